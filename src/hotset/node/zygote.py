"""Processes from a pool: forks of a zygote that has the frameworks imported, made before anybody needs them.

    prepare(python, modules) -> zygote imports -> pool of forked processes -> spawn() takes one, the next is forked

A process from the pool gets its function's environment variables with its LOAD order. Variables that only count when
an interpreter starts (``LD_*``, ``PYTHON*``) need a fresh one, as does every interpreter whose zygote is not ready yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from time import monotonic

import msgspec

from hotset.node.spawner import Connections, Spawned, Spawner, child_environment
from hotset.node.worker.zygote import MESSAGE_BYTES, Exited, Forked, Message, Ready

MOST_ZYGOTES = 8
"""Interpreters with a zygote of their own; the functions of further ones start slowly."""
MOST_LIVES = 3
"""How often a zygote that dies is started again."""
STATUS_WITHIN_S = 1.0
"""Longest wait for a dead child's status; the zygote reports it within a millisecond."""
FORK_WITHIN_S = 0.5
REFILL_AFTER_S = 0.05
"""When a process that was taken from a pool is replaced; at once if the pool is empty and another is wanted."""
STARTUP_ONLY = ("LD_", "PYTHON", "GLIBC_", "MALLOC_")
_FORKABLE = {
    **dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
"""numpy's BLAS starts its threads when it is imported, and no thread may be there when the zygote forks. A module that
asks for ``torch.cuda.is_available()`` when it is imported would start CUDA's runtime, which is of no use to a fork then
(PyTorch's CUDA notes, "poison fork")."""


def _environment() -> dict[str, str]:
    """A zygote's. Its forks are told which GPU is theirs; it is told of none, because where a MIG instance is named
    PyTorch asks CUDA after all."""
    environment = child_environment(_FORKABLE)
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    return environment


class _Child(msgspec.Struct, frozen=True):
    """A fork of the zygote's, as a ``ProcessHandle``."""

    pid: int
    zygote: _Zygote

    def reap(self, reaped: Callable[[int], object]) -> None:
        self.zygote.reap(self.pid, reaped)


class _Zygote:
    """The node's end of one zygote."""

    def __init__(
        self,
        python: str,
        modules: tuple[str, ...],
        spawner: Spawner,
        pool_size: int,
        filled: Callable[[], object],
    ) -> None:
        self.modules = modules
        self.ready = False
        self.dead = False
        self.refused: tuple[str, ...] = ()
        self.pool: deque[Spawned] = deque()
        self._spawner = spawner
        self._pool_size = pool_size
        self._filled = filled
        self._retired = False
        self._forking: deque[Connections] = deque()
        self._statuses: dict[int, int] = {}
        self._reaping: dict[int, Callable[[int], object]] = {}
        """Children that are gone, and whom to tell their status."""
        self._unwanted: set[int] = set()
        """Children that were ended here; their status is of no interest."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        try:
            self._popen = subprocess.Popen(
                [
                    *(python, "-P", "-m", "hotset.node.worker.zygote", "--socket", str(theirs.fileno())),
                    *("--parent", str(os.getpid()), "--modules", ",".join(modules)),
                ],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                process_group=0,
            )
        except OSError:
            self._control.close()
            raise
        finally:
            theirs.close()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._control, self._readable)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def take(self) -> Spawned | None:
        """A process that waits for its order; None if it cannot be had within ``FORK_WITHIN_S``."""
        deadline_s = monotonic() + FORK_WITHIN_S
        self._fill()
        while not self.pool and not self.dead and (left_s := deadline_s - monotonic()) > 0:
            select.select([self._control], [], [], left_s)
            self._readable()
        return self._pop() if self.pool else None

    def spare(self) -> Spawned | None:
        """One of a full pool, whose place is taken again before anybody misses it; None: the pool is not full."""
        return self._pop() if len(self.pool) >= self._pool_size else None

    def _pop(self) -> Spawned:
        # The caller's load comes first: a fork beside it takes milliseconds of a core that it could use.
        self._loop.call_later(REFILL_AFTER_S, self._fill)
        return self.pool.popleft()

    def retire(self) -> None:
        """Fork no more; it ends with its last child."""
        self._retired = True
        while self.pool:
            self._discard(self.pool.popleft())
        with contextlib.suppress(OSError):
            self._control.send(b"retire")

    def close(self) -> None:
        """End it; its children end with it."""
        self._retired = True
        while self.pool:
            self._discard(self.pool.popleft())
        self._lost()

    def reap(self, pid: int, reaped: Callable[[int], object]) -> None:
        """Call back with the return code of a child that is gone, once the zygote has told it."""
        self._reaping[pid] = reaped
        if pid in self._statuses or self.dead:
            self._report(pid)
        else:
            self._loop.call_later(STATUS_WITHIN_S, self._report, pid)

    def _report(self, pid: int) -> None:
        """A child whose zygote is gone was killed with it."""
        reaped = self._reaping.pop(pid, None)
        if reaped is not None:
            status = self._statuses.pop(pid, None)
            reaped(-signal.SIGKILL if status is None else os.waitstatus_to_exitcode(status))

    def _fill(self) -> None:
        """Ask for as many forks as the pool lacks."""
        while self.ready and not self._retired and not self.dead:
            if len(self.pool) + len(self._forking) >= self._pool_size:
                return
            try:
                connections = Connections()
            except OSError:
                return
            try:
                socket.send_fds(self._control, [b"fork"], connections.theirs)
            except OSError:
                connections.close()
                return
            connections.close_theirs()
            self._forking.append(connections)

    def _readable(self) -> None:
        while not self.dead:
            try:
                message = self._control.recv(MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if not message:
                self._lost()
                return
            self._take_note(msgspec.msgpack.decode(message, type=Message))

    def _take_note(self, message: Message) -> None:
        match message:
            case Ready():
                self.ready, self.modules, self.refused = True, message.modules, message.refused
                self._fill()
            case Forked():
                connections = self._forking.popleft()
                try:
                    spawned = connections.spawned(_Child(message.pid, self))
                except OSError:  # it is gone already
                    connections.close()
                    self._fill()
                    return
                self._spawner.guard(message.pid)
                if self._retired:
                    self._discard(spawned)
                else:
                    self.pool.append(spawned)
                    if len(self.pool) >= self._pool_size:
                        self._loop.call_soon(self._filled)  # not now: ``take`` reads too, for who wants this one
            case Exited():
                if message.pid in self._unwanted:
                    self._unwanted.discard(message.pid)
                    return
                self._statuses[message.pid] = message.status
                self._loop.call_soon(self._report, message.pid)  # not now: ``take`` reads too, for a load that begins
                gone = next((each for each in self.pool if each.process.pid == message.pid), None)
                if gone is not None:  # somebody killed a process that nobody used yet
                    self.pool.remove(gone)
                    self._discard(gone)
                    self._fill()

    def _discard(self, spawned: Spawned) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(spawned.process.pid, signal.SIGKILL)
        spawned.close()
        self._spawner.forget(spawned.process.pid)
        if self._statuses.pop(spawned.process.pid, None) is None:
            self._unwanted.add(spawned.process.pid)

    def _lost(self) -> None:
        if not self.dead:
            self.dead, self.ready = True, False
            self._loop.remove_reader(self._control)
            self._control.close()
            # It has closed its end, so it is going anyway.
            self._popen.kill()
            self._popen.wait()
            while self._forking:
                self._forking.popleft().close()
            for pid in self._reaping:
                self._loop.call_soon(self._report, pid)


class ZygoteSource:
    """A ``ProcessSource`` with a zygote and a pool for each interpreter, and a ``Spawner`` for what they cannot do."""

    def __init__(self, *, pool_size: int = 2) -> None:
        self._pool_size = pool_size
        self._spawner = Spawner()
        self._zygotes: dict[str, _Zygote] = {}
        self._former: dict[str, _Zygote] = {}
        """Those that serve until their successors, who import more, are ready."""
        self._retired: list[_Zygote] = []
        self._lives: dict[str, int] = {}
        self._modules: dict[str, tuple[str, ...]] = {}
        self._watching: list[Callable[[], object]] = []

    def prepare(self, python: str, modules: Iterable[str]) -> None:
        """Functions of this interpreter import these modules: have them imported. Returns at once."""
        known = self._modules.get(python, ())
        wanted = (*known, *(name for name in modules if name not in known))
        self._modules[python] = wanted
        zygote = self._zygotes.get(python)
        if zygote is not None and not zygote.dead and set(wanted) <= {*zygote.modules, *zygote.refused}:
            return
        self._start(python, wanted)

    def ready(self, python: str) -> bool:
        """Whether processes of this interpreter come from a zygote that has imported all it was told of."""
        zygote = self._zygotes.get(python)
        return zygote is not None and zygote.ready

    def waiting(self, python: str) -> int:
        """Processes of this interpreter that wait for an order."""
        zygote = self._zygotes.get(python)
        return 0 if zygote is None else len(zygote.pool)

    def zygote_pid(self, python: str) -> int:
        """Process id of the interpreter's zygote; ``KeyError``: it has none."""
        return self._zygotes[python].pid

    def spare(self, python: str, module: str) -> Spawned | None:
        """A waiting process that has this module imported, and that nobody will miss. None: there is none now; who does
        ``watch`` is told when there may be."""
        zygote = self._zygotes.get(python)
        return zygote.spare() if zygote is not None and zygote.ready and module in zygote.modules else None

    def watch(self, filled: Callable[[], object]) -> None:
        """Have ``filled`` called from the loop whenever a pool is full again."""
        self._watching.append(filled)

    def unwatch(self, filled: Callable[[], object]) -> None:
        self._watching.remove(filled)

    def _filled(self) -> None:
        for each in tuple(self._watching):
            each()

    def spawn(self, python: str, env: Mapping[str, str]) -> Spawned:
        zygote = self._zygotes.get(python)
        if zygote is not None and not any(name.startswith(STARTUP_ONLY) for name in env):
            if zygote.dead:
                self._start(python, self._modules[python])
            elif zygote.ready:
                self._retire(self._former.pop(python, None))
            for each in (zygote, self._former.get(python)):
                if each is not None and each.ready and (spawned := each.take()) is not None:
                    return spawned
        return self._spawner.spawn(python, env)

    def forget(self, pid: int) -> None:
        self._spawner.forget(pid)

    def close(self) -> None:
        for zygote in (*self._zygotes.values(), *self._former.values(), *self._retired):
            zygote.close()
        self._zygotes, self._former, self._retired = {}, {}, []
        self._spawner.close()

    def _start(self, python: str, modules: tuple[str, ...]) -> None:
        """A zygote with these modules in place of the one there is, which serves until the new one is ready, and then
        lives on for the processes it has."""
        old = self._zygotes.get(python)
        if old is None and len(self._zygotes) >= MOST_ZYGOTES:
            return
        if old is not None and old.dead:
            self._lives[python] = self._lives.get(python, 0) + 1
            if self._lives[python] > MOST_LIVES:
                return
            old.close()
        elif old is not None and old.ready:
            self._retire(self._former.pop(python, None))
            self._former[python] = old
        elif old is not None:
            old.close()  # nobody has a process of its
        try:
            self._zygotes[python] = _Zygote(python, modules, self._spawner, self._pool_size, self._filled)
        except OSError:
            self._zygotes.pop(python, None)  # the spawner will say what is wrong, to whoever needs a process

    def _retire(self, zygote: _Zygote | None) -> None:
        if zygote is not None and not zygote.dead:
            zygote.retire()
            self._retired = [each for each in self._retired if not each.dead] + [zygote]
