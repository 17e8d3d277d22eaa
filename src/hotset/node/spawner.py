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
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from hotset.node.slots import create_arena

_SOCKET_BUFFER_BYTES = 1024 * 1024


class ProcessHandle(Protocol):
    """A started process; ``pid`` is also its process group."""

    @property
    def pid(self) -> int: ...

    def reap(self) -> int:
        """Its return code, negative for a signal; called when it has ended (its pidfd is readable)."""
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


class ProcessSource(Protocol):
    """Yields started processes. Raises ``OSError`` when it cannot."""

    def spawn(self, python: str, env: Mapping[str, str]) -> Spawned:
        """``python``: interpreter of the function's environment. ``env``: variables on top of the node's own."""
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

    def reap(self) -> int:
        return self.popen.wait()


class Spawner:
    """A new interpreter for every process, and a guard for them all."""

    def __init__(self) -> None:
        self._guard: subprocess.Popen[bytes] | None = None

    def spawn(self, python: str, env: Mapping[str, str]) -> Spawned:
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            log_fd, log_write_fd = os.pipe()
            undo.callback(os.close, log_fd)
            arena_fd = create_arena()
            undo.callback(os.close, arena_fd)
            ours.setblocking(False)
            os.set_blocking(log_fd, False)
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
            try:
                popen = subprocess.Popen(
                    [
                        *(python, "-P", "-m", "hotset.node.worker"),
                        *("--socket", str(theirs.fileno()), "--arena", str(arena_fd), "--parent", str(os.getpid())),
                    ],
                    env=child_environment(env),
                    stdin=subprocess.DEVNULL,
                    stdout=log_write_fd,
                    stderr=log_write_fd,
                    pass_fds=(theirs.fileno(), arena_fd),
                    process_group=0,
                )
            finally:
                theirs.close()
                os.close(log_write_fd)
            self._tell_guard(f"+{popen.pid}\n")
            undo.callback(popen.wait)
            undo.callback(popen.kill)
            pidfd = os.pidfd_open(popen.pid)
            undo.pop_all()
        return Spawned(_Popen(popen), ours, arena_fd, log_fd, pidfd)

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
    """The node's own variables, less hotset's settings, with the function's on top."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HOTSET_")}
    return inherited | dict(env)


def return_code_text(code: int) -> str:
    """``killed by SIGSEGV`` or ``exited with code 3``."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
