"""A node without processes: load times, run times and failures on demand.

It ships with hotset so that a gateway, a policy or a user's own tooling can be tested without GPUs. Time is either a
``FakeClock``, moved by hand, or (``clock=None``) the running event loop's::

    clock = FakeClock()
    node = FakeNode(virtual_gpus(2, memory_bytes=1 << 30), clock=clock)
    node.functions["cat@1"] = FakeFunction(load_s=0.5, inference_s=0.02)
    await node.start(listener)
    node.load("local/virtual:0", spec)
    clock.advance(0.5)  # listener.loaded(...)

Like the real node it never calls the listener from inside ``load``, ``run``, ``unload`` or ``cancel``.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import msgspec

from hotset.node.devices.virtual import virtual_gpus
from hotset.node.interface import Answer, Call, LaunchSpec, NodeListener, ProcessReport
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


class _FakeGpu:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.resident: dict[str, LaunchSpec] = {}
        self.queue: deque[Callable[[], None]] = deque()
        self.busy = False
        self.computing = False
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
        self._gpus = {gpu.gpu_id: _FakeGpu(gpu) for gpu in gpus}
        self._listener: NodeListener | None = None
        self._load_failures: dict[str, deque[Failure]] = {}
        self._run_failures: dict[str, deque[Failure]] = {}
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

    def lose_process(self, gpu_id: str, model: str, reason: str = "killed by SIGKILL") -> None:
        """The idle process of a resident model dies."""
        del self._gpus[gpu_id].resident[model]
        self._later(gpu_id, 0.0, lambda: self._report.process_lost(gpu_id, model, reason))

    def lose_gpu(self, gpu_id: str, reason: str = "fell off the bus") -> None:
        """The GPU is gone with everything on it: nothing that was asked of it is answered any more."""
        gpu = self._gpus.pop(gpu_id)
        gpu.epoch += 1
        self._clock_now.call_later(0.0, lambda: self._report.gpu_lost(gpu_id, reason))

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
            gpu.queue.clear()
            gpu.busy = gpu.computing = False

    def prepare(self, spec: LaunchSpec) -> None:
        """A fake process starts as fast as it is told to."""

    def load(self, gpu_id: str, spec: LaunchSpec) -> None:
        self._submit(Operation("load", gpu_id, spec.model), partial(self._load, gpu_id, spec))

    def unload(self, gpu_id: str, model: str) -> None:
        self._submit(Operation("unload", gpu_id, model), partial(self._unload, gpu_id, model))

    def run(self, gpu_id: str, model: str, calls: Sequence[Call]) -> None:
        request_ids = tuple(call.request_id for call in calls)
        self._unfinished.update(request_ids)
        self._submit(Operation("run", gpu_id, model, request_ids), partial(self._run, gpu_id, model, list(calls)))

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
                device_bytes=self._function(model).memory_bytes or spec.memory_bytes,
                private_bytes=0,
                shared_bytes=0,
            )
            for gpu_id, gpu in self._gpus.items()
            for model, spec in gpu.resident.items()
        ]

    def utilisation(self) -> Mapping[str, float]:
        return {gpu_id: float(gpu.computing) for gpu_id, gpu in self._gpus.items()}

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

    def _submit(self, operation: Operation, begin: Callable[[], None]) -> None:
        self.operations.append(operation)
        gpu = self._gpus.get(operation.gpu_id)
        if gpu is None:
            return
        gpu.queue.append(begin)
        if not gpu.busy:
            self._next(operation.gpu_id)

    def _next(self, gpu_id: str) -> None:
        gpu = self._gpus[gpu_id]
        gpu.computing = False
        gpu.busy = bool(gpu.queue)
        if gpu.queue:
            gpu.queue.popleft()()

    def _load(self, gpu_id: str, spec: LaunchSpec) -> None:
        function = self._function(spec.model)
        failure = _pop(self._load_failures, spec.model)

        def done() -> None:
            if failure is None:
                self._gpus[gpu_id].resident[spec.model] = spec
                self._report.loaded(gpu_id, spec.model, function.load_s, function.memory_bytes)
            else:
                self._report.load_failed(gpu_id, spec.model, failure.kind, failure.reason, failure.memory_bytes)
            self._after_report(gpu_id)

        self._later(gpu_id, function.load_s, done)

    def _unload(self, gpu_id: str, model: str) -> None:
        self._gpus[gpu_id].resident.pop(model, None)
        self._later(gpu_id, self._function(model).unload_s, lambda: self._next(gpu_id))

    def _run(self, gpu_id: str, model: str, calls: list[Call]) -> None:
        gpu = self._gpus[gpu_id]
        spec = gpu.resident.get(model)
        function = self._function(model)
        failure = _pop(self._run_failures, model)
        if spec is None:
            failure = Failure(FailureKind.CRASH, f"{model} has no process on {gpu_id}")
        together = spec is not None and spec.max_batch > 1
        total_s = function.inference_s * (1 if together else len(calls)) if spec is not None else 0.0
        gpu.computing = spec is not None
        answering = calls if failure is None else calls[: failure.answered]
        for position, call in enumerate(answering):
            start_s = 0.0 if together else function.inference_s * position
            answers = function.respond(call)
            for index, answer in enumerate(answers, 1):
                last = index == len(answers)
                due_s = min(total_s, start_s + function.inference_s * index / len(answers))
                self._later(gpu_id, due_s, partial(self._answer, answer, function.inference_s, last))

        def done() -> None:
            self._unfinished.difference_update(call.request_id for call in calls)
            self._cancelled &= self._unfinished
            if failure is None:
                self._report.run_finished(gpu_id, model, total_s)
            else:
                gpu.resident.pop(model, None)
                answered = tuple(call.request_id for call in answering)
                self._report.run_failed(gpu_id, model, failure.kind, failure.reason, answered)
            self._after_report(gpu_id)

        self._later(gpu_id, total_s, done)

    def _answer(self, answer: Answer, inference_s: float, last: bool) -> None:
        if answer.request_id not in self._unfinished:
            return
        if last or answer.request_id in self._cancelled:
            self._unfinished.discard(answer.request_id)
            body = b"" if not last else answer.body
            self._report.answered(msgspec.structs.replace(answer, body=body, inference_s=inference_s, final=True))
        else:
            self._report.answered(msgspec.structs.replace(answer, final=False))

    def _after_report(self, gpu_id: str) -> None:
        """The listener may have lost the GPU while it was told."""
        if gpu_id in self._gpus:
            self._next(gpu_id)


def _pop(failures: dict[str, deque[Failure]], model: str) -> Failure | None:
    waiting = failures.get(model)
    return waiting.popleft() if waiting else None
