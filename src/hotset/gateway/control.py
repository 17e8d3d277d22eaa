"""The control loop: the one owner that joins the scheduler, the nodes and the clients (rule R2).

A call becomes an event, the scheduler's actions become calls of a node, the node's reports become events and answers::

    call() -> RequestArrived -> Scheduler -> Run -> Node.run
    Future <- Result <- answered() <- Node        run_finished() -> RunFinished -> Scheduler -> ...

Everything here runs on one event loop and nothing blocks, so there are no locks. One Future per call and no task: only
a call that waits longer than ``LOOK_AFTER_S`` costs a task, which watches whether its client is still there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from hotset.gateway.callers import NOBODY, Caller, Callers
from hotset.gateway.calls import CallIds, CallRecord, Chunks, Deliver, PendingCall, Receive, Result
from hotset.gateway.clock import Clock
from hotset.gateway.functions import Functions, Learned, Version, VersionSpec
from hotset.gateway.logbook import Logbook, LogLine
from hotset.gateway.orders import Orders
from hotset.gateway.pinning import Pinning
from hotset.gateway.statuses import CLIENT_CLOSED, STATUS, STATUS_OF_FAILURE, WAIT_BEFORE_RETRY_S, error_body
from hotset.node.cpu import CpuPool
from hotset.node.interface import Answer, Call, Node
from hotset.scheduling.actions import Reject
from hotset.scheduling.events import (
    Event,
    GpuJoined,
    GpuLost,
    LoadFailed,
    ModelAdded,
    ModelLoaded,
    ModelMeasured,
    ModelOffloaded,
    ModelRemoved,
    ModelRestored,
    ProcessLost,
    RequestArrived,
    RequestCancelled,
    RunFailed,
    RunFinished,
    TimeAdvanced,
)
from hotset.scheduling.scheduler import Scheduler
from hotset.vocabulary import FailureKind, RejectReason, Request

LOOK_AFTER_S = 0.1
"""How often calls that take long are looked at: has the client left, has the time it gave run out."""
SHUTTING_DOWN = "the server is shutting down: try again elsewhere"

log = logging.getLogger("hotset.gateway")


class ControlConfig(msgspec.Struct, frozen=True, kw_only=True):
    recorded_calls: int = 100_000
    """How many finished calls are kept for ``/system/trace``; the oldest go first."""
    stream_buffer_bytes: int = 16 << 20
    """A streamed answer is given up when its reader is this far behind."""
    max_cpu_calls: int = 1_000
    """Most calls of plain functions that wait or run at once; one more gets a 429."""


class Control:
    """Owns the scheduler, the nodes and every call that has not ended. ``start`` it on the loop that is to run it."""

    def __init__(
        self,
        scheduler: Scheduler,
        nodes: Sequence[Node],
        *,
        cpu: CpuPool | None = None,
        config: ControlConfig | None = None,
        clock: Clock | None = None,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self.config = config or ControlConfig()
        self.scheduler = scheduler
        self.functions = Functions()
        self.callers = Callers()  # its owner may tell them apart better
        self.logbook = Logbook()
        self.ids = CallIds()
        self.records: deque[CallRecord] = deque(maxlen=self.config.recorded_calls)
        self.accepting = False
        self.lost_gpus: dict[str, str] = {}
        """GPU id -> why it was lost."""
        self.nodes = nodes
        self._node_of: dict[str, Node] = {}
        """GPU id -> its node."""
        self.cpu = cpu
        self._clock = clock
        self._unix_time = unix_time
        self.started_s = 0.0
        self.started_unix_s = 0.0
        self.calls: dict[int, PendingCall] = {}
        """Every call that has not ended; for others to read."""
        self.open_body_bytes = 0
        """The bodies of these."""
        self._orders = Orders(self.calls, self.functions, self._node_of, self.now_s)
        self.pinning = Pinning(scheduler, self.functions, self._handle)
        self._last_request_id = 0
        self._cpu_calls = 0
        self._failing: FailureKind | None = None
        """Set while the scheduler decides what becomes of a failure's calls."""
        self._looking = False
        self._wakeup_s = float("inf")
        self._drained: asyncio.Future[None] | None = None

    # Life

    async def start(self) -> None:
        """Start the nodes and take calls; raises ``NodeError`` when a node has nothing to run on."""
        self._loop = asyncio.get_running_loop()
        # Not the loop's own clock: uvloop's counts in whole milliseconds.
        self._now = self._clock.time if self._clock is not None else time.monotonic
        self._call_later = (self._clock or self._loop).call_later
        self.started_s = self._now()
        self.started_unix_s = self._unix_time()
        for node in self.nodes:
            await node.start(self)
            for gpu in node.gpus:
                self._node_of[gpu.gpu_id] = node
                self._handle(GpuJoined(gpu))
        if self.cpu is not None:
            await self.cpu.start(self)
        self.accepting = True

    async def drain(self, grace_s: float) -> None:
        """Take no more calls and let the others end; those that have not after ``grace_s`` seconds get a 503."""
        self.accepting = False
        self.logbook.close()
        if self.calls:
            self._drained = self._loop.create_future()
            await asyncio.wait([self._drained], timeout=grace_s)
        for pending in list(self.calls.values()):
            self._abandon(pending, RejectReason.SHUTTING_DOWN, SHUTTING_DOWN)

    async def stop(self) -> None:
        """End every process; what still waits gets a 503."""
        await self.drain(0.0)
        for node in self.nodes:
            await node.stop()
        if self.cpu is not None:
            await self.cpu.stop()

    @property
    def next_call_id(self) -> str:
        """Public id of the call that is handed in next."""
        return self.ids.public(self._last_request_id + 1)

    @property
    def open_cpu_calls(self) -> int:
        """Calls of plain functions that wait or run."""
        return self._cpu_calls

    @property
    def open_gpu_calls(self) -> int:
        """Calls that wait for a GPU or run on one."""
        return len(self.calls) - self._cpu_calls

    # Functions

    def deploy(self, spec: VersionSpec) -> None:
        """Install a version beside the old one: new calls go to it from here on, the old one's calls end on the old."""
        version, replaced = self.functions.install(spec)
        if replaced is not None:
            self.pinning.retired(replaced)
        if spec.scheduled is not None:
            self._handle(ModelAdded(self.pinning.scheduled(spec.function, spec.scheduled)))
            for node in self.nodes:
                node.prepare(spec.launch)
        if replaced is not None:
            self._remove_if_done(replaced)
        log.info("deployed %s", version.model)

    def remove(self, function: str) -> bool:
        """Take a function out of service; its calls end first. False: there is none of that name."""
        version = self.functions.retire(function)
        if version is None:
            return False
        self.pinning.removed(version)
        self._remove_if_done(version)
        log.info("removed %s", version.model)
        return True

    def evict(self, function: str) -> bool:
        """Take an idle function's model out of GPU memory; what was learned of it stays, and the next call loads it
        again. False: it has open calls, needs no GPU, or there is none of that name."""
        version = self.functions.current.get(function)
        if version is None or version.calls or version.spec.scheduled is None:
            return False
        scheduled = self.scheduler.cluster.models.get(version.model, version.spec.scheduled)
        learned = version.profile(self.scheduler.profiles)
        if learned is not None:
            scheduled = msgspec.structs.replace(scheduled, profile=learned)
        self._handle(ModelRemoved(version.model))
        self._handle(ModelAdded(scheduled))
        return True

    def _remove_if_done(self, version: Version) -> None:
        """Drop a retired version whose calls have ended; one that was deployed again meanwhile stays."""
        if version.calls or not version.retired or self.functions.versions.get(version.model) is not version:
            return
        self.functions.forget(version)
        if version.spec.scheduled is not None:
            self._handle(ModelRemoved(version.model))
        elif self.cpu is not None:
            self.cpu.forget(version.model)

    # Calls

    def submit(
        self,
        function: str,
        body: bytes | memoryview,
        content_type: str = "application/json",
        accept: str = "*/*",
        *,
        caller: Caller = NOBODY,
        timeout_s: float | None = None,
        receive: Receive | None = None,
        deliver: Deliver | None = None,
    ) -> PendingCall:
        """Hand in a call; its ``future`` gets the ``Result``, whatever happens. ``KeyError``: no such function.

        ``timeout_s``: what the caller gives it, running included; at most ``VersionSpec.patience_s``. ``receive``
        (ASGI): watched for the client's leaving once the call takes long. ``deliver``: gets the result, maybe at once.
        """
        version = self.functions.current[function]
        now_s = self._now()
        request_id = self._last_request_id = self._last_request_id + 1
        call = Call(request_id=request_id, body=body, content_type=content_type, accept=accept)
        pending = PendingCall(version, call, now_s, deliver)
        pending.receive = receive
        pending.caller = caller
        version.calls += 1
        self.open_body_bytes += len(body)
        self.calls[request_id] = pending
        if not self.accepting:
            self._reject(pending, RejectReason.SHUTTING_DOWN, SHUTTING_DOWN)
            return pending
        deadline_s = now_s + version.spec.patience_s
        if timeout_s is not None and timeout_s < version.spec.patience_s:
            deadline_s = pending.expires_s = now_s + timeout_s
        if not self._looking:
            self._looking = True
            self._call_later(LOOK_AFTER_S, self._look)
        if version.spec.scheduled is None:
            self._submit_to_cpu(pending, deadline_s)
        else:
            request = Request(
                request_id=request_id,
                model=version.model,
                arrival_s=now_s,
                deadline_s=deadline_s,
                caller=caller.name,
                weight=caller.weight,
                priority=caller.priority,
            )
            self._handle(RequestArrived(request))
            if not self.scheduler.cache.copies(version.model):
                self._orders.expect(version)
        return pending

    def _submit_to_cpu(self, pending: PendingCall, deadline_s: float) -> None:
        if self.cpu is None:
            self._reject(pending, RejectReason.FAILED, "this server runs no plain functions: it has no CPU pool")
        elif self._cpu_calls >= self.config.max_cpu_calls:
            message = f"{self._cpu_calls} calls of plain functions are open already: try again later"
            self._reject(pending, RejectReason.QUEUE_FULL, message)
        else:
            self._cpu_calls += 1
            pending.on_cpu = True
            pending.expires_s = deadline_s
            self.cpu.run(pending.version.spec.launch, pending.call)

    async def call(
        self,
        function: str,
        body: bytes | memoryview,
        content_type: str = "application/json",
        accept: str = "*/*",
        *,
        caller: Caller = NOBODY,
        timeout_s: float | None = None,
    ) -> Result:
        """``submit`` and wait; cancelling the wait is leaving."""
        pending = self.submit(function, body, content_type, accept, caller=caller, timeout_s=timeout_s)
        try:
            return await pending.future
        except asyncio.CancelledError:
            self.cancel(pending)
            raise

    def cancel(self, pending: PendingCall) -> None:
        """The client left: a waiting call leaves the queue, a running one ends unread."""
        if pending.request_id in self.calls and self._withdraw(pending):
            self._end(pending, Result(record=pending.record(CLIENT_CLOSED, self._now())))

    def _withdraw(self, pending: PendingCall) -> bool:
        """Nobody wants the call any more: tell whoever has it. False: the scheduler ended it in the same turn (its
        deadline had passed)."""
        if pending.on_cpu:
            assert self.cpu is not None
            self.cpu.cancel(pending.request_id)
            return True
        self._handle(RequestCancelled(pending.request_id))
        if pending.request_id not in self.calls:
            return False
        if pending.run_s is not None and pending.gpu_id in self._node_of:
            self._node_of[pending.gpu_id].cancel(pending.request_id)
        return True

    def _abandon(self, pending: PendingCall, reason: RejectReason, message: str) -> None:
        """Answer the client now, whatever became of the call."""
        if pending.request_id in self.calls and self._withdraw(pending):
            self._reject(pending, reason, message)

    def _reject(
        self, pending: PendingCall, reason: RejectReason, message: str, retry_after_s: float | None = None
    ) -> None:
        call_id, status = self.ids.public(pending.request_id), STATUS[reason]
        pending.version.metrics.hopeless += reason is RejectReason.HOPELESS
        if reason is RejectReason.FAILED and self._failing is not None:
            status = STATUS_OF_FAILURE.get(self._failing, status)
        self._end(
            pending,
            Result(
                record=pending.record(status, self._now()),
                body=error_body(message, reason=reason.value, function=pending.version.function, call_id=call_id),
                retry_after_s=WAIT_BEFORE_RETRY_S.get(reason) if retry_after_s is None else retry_after_s,
                internal=True,
            ),
            error=message,
        )

    def _end(self, pending: PendingCall, result: Result, error: str | None = None) -> None:
        """The one way out: every call passes here exactly once. ``error``: how a streamed answer broke off."""
        del self.calls[pending.request_id]
        version = pending.version
        version.calls -= 1
        self.open_body_bytes -= len(pending.call.body)
        self._cpu_calls -= pending.on_cpu
        version.metrics.observe(result.record)
        self.records.append(result.record)
        if pending.watcher is not None:
            pending.watcher.cancel()
        if pending.chunks is not None:
            pending.chunks.end(error)
        else:
            pending.resolve(result)
        if not version.calls and version.retired:
            self._loop.call_soon(self._remove_if_done, version)  # not now: the scheduler may be in the middle of a turn
        if self._drained is not None and not self.calls and not self._drained.done():
            self._drained.set_result(None)

    def _look(self) -> None:
        """Look after the calls that take long; comes again as long as there are calls."""
        now_s = self._now()
        for pending in list(self.calls.values()):
            if pending.expires_s is not None and now_s >= pending.expires_s:
                message = f"the call took longer than the {pending.expires_s - pending.arrival_s:g} s it was given"
                self._abandon(pending, RejectReason.DEADLINE, message)
            elif pending.watcher is None and pending.receive is not None and now_s - pending.arrival_s >= LOOK_AFTER_S:
                pending.watcher = self._loop.create_task(self._watch(pending, pending.receive))
        self._looking = bool(self.calls)
        if self._looking:
            self._call_later(LOOK_AFTER_S, self._look)

    async def _watch(self, pending: PendingCall, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        pending.watcher = None
        self.cancel(pending)

    # Scheduler -> node

    def _handle(self, event: Event) -> None:
        """Tell the scheduler and do what it says. Never entered twice: a node reports later, not from inside a call."""
        for action in self.scheduler.handle(event, self._now()):
            if type(action) is Reject:
                rejected = self.calls.get(action.request_id)
                if rejected is not None:
                    self._reject(rejected, action.reason, action.message, action.retry_after_s)
            else:
                self._orders.carry_out(action)
        wakeup_s = self.scheduler.next_wakeup_s()
        if wakeup_s is not None and wakeup_s < self._wakeup_s:
            self._wakeup_s = wakeup_s
            self._call_later(max(0.0, wakeup_s - self._now()), self._wake)

    def _wake(self) -> None:
        self._wakeup_s = float("inf")
        self._handle(TimeAdvanced())

    # Node -> scheduler and clients (``NodeListener``)

    def loaded(self, gpu_id: str, model: str, load_s: float, memory_bytes: int | None) -> None:
        self._learned(gpu_id, model).loads += 1
        self._handle(ModelLoaded(gpu_id, model, load_s, memory_bytes))

    def load_failed(
        self, gpu_id: str, model: str, kind: FailureKind, reason: str, memory_bytes: int | None = None
    ) -> None:
        log.warning("%s did not load on %s (%s): %s", model, gpu_id, kind.value, reason)
        self._handle_failure(kind, LoadFailed(gpu_id, model, kind, reason, memory_bytes))

    def offloaded(self, gpu_id: str, model: str, offload_s: float, device_bytes: int, host_bytes: int) -> None:
        self._handle(ModelOffloaded(gpu_id, model, offload_s, device_bytes, host_bytes))

    def restored(self, gpu_id: str, model: str, restore_s: float, memory_bytes: int | None) -> None:
        self._learned(gpu_id, model).restores += 1
        self._handle(ModelRestored(gpu_id, model, restore_s, memory_bytes))

    def measured(self, gpu_id: str, model: str, memory_bytes: int) -> None:
        self._handle(ModelMeasured(gpu_id, model, memory_bytes))

    def answered(self, answer: Answer) -> None:
        pending = self.calls.get(answer.request_id)
        if pending is None:
            return  # its client left
        record = pending.record(answer.status, self._now(), answer.inference_s)
        chunks = pending.chunks
        body = answer.body  # may lie in a slot shared with the process, which is free again once this view is gone
        if answer.final:
            if chunks is not None:
                chunks.put(body)
            self._end(pending, Result(record=record, content_type=answer.content_type, body=body))
            return
        if chunks is None:
            chunks = pending.chunks = Chunks()
            pending.resolve(Result(record=record, content_type=answer.content_type, chunks=chunks))
        chunks.put(body)
        if chunks.buffered_bytes > self.config.stream_buffer_bytes:
            self._abandon(pending, RejectReason.FAILED, "the answer came faster than it was read: read it faster")

    def run_finished(self, gpu_id: str, model: str, inference_s: float) -> None:
        self._learned(gpu_id, model).runs += 1
        self._handle(RunFinished(gpu_id, model, inference_s))

    def _learned(self, gpu_id: str, model: str) -> Learned:
        """What is counted there, or nowhere: of a version, or a GPU, that is gone."""
        version = self.functions.versions.get(model)
        gpu = self.scheduler.cluster.gpus.get(gpu_id)
        return Learned() if version is None or gpu is None else version.learned[gpu.kind]

    def run_failed(self, gpu_id: str, model: str, kind: FailureKind, reason: str, answered: tuple[int, ...]) -> None:
        log.warning("%s failed on %s (%s): %s", model, gpu_id, kind.value, reason)
        broken = self._break_streams(gpu_id, reason)
        self._handle_failure(kind, RunFailed(gpu_id, model, kind, reason, answered + broken))

    def _handle_failure(self, kind: FailureKind, event: Event) -> None:
        """The calls that end because of it shall say in which way their process failed."""
        self._failing = kind
        self._handle(event)
        self._failing = None

    def process_lost(self, gpu_id: str, model: str, reason: str) -> None:
        log.warning("the process of %s on %s is gone: %s", model, gpu_id, reason)
        self._handle(ProcessLost(gpu_id, model, reason))

    def gpu_lost(self, gpu_id: str, reason: str) -> None:
        log.error("GPU %s is lost: %s", gpu_id, reason)
        self.lost_gpus[gpu_id] = reason
        for request_id in self._break_streams(gpu_id, reason):
            self._handle(RequestCancelled(request_id))
        self._handle(GpuLost(gpu_id, reason))

    def logged(self, model: str, line: str) -> None:
        function = model.rpartition("@")[0] or model
        self.logbook.write(LogLine(name=function, instance=model, timestamp_s=self._unix_time(), text=line))

    def _break_streams(self, gpu_id: str, reason: str) -> tuple[int, ...]:
        """End the answers that a failed GPU process had begun: what is sent cannot be taken back and tried again."""
        begun = [each for each in self.calls.values() if each.gpu_id == gpu_id and each.chunks is not None]
        for pending in begun:
            self._reject(pending, RejectReason.FAILED, f"the answer broke off: {reason}")
        return tuple(pending.request_id for pending in begun)

    # Time

    def now_s(self) -> float:
        """The control loop's clock, which all its times are on."""
        return self._now()

    def unix_ns(self, moment_s: float) -> int:
        """A moment on that clock as Unix time, in nanoseconds."""
        return int((self.started_unix_s + moment_s - self.started_s) * 1e9)

    def uptime_s(self) -> float:
        return self._now() - self.started_s
