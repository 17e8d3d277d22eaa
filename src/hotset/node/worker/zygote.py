"""``python -m hotset.node.worker.zygote``: imports the frameworks once, then forks a GPU process whenever asked.

A fork of a process that has torch imported is ready in milliseconds and shares its memory; a new interpreter takes a
second. The zygote has one thread and never touches a device: both would not survive a fork. A module that starts
threads when it is imported is therefore not kept: the zygote begins again without it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import os
import random
import select
import signal
import socket
import sys
from collections.abc import Iterable
from typing import NoReturn

import msgspec

from hotset.node.worker.entry import become_worker
from hotset.node.worker.imports import watched
from hotset.node.worker.orphans import die_with

MESSAGE_BYTES = 4096
_MADV_COLLAPSE = 25
_HUGE_BYTES = 2 << 20


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The imports are done."""

    modules: tuple[str, ...]
    refused: tuple[str, ...]
    """Not importable, or not without starting threads."""


class Forked(msgspec.Struct, tag=True, frozen=True):
    """The answer to a request, which is a message with three descriptors: socket, log and arena."""

    pid: int


class Exited(msgspec.Struct, tag=True, frozen=True):
    """A child is gone. ``status``: as ``waitpid`` has it."""

    pid: int
    status: int


Message = Ready | Forked | Exited


class Zygote:
    """Serves one node over a SOCK_SEQPACKET socket. At its end, zygote and children end."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: set[int] = set()
        self._retired = False

    def main(self, modules: tuple[str, ...], refused: tuple[str, ...]) -> None:
        """Serve until the node closes its end and, if it said RETIRE before, until the last child is gone."""
        ended, wakeup = socket.socketpair()
        for end in (ended, wakeup):
            end.setblocking(False)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        gc.collect()
        gc.freeze()  # a collection in a fork would write to, and so copy, the page of every object imported here
        collapse_pages()
        self._send(Ready(modules, refused))
        while not (self._retired and not self._children):
            readable, _, _ = select.select([self._control, ended], [], [])
            if ended in readable:
                with contextlib.suppress(BlockingIOError):
                    while ended.recv(MESSAGE_BYTES):
                        pass
            self._reap()
            if self._control in readable and not self._receive():
                return

    def _receive(self) -> bool:
        """One request; False: the node is gone."""
        try:
            message, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE_BYTES, 3)
        except ConnectionResetError:  # it went without reading what it was last told
            return False
        if not message:
            return False
        if message == b"retire":
            self._retired = True
            return True
        pid = os.fork()
        if not pid:
            self._become(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        self._children.add(pid)
        self._send(Forked(pid))
        return True

    def _become(self, socket_fd: int, log_fd: int, arena_fd: int) -> NoReturn:
        """In the child: leave everything of the zygote's behind but its imports."""
        parent_pid = os.getppid()
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setpgid(0, 0)
            self._control.close()
            os.dup2(log_fd, 1)
            os.dup2(log_fd, 2)
            os.close(log_fd)
            _reseed()
            # Imported here: it is to touch what a function's import touches.
            from hotset.node.worker.rehearsal import rehearse

            rehearse()
            become_worker(socket_fd, arena_fd, parent_pid)
        finally:
            os._exit(1)

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            self._children.discard(pid)
            self._send(Exited(pid, status))

    def _send(self, message: Message) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the node is gone: the next read says so
            self._control.send(msgspec.msgpack.encode(message))


def collapse_pages() -> None:
    """Have this process's own memory in pages of 2 MiB (Linux 6.1 and later; elsewhere nothing happens).

    A fork copies one entry for each page, and its exit takes each back: 37,000 of them with PyTorch imported, which is
    half of the time of both. What a fork writes to is still copied in pages of 4 KiB.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None:
        return
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with open("/proc/self/maps") as maps:
        for begin, end in own_memory(maps.read().splitlines()):
            for address in range(-(-begin // _HUGE_BYTES) * _HUGE_BYTES, end - _HUGE_BYTES + 1, _HUGE_BYTES):
                madvise(address, _HUGE_BYTES, _MADV_COLLAPSE)


def own_memory(maps: Iterable[str]) -> list[tuple[int, int]]:
    """Begin and end of the writable mappings that are no file's, out of the lines of ``/proc/PID/maps``."""
    found = []
    for line in maps:
        addresses, permissions, _, _, inode, *name = line.split(maxsplit=5)
        if inode == "0" and permissions == "rw-p" and name != ["[stack]"]:
            begin, _, end = addresses.partition("-")
            found.append((int(begin, 16), int(end, 16)))
    return found


def _reseed() -> None:
    """Forks must not draw the same random numbers. What is imported later seeds itself: numpy's generator (an import of
    15 ms, which numpy makes only when it is asked for) and torch's on a GPU."""
    random.seed()
    numpy_random, torch = sys.modules.get("numpy.random"), sys.modules.get("torch")
    if numpy_random is not None:
        numpy_random.seed(int.from_bytes(os.urandom(4)))
    if torch is not None:
        torch.default_generator.manual_seed(int.from_bytes(os.urandom(7)))


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def import_all(modules: tuple[str, ...]) -> tuple[tuple[str, ...], str | None]:
    """Import in order; returns those that were, and the first that started a thread (the process is then spoilt)."""
    done: list[str] = []
    for name in modules:
        try:
            with watched():
                importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - whatever breaks the import here breaks it, visibly, in the function
            sys.stderr.write(f"the zygote cannot import {name}: {error}\n")
            continue
        if _threads() > 1:
            return tuple(done), name
        done.append(name)
    return tuple(done), None


def main() -> None:
    parser = argparse.ArgumentParser(prog="hotset.node.worker.zygote", description="Started by a hotset node.")
    parser.add_argument("--socket", type=int, required=True, help="descriptor of the control socket")
    parser.add_argument("--parent", type=int, required=True, help="process id of the node")
    parser.add_argument("--modules", default="", help="what to import, comma-separated")
    parser.add_argument("--refused", default="", help="what started threads in an earlier life")
    arguments = parser.parse_args()
    die_with(arguments.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wanted = tuple(filter(None, arguments.modules.split(",")))
    refused = tuple(filter(None, arguments.refused.split(",")))
    modules, threaded = import_all(tuple(name for name in wanted if name not in refused))
    if threaded is not None:
        os.set_inheritable(arguments.socket, True)
        os.execv(
            sys.executable,
            [
                *(sys.executable, "-P", "-m", "hotset.node.worker.zygote", "--socket", str(arguments.socket)),
                *("--parent", str(arguments.parent), "--modules", arguments.modules),
                *("--refused", ",".join((*refused, threaded))),
            ],
        )
    os.set_inheritable(arguments.socket, False)
    Zygote(socket.socket(fileno=arguments.socket)).main(modules, tuple(n for n in wanted if n not in modules))


if __name__ == "__main__":
    main()
