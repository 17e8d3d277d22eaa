"""Where GPU processes come from: one call that yields a started process, waiting for its LOAD.

``Spawner`` starts a fresh interpreter each time. Anything with the same methods (a pool, a zygote) can take its
place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from hotset.node.slots import create_arena

_SOCKET_BUFFER_BYTES = 1024 * 1024


class ProcessHandle(Protocol):
    """A started process; ``pid`` is also its process group."""

    @property
    def pid(self) -> int: ...

    def reap(self, reaped: Callable[[int], object]) -> None:
        """Call back, now or soon, with its return code, negative for a signal. Only when it has ended (its pidfd is
        readable)."""
        ...


class Spawned(msgspec.Struct, frozen=True):
    """A process and the node's ends of what connects to it; who spawned it closes them."""

    process: ProcessHandle
    socket: socket.socket
    """Stream socket for frames, non-blocking."""
    arena_fd: int
    log_fd: int
    """Read end of its stdout and stderr, non-blocking."""
    pidfd: int
    """Readable when it has ended."""
    context_bytes: int = 0
    """Device memory that it took when it opened its device, if it has."""

    def close(self) -> None:
        """Close the node's ends: of a process that nobody used."""
        self.socket.close()
        for descriptor in (self.arena_fd, self.log_fd, self.pidfd):
            os.close(descriptor)


class Connections:
    """What connects the node to one process, before there is a process: raises ``OSError`` when it cannot be had."""

    def __init__(self) -> None:
        with contextlib.ExitStack() as undo:
            self._ours, self._theirs = socket.socketpair()
            undo.callback(self._ours.close)
            undo.callback(self._theirs.close)
            self._log_fd, self._log_write_fd = os.pipe()
            undo.callback(os.close, self._log_fd)
            undo.callback(os.close, self._log_write_fd)
            self._arena_fd = create_arena()
            undo.pop_all()
        self._ours.setblocking(False)
        os.set_blocking(self._log_fd, False)
        for end in (self._ours, self._theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)

    @property
    def theirs(self) -> tuple[int, int, int]:
        """Descriptors the process needs: socket, log (to write), arena (shared by both)."""
        return self._theirs.fileno(), self._log_write_fd, self._arena_fd

    def close_theirs(self) -> None:
        """The process has its own copies."""
        self._theirs.close()
        os.close(self._log_write_fd)

    def close(self) -> None:
        """Close the node's ends; nothing came of it."""
        self._ours.close()
        os.close(self._log_fd)
        os.close(self._arena_fd)

    def spawned(self, process: ProcessHandle) -> Spawned:
        """The node's ends, now those of this process; raises ``OSError`` when it is gone already."""
        return Spawned(process, self._ours, self._arena_fd, self._log_fd, os.pidfd_open(process.pid))


class ProcessSource(Protocol):
    """Yields started processes. Raises ``OSError`` when it cannot."""

    def spawn(self, python: str, env: Mapping[str, str]) -> Spawned:
        """``python``: interpreter of the function's environment. ``env``: variables on top of the node's own."""
        ...

    def prepare(self, python: str, modules: Iterable[str]) -> None:
        """Processes of this interpreter will import these modules; have them at hand if that makes a difference."""
        ...

    def forget(self, pid: int) -> None:
        """This process was reaped."""
        ...

    def close(self) -> None: ...


class _Popen(msgspec.Struct, frozen=True):
    popen: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.popen.pid

    def reap(self, reaped: Callable[[int], object]) -> None:
        reaped(self.popen.wait())


class Spawner:
    """A new interpreter for every process, and a guard for them all. ``program``: what the interpreter runs."""

    def __init__(self, program: Sequence[str] = ("-P", "-m", "hotset.node.worker")) -> None:
        self._program = program
        self._guard: subprocess.Popen[bytes] | None = None

    def spawn(self, python: str, env: Mapping[str, str]) -> Spawned:
        connections = Connections()
        socket_fd, log_fd, arena_fd = connections.theirs
        try:
            popen = subprocess.Popen(
                [
                    *(python, *self._program),
                    *("--socket", str(socket_fd), "--arena", str(arena_fd), "--parent", str(os.getpid())),
                ],
                env=child_environment(env),
                stdin=subprocess.DEVNULL,
                stdout=log_fd,
                stderr=log_fd,
                pass_fds=(socket_fd, arena_fd),
                process_group=0,
            )
        except OSError:
            connections.close()
            raise
        finally:
            connections.close_theirs()
        self.guard(popen.pid)
        try:
            return connections.spawned(_Popen(popen))
        except OSError:
            popen.kill()
            popen.wait()
            connections.close()
            raise

    def prepare(self, python: str, modules: Iterable[str]) -> None:
        """A fresh interpreter imports everything itself."""

    def guard(self, pid: int) -> None:
        """Have the process group ended when the node is gone, until ``forget``."""
        self._tell_guard(f"+{pid}\n")

    def forget(self, pid: int) -> None:
        self._tell_guard(f"-{pid}\n")

    def close(self) -> None:
        """The guard ends by itself when its pipe does."""
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            self._guard.wait()
        self._guard = None

    def _tell_guard(self, line: str) -> None:
        if self._guard is None:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,
            )
        assert self._guard.stdin is not None
        try:
            self._guard.stdin.write(line.encode())
        except BrokenPipeError:
            # Somebody killed it. A new one guards what starts from here on.
            self._guard.wait()
            self._guard = None


def child_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The node's own variables, less hotset's settings, with the function's on top.

    Bytecode is always kept: process after process imports the same frameworks, and compiling torch anew each time takes
    seconds.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HOTSET_") and name != "PYTHONDONTWRITEBYTECODE"
    }
    return inherited | dict(env)


def return_code_text(code: int) -> str:
    """``killed by SIGSEGV`` or ``exited with code 3``."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
