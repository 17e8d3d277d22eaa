"""Large bodies: received in place, in memory that is used again, within what the server may hold."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from gateway_world import run
from test_direct import Line, post

from hotset.gateway.bodies import BodyMemory
from hotset.node.slots import UNIT_BYTES

LARGE = np.random.default_rng(0).bytes(600_000)


def test_a_large_body_needs_no_task_and_is_in_one_piece():
    async def story():
        line = await Line().open()
        for count in (1, 2):
            line.send(post("/function/cat", LARGE))
            assert line.control.open_body_bytes == len(LARGE)
            (pending,) = line.control.calls.values()
            assert isinstance(pending.call.body, memoryview)
            assert pending.call.body == LARGE
            del pending
            *_, (status, _, body) = await line.answers(count)
            assert (status, body) == (200, LARGE)
        assert line.tasks == 0
        assert line.bodies.reading_bytes == line.control.open_body_bytes == 0

    run(story)


def test_its_memory_is_used_again():
    async def story():
        line = await Line().open()
        places = set()
        for count in range(1, 4):
            line.send(post("/function/cat", LARGE))
            (pending,) = line.control.calls.values()
            places.add(np.frombuffer(pending.call.body, np.uint8).ctypes.data)
            del pending
            await line.answers(count)
        assert len(places) == 1

    run(story)


@pytest.mark.parametrize("size", [65_536, 65_537, UNIT_BYTES, UNIT_BYTES + 1])
def test_requests_before_and_behind_it_are_kept_apart(size: int):
    async def story():
        line = await Line().open()
        large = LARGE[:size]
        line.send(
            post("/function/cat", b"before"),
            post("/function/dog", large),
            post("/function/cat", large[::-1]),
            post("/function/cat", b"behind"),
        )
        answers = [(status, body) for status, _, body in await line.answers(4)]
        assert answers == [(200, b"before"), (200, large), (200, large[::-1]), (200, b"behind")]

    run(story)


def test_who_waits_to_be_told_to_go_on_is_told_at_once():
    async def story():
        line = await Line().open()
        request = post("/function/cat", LARGE, "expect: 100-continue")
        line.send(request[: -len(LARGE)])
        await line.advance()
        assert line.wire.sent == b"HTTP/1.1 100 Continue\r\n\r\n"
        line.wire.sent = b""
        line.send(LARGE)
        assert [(status, body) for status, _, body in await line.answers()] == [(200, LARGE)]
        assert line.tasks == 0

    run(story)


def test_a_client_that_leaves_in_the_middle_leaves_nothing_behind():
    async def story():
        line = await Line().open()
        line.send(post("/function/cat", LARGE)[:300_000])
        assert line.bodies.reading_bytes == len(LARGE)
        line.intake.connection_lost(None)
        assert line.bodies.reading_bytes == 0
        assert not line.control.calls

    run(story)


def test_what_is_no_call_takes_no_memory():
    async def story():
        line = await Line(limits={"max_body_bytes": len(LARGE), "max_open_bytes": 2 * len(LARGE)}).open()
        line.send(post("/function/cow", LARGE)[:1000])
        ((status, _, body),) = await line.answers()
        assert (status, b"deploy it" in body) == (404, True)

        line = await Line(limits={"max_body_bytes": len(LARGE) - 1}).open()
        line.send(post("/function/cat", LARGE)[:1000])
        ((status, headers, _),) = await line.answers()
        assert (status, headers["connection"]) == (413, "close")

        line = await Line(limits={"max_open_bytes": len(LARGE) - 1}).open()
        line.send(post("/function/cat", LARGE)[:1000])
        ((status, headers, _),) = await line.answers()
        assert (status, headers["retry-after"]) == (429, "1")
        assert line.bodies.reading_bytes == 0

    run(story)


def test_what_is_refused_once_it_is_there_is_the_applications():
    async def story():
        line = await Line().open()
        line.send(post("/function/cat", LARGE, "x-hotset-timeout: soon"))
        ((status, _, body),) = await line.answers()
        assert (status, b"X-Hotset-Timeout" in body, line.tasks) == (400, True, 1)
        line.wire.sent = b""
        line.send(post("/function/cat", LARGE))
        assert [body for _, _, body in await line.answers()] == [LARGE]

    run(story)


def test_memory_is_free_again_when_the_last_view_of_it_is_gone():
    memory = BodyMemory(4 * UNIT_BYTES)

    def address(view: memoryview) -> int:
        return int(np.frombuffer(view, np.uint8).ctypes.data)

    first, second = memory.take(2 * UNIT_BYTES), memory.take(2 * UNIT_BYTES)
    first[:3] = b"abc"
    kept = np.frombuffer(first[1:3], np.uint8)
    start, middle = address(first), address(second)
    elsewhere = memory.take(UNIT_BYTES)
    assert not start <= address(elsewhere) < start + 4 * UNIT_BYTES, "none is free"
    del first
    gc.collect()
    assert not start <= address(memory.take(UNIT_BYTES)) < start + 4 * UNIT_BYTES, "a part of it is still looked at"
    assert bytes(kept) == b"bc"

    holder = [second]
    del second
    thread = threading.Thread(target=holder.clear)  # bodies are dropped by whatever thread is done with them
    thread.start()
    thread.join()
    assert address(memory.take(2 * UNIT_BYTES)) == middle
    del kept
    assert address(memory.take(2 * UNIT_BYTES)) == start
