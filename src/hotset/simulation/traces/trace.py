"""What every trace can do, and the part that all formats with one row per request share."""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import msgspec

from hotset.simulation.working_set import FunctionUse, Scaling
from hotset.simulation.workloads import Arrival


class Window(msgspec.Struct, frozen=True):
    """A part of a trace, in seconds after its start: from ``start_s`` up to, not including, ``end_s``."""

    start_s: float = 0.0
    end_s: float = math.inf


class Selection(msgspec.Struct, frozen=True):
    """What to let through of a trace: the chosen functions and the scaling of their requests."""

    index: Mapping[str, int]
    """Function name to its place in ``scaling``; functions that are not in it are left out."""
    scaling: Scaling


class Trace(ABC):
    """A recording of requests, read again from its file for each use: nothing of it is kept but sums per function."""

    format: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    """The columns that the format cannot do without; they also tell a file's format."""
    names_functions: ClassVar[bool] = True
    """False: arrivals only, every function name is empty and has to be drawn from a popularity."""
    per_minute: ClassVar[bool] = False
    """True: the format counts requests per minute, so their order and times inside a minute are made up."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    @abstractmethod
    def duration_s(self) -> float:
        """Time from the trace's start to its end; nothing arrives later than that."""

    @abstractmethod
    def functions(self, window: Window) -> list[FunctionUse]:
        """Every function of the whole trace, in the order of its first mention, with its use in the window."""

    @abstractmethod
    def arrivals(self, window: Window, selection: Selection, seed: int) -> Iterator[Arrival]:
        """The selected requests in time order; ``time_s`` counts from the window's start."""


class _Summary(msgspec.Struct):
    """One pass over an invocation trace. Times are in the file's own clock."""

    totals: dict[str, int]
    first_s: float
    last_s: float
    lateness_s: float
    """Most that an arrival lies before one of an earlier row: 0 when the file is in order of arrival."""


class InvocationTrace(Trace):
    """A trace with one row per request.

    Rows may be out of order, as in a file written when requests end. A first pass measures by how much at most; the
    reading pass then holds back only the arrivals of that much time, and gives them out sorted.
    """

    starts_at_first_arrival: ClassVar[bool] = True
    """Time 0 is the first arrival; False: the file's own zero."""

    @abstractmethod
    def rows(self) -> Iterator[Arrival]:
        """The requests in the file's order, on any clock. Raises ``TraceError`` for a row that breaks the format."""

    @property
    def duration_s(self) -> float:
        return self._summary.last_s - self._origin_s

    def functions(self, window: Window) -> list[FunctionUse]:
        """Every function of the trace with its use in the window."""
        totals = self._summary.totals
        in_window: Mapping[str, int] = totals
        if window.start_s > 0 or window.end_s <= self.duration_s:
            in_window = Counter(arrival.function for arrival in self._in_order(window))
        return [
            FunctionUse(name=name, requests=in_window.get(name, 0), total_requests=total)
            for name, total in totals.items()
        ]

    def arrivals(self, window: Window, selection: Selection, seed: int) -> Iterator[Arrival]:
        """The selected requests in time order, where they were recorded; nothing here is left to the seed.

        Repeated ones (a scaling above 1) are spread over the time to the next selected request of any function.
        """
        take, index = selection.scaling.take, selection.index
        held: Arrival | None = None
        copies = 0
        for arrival in self._in_order(window):
            place = index.get(arrival.function)
            if place is None or not (through := take(place, 1)):
                continue
            time_s = arrival.time_s - self._origin_s - window.start_s
            if held is not None:
                yield from _spread(held, copies, time_s)
            held, copies = Arrival(time_s, arrival.function, arrival.inference_s, arrival.caller), through
        if held is not None:
            yield from _spread(held, copies, min(window.end_s, self.duration_s) - window.start_s)

    @cached_property
    def _summary(self) -> _Summary:
        totals: dict[str, int] = {}
        first_s, last_s, lateness_s = math.inf, -math.inf, 0.0
        for arrival in self.rows():
            time_s = arrival.time_s
            totals[arrival.function] = totals.get(arrival.function, 0) + 1
            if time_s >= last_s:
                last_s = time_s
            else:
                lateness_s = max(lateness_s, last_s - time_s)
            first_s = min(first_s, time_s)
        if not totals:  # every row was left out by a choice of the reader's
            first_s = last_s = 0.0
        return _Summary(totals, first_s, last_s, lateness_s)

    @property
    def _origin_s(self) -> float:
        return self._summary.first_s if self.starts_at_first_arrival else 0.0

    def _in_order(self, window: Window) -> Iterator[Arrival]:
        """The window's rows, in order of arrival, still on the file's clock."""
        start_s, end_s = self._origin_s + window.start_s, self._origin_s + window.end_s
        for arrival in self._sorted_rows():
            if arrival.time_s >= end_s:
                return
            if arrival.time_s >= start_s:
                yield arrival

    def _sorted_rows(self) -> Iterator[Arrival]:
        lateness_s = self._summary.lateness_s
        if lateness_s == 0:
            yield from self.rows()
            return
        held: list[tuple[float, int, Arrival]] = []
        latest_s = -math.inf
        for number, arrival in enumerate(self.rows()):
            heapq.heappush(held, (arrival.time_s, number, arrival))
            latest_s = max(latest_s, arrival.time_s)
            while held[0][0] <= latest_s - lateness_s:
                yield heapq.heappop(held)[2]
        while held:
            yield heapq.heappop(held)[2]


def _spread(arrival: Arrival, copies: int, next_s: float) -> Iterator[Arrival]:
    yield arrival
    gap_s = max(0.0, next_s - arrival.time_s) / copies
    for copy in range(1, copies):
        yield msgspec.structs.replace(arrival, time_s=arrival.time_s + copy * gap_s)
