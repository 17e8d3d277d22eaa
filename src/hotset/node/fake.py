"""A node without processes: load times, run times and failures on demand.

It ships with hotset so that a gateway, a policy or a user's own tooling can be tested without GPUs. Time is either a
``FakeClock``, moved by hand, or (``clock=None``) the running event loop's::

    clock = FakeClock()
    node = FakeNode(virtual_gpus(2, memory_bytes=1 << 30), clock=clock)
    node.functions["cat@1"] = FakeFunction(load_s=0.5, inference_s=0.02)
    await node.start(listener)
    node.load("local/virtual:0", spec)
    clock.advance(0.5)  # listener.loaded(...)

Like the real node it never calls the listener from inside ``load``, ``run``, ``unload`` or ``cancel``, and copies go on
beside runs (order.py).
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar, Protocol

import msgspec

from hotset.node.devices.virtual import virtual_gpus
from hotset.node.history import History, ModelHistory, Transition
from hotset.node.interface import Answer, Call, LaunchSpec, NodeListener, ProcessReport
from hotset.node.order import Operation as Ordered
from hotset.node.order import Turns
from hotset.vocabulary import FailureKind, Gpu

__all__ = ["Clock", "Failure", "FakeClock", "FakeFunction", "FakeNode", "Operation", "echo", "virtual_gpus"]


class Clock(Protocol):
    """What the fake node needs of an event loop; ``asyncio`` loops fit."""

    def call_later(self, delay: float, callback: Callable[[], object], /) -> object: ...


class FakeClock:
    """Time that moves when told to; callbacks due at the same instant run in the order they were asked for."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._counter = itertools.count()

    def call_later(self, delay: float, callback: Callable[[], object], /) -> None:
        heapq.heappush(self._due, (self.now_s + delay, next(self._counter), callback))

    def advance(self, seconds: float = 0.0) -> None:
        """Move on, and run what is due until then, including what that causes."""
        end_s = self.now_s + seconds
        while self._due and self._due[0][0] <= end_s:
            self.now_s, _, callback = heapq.heappop(self._due)
            callback()
        self.now_s = end_s

    def drain(self, most: int = 100_000) -> None:
        """Run everything that is due at any time; stops after ``most`` callbacks."""
        for _ in range(most):
            if not self._due:
                return
            self.advance(self._due[0][0] - self.now_s)


def echo(call: Call) -> list[Answer]:
    """The default function: the body, back as it came."""
    return [Answer(request_id=call.request_id, content_type=call.content_type, body=bytes(call.body))]


class FakeFunction(msgspec.Struct, kw_only=True):
    """How one model behaves."""

    load_s: float = 0.1
    inference_s: float = 0.01
    """One run; without batching, one call."""
    unload_s: float = 0.0
    offload_s: float = 0.02
    restore_s: float = 0.01
    parked_bytes: int = 0
    """GPU memory that its process holds while the model is parked."""
    memory_bytes: int | None = None
    """What a load reports as measured; None: nothing."""
    respond: Callable[[Call], Sequence[Answer]] = echo
    """Several answers: a stream, spread evenly over ``inference_s``; only the last one is ``final``."""


class Failure(msgspec.Struct, frozen=True):
    kind: FailureKind
    reason: str = "asked to fail"
    answered: int = 0
    """How many calls of a run get their answer before it fails."""
    memory_bytes: int | None = None
    """What a load that ran out of memory would have taken."""


class Operation(msgspec.Struct, frozen=True):
    """One thing the node was asked to do, for a test to look at."""

    verb: str
    gpu_id: str = ""
    model: str = ""
    request_ids: tuple[int, ...] = ()


class _Copy(Ordered):
    begin: Callable[[], None]


class _Leave(_Copy):
    leaves: ClassVar[bool] = True


class _Run(Ordered):
    runs: ClassVar[bool] = True
    begin: Callable[[], None]


class _FakeGpu:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.resident: dict[str, LaunchSpec] = {}
        """Models that have a process, parked ones too."""
        self.parked: set[str] = set()
        self.turns: Turns[_Copy | _Run] = Turns()
        self.epoch = 0
        """Counts the losses of this GPU: what was scheduled before one is void after it."""


class FakeNode:
    """``Node`` without processes. ``operations`` keeps what was asked for, in order; ``functions`` says how each model
    behaves (``default`` for the rest); ``well`` is what ``healthy()`` answers."""

    def __init__(self, gpus: Sequence[Gpu], *, clock: Clock | None = None) -> None:
        self.functions: dict[str, FakeFunction] = {}
        self.default = FakeFunction()
        self.operations: list[Operation] = []
        self.well = True
        self._clock = clock
        self.expected: list[str] = []
        """Models whose calls waited while no GPU had them, as often as it was said."""
        self._gpus = {gpu.gpu_id: _FakeGpu(gpu) for gpu in gpus}
        self._listener: NodeListener | None = None
        self._load_failures: dict[str, deque[Failure]] = {}
        self._run_failures: dict[str, deque[Failure]] = {}
        self._offload_failures: dict[str, deque[Failure]] = {}
        self._restore_failures: dict[str, deque[Failure]] = {}
        self._history = History()
        self._cancelled: set[int] = set()
        self._unfinished: set[int] = set()

    # What a test does to it

    def fail_load(
        self, model: str, kind: FailureKind, reason: str = "asked to fail", memory_bytes: int | None = None
    ) -> None:
        """The next load of this model fails, when it would have been done."""
        failure = Failure(kind, reason, memory_bytes=memory_bytes)
        self._load_failures.setdefault(model, deque()).append(failure)

    def fail_run(self, model: str, kind: FailureKind, reason: str = "asked to fail", answered: int = 0) -> None:
        """The next run of this model fails, when it would have been done, after ``answered`` of its calls."""
        self._run_failures.setdefault(model, deque()).append(Failure(kind, reason, answered))

    def fail_offload(self, model: str, reason: str = "asked to fail") -> None:
        """The next offload of this model ends with its process gone."""
        self._offload_failures.setdefault(model, deque()).append(Failure(FailureKind.ERROR, reason))

    def fail_restore(self, model: str, kind: FailureKind, reason: str = "asked to fail") -> None:
        """The next restore of this model ends with its process gone."""
        self._restore_failures.setdefault(model, deque()).append(Failure(kind, reason))

    def lose_process(self, gpu_id: str, model: str, reason: str = "killed by SIGKILL") -> None:
        """The idle process of a resident or parked model dies."""
        self._gone(gpu_id, model)
        self._later(gpu_id, 0.0, lambda: self._report.process_lost(gpu_id, model, reason))

    def lose_gpu(self, gpu_id: str, reason: str = "fell off the bus") -> None:
        """The GPU is gone with everything on it: nothing that was asked of it is answered any more."""
        gpu = self._gpus.pop(gpu_id)
        gpu.epoch += 1
        self._clock_now.call_later(0.0, lambda: self._report.gpu_lost(gpu_id, reason))

    def measure(self, gpu_id: str, model: str, memory_bytes: int) -> None:
        """Runs have made a resident model larger, or smaller."""
        self._later(gpu_id, 0.0, lambda: self._report.measured(gpu_id, model, memory_bytes))

    def log(self, model: str, line: str) -> None:
        """The function prints a line."""
        self._report.logged(model, line)

    # Node

    @property
    def gpus(self) -> Sequence[Gpu]:
        return [state.gpu for state in self._gpus.values()]

    async def start(self, listener: NodeListener) -> None:
        if self._clock is None:
            self._clock = asyncio.get_running_loop()
        self._listener = listener

    async def stop(self) -> None:
        self.operations.append(Operation("stop"))
        for gpu in self._gpus.values():
            gpu.epoch += 1
            gpu.resident.clear()
            gpu.parked.clear()
            gpu.turns = Turns()

    def prepare(self, spec: LaunchSpec) -> None:
        """A fake process starts as fast as it is told to."""

    def expect(self, spec: LaunchSpec) -> None:
        """Fake models have no files."""
        self.expected.append(spec.model)

    def load(self, gpu_id: str, spec: LaunchSpec) -> None:
        begin = partial(self._load, gpu_id, spec)
        self._submit(Operation("load", gpu_id, spec.model), _Copy(model=spec.model, begin=begin))

    def unload(self, gpu_id: str, model: str) -> None:
        begin = partial(self._unload, gpu_id, model)
        self._submit(Operation("unload", gpu_id, model), _Leave(model=model, begin=begin))

    def offload(self, gpu_id: str, model: str) -> None:
        begin = partial(self._offload, gpu_id, model)
        self._submit(Operation("offload", gpu_id, model), _Leave(model=model, begin=begin))

    def restore(self, gpu_id: str, model: str) -> None:
        begin = partial(self._restore, gpu_id, model)
        self._submit(Operation("restore", gpu_id, model), _Copy(model=model, begin=begin))

    def run(self, gpu_id: str, model: str, calls: Sequence[Call]) -> None:
        request_ids = tuple(call.request_id for call in calls)
        self._unfinished.update(request_ids)
        begin = partial(self._run, gpu_id, model, list(calls))
        self._submit(Operation("run", gpu_id, model, request_ids), _Run(model=model, begin=begin))

    def cancel(self, request_id: int) -> None:
        self.operations.append(Operation("cancel", request_ids=(request_id,)))
        if request_id in self._unfinished:
            self._cancelled.add(request_id)

    def healthy(self) -> bool:
        return self.well

    def processes(self) -> list[ProcessReport]:
        return [
            ProcessReport(
                gpu_id=gpu_id,
                model=model,
                pid=0,
                device_bytes=self._function(model).parked_bytes if model in gpu.parked else self._memory_bytes(spec),
                private_bytes=0,
                shared_bytes=0,
            )
            for gpu_id, gpu in self._gpus.items()
            for model, spec in gpu.resident.items()
        ]

    def utilisation(self) -> Mapping[str, float]:
        return {gpu_id: float(gpu.turns.running is not None) for gpu_id, gpu in self._gpus.items()}

    def pids(self) -> Mapping[int, str]:
        return {}

    def history(self) -> Mapping[str, ModelHistory]:
        return self._history.report()

    # Inside

    @property
    def _report(self) -> NodeListener:
        assert self._listener is not None, "start() comes first"
        return self._listener

    @property
    def _clock_now(self) -> Clock:
        assert self._clock is not None, "start() comes first"
        return self._clock

    def _function(self, model: str) -> FakeFunction:
        return self.functions.get(model, self.default)

    def _later(self, gpu_id: str, delay_s: float, callback: Callable[[], object]) -> None:
        """Call back unless the GPU was lost, or the node stopped, in the meantime."""
        gpu = self._gpus[gpu_id]
        epoch = gpu.epoch

        def fire() -> None:
            if gpu.epoch == epoch:
                callback()

        self._clock_now.call_later(delay_s, fire)

    def _memory_bytes(self, spec: LaunchSpec) -> int:
        return self._function(spec.model).memory_bytes or spec.memory_bytes

    def _gone(self, gpu_id: str, model: str) -> None:
        """Its process ended."""
        self._gpus[gpu_id].resident.pop(model, None)
        self._gpus[gpu_id].parked.discard(model)

    def _submit(self, operation: Operation, ordered: _Copy | _Run) -> None:
        self.operations.append(operation)
        gpu = self._gpus.get(operation.gpu_id)
        if gpu is not None:
            gpu.turns.add(ordered)
            self._advance(gpu)

    def _advance(self, gpu: _FakeGpu) -> None:
        while (ordered := gpu.turns.start()) is not None:
            ordered.begin()

    def _over(self, gpu_id: str, ordered: _Copy | _Run | None, report: Callable[[], None] | None = None) -> None:
        """The operation is over; whoever is told may ask for the next, or lose the GPU."""
        gpu = self._gpus[gpu_id]
        assert ordered is not None
        gpu.turns.done(ordered)
        if report is not None:
            report()
        if gpu_id in self._gpus:
            self._advance(gpu)

    def _copy_over(self, gpu_id: str, delay_s: float, report: Callable[[], None] | None = None) -> None:
        self._later(gpu_id, delay_s, lambda: self._over(gpu_id, self._gpus[gpu_id].turns.copying, report))

    def _load(self, gpu_id: str, spec: LaunchSpec) -> None:
        function = self._function(spec.model)
        failure = _pop(self._load_failures, spec.model)

        def report() -> None:
            if failure is None:
                self._gpus[gpu_id].resident[spec.model] = spec
                self._history.took(spec.model, Transition.LOAD, function.load_s)
                self._report.loaded(gpu_id, spec.model, function.load_s, function.memory_bytes)
            else:
                self._report.load_failed(gpu_id, spec.model, failure.kind, failure.reason, failure.memory_bytes)

        self._copy_over(gpu_id, function.load_s, report)

    def _unload(self, gpu_id: str, model: str) -> None:
        self._gone(gpu_id, model)
        self._copy_over(gpu_id, self._function(model).unload_s)

    def _offload(self, gpu_id: str, model: str) -> None:
        function, gpu = self._function(model), self._gpus[gpu_id]
        failure = _pop(self._offload_failures, model)

        def report() -> None:
            spec = gpu.resident.get(model)
            if spec is None:
                return  # it was reported as lost
            if failure is None:
                gpu.parked.add(model)
                self._history.took(model, Transition.OFFLOAD, function.offload_s)
                host_bytes = self._memory_bytes(spec)
                self._report.offloaded(gpu_id, model, function.offload_s, function.parked_bytes, host_bytes)
            else:
                self._gone(gpu_id, model)
                self._report.process_lost(gpu_id, model, failure.reason)

        self._copy_over(gpu_id, function.offload_s, report)

    def _restore(self, gpu_id: str, model: str) -> None:
        function, gpu = self._function(model), self._gpus[gpu_id]
        failure = _pop(self._restore_failures, model)

        def report() -> None:
            if model not in gpu.parked:
                reason = f"{model} is not parked on {gpu_id}"
                self._report.load_failed(gpu_id, model, FailureKind.CRASH, reason)
            elif failure is None:
                gpu.parked.discard(model)
                self._history.took(model, Transition.RESTORE, function.restore_s)
                self._report.restored(gpu_id, model, function.restore_s, function.memory_bytes)
            else:
                self._gone(gpu_id, model)
                self._report.load_failed(gpu_id, model, failure.kind, failure.reason, failure.memory_bytes)

        self._copy_over(gpu_id, function.restore_s, report)

    def _run(self, gpu_id: str, model: str, calls: list[Call]) -> None:
        gpu = self._gpus[gpu_id]
        spec = None if model in gpu.parked else gpu.resident.get(model)
        function = self._function(model)
        failure = _pop(self._run_failures, model)
        if spec is None:
            failure = Failure(FailureKind.CRASH, f"{model} has no process on {gpu_id}")
        together = spec is not None and spec.max_batch > 1
        total_s = function.inference_s * (1 if together else len(calls)) if spec is not None else 0.0
        answering = calls if failure is None else calls[: failure.answered]
        for position, call in enumerate(answering):
            start_s = 0.0 if together else function.inference_s * position
            answers = function.respond(call)
            for index, answer in enumerate(answers, 1):
                last = index == len(answers)
                due_s = min(total_s, start_s + function.inference_s * index / len(answers))
                self._later(gpu_id, due_s, partial(self._answer, answer, function.inference_s, last))

        def report() -> None:
            self._unfinished.difference_update(call.request_id for call in calls)
            self._cancelled &= self._unfinished
            if failure is None:
                self._report.run_finished(gpu_id, model, total_s)
            else:
                self._gone(gpu_id, model)
                answered = tuple(call.request_id for call in answering)
                self._report.run_failed(gpu_id, model, failure.kind, failure.reason, answered)

        self._later(gpu_id, total_s, lambda: self._over(gpu_id, gpu.turns.running, report))

    def _answer(self, answer: Answer, inference_s: float, last: bool) -> None:
        if answer.request_id not in self._unfinished:
            return
        if last or answer.request_id in self._cancelled:
            self._unfinished.discard(answer.request_id)
            body = b"" if not last else answer.body
            self._report.answered(msgspec.structs.replace(answer, body=body, inference_s=inference_s, final=True))
        else:
            self._report.answered(msgspec.structs.replace(answer, final=False))


def _pop(failures: dict[str, deque[Failure]], model: str) -> Failure | None:
    waiting = failures.get(model)
    return waiting.popleft() if waiting else None
