"""In which order the operations of one GPU begin: copies and runs have a queue each.

    copies   load A   unload B   load C      one at a time: C's load begins when B's memory is free
    runs     run A    run A      run D       one at a time, while copies go on

Operations on one model keep the order they were asked for, whichever queue they are in: a run waits for its model's
load, an unload for its model's runs. Everything waits for earlier operations only, so nothing waits for ever.

GPUs of one node share its host memory. What is to be parked there waits for the parked models that were told to go
before it, on whichever GPU (``HostMemoryOrder``): so there is never more in it than the scheduler planned.

Whether copies do run beside runs is the scheduler's choice: one that asks for a load only while the GPU is idle never
sees two operations at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import count
from typing import ClassVar, Generic, TypeVar

import msgspec


class Operation(msgspec.Struct, eq=False, kw_only=True):
    """Something a GPU is to do with one model."""

    runs: ClassVar[bool] = False
    """It computes; else it copies."""
    leaves: ClassVar[bool] = False
    """Afterwards the model cannot run."""
    parks: ClassVar[bool] = False
    """It takes host memory."""
    model: str
    number: int = 0
    """Set by ``Turns.add``."""


class HostMemoryOrder:
    """What the queues of one node's GPUs share: numbers, and who is about to give host memory back."""

    def __init__(self) -> None:
        self.next_number = count(1).__next__
        self._leaving: set[int] = set()
        self._lanes: list[Callable[[], None]] = []

    def call(self, advance: Callable[[], None]) -> None:
        """Have ``advance`` called whenever host memory was given back, in the middle of whatever gave it back."""
        self._lanes.append(advance)

    def leaves(self, operation: Operation) -> None:
        """A parked model is to go."""
        self._leaving.add(operation.number)

    def left(self, *operations: Operation) -> None:
        """It is gone, or the operation will not be done any more. Others are of no account here."""
        gone = self._leaving.intersection(operation.number for operation in operations)
        if gone:
            self._leaving -= gone
            for advance in self._lanes:
                advance()

    def is_awaited(self, operation: Operation) -> bool:
        return operation.parks and any(number < operation.number for number in self._leaving)


Op = TypeVar("Op", bound=Operation)


class Turns(Generic[Op]):
    """Whose turn it is. ``add`` operations, ``start`` whatever may begin, tell when it is ``done``."""

    def __init__(self, host: HostMemoryOrder | None = None) -> None:
        self.copying: Op | None = None
        self._host = host or HostMemoryOrder()
        self.running: Op | None = None
        self.copies: deque[Op] = deque()
        """Those that have not begun; for others to read."""
        self._runs: deque[Op] = deque()

    def add(self, operation: Op) -> None:
        operation.number = self._host.next_number()
        (self._runs if operation.runs else self.copies).append(operation)

    def start(self) -> Op | None:
        """The next operation that may begin, which has begun from here on; None: there is none now."""
        if self._runs and self.running is None and not self._copied_before(self._runs[0]):
            self.running = self._runs.popleft()
            return self.running
        if self.copies and self.copying is None and not self._held_up(self.copies[0]):
            self.copying = self.copies.popleft()
            return self.copying
        return None

    def done(self, operation: Op) -> None:
        """It is over, well or not; what is asked for from here on may take its place."""
        if operation.runs:
            self.running = None
        else:
            self.copying = None
            self._host.left(operation)

    def clear(self) -> None:
        """Forget what has not begun."""
        self._host.left(*self.copies, *([] if self.copying is None else [self.copying]))
        self.copies.clear()
        self._runs.clear()

    def _copied_before(self, run: Op) -> bool:
        """A copy of the run's model, asked for earlier, is not done."""
        if self.copying is not None and self.copying.model == run.model:
            return True
        return any(copy.model == run.model and copy.number < run.number for copy in self.copies)

    def _held_up(self, copy: Op) -> bool:
        return self._run_before(copy) or self._host.is_awaited(copy)

    def _run_before(self, copy: Op) -> bool:
        """The copy takes a model away of which a run, asked for earlier, is not done."""
        if not copy.leaves:
            return False
        if self.running is not None and self.running.model == copy.model:
            return True
        return any(run.model == copy.model and run.number < copy.number for run in self._runs)
