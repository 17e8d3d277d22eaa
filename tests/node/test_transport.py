"""Both ends of the socket in one process: the node's transport and the process's channel."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from recording import story

from hotset.node.frames import (
    INLINE_BYTES,
    Failed,
    Kind,
    Loaded,
    LoadOrder,
    Measured,
    Moved,
    call_prefix,
    control,
    split_call,
)
from hotset.node.interface import Answer, Call
from hotset.node.slots import create_arena
from hotset.node.transport import ProcessTransport
from hotset.node.worker.channel import ByeError, Channel, ClosedError
from hotset.vocabulary import FailureKind

HALF = 1 << 20


class Handler:
    """Keeps what the process said."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.other: list[object] = []
        self.closed: list[str | None] = []
        self._changed = asyncio.Event()

    def on_answer(self, answer: Answer) -> None:
        self.answers.append(answer)
        self._changed.set()

    def on_ran(self, inference_s: float) -> None:
        self.other.append(inference_s)
        self._changed.set()

    def on_loaded(self, loaded: Loaded) -> None:
        self.other.append(loaded)
        self._changed.set()

    def on_failed(self, failed: Failed) -> None:
        self.other.append(failed)
        self._changed.set()

    def on_moved(self, moved: Moved) -> None:
        self.other.append(moved)
        self._changed.set()

    def on_measured(self, measured: Measured) -> None:
        self.other.append(measured)
        self._changed.set()

    def on_closed(self, broken: str | None) -> None:
        self.closed.append(broken)
        self._changed.set()

    async def next(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class Ends:
    def __init__(self) -> None:
        self.handler = Handler()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        fd = create_arena(HALF)
        self.socket = ours
        self.channel = Channel(theirs, os.dup(fd))
        self.transport = ProcessTransport(self.handler, fd)
        self.theirs = theirs


@asynccontextmanager
async def connected() -> AsyncIterator[Ends]:
    ends = Ends()
    await asyncio.get_running_loop().create_unix_connection(lambda: ends.transport, sock=ends.socket)
    yield ends
    ends.transport.close()
    while not ends.handler.closed:
        await ends.handler.next()
    ends.theirs.close()


async def runs(ends: Ends) -> list[Call]:
    """The process's next run, once the node's loop has sent it; a thread, because the process blocks."""
    work = await asyncio.to_thread(ends.channel.next_work)
    assert isinstance(work, list)
    return work


def call(request_id: int, body: bytes | memoryview) -> Call:
    return Call(request_id=request_id, body=body, content_type="text/plain", accept="text/html")


@story
async def test_the_calls_of_a_run_arrive_together_and_their_answers_too() -> None:
    async with connected() as ends:
        ends.transport.send_run([call(1, b"one"), call(2, memoryview(b"two"))])
        first, second = await runs(ends)
        assert (first.request_id, first.body, first.content_type, first.accept) == (
            1,
            b"one",
            "text/plain",
            "text/html",
        )
        assert (second.request_id, bytes(second.body)) == (2, b"two")
        ends.channel.answer(1, 200, "text/plain", b"eins", 0.5, final=True)
        ends.channel.answer(2, 201, "text/plain", memoryview(b"zw"), 0.5, final=False)
        ends.channel.answer(2, 201, "text/plain", b"", 0.6, final=True)
        ends.channel.ran(0.75)
        ends.channel.flush()
        while not ends.handler.other:
            await ends.handler.next()
        assert [(each.request_id, each.body, each.final) for each in ends.handler.answers] == [
            (1, b"eins", True),
            (2, b"zw", False),
            (2, b"", True),
        ]
        assert ends.handler.answers[0].inference_s == 0.5
        assert ends.handler.other == [0.75]


@pytest.mark.parametrize("size", [INLINE_BYTES, INLINE_BYTES + 1, 600_000, 3 * HALF])
@story
async def test_bodies_of_every_size_go_there_and_back(size: int) -> None:
    """Inline; in a slot; and larger than all slots, received into memory of its own."""
    body = os.urandom(size)
    async with connected() as ends:
        ends.transport.send_run([call(1, body), call(2, b"small")])
        large, small = await runs(ends)
        assert bytes(large.body) == body
        assert small.body == b"small"
        ends.channel.answer(1, 200, "", large.body, 0.0, final=True)
        ends.channel.answer(2, 200, "", small.body, 0.0, final=True)
        await asyncio.to_thread(ends.channel.flush)
        while len(ends.handler.answers) < 2:
            await ends.handler.next()
        assert bytes(ends.handler.answers[0].body) == body
        assert ends.handler.answers[1].body == b"small"


@pytest.mark.parametrize("size", [10, INLINE_BYTES - 4, 600_000, 3 * HALF])
@story
async def test_an_answer_in_parts_is_one_and_keeps_nothing_of_them(size: int) -> None:
    """A function may write to what it returned as soon as it runs again, which is before the answer leaves."""
    body = os.urandom(size)
    async with connected() as ends:
        ends.transport.send_run([call(1, b"")])
        await runs(ends)
        array = bytearray(body)
        ends.channel.answer(1, 200, "", b"head", 0.0, rest=[memoryview(array), b"tail"], final=True)
        array[:] = bytes(size)
        await asyncio.to_thread(ends.channel.flush)
        while not ends.handler.answers:
            await ends.handler.next()
        assert bytes(ends.handler.answers[0].body) == b"head" + body + b"tail"


@story
async def test_slots_run_out_and_come_back_when_what_was_in_them_is_gone() -> None:
    body = bytes(HALF // 2 + 1)  # the second finds no room, and goes through the socket
    async with connected() as ends:
        slots = ends.transport._slots
        for _ in range(3):
            ends.transport.send_run([call(1, body), call(2, body)])
            assert not slots.idle
            calls = await runs(ends)
            assert [bytes(each.body) for each in calls] == [body, body]
            for each in calls:
                ends.channel.answer(each.request_id, 200, "", each.body, 0.0, final=True)
            await asyncio.to_thread(ends.channel.flush)
            while len(ends.handler.answers) < 2:
                await ends.handler.next()
            assert [bytes(each.body) for each in ends.handler.answers] == [body, body]
            del calls, each
            ends.handler.answers.clear()  # the client has its answer: the process learns that its slot is free
            ends.channel.ran(0.0)
            ends.channel.flush()
            while not ends.handler.other:
                await ends.handler.next()
            ends.handler.other.clear()
            assert slots.idle
            while not ends.channel._slots.idle:
                await asyncio.sleep(0)
                ends.channel.poll()


@story
async def test_what_is_sent_before_the_connection_waits_for_it() -> None:
    ends = Ends()
    order = LoadOrder(model="a@1", entry="a:A", code_path=".", device="cpu")
    ends.transport.send(control(Kind.LOAD, order))
    ends.transport.send_run([call(1, b"one")])
    await asyncio.get_running_loop().create_unix_connection(lambda: ends.transport, sock=ends.socket)
    assert await asyncio.to_thread(ends.channel.next_order) == order
    assert len(await runs(ends)) == 1
    ends.channel.loaded(Loaded(memory_bytes=7))
    ends.channel.failed(Failed(kind=FailureKind.DEVICE, reason="gone"))
    while len(ends.handler.other) < 2:
        await ends.handler.next()
    assert ends.handler.other == [Loaded(memory_bytes=7), Failed(kind=FailureKind.DEVICE, reason="gone")]
    ends.theirs.close()
    while not ends.handler.closed:
        await ends.handler.next()
    assert ends.handler.closed == [None]
    ends.transport.send_run([call(2, b"nobody hears this")])


@story
async def test_cancel_bye_and_the_end_reach_the_process() -> None:
    async with connected() as ends:
        ends.channel.poll()  # nothing there
        ends.transport.send_run([call(1, b"one")])
        ends.transport.send(control(Kind.CANCEL, id=1))
        ends.transport.send(control(Kind.BYE))
        await runs(ends)
        while not ends.channel.cancelled:
            ends.channel.poll()
            await asyncio.sleep(0)
        assert ends.channel.cancelled == {1}
        with pytest.raises(ByeError):
            await runs(ends)
        with pytest.raises(ByeError):
            ends.channel.poll()
    other = Ends()
    other.socket.close()
    with pytest.raises(ClosedError):
        other.channel.next_work()
    other.channel.ran(0.0)
    with pytest.raises(ClosedError):
        other.channel.flush()
    os.close(other.transport._slots._fd)
    other.theirs.close()


@story
async def test_many_replies_are_sent_before_they_pile_up() -> None:
    async with connected() as ends:
        for number in range(1000):
            ends.channel.answer(number, 200, "", b"x", 0.0, final=True)
        ends.channel.flush()
        while len(ends.handler.answers) < 1000:
            await ends.handler.next()
        assert [answer.request_id for answer in ends.handler.answers] == list(range(1000))


def test_texts_are_cut_to_what_a_frame_holds() -> None:
    for number in range(300):
        call_prefix(f"a/{number}", "*/*")
    prefix = call_prefix("x" * 70_000, "grün")
    content_type, accept, start = split_call(prefix + b"body")
    assert (len(content_type), accept, start) == (65535, "grün", len(prefix))
