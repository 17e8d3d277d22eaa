"""Whose call is made next: functions take turns, and within a function its callers do, by their weights.

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) in calls, as nobody knows yet what one will take: a caller's
turns come 1/weight apart, so his backlog delays another caller of the function by about one call. What calls took is
settled by the scheduler's fair shares once they are handed in.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

from hotset.store.async_calls import AsyncCall


class Turns:
    """The calls that are ready to be made. Each step takes logarithmic time in the callers of one function."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        """By function, the one whose turn it is first."""

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __iter__(self) -> Iterator[AsyncCall]:
        return (call for line in self._lines.values() for calls in line.waiting.values() for call in calls)

    def functions(self) -> list[str]:
        """Those that calls wait for, the one whose turn it is first."""
        return list(self._lines)

    def add(self, call: AsyncCall) -> None:
        line = self._lines.get(call.function)
        if line is None:
            line = self._lines[call.function] = _Line()
        line.add(call)

    def take(self, function: str) -> AsyncCall:
        """The next call of a function that calls wait for; afterwards it is the other functions' turn."""
        line = self._lines.pop(function)
        call = line.take()
        if line.waiting:
            self._lines[function] = line
        return call


class _Line:
    """The calls for one function."""

    def __init__(self) -> None:
        self.waiting: dict[str, deque[AsyncCall]] = {}
        """By caller, oldest first."""
        self._turns: list[tuple[float, int, str]] = []
        """A heap, one for each caller who waits: when in virtual time, number of the call, caller."""
        self._now = 0.0

    def add(self, call: AsyncCall) -> None:
        calls = self.waiting.setdefault(call.caller, deque())
        if not calls:  # not at once: who comes back after each call would pass all who wait
            heapq.heappush(self._turns, (self._now + 1 / call.weight, call.number, call.caller))
        calls.append(call)

    def take(self) -> AsyncCall:
        self._now, _, caller = heapq.heappop(self._turns)
        calls = self.waiting[caller]
        call = calls.popleft()
        if calls:
            heapq.heappush(self._turns, (self._now + 1 / calls[0].weight, calls[0].number, caller))
        else:
            del self.waiting[caller]
        return call
