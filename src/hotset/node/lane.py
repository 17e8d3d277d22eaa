"""One GPU's work: operations begin in their turn (order.py), and each is reported when it is over."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import monotonic
from typing import ClassVar

import msgspec

from hotset.functions.http_envelope import PROCESS_ENTRY
from hotset.functions.units import format_bytes
from hotset.node.contexts import MOST_CONTEXT_BYTES, ContextPool
from hotset.node.devices.device import Device
from hotset.node.frames import LoadOrder, Moved, is_news
from hotset.node.history import History, LoadParts, Transition
from hotset.node.interface import Answer, Call, LaunchSpec, NodeListener
from hotset.node.order import HostMemoryOrder, Operation, Turns
from hotset.node.process import Ending, ModelProcess, ProcessState
from hotset.node.read_ahead import ReadAhead
from hotset.node.spawner import ProcessSource
from hotset.node.utilisation import BusyMeter
from hotset.vocabulary import FailureKind

COMES_BACK_WITHIN_S = 2.0
"""The driver may give a dead process's memory back a moment after the process is reaped."""
_LOOK_AGAIN_S = 0.02


class LoadOperation(Operation):
    spec: LaunchSpec
    asked_s: float = msgspec.field(default_factory=monotonic)
    """Its callers wait from here on, for whoever leaves before it, too."""


class UnloadOperation(Operation):
    leaves: ClassVar[bool] = True
    begin_s: float = 0.0


class OffloadOperation(Operation):
    leaves: ClassVar[bool] = True
    parks: ClassVar[bool] = True
    begin_s: float = 0.0


class RestoreOperation(Operation):
    begin_s: float = 0.0


class RunOperation(Operation):
    runs: ClassVar[bool] = True
    calls: Sequence[Call]


AnyOperation = LoadOperation | UnloadOperation | OffloadOperation | RestoreOperation | RunOperation


class Lane:
    """The work of one GPU and the processes on it.

    ``where`` maps each request to the lane that has it, for as long as it has no final answer. The listener is never
    called from inside ``submit``.
    """

    def __init__(
        self,
        device: Device,
        listener: NodeListener,
        source: ProcessSource,
        where: dict[int, Lane],
        history: History,
        host: HostMemoryOrder,
        read_ahead: ReadAhead,
        contexts: ContextPool | None = None,
    ) -> None:
        self.device = device
        self.gpu_id = device.gpu.gpu_id
        self.processes: dict[str, ModelProcess] = {}
        """The process of each model that is loading, resident or parked."""
        self.spawn_failed = False
        """The system would not start the latest process."""
        self.meter = BusyMeter()
        self._listener = listener
        self._source = source
        self._contexts = contexts
        self._where = where
        self._history = history
        self._loop = asyncio.get_running_loop()
        self._host = host
        self._read_ahead = read_ahead
        self._host.call(self._advance_soon)
        self._turns: Turns[AnyOperation] = Turns(host)
        self._copying: ModelProcess | None = None
        """The process that the current load, unload, offload or restore waits for."""
        self._ahead: ModelProcess | None = None
        """The process of the next load, while that waits for its turn."""
        self._running: ModelProcess | None = None
        """The process that the current run waits for."""
        self._fresh: set[ModelProcess] = set()
        """Processes that were loaded and have not run."""
        self._alive: set[ModelProcess] = set()
        self._cancelled: set[int] = set()
        self._left_s = 0.0
        """When the latest process was gone."""
        self._free_before_bytes: int | None = None
        """Of the device, when the current load began."""
        self._over = False
        """Lost or stopped: nothing is taken and nothing reported any more."""
        self._emptied: asyncio.Future[None] | None = None

    @property
    def over(self) -> bool:
        return self._over

    def submit(self, operation: AnyOperation) -> None:
        """Do this when it is its turn."""
        if not self._over:
            self._turns.add(operation)
            if isinstance(operation, UnloadOperation) and self._is_parked(operation.model):
                self._host.leaves(operation)
            self._advance()

    def _is_parked(self, model: str) -> bool:
        process = self.processes.get(model)
        return process is not None and (
            process.state in (ProcessState.PARKED, ProcessState.OFFLOADING)
            or any(isinstance(copy, OffloadOperation) and copy.model == model for copy in self._turns.copies)
        )

    def cancel(self, request_id: int) -> None:
        """The client of a request in this lane left; a run that has not begun is told when it does."""
        if self._running is None or not self._running.cancel(request_id):
            self._cancelled.add(request_id)

    async def stop(self) -> None:
        """End every process; returns when all are reaped."""
        self._give_up()
        if self._alive:
            self._emptied = self._loop.create_future()
            await self._emptied
        if self._contexts is not None:
            await self._contexts.stop()

    # Operations begin

    def _advance_soon(self) -> None:
        self._loop.call_soon(self._advance)

    def _advance(self) -> None:
        while not self._over and (operation := self._turns.start()) is not None:
            match operation:
                case RunOperation():
                    self._begin_run(operation)
                case LoadOperation():
                    self._begin_load(operation)
                case UnloadOperation():
                    self._begin_unload(operation)
                case OffloadOperation():
                    self._begin_offload(operation)
                case RestoreOperation():
                    self._begin_restore(operation)
        self._prepare()

    def _begin_run(self, operation: RunOperation) -> None:
        process = self.processes.get(operation.model)
        if process is None:
            self._loop.call_soon(self._run_refused, operation)
            return
        if not operation.calls:
            self._loop.call_soon(self._ran_nothing, operation)
            return
        self._running = process
        self.meter.begin()
        if process.state is ProcessState.PARKED:
            process.end(_untimely(operation.model, "run", process))
            return
        process.run(operation.calls)
        if self._cancelled:
            for call in operation.calls:
                if call.request_id in self._cancelled:
                    self._cancelled.discard(call.request_id)
                    process.cancel(call.request_id)

    def _begin_load(self, operation: LoadOperation) -> None:
        if self._over:
            return
        spec = operation.spec
        if spec.model in self.processes:
            reason = f"{spec.model} is on {self.gpu_id} already"
            self._loop.call_soon(self._load_refused, operation, FailureKind.ERROR, reason, None)
            return
        known_bytes = self._history.memory_bytes(spec.model)
        if self._comes_back(known_bytes or spec.memory_bytes):
            self._loop.call_later(_LOOK_AGAIN_S, self._begin_load, operation)
            return
        free_bytes = self._free_bytes()
        if known_bytes is not None and known_bytes > free_bytes:
            reason = f"takes {format_bytes(known_bytes)}, but its GPU has {format_bytes(free_bytes)} free"
            self._loop.call_soon(self._load_refused, operation, FailureKind.OUT_OF_MEMORY, reason, known_bytes)
            return
        process, self._ahead = self._ahead, None
        if process is None or process.spec is not spec:
            if process is not None:
                process.end()
            process = self._new_process(spec)
        self.processes[spec.model] = self._copying = process
        self._free_before_bytes = self.device.free_bytes()
        process.load(free_bytes)

    def _prepare(self) -> None:
        """While another model leaves, the process of the one that comes starts and imports: neither takes memory."""
        following = self._turns.copies[0] if self._turns.copies else None
        if self._ahead is None and isinstance(following, LoadOperation) and not self._over:
            self._ahead = self._new_process(following.spec)
            self._ahead.prepare()

    def _new_process(self, spec: LaunchSpec) -> ModelProcess:
        order = LoadOrder(
            model=spec.model,
            entry=spec.entry,
            code_path=spec.code_path,
            device=self.device.device_name,
            fast=spec.fast_load,
            copy_bandwidth=self.device.copy_bandwidth,
        )
        env = {**self.device.defaults(), **spec.env, **self.device.environment()}
        source = self._contexts if self._contexts is not None and self._contexts.serves(spec) else self._source
        process = ModelProcess(self, spec, order, source, env)
        self._alive.add(process)
        return process

    def _free_bytes(self) -> int:
        """Device memory for one more model: what is left of the budget, or of the device if others use it too."""
        free_bytes, on_device_bytes = self._booked_free_bytes(), self.device.free_bytes()
        return free_bytes if on_device_bytes is None else min(free_bytes, on_device_bytes)

    def _booked_free_bytes(self) -> int:
        return max(0, self.device.gpu.memory_bytes - sum(other.memory_bytes for other in self._alive))

    def _comes_back(self, wanted_bytes: int) -> bool:
        """So much is free by the books but not on the device yet, and a process has just left."""
        if monotonic() - self._left_s > COMES_BACK_WITHIN_S:
            return False
        on_device_bytes = self.device.free_bytes()
        return on_device_bytes is not None and on_device_bytes < wanted_bytes <= self._booked_free_bytes()

    def _taken_bytes(self, process: ModelProcess, said_bytes: int | None) -> int:
        """Device memory a process takes: the driver's figure; else its own, and what its context took besides; else
        what it last took."""
        seen_bytes = self.device.process_bytes(process.pid)
        if seen_bytes is not None:
            return max(seen_bytes, said_bytes or 0)
        return process.memory_bytes if said_bytes is None else said_bytes + process.context_bytes

    def _context_bytes(self, process: ModelProcess, said_bytes: int) -> int:
        """What the device has lost since the load began, beyond what the model says it takes, and what its process had
        taken before."""
        now_bytes = self.device.free_bytes()
        if self._free_before_bytes is None or now_bytes is None:
            return process.context_bytes
        lost_bytes = max(0, self._free_before_bytes - now_bytes - said_bytes)
        return min(process.context_bytes + lost_bytes, MOST_CONTEXT_BYTES)

    def _begin_unload(self, operation: UnloadOperation) -> None:
        operation.begin_s = monotonic()
        self._copying = self.processes.pop(operation.model, None)
        if self._copying is None:
            self._loop.call_soon(self._did_nothing, operation)
        else:
            self._copying.end()

    def _begin_offload(self, operation: OffloadOperation) -> None:
        operation.begin_s = monotonic()
        process = self.processes.get(operation.model)
        if process is None:
            self._loop.call_soon(self._did_nothing, operation)
            return
        self._copying = process
        if process.state is ProcessState.READY:
            process.offload(lambda moved: self._offloaded(process, operation, moved))
        else:
            process.end(_untimely(operation.model, "offload", process))

    def _begin_restore(self, operation: RestoreOperation) -> None:
        if self._over:
            return
        operation.begin_s = operation.begin_s or monotonic()
        process = self.processes.get(operation.model)
        if process is None:
            reason = f"{operation.model} has no process on {self.gpu_id}"
            self._loop.call_soon(self._load_refused, operation, FailureKind.CRASH, reason, None)
            return
        known_bytes = self._history.memory_bytes(operation.model) or process.spec.memory_bytes
        if self._comes_back(max(0, known_bytes - process.memory_bytes)):
            self._loop.call_later(_LOOK_AGAIN_S, self._begin_restore, operation)
            return
        self._copying = process
        if process.state is ProcessState.PARKED:
            process.restore(lambda moved: self._restored(process, operation, moved))
        else:
            process.end(_untimely(operation.model, "restore", process))

    # Operations that are over at once

    def _did_nothing(self, operation: AnyOperation) -> None:
        """Its process was gone already, which was reported then."""
        self._turns.done(operation)
        self._advance()

    def _ran_nothing(self, operation: RunOperation) -> None:
        """Every client left before the run was handed over."""
        self._turns.done(operation)
        self._listener.run_finished(self.gpu_id, operation.model, 0.0)
        self._advance()

    def _run_refused(self, operation: RunOperation) -> None:
        reason = f"{operation.model} has no process on {self.gpu_id}"
        self._turns.done(operation)
        self._report_run_failed(operation, FailureKind.CRASH, reason, ())
        self._advance()

    def _load_refused(
        self,
        operation: LoadOperation | RestoreOperation,
        kind: FailureKind,
        reason: str,
        memory_bytes: int | None,
    ) -> None:
        self._turns.done(operation)
        self._listener.load_failed(self.gpu_id, operation.model, kind, reason, memory_bytes)
        self._advance()

    # What the processes report (ProcessOwner). An operation is over before the listener hears of it: what it asks for
    # when told may begin at once.

    def process_loaded(self, process: ModelProcess, memory_bytes: int) -> None:
        model = process.spec.model
        self.spawn_failed = False
        if not memory_bytes and process.spec.entry == PROCESS_ENTRY and self.device.process_bytes(process.pid) is None:
            memory_bytes = process.spec.memory_bytes  # a command cannot be looked into: what it declared counts
        process.context_bytes = self._context_bytes(process, memory_bytes)
        process.memory_bytes = memory_bytes = self._taken_bytes(process, memory_bytes)
        load_s = monotonic() - process.load_began_s
        if self._contexts is not None:
            self._contexts.loaded(process.pid, process.spec)
        self._fresh.add(process)
        self._read_ahead.loaded(model, process.spec.code_path, process.pid)
        self._history.measured(model, memory_bytes)
        self._history.took(model, Transition.LOAD, load_s)
        operation = self._copied()
        assert isinstance(operation, LoadOperation)
        if process.report is not None:
            import_s, own_s = process.report.import_s, process.report.load_s
            rest_s = max(0.0, load_s - own_s - (0.0 if process.ahead else import_s))
            room_s = process.load_began_s - operation.asked_s
            parts = LoadParts(room_s=room_s, process_s=rest_s, import_s=import_s, load_s=own_s, ahead=process.ahead)
            self._history.loaded(model, parts)
        self._listener.loaded(self.gpu_id, model, monotonic() - operation.asked_s, memory_bytes)
        self._advance()

    def _offloaded(self, process: ModelProcess, operation: OffloadOperation, moved: Moved) -> None:
        offload_s = monotonic() - operation.begin_s
        process.memory_bytes = self._taken_bytes(process, moved.device_bytes)
        self._history.took(operation.model, Transition.OFFLOAD, offload_s)
        self._copied()
        self._listener.offloaded(self.gpu_id, operation.model, offload_s, process.memory_bytes, moved.host_bytes)
        self._advance()

    def _restored(self, process: ModelProcess, operation: RestoreOperation, moved: Moved) -> None:
        restore_s = monotonic() - operation.begin_s
        process.memory_bytes = self._taken_bytes(process, moved.device_bytes)
        self._history.took(operation.model, Transition.RESTORE, restore_s)
        self._copied()
        self._listener.restored(self.gpu_id, operation.model, restore_s, process.memory_bytes)
        self._advance()

    def process_answered(self, process: ModelProcess, answer: Answer) -> None:
        if answer.final:
            self._where.pop(answer.request_id, None)
        self._listener.answered(answer)

    def process_ran(self, process: ModelProcess, inference_s: float) -> None:
        self.meter.end()
        if self._fresh and process in self._fresh:
            self._fresh.discard(process)
            self._history.first_ran(process.spec.model, inference_s)
        self._ran()
        self._listener.run_finished(self.gpu_id, process.spec.model, inference_s)
        self._advance()

    def process_measured(self, process: ModelProcess, memory_bytes: int | None) -> None:
        taken_bytes = self._taken_bytes(process, memory_bytes)
        if is_news(process.memory_bytes, taken_bytes):
            process.memory_bytes = taken_bytes
            self._listener.measured(self.gpu_id, process.spec.model, taken_bytes)

    def process_logged(self, process: ModelProcess, line: str) -> None:
        self._listener.logged(process.spec.model, line)

    def process_ended(self, process: ModelProcess, ending: Ending) -> None:
        self._alive.discard(process)
        self._fresh.discard(process)
        self._left_s = monotonic()
        if self._emptied is not None and not self._alive:
            self._emptied.set_result(None)
        if self._over:
            return
        self.spawn_failed = not ending.started
        if process is self._ahead:
            self._ahead = None  # whatever is wrong will be seen, and reported, when it is its turn
            return
        model = process.spec.model
        if self.processes.get(model) is process:
            del self.processes[model]
        if process is self._copying:
            self._report_copy_ended(self._copied(), process, ending)
        elif process is self._running:
            self._report_run_failed(self._ran(), ending.kind or FailureKind.CRASH, ending.reason, process.answered)
        else:
            self._listener.process_lost(self.gpu_id, model, ending.reason)
        if ending.kind is FailureKind.DEVICE:
            if self._contexts is not None:
                self._contexts.renew()
            if (reason := self.device.lost()) is not None:
                self._give_up()
                self._listener.gpu_lost(self.gpu_id, reason)
        self._advance()

    def _copied(self) -> AnyOperation | None:
        """The current copy is over."""
        operation, self._copying = self._turns.copying, None
        if operation is not None:
            self._turns.done(operation)
        return operation

    def _ran(self) -> AnyOperation | None:
        """The current run is over."""
        operation, self._running = self._turns.running, None
        if operation is not None:
            self._turns.done(operation)
        return operation

    def _report_copy_ended(self, operation: AnyOperation | None, process: ModelProcess, ending: Ending) -> None:
        model = process.spec.model
        match operation:
            case LoadOperation() | RestoreOperation():
                if ending.memory_bytes is not None:
                    self._history.measured(model, ending.memory_bytes)
                kind = ending.kind or FailureKind.CRASH
                self._listener.load_failed(self.gpu_id, model, kind, ending.reason, ending.memory_bytes)
            case OffloadOperation():
                if ending.kind is FailureKind.ERROR:
                    # Its own code cannot do it: as if parked it freed nothing, so that nobody tries again.
                    took_s = monotonic() - operation.begin_s
                    self._listener.offloaded(self.gpu_id, model, took_s, process.memory_bytes, 0)
                self._listener.process_lost(self.gpu_id, model, ending.reason)
            case UnloadOperation():
                self._history.took(model, Transition.UNLOAD, monotonic() - operation.begin_s)

    def _report_run_failed(
        self, operation: AnyOperation | None, kind: FailureKind, reason: str, answered: tuple[int, ...]
    ) -> None:
        self.meter.end()
        assert isinstance(operation, RunOperation)
        for call in operation.calls:
            self._where.pop(call.request_id, None)
            self._cancelled.discard(call.request_id)
        self._listener.run_failed(self.gpu_id, operation.model, kind, reason, answered)

    def _give_up(self) -> None:
        self._over = True
        if self._contexts is not None:
            self._contexts.close()
        self._turns.clear()
        for process in self._alive:
            process.end()


def _untimely(model: str, verb: str, process: ModelProcess) -> Ending:
    """Who asks for this has lost track of the process: it must go, so that all agree again."""
    return Ending(FailureKind.CRASH, f"{model} was to {verb} while {process.state.value}")
