"""Azure Functions Trace 2019: requests per function and minute (Shahrad et al., "Serverless in the Wild", USENIX ATC
2020; Azure/AzurePublicDataset, ``invocations_per_function_md.anon.dNN.csv``).

One row is a function: ``HashOwner, HashApp, HashFunction, Trigger`` and a column for each minute of the day, named by
its number (the day's first is 1). A cut of the columns is fine, as long as they follow one another.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import msgspec

from hotset.errors import TraceError
from hotset.simulation.traces.reading import Table, shorten
from hotset.simulation.traces.trace import Selection, Trace, Window
from hotset.simulation.working_set import FunctionUse
from hotset.simulation.workloads import Arrival, random_stream

MAX_COUNT = 10_000_000
"""More requests than this to one function in one minute are taken for a damaged file."""


class Spread(Enum):
    """Where in its minute a request is put, as the trace does not say."""

    EVEN = "even"
    """All of a minute's requests, of all functions, shuffled and the same distance apart."""
    UNIFORM = "uniform"
    """Each anywhere, independently: within a minute, a Poisson process with as many arrivals as were counted."""


class _Row(msgspec.Struct, frozen=True):
    function: str
    owner: str
    trigger: str
    counts: list[int]


class Azure2019(Trace):
    """Per-minute counts.

    The file goes by functions and a replay goes by minutes, so a replay keeps the selected functions' minutes that are
    not zero: 8 bytes each, at most 1,440 a function and day.
    """

    format: ClassVar[str] = "azure2019"
    columns: ClassVar[tuple[str, ...]] = ("HashOwner", "HashApp", "HashFunction", "Trigger")
    per_minute: ClassVar[bool] = True

    def __init__(self, path: Path, spread: Spread = Spread.EVEN) -> None:
        super().__init__(path)
        self.spread = spread

    @property
    def duration_s(self) -> float:
        return 60.0 * len(self._minutes(self._table()))

    def functions(self, window: Window) -> list[FunctionUse]:
        """Every function of the trace with its use in the window, which is taken in whole minutes."""
        minutes = self._slice(window)
        uses: dict[str, FunctionUse] = {}
        for row in self._rows():
            known = uses.get(row.function)
            uses[row.function] = FunctionUse(
                name=row.function,
                requests=sum(row.counts[minutes]) + (known.requests if known else 0),
                total_requests=sum(row.counts) + (known.total_requests if known else 0),
                trigger=row.trigger,
            )
        return list(uses.values())

    def arrivals(self, window: Window, selection: Selection, seed: int) -> Iterator[Arrival]:
        """The selected requests, minute by minute; the seed decides their order inside a minute."""
        order, times = random_stream(seed, "order"), random_stream(seed, "times")
        minutes, owners = self._load(window, selection)
        names = list(selection.index)
        take = selection.scaling.take
        for minute, cells in enumerate(minutes):
            calls: list[int] = []
            for cell in range(0, len(cells), 2):
                place = cells[cell]
                calls += [place] * take(place, cells[cell + 1])
            order.shuffle(calls)
            for time_s, place in zip(self._times(len(calls), times), calls, strict=True):
                yield Arrival(minute * 60 + time_s, names[place], None, owners[place])

    def _times(self, count: int, rng: random.Random) -> list[float]:
        if self.spread is Spread.EVEN:
            return [index * 60 / count for index in range(count)]
        return sorted(rng.random() * 60 for _ in range(count))

    def _load(self, window: Window, selection: Selection) -> tuple[list[array[int]], list[str]]:
        """For each minute of the window a flat array: place, count, place, count, ...; and each place's owner."""
        cut = self._slice(window)
        minutes = [array("I") for _ in range(len(self._minutes(self._table())))[cut]]
        owners = [""] * len(selection.index)
        for row in self._rows():
            place = selection.index.get(row.function)
            if place is not None:
                owners[place] = row.owner
                for cells, count in zip(minutes, row.counts[cut], strict=True):
                    if count:
                        cells.extend((place, count))
        return minutes, owners

    def _slice(self, window: Window) -> slice:
        first = int(window.start_s // 60)
        return slice(first, None if window.end_s >= self.duration_s else max(first + 1, round(window.end_s / 60)))

    def _rows(self) -> Iterator[_Row]:
        table = self._table()
        minutes = self._minutes(table)
        for values in table.rows((*self.columns, *minutes)):
            try:
                counts = list(map(int, values[len(self.columns) :]))
            except ValueError:
                counts = [-1]
            if not values[2] or min(counts) < 0 or max(counts) > MAX_COUNT:
                raise self._bad_row(table, values, minutes)
            yield _Row(values[2], values[0], values[3], counts)

    def _bad_row(self, table: Table, values: Sequence[str], minutes: Sequence[str]) -> TraceError:
        for minute, text in zip(minutes, values[len(self.columns) :], strict=True):
            if not text.isdecimal() or int(text) > MAX_COUNT:
                return table.error(
                    f"expected a whole number from 0 to {MAX_COUNT} in minute column {minute}, found {shorten(text)}"
                )
        return table.error("expected a function's name in column HashFunction")

    def _table(self) -> Table:
        return Table(self.path, self.columns)

    def _minutes(self, table: Table) -> list[str]:
        minutes = [column for column in table.columns if column.isdecimal()]
        if not minutes:
            raise table.error("expected a column for each minute (1, 2, ...) in the header")
        for before, after in pairwise(minutes):
            if int(after) != int(before) + 1:
                raise table.error(f"expected the minute column {int(before) + 1} after {before}, found {after}")
        return minutes
