"""In which order the operations of one GPU begin: copies and runs have a queue each.

    copies   load A   unload B   load C      one at a time: C's load begins when B's memory is free
    runs     run A    run A      run D       one at a time, while copies go on

Operations on one model keep the order they were asked for, whichever queue they are in: a run waits for its model's
load, an unload for its model's runs. Everything waits for earlier operations only, so nothing waits for ever.

Whether copies do run beside runs is the scheduler's choice: one that asks for a load only while the GPU is idle never
sees two operations at once.
"""

from __future__ import annotations

from collections import deque
from typing import ClassVar, Generic, TypeVar

import msgspec


class Operation(msgspec.Struct, eq=False, kw_only=True):
    """Something a GPU is to do with one model."""

    runs: ClassVar[bool] = False
    """It computes; else it copies."""
    leaves: ClassVar[bool] = False
    """Afterwards the model cannot run."""
    model: str
    number: int = 0
    """Set by ``Turns.add``."""


Op = TypeVar("Op", bound=Operation)


class Turns(Generic[Op]):
    """Whose turn it is. ``add`` operations, ``start`` whatever may begin, tell when it is ``done``."""

    def __init__(self) -> None:
        self.copying: Op | None = None
        self.running: Op | None = None
        self._copies: deque[Op] = deque()
        self._runs: deque[Op] = deque()
        self._number = 0

    def add(self, operation: Op) -> None:
        self._number += 1
        operation.number = self._number
        (self._runs if operation.runs else self._copies).append(operation)

    def start(self) -> Op | None:
        """The next operation that may begin, which has begun from here on; None: there is none now."""
        if self._runs and self.running is None and not self._copied_before(self._runs[0]):
            self.running = self._runs.popleft()
            return self.running
        if self._copies and self.copying is None and not self._run_before(self._copies[0]):
            self.copying = self._copies.popleft()
            return self.copying
        return None

    @property
    def next_copy(self) -> Op | None:
        """The first copy that has not begun."""
        return self._copies[0] if self._copies else None

    def done(self, operation: Op) -> None:
        """It is over, well or not; what is asked for from here on may take its place."""
        if operation.runs:
            self.running = None
        else:
            self.copying = None

    def clear(self) -> None:
        """Forget what has not begun."""
        self._copies.clear()
        self._runs.clear()

    def _copied_before(self, run: Op) -> bool:
        """A copy of the run's model, asked for earlier, is not done."""
        if self.copying is not None and self.copying.model == run.model:
            return True
        return any(copy.model == run.model and copy.number < run.number for copy in self._copies)

    def _run_before(self, copy: Op) -> bool:
        """The copy takes a model away of which a run, asked for earlier, is not done."""
        if not copy.leaves:
            return False
        if self.running is not None and self.running.model == copy.model:
            return True
        return any(run.model == copy.model and run.number < copy.number for run in self._runs)
