"""Import a function in a process like the one that will serve it, to read what it is: the process ends with that.

A process from the zygote has the function's frameworks imported already, which a fresh interpreter takes seconds for.
The zygote itself never sees the function's code.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from hotset.node.frames import HEADER, HEADER_BYTES, Inspected, InspectOrder, Kind, control
from hotset.node.spawner import ProcessSource, Spawned

MOST_ANSWER_BYTES = 1 << 20
LAST_WORDS_S = 0.2
"""Longest wait for the rest of its output, once it has ended."""
_PIECE_BYTES = 65536


async def inspect(
    source: ProcessSource,
    python: str,
    code_path: Path,
    entry: str,
    env: Mapping[str, str],
    said: Callable[[bytes], None],
    timeout_s: float,
) -> bytes | None:
    """The description of the function as JSON (``functions/description.py``); None: its import ended the process.

    ``said`` gets what it prints meanwhile, in pieces. Raises ``TimeoutError``, and ``OSError`` when no process can be
    started.
    """
    spawned = source.spawn(python, env)
    following = asyncio.create_task(_follow(spawned.log_fd, said))
    try:
        async with asyncio.timeout(timeout_s):
            return await _ask(spawned, InspectOrder(code_path=str(code_path), entry=entry, env=dict(env)))
    finally:
        await _end(spawned)
        source.forget(spawned.process.pid)
        # Whatever has left its process group may keep the log open for ever.
        await asyncio.wait([following], timeout=LAST_WORDS_S)
        following.cancel()
        spawned.close()


async def _ask(spawned: Spawned, order: InspectOrder) -> bytes | None:
    loop = asyncio.get_running_loop()
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        await loop.sock_sendall(spawned.socket, control(Kind.INSPECT, order))
        while (piece := await loop.sock_recv(spawned.socket, _PIECE_BYTES)) and len(received) <= MOST_ANSWER_BYTES:
            received += piece
    if not HEADER_BYTES < len(received) <= MOST_ANSWER_BYTES:
        return None
    length, kind, *_ = HEADER.unpack_from(received)
    if kind != Kind.INSPECTED or length != len(received) - HEADER_BYTES:
        return None
    try:
        return msgspec.msgpack.decode(received[HEADER_BYTES:], type=Inspected).description
    except msgspec.DecodeError:
        return None


async def _follow(log_fd: int, said: Callable[[bytes], None]) -> None:
    """Until the process, and whatever it started, has closed it."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def readable() -> None:
        try:
            piece = os.read(log_fd, _PIECE_BYTES)
        except BlockingIOError:
            return
        if piece:
            said(piece)
        else:
            loop.remove_reader(log_fd)
            ended.set()

    loop.add_reader(log_fd, readable)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(log_fd)


async def _end(spawned: Spawned) -> None:
    """End it, with what it started, and reap it."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(spawned.process.pid, signal.SIGKILL)
    loop.add_reader(spawned.pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(spawned.pidfd)
        spawned.process.reap(lambda _: None)
