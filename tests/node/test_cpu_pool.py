"""Plain functions on the CPU: one process each, every call answered."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from recording import STUB, Recorder, ask, launch, story

from hotset.node import cpu
from hotset.node.cpu import CpuPool
from hotset.node.process import ProcessState
from hotset.node.spawner import Spawner


@asynccontextmanager
async def running_pool(
    recorder: Recorder, source: Spawner | None = None, idle_s: float = 60.0
) -> AsyncIterator[CpuPool]:
    pool = CpuPool(source=source or Spawner(), idle_s=idle_s)
    await pool.start(recorder)
    try:
        yield pool
    finally:
        await pool.stop()


async def statuses(recorder: Recorder, count: int) -> list[tuple[int, int]]:
    """Request ids and statuses of the next ``count`` answers, in order."""
    await recorder.until(lambda: len(recorder.answers) >= count)
    answers, recorder.answers = recorder.answers, []
    return [(answer.request_id, answer.status) for answer in answers]


@story
async def test_calls_are_answered_in_order_by_one_process(recorder: Recorder) -> None:
    async with running_pool(recorder) as pool:
        for number in range(100):  # more than fit into the process at once
            pool.run(launch("shout"), ask(number, "a"))
        assert await statuses(recorder, 100) == [(number, 200) for number in range(100)]
        (report,) = pool.processes()
        assert (report.gpu_id, report.model, report.device_bytes) == ("", "shout@1", 0)
        assert report.private_bytes > 0
        pool.run(launch("shout"), ask(1, "pid"))
        await recorder.until(lambda: recorder.answers)
        assert int(recorder.answers[0].body.strip(b'"')) == report.pid
    assert pool.processes() == []


@story
async def test_a_process_without_calls_ends_and_the_next_call_starts_another(recorder: Recorder) -> None:
    async with running_pool(recorder, Spawner(STUB), idle_s=0.01) as pool:
        pool.run(launch("shout"), ask(1, "a"))
        await statuses(recorder, 1)
        function = pool._functions["shout@1"]
        first = function.process
        assert first is not None
        pool._idle_over(function)
        pool.run(launch("shout"), ask(2, "a"))  # while it ends
        assert await statuses(recorder, 1) == [(2, 200)]
        assert function.process is not first


@story
async def test_the_call_that_kills_its_process_fails_and_those_around_it_run(recorder: Recorder) -> None:
    async with running_pool(recorder) as pool:
        for number, word in enumerate(("a", "die", "b", "hang", "c")):
            pool.run(launch("shout", timeout_s=0.5), ask(number, word))
        await recorder.until(lambda: len(recorder.answers) == 5)
        by_id = {answer.request_id: answer for answer in recorder.answers}
        assert [by_id[number].status for number in range(5)] == [200, 500, 200, 504, 200]
        assert by_id[1].body == b'{"error":"shout@1 failed: exited with code 9"}'
        os.kill(pool.processes()[0].pid, signal.SIGKILL)  # idle: nobody is concerned
        while pool.processes():
            await asyncio.sleep(0)
        assert len(recorder.answers) == 5
        pool.run(launch("shout"), ask(9, "again"))
        await recorder.until(lambda: len(recorder.answers) == 6)


@story
async def test_a_function_that_keeps_failing_is_left_alone_for_a_while(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr(cpu, "monotonic", lambda: now_s)
    async with running_pool(recorder, Spawner(STUB)) as pool:
        spec = launch("shout", env={"LIE": "ff" * 16})
        for number in range(5):
            pool.run(spec, ask(number, "x"))
        assert await statuses(recorder, 5) == [(0, 500), (1, 500), (2, 503), (3, 503), (4, 503)]
        pool.run(spec, ask(5, "x"))
        assert recorder.answers == []  # never from inside a call
        await recorder.until(lambda: recorder.answers)
        assert b"it is tried again in 2.0 s" in recorder.answers[0].body
        recorder.answers.clear()
        now_s += 2.0
        pool.run(spec, ask(6, "x"))
        assert await statuses(recorder, 1) == [(6, 500)]


@story
async def test_a_function_that_does_not_load(recorder: Recorder) -> None:
    async with running_pool(recorder) as pool:
        pool.run(launch("nobody"), ask(1, "x"))
        pool.run(launch("nobody"), ask(2, "x"))
        assert await statuses(recorder, 2) == [(1, 503), (2, 503)]


@story
async def test_clients_leave_and_versions_are_removed(recorder: Recorder) -> None:
    async with running_pool(recorder, Spawner(STUB)) as pool:
        spec = launch("shout")
        for number in (1, 2, 3):
            pool.run(spec, ask(number, "x"))
        pool.cancel(2)  # waits: is forgotten
        pool.cancel(99)
        assert await statuses(recorder, 2) == [(1, 200), (3, 200)]
        pool.run(spec, ask(4, "x"))
        pool.cancel(4)  # in its process: is told so
        assert await statuses(recorder, 1) == [(4, 200)]
        pool.run(launch("other"), ask(5, "x"))
        pool.forget("other@1")
        pool.forget("other@1")
        assert await statuses(recorder, 1) == [(5, 503)]
        pool.run(launch("mute", env={"LIE": ""}), ask(6, "x"))
        process = pool._functions["mute@1"].process
        assert process is not None
        while process.state is not ProcessState.RUNNING:
            await asyncio.sleep(0)
        pool.forget("mute@1")
        assert await statuses(recorder, 1) == [(6, 503)]
