"""One GPU's work: what is asked of it is done strictly in the order it was asked, one thing at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from time import monotonic

import msgspec

from hotset.functions.http_envelope import PROCESS_ENTRY
from hotset.node.devices.device import Device
from hotset.node.frames import LoadOrder
from hotset.node.interface import Answer, Call, LaunchSpec, NodeListener
from hotset.node.process import Ending, ModelProcess
from hotset.node.spawner import ProcessSource
from hotset.node.utilisation import BusyMeter
from hotset.vocabulary import FailureKind


class LoadOperation(msgspec.Struct):
    spec: LaunchSpec


class UnloadOperation(msgspec.Struct):
    model: str


class RunOperation(msgspec.Struct):
    model: str
    calls: Sequence[Call]


Operation = LoadOperation | UnloadOperation | RunOperation


class Lane:
    """The queue of one GPU and the processes on it.

    ``where`` maps each request to the lane that has it, for as long as it has no final answer. The listener is never
    called from inside ``submit``.
    """

    def __init__(self, device: Device, listener: NodeListener, source: ProcessSource, where: dict[int, Lane]) -> None:
        self.device = device
        self.gpu_id = device.gpu.gpu_id
        self.processes: dict[str, ModelProcess] = {}
        """The process of each model that is loading or resident."""
        self.spawn_failed = False
        """The system would not start the latest process."""
        self.meter = BusyMeter()
        self._listener = listener
        self._source = source
        self._where = where
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Operation] = deque()
        self._current: Operation | None = None
        self._process: ModelProcess | None = None
        """The process that ``_current`` waits for."""
        self._alive: set[ModelProcess] = set()
        self._cancelled: set[int] = set()
        self._over = False
        """Lost or stopped: nothing is taken and nothing reported any more."""
        self._emptied: asyncio.Future[None] | None = None

    @property
    def over(self) -> bool:
        return self._over

    def submit(self, operation: Operation) -> None:
        """Do this when all that was asked before is done."""
        if self._over:
            return
        if self._current is None and not self._queue:
            self._begin(operation)
        else:
            self._queue.append(operation)

    def cancel(self, request_id: int) -> None:
        """The client of a request in this lane left; a run that has not begun is told when it does."""
        if self._process is None or not self._process.cancel(request_id):
            self._cancelled.add(request_id)

    async def stop(self) -> None:
        """End every process; returns when all are reaped."""
        self._give_up()
        if self._alive:
            self._emptied = self._loop.create_future()
            await self._emptied

    # One operation after the other

    def _begin(self, operation: Operation) -> None:
        self._current = operation
        match operation:
            case RunOperation():
                self._begin_run(operation)
            case LoadOperation():
                self._begin_load(operation.spec)
            case UnloadOperation():
                self._process = self.processes.pop(operation.model, None)
                if self._process is None:
                    self._loop.call_soon(self._unloaded_nothing)
                else:
                    self._process.end()

    def _begin_run(self, operation: RunOperation) -> None:
        process = self.processes.get(operation.model)
        if process is None:
            self._loop.call_soon(self._run_refused, operation)
            return
        if not operation.calls:
            self._loop.call_soon(self._ran_nothing, operation)
            return
        self._process = process
        self.meter.begin()
        process.run(operation.calls)
        if self._cancelled:
            for call in operation.calls:
                if call.request_id in self._cancelled:
                    self._cancelled.discard(call.request_id)
                    process.cancel(call.request_id)

    def _begin_load(self, spec: LaunchSpec) -> None:
        if spec.model in self.processes:
            self._loop.call_soon(self._load_refused, spec)
            return
        order = LoadOrder(
            model=spec.model,
            entry=spec.entry,
            code_path=spec.code_path,
            device=self.device.device_name,
            limit_bytes=max(0, self.device.gpu.memory_bytes - sum(other.memory_bytes for other in self._alive)),
        )
        process = ModelProcess(self, spec, order, self._source, {**spec.env, **self.device.environment()})
        self.processes[spec.model] = self._process = process
        self._alive.add(process)
        process.start()

    def _over_with(self) -> Operation | None:
        """The current operation is done, and no longer current: what the listener asks for when told comes next."""
        operation, self._current, self._process = self._current, None, None
        return operation

    def _next(self) -> None:
        while self._queue and self._current is None and not self._over:
            self._begin(self._queue.popleft())

    def _unloaded_nothing(self) -> None:
        """Its process was gone already."""
        self._over_with()
        self._next()

    def _ran_nothing(self, operation: RunOperation) -> None:
        """Every client left before the run was handed over."""
        self._over_with()
        self._listener.run_finished(self.gpu_id, operation.model, 0.0)
        self._next()

    def _run_refused(self, operation: RunOperation) -> None:
        reason = f"{operation.model} has no process on {self.gpu_id}"
        self._over_with()
        self._report_run_failed(operation, FailureKind.CRASH, reason, ())
        self._next()

    def _load_refused(self, spec: LaunchSpec) -> None:
        self._over_with()
        reason = f"{spec.model} is on {self.gpu_id} already"
        self._listener.load_failed(self.gpu_id, spec.model, FailureKind.ERROR, reason)
        self._next()

    # What the processes report (ProcessOwner)

    def process_loaded(self, process: ModelProcess, memory_bytes: int) -> None:
        self.spawn_failed = False
        memory_bytes = self.device.process_bytes(process.pid) or memory_bytes
        if not memory_bytes and process.spec.entry == PROCESS_ENTRY:
            memory_bytes = process.spec.memory_bytes  # a command cannot be looked into: what it declared counts
        process.memory_bytes = memory_bytes
        self._over_with()
        load_s = monotonic() - process.started_s
        self._listener.loaded(self.gpu_id, process.spec.model, load_s, memory_bytes)
        self._next()

    def process_answered(self, process: ModelProcess, answer: Answer) -> None:
        if answer.final:
            self._where.pop(answer.request_id, None)
        self._listener.answered(answer)

    def process_ran(self, process: ModelProcess, inference_s: float) -> None:
        self.meter.end()
        self._over_with()
        self._listener.run_finished(self.gpu_id, process.spec.model, inference_s)
        self._next()

    def process_logged(self, process: ModelProcess, line: str) -> None:
        self._listener.logged(process.spec.model, line)

    def process_ended(self, process: ModelProcess, ending: Ending) -> None:
        self._alive.discard(process)
        if self._emptied is not None and not self._alive:
            self._emptied.set_result(None)
        if self._over:
            return
        self.spawn_failed = not ending.started
        model = process.spec.model
        if self.processes.get(model) is process:
            del self.processes[model]
        kind = ending.kind or FailureKind.CRASH
        if process is not self._process:
            self._listener.process_lost(self.gpu_id, model, ending.reason)
        else:
            match operation := self._over_with():
                case LoadOperation():
                    self._listener.load_failed(self.gpu_id, model, kind, ending.reason, ending.memory_bytes)
                case RunOperation():
                    self._report_run_failed(operation, kind, ending.reason, process.answered)
        if ending.kind is FailureKind.DEVICE and (reason := self.device.lost()) is not None:
            self._give_up()
            self._listener.gpu_lost(self.gpu_id, reason)
        self._next()

    def _report_run_failed(
        self, operation: RunOperation, kind: FailureKind, reason: str, answered: tuple[int, ...]
    ) -> None:
        self.meter.end()
        for call in operation.calls:
            self._where.pop(call.request_id, None)
            self._cancelled.discard(call.request_id)
        self._listener.run_failed(self.gpu_id, operation.model, kind, reason, answered)

    def _give_up(self) -> None:
        self._over = True
        self._queue.clear()
        for process in self._alive:
            process.end()
