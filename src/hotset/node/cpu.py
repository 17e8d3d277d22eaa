"""CPU functions: plain functions that need no GPU and no scheduler, one process each, started at the first call."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from time import monotonic

import msgspec

from hotset.node.frames import LoadOrder
from hotset.node.host_memory import host_memory
from hotset.node.interface import Answer, Call, LaunchSpec, NodeListener, ProcessReport
from hotset.node.process import Ending, ModelProcess, ProcessState
from hotset.node.spawner import ProcessSource, Spawner
from hotset.vocabulary import FailureKind

MAX_IN_FLIGHT = 64
"""Calls a process has at most; the others wait in the node."""
IDLE_S = 60.0
"""A process without calls ends after this."""
FIRST_BACK_OFF_S = 0.5
LONGEST_BACK_OFF_S = 60.0
"""After too many failures in a row, or one load that failed, the next start waits; the wait doubles each time."""

FAILURES_IN_A_ROW = 3
"""So often a process that had loaded is replaced at once."""

_STATUS = {FailureKind.HANG: 504, FailureKind.OUT_OF_MEMORY: 507}
_NOT_NOW = 503
_FAILED = 500


class _Function:
    """One plain function: its process, if there is one, and the calls that wait for it."""

    def __init__(self, spec: LaunchSpec) -> None:
        self.spec = spec
        self.process: ModelProcess | None = None
        self.sent: deque[Call] = deque()
        """In the process, oldest first."""
        self.suspects = 0
        """So many of the next calls go one at a time: a process has died under them."""
        self.waiting: deque[Call] = deque()
        self.failures = 0
        self.retry_at_s = 0.0
        self.reason = ""
        self.idle: asyncio.TimerHandle | None = None


class CpuPool:
    """Runs plain functions. Every call ends with a final ``Answer`` to the listener, also when its process fails
    (status 500, 503, 504 or 507, a JSON error); the listener is never called from inside ``run``.

    A process has several calls at a time, and when it dies the one to blame is not known: they all run again, one at a
    time, and the one that is alone when it happens again has failed.
    """

    def __init__(self, *, source: ProcessSource | None = None, idle_s: float = IDLE_S) -> None:
        self._source = source or Spawner()
        self._idle_s = idle_s
        self._listener: NodeListener | None = None
        self._functions: dict[str, _Function] = {}
        self._where: dict[int, _Function] = {}
        self._alive: dict[ModelProcess, _Function] = {}
        self._emptied: asyncio.Future[None] | None = None

    async def start(self, listener: NodeListener) -> None:
        self._listener = listener

    async def stop(self) -> None:
        """End every process; what still waits is answered 503. Returns when all are reaped."""
        self._emptied = asyncio.get_running_loop().create_future()
        for model in list(self._functions):
            self.forget(model)
        if self._alive:
            await self._emptied
        self._source.close()

    def run(self, spec: LaunchSpec, call: Call) -> None:
        """Run one call; the first of a function starts its process."""
        function = self._functions.get(spec.model)
        if function is None:
            function = self._functions[spec.model] = _Function(spec)
        self._where[call.request_id] = function
        process = function.process
        if process is None:
            left_s = function.retry_at_s - monotonic()
            if left_s > 0:
                message = f"{spec.model} failed ({function.reason}): it is tried again in {left_s:.1f} s"
                self._loop.call_soon(self._refuse, call.request_id, _NOT_NOW, message)
                return
            self._start(function)
        elif process.state in _WORKING and not function.waiting and process.in_flight < self._most(function):
            self._send(function, process, call)
            return
        function.waiting.append(call)

    def cancel(self, request_id: int) -> None:
        """The client left: a waiting call is forgotten, a streamed answer closed."""
        function = self._where.get(request_id)
        if function is None:
            return
        if function.process is None or not function.process.cancel(request_id):
            self._where.pop(request_id)
            function.waiting = deque(call for call in function.waiting if call.request_id != request_id)

    def forget(self, model: str) -> None:
        """The version is gone: its process ends, what waits for it is answered 503."""
        function = self._functions.pop(model, None)
        if function is None:
            return
        self._wanted(function)
        if function.process is not None:
            function.process.end()
        self._refuse_all(function.waiting, _NOT_NOW, f"{model} was removed")

    def processes(self) -> list[ProcessReport]:
        """As a node's, with an empty GPU id."""
        reports = []
        for process in list(self._alive):
            host = host_memory(process.pid)
            reports.append(
                ProcessReport(
                    gpu_id="",
                    model=process.spec.model,
                    pid=process.pid,
                    device_bytes=0,
                    private_bytes=host.private_bytes,
                    shared_bytes=host.shared_bytes,
                )
            )
        return reports

    def pids(self) -> Mapping[int, str]:
        """As a node's."""
        return {process.pid: process.spec.model for process in self._alive}

    # What the processes report (ProcessOwner)

    def process_loaded(self, process: ModelProcess, memory_bytes: int) -> None:
        self._feed(self._alive[process], process)

    def process_answered(self, process: ModelProcess, answer: Answer) -> None:
        if answer.final:
            self._where.pop(answer.request_id, None)
        self._report.answered(answer)

    def process_ran(self, process: ModelProcess, inference_s: float) -> None:
        function = self._alive[process]
        function.failures = 0
        function.sent.popleft()
        function.suspects = max(0, function.suspects - 1)
        if function.waiting:
            self._feed(function, process)
        elif not process.in_flight:
            self._unwanted(function)

    def process_measured(self, process: ModelProcess, memory_bytes: int | None) -> None:
        """No account is kept of it, so it is not measured."""

    def process_logged(self, process: ModelProcess, line: str) -> None:
        self._report.logged(process.spec.model, line)

    def process_ended(self, process: ModelProcess, ending: Ending) -> None:
        function = self._alive.pop(process)
        function.process = None
        self._wanted(function)
        if ending.kind is None:
            self._refuse_all(function.sent, _NOT_NOW, "its process was asked to end")
        else:
            self._failed(function, ending, loaded=process.loaded)
        # More calls may have come while it ended.
        if function.waiting and function.spec.model in self._functions:
            self._start(function)
        if self._emptied is not None and not self._alive:
            self._emptied.set_result(None)

    # Inside

    @property
    def _report(self) -> NodeListener:
        assert self._listener is not None, "start() comes first"
        return self._listener

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def _start(self, function: _Function) -> None:
        spec = function.spec
        order = LoadOrder(model=spec.model, entry=spec.entry, code_path=spec.code_path, device="cpu")
        process = ModelProcess(self, spec, order, self._source, {"CUDA_VISIBLE_DEVICES": "", **spec.env})
        function.process = process
        self._alive[process] = function
        process.start()

    def _send(self, function: _Function, process: ModelProcess, call: Call) -> None:
        self._wanted(function)
        function.sent.append(call)
        process.run([call])

    def _most(self, function: _Function) -> int:
        return 1 if function.suspects else MAX_IN_FLIGHT

    def _feed(self, function: _Function, process: ModelProcess) -> None:
        while function.waiting and process.in_flight < self._most(function):
            self._send(function, process, function.waiting.popleft())
        if not process.in_flight:
            self._unwanted(function)

    def _unwanted(self, function: _Function) -> None:
        if function.idle is None:
            function.idle = self._loop.call_later(self._idle_s, self._idle_over, function)

    def _wanted(self, function: _Function) -> None:
        if function.idle is not None:
            function.idle.cancel()
            function.idle = None

    def _idle_over(self, function: _Function) -> None:
        function.idle = None
        if function.process is not None:
            function.process.end()

    def _failed(self, function: _Function, ending: Ending, *, loaded: bool) -> None:
        """A call that was alone fails with its process; others get another process, as long as that seems to help."""
        assert ending.kind is not None
        function.failures += 1
        function.reason = ending.reason
        message = f"{function.spec.model} failed: {ending.reason}"
        if len(function.sent) == 1:
            self._refuse_all(function.sent, _STATUS.get(ending.kind, _FAILED), message)
            function.suspects = max(0, function.suspects - 1)
        elif function.sent:
            function.suspects = len(function.sent)
            function.waiting.extendleft(reversed(function.sent))
            function.sent.clear()
        if loaded and function.failures < FAILURES_IN_A_ROW:
            return
        exponent = min(function.failures - 1, 16)
        function.retry_at_s = monotonic() + min(LONGEST_BACK_OFF_S, FIRST_BACK_OFF_S * 2**exponent)
        self._refuse_all(function.waiting, _NOT_NOW, f"{message}; try again")

    def _refuse_all(self, calls: deque[Call], status: int, message: str) -> None:
        for call in calls:
            self._loop.call_soon(self._refuse, call.request_id, status, message)
        calls.clear()

    def _refuse(self, request_id: int, status: int, message: str) -> None:
        if self._where.pop(request_id, None) is not None:
            self._report.answered(
                Answer(request_id=request_id, status=status, body=msgspec.json.encode({"error": message}))
            )


_WORKING = (ProcessState.READY, ProcessState.RUNNING)
