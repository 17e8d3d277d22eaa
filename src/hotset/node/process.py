"""One process of one model, from spawn to reaping: the same for a GPU's processes and for CPU functions.

    STARTING --loaded--> READY --run--> RUNNING --ran--> READY --end--> ENDING --reaped--> ENDED
                         READY --offload--> OFFLOADING --> PARKED --restore--> RESTORING --> READY

Whatever goes wrong, in any state, leads to ENDING: the process group is killed, and its owner hears of it once, when
the process is reaped and what it had sent before has been delivered. Its memory is free by then.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from time import monotonic
from typing import Protocol

import msgspec

from hotset.deadline import Deadline
from hotset.node.frames import Failed, FrameError, Kind, Loaded, LoadOrder, Measured, Moved, control
from hotset.node.interface import Answer, Call, LaunchSpec
from hotset.node.logs import LogReader
from hotset.node.spawner import ProcessSource, Spawned, return_code_text
from hotset.node.transport import ProcessTransport
from hotset.vocabulary import FailureKind

GRACE_S = 2.0
"""Between asking a process to end and SIGKILL."""
_LAST_WORDS_S = 1.0
"""How long the socket of a dead process may stay open (somebody else holds it) before it is closed for it."""

_REASON_CHARACTERS = 500
"""How much of a process's own words goes into a failure's reason."""


class ProcessState(Enum):
    STARTING = "starting"
    READY = "ready"
    RUNNING = "running"
    OFFLOADING = "offloading"
    PARKED = "parked"
    RESTORING = "restoring"
    ENDING = "ending"
    ENDED = "ended"


class Ending(msgspec.Struct, frozen=True):
    """Why a process is gone."""

    kind: FailureKind | None
    """None: it was asked to end."""
    reason: str
    started: bool = True
    """False: the operating system would not start it."""
    memory_bytes: int | None = None
    """What a load that did not fit would have taken."""


class ProcessOwner(Protocol):
    """Who started a process. The methods must not raise."""

    def process_loaded(self, process: ModelProcess, memory_bytes: int) -> None: ...

    def process_answered(self, process: ModelProcess, answer: Answer) -> None: ...

    def process_ran(self, process: ModelProcess, inference_s: float) -> None:
        """The oldest run is done."""
        ...

    def process_measured(self, process: ModelProcess, memory_bytes: int | None) -> None:
        """Its model takes this much now; None: it cannot tell."""
        ...

    def process_logged(self, process: ModelProcess, line: str) -> None: ...

    def process_ended(self, process: ModelProcess, ending: Ending) -> None: ...


class ModelProcess:
    """The process of one model. Make it and ``start`` it on the running event loop."""

    def __init__(
        self, owner: ProcessOwner, spec: LaunchSpec, order: LoadOrder, source: ProcessSource, env: Mapping[str, str]
    ) -> None:
        self.spec = spec
        self.state = ProcessState.STARTING
        self.pid = 0
        self.loaded = False
        """Its load succeeded, some time."""
        self.memory_bytes = 0
        """GPU memory as measured: after the load, an offload, a restore, some runs."""
        self.context_bytes = 0
        """Of that, what no framework in it knows of. Before it is loaded: what it took before it was this model's."""
        self.report: Loaded | None = None
        """What it said of its load."""
        self.load_began_s = 0.0
        """When it was told to load."""
        self.ahead = False
        """It imports, or has imported, its function before it is told to load."""
        self._owner = owner
        self._order = msgspec.structs.replace(order, env=dict(env))
        self._source = source
        self._env = env
        self._loop = asyncio.get_running_loop()
        self._deadline = Deadline(self._expired)
        self._ending: Ending | None = None
        self._spawned: Spawned | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._transport: ProcessTransport | None = None
        self._log: LogReader | None = None
        self._moved: Callable[[Moved], None] | None = None
        self._runs: deque[tuple[int, ...]] = deque()
        self._ran = False
        """It has, and has not said since what it takes."""
        self._outstanding: set[int] = set()
        self._gone = False
        """Its process id may be another's by now."""
        self._return_code: int | None = None
        self._closed = False
        self._oom_kills = 0

    # What its owner asks for

    def start(self) -> None:
        """Spawn it and have it load; answered by ``process_loaded`` or ``process_ended``, never from inside."""
        self.load_began_s = monotonic()
        self._spawn(Kind.LOAD)

    def prepare(self) -> None:
        """Spawn it and have it import its function; ``load`` follows."""
        self.ahead = True
        self._spawn(Kind.IMPORT)

    def load(self, limit_bytes: int) -> None:
        """What ``start`` does, of a process that may have been prepared. ``limit_bytes``: what it may take."""
        self._order = msgspec.structs.replace(self._order, limit_bytes=limit_bytes)
        if self._transport is None:
            self.start()
            return
        self.load_began_s = monotonic()
        self._transport.send(control(Kind.LOAD, self._order))
        self._deadline.set(self.spec.load_timeout_s)

    def _spawn(self, order: Kind) -> None:
        self._oom_kills = _oom_kills()
        try:
            spawned = self._source.spawn(self.spec.python, self._env)
        except OSError as error:
            self.state = ProcessState.ENDED
            self._loop.call_soon(self._owner.process_ended, self, _not_started(self.spec, error))
            return
        self._spawned = spawned
        self.pid = spawned.process.pid
        self.context_bytes = spawned.context_bytes
        self._log = LogReader(spawned.log_fd, lambda line: self._owner.process_logged(self, line))
        self._transport = ProcessTransport(self, spawned.arena_fd)
        self._transport.send(control(order, self._order))
        self._loop.add_reader(spawned.pidfd, self._exited)
        self._deadline.set(self.spec.load_timeout_s)
        self._connecting = self._loop.create_task(self._connect(spawned, self._transport))

    def run(self, calls: Sequence[Call]) -> None:
        """Answer these calls; several runs are done in order. Only for a READY or RUNNING process."""
        assert self._transport is not None
        request_ids = tuple([call.request_id for call in calls])
        self._runs.append(request_ids)
        self._outstanding.update(request_ids)
        if self.state is ProcessState.READY:
            self.state = ProcessState.RUNNING
            self._deadline.set(self.spec.timeout_s)
        self._transport.send_run(calls)

    def offload(self, moved: Callable[[Moved], None]) -> None:
        """Park the model; answered by ``moved`` or ``process_ended``. Only for a READY process."""
        self._move(Kind.OFFLOAD, ProcessState.OFFLOADING, moved)

    def restore(self, moved: Callable[[Moved], None]) -> None:
        """Bring the model back; answered as ``offload``. Only for a PARKED process."""
        self._move(Kind.RESTORE, ProcessState.RESTORING, moved)

    def _move(self, order: Kind, state: ProcessState, moved: Callable[[Moved], None]) -> None:
        assert self._transport is not None
        self.state = state
        self._moved = moved
        self._deadline.set(self.spec.load_timeout_s)
        self._transport.send(control(order))

    def cancel(self, request_id: int) -> bool:
        """The client of this request left. False: it is not (or no longer) among this process's."""
        if request_id not in self._outstanding or self._transport is None:
            return False
        self._transport.send(control(Kind.CANCEL, id=request_id))
        return True

    def end(self, because: Ending | None = None) -> None:
        """End it: in good order when it is idle, by SIGTERM when it is not, by SIGKILL after ``GRACE_S``."""
        if self.state in (ProcessState.ENDING, ProcessState.ENDED):
            return
        idle = self.state in (ProcessState.READY, ProcessState.PARKED)
        self._end_because(because or Ending(None, "asked to end"))
        if idle and self._transport is not None:
            self._transport.send(control(Kind.BYE))
        else:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    @property
    def in_flight(self) -> int:
        """Runs that are not done."""
        return len(self._runs)

    @property
    def answered(self) -> tuple[int, ...]:
        """Requests of the oldest unfinished run that have their answer."""
        run = self._runs[0] if self._runs else ()
        return tuple(request_id for request_id in run if request_id not in self._outstanding)

    # What the process says (FrameHandler)

    def on_loaded(self, loaded: Loaded) -> None:
        if self.state is ProcessState.ENDING:
            return
        possible = loaded.memory_bytes >= 0 and 0 <= loaded.import_s < math.inf and 0 <= loaded.load_s < math.inf
        if self.state is not ProcessState.STARTING or not possible:
            raise FrameError("an untimely or impossible LOADED")
        self.state = ProcessState.READY
        self.report = loaded
        self.loaded = True
        self.memory_bytes = loaded.memory_bytes
        self._deadline.clear()
        self._source.prepare(self.spec.python, loaded.frameworks)
        self._owner.process_loaded(self, loaded.memory_bytes)

    def on_moved(self, moved: Moved) -> None:
        if self.state is ProcessState.ENDING:
            return
        report, self._moved = self._moved, None
        if report is None or moved.device_bytes < 0 or moved.host_bytes < 0:
            raise FrameError("an untimely or impossible MOVED")
        self.state = ProcessState.PARKED if self.state is ProcessState.OFFLOADING else ProcessState.READY
        self._deadline.clear()
        report(moved)

    def on_measured(self, measured: Measured) -> None:
        if self.state is ProcessState.ENDING:
            return
        counted = self._order.limit_bytes is not None
        if not counted or not self._ran or (measured.memory_bytes is not None and measured.memory_bytes < 0):
            raise FrameError("an untimely or impossible MEASURED")
        self._ran = False
        self._owner.process_measured(self, measured.memory_bytes)

    def on_answer(self, answer: Answer) -> None:
        if answer.request_id not in self._outstanding:
            raise FrameError("an answer to a request it does not have")
        if answer.final:
            self._outstanding.discard(answer.request_id)
        self._owner.process_answered(self, answer)

    def on_ran(self, inference_s: float) -> None:
        if not self._runs or not self._outstanding.isdisjoint(self._runs[0]):
            raise FrameError("the end of a run that has unanswered calls")
        self._runs.popleft()
        self._ran = True
        if self.state is ProcessState.RUNNING:
            if self._runs:
                self._deadline.set(self.spec.timeout_s)
            else:
                self.state = ProcessState.READY
                self._deadline.clear()
        self._owner.process_ran(self, inference_s)

    def on_failed(self, failed: Failed) -> None:
        # It exits by itself now; the deadline sees to it.
        reason = failed.reason[:_REASON_CHARACTERS]
        self._end_because(Ending(failed.kind, reason, memory_bytes=failed.memory_bytes))

    def on_closed(self, broken: str | None) -> None:
        self._closed = True
        if broken is not None:
            self._end_because(Ending(FailureKind.CRASH, f"sent {broken}"))
        # A process that has closed its socket is of no use, if it is not gone already.
        self._kill()
        self._ended_if_over()

    # Inside

    async def _connect(self, spawned: Spawned, transport: ProcessTransport) -> None:
        try:
            await self._loop.create_unix_connection(lambda: transport, sock=spawned.socket)
        except OSError:
            spawned.socket.close()
            transport.connection_lost(None)
        if self._closed:
            # Lost before it was made: uvloop has closed the descriptor, but the socket object does not know.
            spawned.socket.detach()

    def _end_because(self, ending: Ending) -> None:
        """The first reason counts."""
        if self._ending is None:
            self._ending = ending
            self.state = ProcessState.ENDING
            self._deadline.set(GRACE_S)

    def _expired(self) -> None:
        if self.state is ProcessState.STARTING:
            limit = f"{self.spec.load_timeout_s:g} s: make load faster or raise load_timeout"
            self._end_because(Ending(FailureKind.HANG, f"did not load within {limit}"))
        elif self.state in (ProcessState.OFFLOADING, ProcessState.RESTORING):
            limit = f"{self.spec.load_timeout_s:g} s: raise load_timeout"
            self._end_because(Ending(FailureKind.HANG, f"was not done {self.state.value} within {limit}"))
        elif self.state is ProcessState.RUNNING:
            limit = f"{self.spec.timeout_s:g} s: make predict faster or raise timeout"
            self._end_because(Ending(FailureKind.HANG, f"did not finish a run within {limit}"))
        self._kill()

    def _kill(self) -> None:
        if not self._gone:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _exited(self) -> None:
        """It is a zombie: its children go first, while its process group cannot be anybody else's."""
        assert self._spawned is not None
        self._loop.remove_reader(self._spawned.pidfd)
        os.close(self._spawned.pidfd)
        self._kill()
        self._gone = True
        self._deadline.cancel()
        self._spawned.process.reap(self._reaped)

    def _reaped(self, return_code: int) -> None:
        assert self._transport is not None
        self._return_code = return_code
        self._source.forget(self.pid)
        if not self._closed:
            self._loop.call_later(_LAST_WORDS_S, self._transport.close)
        self._ended_if_over()

    def _ended_if_over(self) -> None:
        if self._return_code is None or not self._closed or self.state is ProcessState.ENDED:
            return
        assert self._log is not None
        self.state = ProcessState.ENDED
        self._log.close()
        self._owner.process_ended(self, self._ending or self._crash(self._return_code, self._log.last_line))

    def _crash(self, return_code: int, last_line: str) -> Ending:
        if return_code == -signal.SIGKILL and _oom_kills() > self._oom_kills:
            return Ending(FailureKind.OUT_OF_MEMORY, "was killed by the kernel because the machine had no memory left")
        words = f"; it last printed: {last_line.strip()[:_REASON_CHARACTERS]}" if last_line else ""
        return Ending(FailureKind.CRASH, return_code_text(return_code) + words)


def _not_started(spec: LaunchSpec, error: OSError) -> Ending:
    if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError):
        return Ending(FailureKind.ERROR, f"{spec.python} cannot be run ({error.strerror}): deploy {spec.model} again")
    return Ending(
        FailureKind.CRASH, f"the system would not start a process ({error.strerror}): free what it lacks", started=False
    )


def _oom_kills() -> int:
    """How often the kernel's out-of-memory killer has struck since boot."""
    with open("/proc/vmstat") as counters:
        for line in counters:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
