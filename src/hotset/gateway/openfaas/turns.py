"""Whose call is made next: the one of the caller who has had least of the GPUs' time for his weight.

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) in GPU seconds, over all functions, so it is no use to flood
many of them. What callers had, the scheduler knows (``scheduling/fairness.py``), loads and interactive calls included.
Nobody knows yet what a call will take: it is charged what is usual when it is taken, and put right when it ends. Who
comes back from silence is as far as those who did not rest. Calls that need no GPU are counted, one as good as another,
and for themselves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from hotset.store.async_calls import AsyncCall

MOST_IDLE = 1_000
"""Callers without waiting calls whose accounts are kept."""


class Turns:
    """The calls that are ready to be made. ``functions`` is linear in the callers of each, ``take`` in one's; the rest
    takes constant time."""

    def __init__(
        self,
        had_s: Callable[[str], float] = lambda _: 0.0,
        usual_s: Callable[[], float] = lambda: 1.0,
        on_gpu: Callable[[str], bool] = lambda _: True,
    ) -> None:
        """``had_s``: what a caller had since the start; ``usual_s``: what a call takes, as far as is known; both in GPU
        seconds. ``on_gpu``: whether a function needs one."""
        self._had_s = had_s
        self._usual_s = usual_s
        self._on_gpu = on_gpu
        self._lines: dict[str, dict[str, deque[AsyncCall]]] = {}
        """By function, the one that had its turn last at the end; in it by caller, oldest first."""
        self._accounts = {True: _Accounts(), False: _Accounts()}
        """For GPUs, and for all others."""

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __iter__(self) -> Iterator[AsyncCall]:
        return (call for line in self._lines.values() for calls in line.values() for call in calls)

    def functions(self) -> list[str]:
        """Those that calls wait for, the one whose turn it is first."""
        return sorted(self._lines, key=lambda function: self._had(function, self._next_of(function)))

    def add(self, call: AsyncCall) -> None:
        for accounts in self._accounts.values():  # which one it is may change until it is taken
            accounts.wait(call.caller, self._had_s(call.caller))
        self._lines.setdefault(call.function, {}).setdefault(call.caller, deque()).append(call)

    def take(self, function: str) -> AsyncCall:
        """The next call of a function that calls wait for."""
        on_gpu = self._on_gpu(function)
        call = self._next_of(function)
        line = self._lines.pop(function)
        line[call.caller].popleft()
        if not line[call.caller]:
            del line[call.caller]
        if line:
            self._lines[function] = line
        self._accounts[on_gpu].take(call, self._usual_s() if on_gpu else 1.0)
        for accounts in self._accounts.values():
            accounts.waits_less(call.caller)
        return call

    def made(self, call: AsyncCall) -> None:
        """A call that was taken has ended: what it had is known."""
        if self._on_gpu(call.function):
            self._accounts[True].made(call, self._had_s(call.caller))

    def _next_of(self, function: str) -> AsyncCall:
        heads = [calls[0] for calls in self._lines[function].values()]
        return min(heads, key=lambda call: (self._had(function, call), call.number))

    def _had(self, function: str, call: AsyncCall) -> float:
        on_gpu = self._on_gpu(function)
        return self._accounts[on_gpu].had(call, self._had_s(call.caller) if on_gpu else 0.0)


class _Account:
    """What one caller had, in virtual time, and what of it is known."""

    __slots__ = ("ahead", "at", "known", "taken", "waiting")

    def __init__(self, at: float, known: float) -> None:
        self.at = at
        """Over weight."""
        self.known = known
        """What he had when that was last looked at."""
        self.ahead = 0.0
        """Charged, and not seen yet."""
        self.waiting = 0
        """Calls."""
        self.taken = 0
        """Calls that have not ended."""


class _Accounts:
    """Those of all callers who wait, or waited lately."""

    def __init__(self) -> None:
        self._now = 0.0
        self._by_caller: dict[str, _Account] = {}
        """Who waited last at the end."""

    def wait(self, caller: str, known: float) -> None:
        account = self._by_caller.pop(caller, None)
        if account is None:
            account = _Account(self._now, known)
            while len(self._by_caller) > MOST_IDLE and not (oldest := next(iter(self._by_caller.items())))[1].waiting:
                del self._by_caller[oldest[0]]
        if not account.waiting:
            account.at = max(account.at, self._now)
        account.waiting += 1
        self._by_caller[caller] = account

    def waits_less(self, caller: str) -> None:
        self._by_caller[caller].waiting -= 1

    def had(self, call: AsyncCall, known: float) -> float:
        """The caller's virtual time, what was spent on him meanwhile included."""
        account = self._by_caller[call.caller]
        if known > account.known:
            spent = known - account.known
            seen = min(spent, account.ahead)
            account.known = known
            account.ahead -= seen
            account.at += (spent - seen) / call.weight
        return account.at

    def take(self, call: AsyncCall, usual: float) -> None:
        account = self._by_caller[call.caller]
        self._now = max(self._now, account.at)
        account.at += usual / call.weight
        account.ahead += usual
        account.taken += 1

    def made(self, call: AsyncCall, known: float) -> None:
        """What was charged ahead for one call, and was not spent, is given back."""
        account = self._by_caller.get(call.caller)
        if account is not None and account.taken:
            self.had(call, known)
            unspent = account.ahead / account.taken
            account.at -= unspent / call.weight
            account.ahead -= unspent
            account.taken -= 1
