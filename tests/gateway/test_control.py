"""The control loop: every call gets exactly one answer, whatever happens to it on its way."""

from __future__ import annotations

import asyncio
import json

import pytest
from gateway_world import GPU, MIB, World, run, version

from hotset.gateway.calls import CallIds, PendingCall, StreamBroken
from hotset.gateway.control import LOOK_AFTER_S, ControlConfig
from hotset.gateway.readings import gpu_metrics, losses, problem, waiting
from hotset.node.interface import Answer, Call
from hotset.scheduling.config import SchedulerConfig
from hotset.vocabulary import FailureKind


def error_of(body: bytes) -> str:
    return str(json.loads(body)["error"])


def numbers(call: Call) -> list[Answer]:
    """A streaming function: three lines."""
    lines = [b"1\n", b"2\n", b"3\n"]
    return [Answer(request_id=call.request_id, content_type="application/x-ndjson", body=line) for line in lines]


async def read(pending: PendingCall) -> list[bytes]:
    """The chunks of a streamed answer, as they come."""
    chunks = (await pending.future).chunks
    assert chunks is not None
    return [chunk async for chunk in chunks]


def test_a_first_call_loads_its_model_and_says_where_its_time_went():
    async def story():
        world = await World().start(version("cat"))
        world.behave("cat@1", load_s=0.5, inference_s=0.2)
        result = await world.finish(world.control.submit("cat", b"hello"))

        assert (result.record.status, result.body) == (200, b"hello")
        assert (result.record.gpu_id, result.record.hit) == (GPU, False)
        assert result.record.load_s == pytest.approx(0.5)
        assert result.record.inference_s == pytest.approx(0.2)
        assert result.record.queue_s == pytest.approx(0.0)
        assert result.record.duration_s == pytest.approx(0.7)

        again = await world.finish(world.control.submit("cat", b"again"))
        assert again.record.hit
        assert again.record.load_s == 0.0
        assert world.verbs("load") == [("load", "cat@1")]

    run(story)


def test_a_call_that_waits_says_so():
    async def story():
        world = await World().start(version("cat"))
        world.behave("cat@1", load_s=0.5, inference_s=0.2)
        first, second = world.control.submit("cat", b"1"), world.control.submit("cat", b"2")
        assert waiting(world.control) == {"cat": 2}
        await world.finish(first)
        waited = await world.finish(second)
        assert waited.record.hit
        assert waited.record.queue_s == pytest.approx(0.7)
        assert waiting(world.control) == {"cat": 0}

    run(story)


def test_waiting_calls_of_one_model_share_a_run():
    async def story():
        world = await World(config=SchedulerConfig(burst_s=1.0)).start(version("cat"))
        world.behave("cat@1", inference_s=0.001)
        pending = [world.control.submit("cat", b"%d" % number) for number in range(20)]
        assert [(await world.finish(each)).body for each in pending] == [b"%d" % number for number in range(20)]
        assert len(world.verbs("run")) < 5
        assert [each.future.result().record.hit for each in pending] == [False] + [True] * 19

    run(story)


def test_more_models_than_memory_evict_each_other_and_the_counters_tell():
    async def story():
        names = ["a", "b", "c", "d"]
        world = await World().start(*(version(name) for name in names))
        for name in names * 2:
            assert (await world.finish(world.control.submit(name, b"x"))).record.status == 200
        metrics = {each.function: each for each in world.control.functions.metrics()}
        assert {name: metrics[name].misses for name in names} == dict.fromkeys(names, 2)
        assert sum(metrics[name].evictions for name in names) == 5
        assert all(metrics[name].requests == {200: 2} for name in names)
        (gpu,) = gpu_metrics(world.control)
        assert (gpu.used_bytes, gpu.capacity_bytes) == (300 * MIB, 320 * MIB)

    run(story)


def test_a_full_queue_turns_calls_away_with_a_time_to_come_back():
    async def story():
        world = await World(config=SchedulerConfig(max_queue=1)).start(version("cat"))
        world.control.submit("cat", b"runs")
        world.control.submit("cat", b"waits")
        result = await world.finish(world.control.submit("cat", b"turned away"))
        assert result.record.status == 429
        assert result.retry_after_s is not None
        assert result.retry_after_s >= 1.0
        assert json.loads(result.body)["reason"] == "queue_full"

    run(story)


def test_a_call_that_cannot_start_in_time_ends_with_504():
    async def story():
        world = await World().start(version("cat"), version("dog", patience_s=2.0))
        world.behave("cat@1", load_s=0.0, inference_s=10.0)
        world.control.submit("cat", b"long")
        late = world.control.submit("dog", b"late")
        await world.advance(1.9)
        assert not late.future.done()
        await world.advance(0.2)
        assert late.future.result().record.status == 504

    run(story)


def test_a_client_that_leaves_takes_its_waiting_call_along():
    async def story():
        world = await World().start(version("cat"))
        running, queued = world.control.submit("cat", b"runs"), world.control.submit("cat", b"waits")
        world.control.cancel(queued)
        world.control.cancel(queued)
        assert waiting(world.control) == {"cat": 1}
        assert world.control.scheduler.open_requests == 1
        await world.finish(running)
        await world.advance(1.0)
        runs = [each.request_ids for each in world.node.operations if each.verb == "run"]
        assert runs == [(running.request_id,)]
        (metrics,) = world.control.functions.metrics()
        assert metrics.requests == {499: 1, 200: 1}

    run(story)


def test_a_client_that_leaves_a_running_call_is_not_waited_for():
    async def story():
        world = await World().start(version("cat"))
        world.behave("cat@1", load_s=0.0, inference_s=5.0)
        task = asyncio.create_task(world.control.call("cat", b"x"))
        await world.advance(1.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert world.verbs("cancel")
        await world.advance(5.0)
        assert world.control.scheduler.open_requests == 0
        follow_up = asyncio.create_task(world.control.call("cat", b"y"))
        await world.advance(0.0)
        await world.advance(5.0)
        assert (await follow_up).body == b"y"

    run(story)


def test_only_a_call_that_takes_long_costs_a_watcher():
    async def story():
        world = await World().start(version("cat"))
        world.behave("cat@1", load_s=0.0, inference_s=3.0)
        gone = asyncio.Event()
        asked = []

        async def receive():
            asked.append(1)
            if len(asked) > 1:
                await gone.wait()
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": b""}

        pending = world.control.submit("cat", b"x", receive=receive)
        await world.advance(LOOK_AFTER_S / 2)
        assert asked == []
        await world.advance(LOOK_AFTER_S)
        assert len(asked) == 2
        gone.set()
        await world.advance(LOOK_AFTER_S)
        assert pending.future.result().record.status == 499

    run(story)


def test_a_watcher_goes_when_the_answer_comes():
    async def story():
        world = await World().start(version("cat"))
        world.behave("cat@1", load_s=0.0, inference_s=3.0)

        async def receive():
            await asyncio.Event().wait()

        pending = world.control.submit("cat", b"x", receive=receive)
        assert (await world.finish(pending)).record.status == 200
        await world.advance(0.0)
        assert pending.watcher is not None
        assert pending.watcher.cancelled()

    run(story)


def test_a_process_that_dies_costs_its_call_a_second_try_not_an_error():
    async def story():
        world = await World().start(version("cat"))
        world.node.fail_run("cat@1", FailureKind.CRASH)
        result = await world.finish(world.control.submit("cat", b"x"))
        assert (result.record.status, result.body) == (200, b"x")
        assert world.verbs("load") == [("load", "cat@1")] * 2

    run(story)


def test_a_function_that_keeps_dying_fails_with_its_reason_and_is_then_left_alone():
    async def story():
        world = await World().start(version("cat"))
        for _ in range(6):
            world.node.fail_run("cat@1", FailureKind.CRASH, "killed by SIGSEGV")
        first = await world.finish(world.control.submit("cat", b"x"))
        assert first.record.status == 502
        assert "SIGSEGV" in error_of(first.body)
        await world.finish(world.control.submit("cat", b"x"))
        third = await world.finish(world.control.submit("cat", b"x"))
        assert third.record.status == 503
        assert third.retry_after_s

    run(story)


@pytest.mark.parametrize(
    ("kind", "status"), [(FailureKind.HANG, 504), (FailureKind.OUT_OF_MEMORY, 507), (FailureKind.CRASH, 502)]
)
def test_the_way_a_process_failed_shows_in_the_status(kind, status):
    async def story():
        world = await World().start(version("cat"))
        for _ in range(2):
            world.node.fail_run("cat@1", kind, "no luck")
        result = await world.finish(world.control.submit("cat", b"x"))
        assert (result.record.status, error_of(result.body)) == (status, "no luck")

    run(story)


def test_a_model_that_does_not_load_says_why():
    async def story():
        world = await World().start(version("cat"))
        world.node.fail_load("cat@1", FailureKind.ERROR, "weights.bin is not there")
        result = await world.finish(world.control.submit("cat", b"x"))
        assert result.record.status == 502
        assert "weights.bin is not there" in error_of(result.body)

    run(story)


def test_a_model_larger_than_any_gpu_is_refused():
    async def story():
        world = await World().start(version("huge", memory_bytes=400 * MIB))
        result = await world.finish(world.control.submit("huge", b"x"))
        assert result.record.status == 507

    run(story)


def test_an_idle_process_that_dies_is_loaded_again():
    async def story():
        world = await World().start(version("cat"))
        await world.finish(world.control.submit("cat", b"x"))
        world.node.lose_process(GPU, "cat@1")
        await world.advance(0.0)
        again = await world.finish(world.control.submit("cat", b"y"))
        assert (again.body, again.record.hit) == (b"y", False)

    run(story)


def test_a_lost_gpu_fails_nothing_while_there_is_another():
    async def story():
        world = await World(gpus=2).start(version("cat"))
        world.behave("cat@1", inference_s=1.0)
        pending = [world.control.submit("cat", b"%d" % number) for number in range(4)]
        await world.advance(0.5)
        world.node.lose_gpu(GPU, "fell off the bus")
        results = [await world.finish(each) for each in pending]
        assert [each.body for each in results] == [b"0", b"1", b"2", b"3"]
        assert problem(world.control) is None
        assert losses(world.control) == [f"GPU {GPU} is lost: fell off the bus"]
        (other,) = world.control.scheduler.cluster.gpus
        world.node.lose_gpu(other, "so did this")
        await world.advance(0.0)
        assert "every GPU is lost" in str(problem(world.control))

    run(story)


def test_streams_pass_through_chunk_by_chunk():
    async def story():
        world = await World().start(version("count"))
        world.behave("count@1", load_s=0.0, inference_s=0.3, respond=numbers)
        pending = world.control.submit("count", b"3")
        await world.advance(0.15)
        begun = pending.future.result()
        assert begun.content_type == "application/x-ndjson"
        assert begun.chunks is not None
        assert begun.chunks.buffered_bytes == 2
        reader = asyncio.create_task(read(pending))
        await world.advance(0.3, steps=3)
        assert await reader == [b"1\n", b"2\n", b"3\n"]
        assert [each.status for each in world.control.records] == [200]

    run(story)


def test_a_stream_that_breaks_off_is_not_started_again():
    async def story():
        world = await World().start(version("count"))
        world.behave("count@1", load_s=0.0, inference_s=0.3, respond=numbers)
        world.node.fail_run("count@1", FailureKind.CRASH, "killed by SIGKILL", answered=1)
        pending = world.control.submit("count", b"3")
        await world.advance(0.15)
        world.control.run_failed(GPU, "count@1", FailureKind.CRASH, "killed by SIGKILL", ())
        with pytest.raises(StreamBroken, match="killed by SIGKILL"):
            await read(pending)
        assert world.control.scheduler.open_requests == 0
        assert [each.status for each in world.control.records] == [502]

    run(story)


def test_a_stream_on_a_lost_gpu_breaks_off():
    async def story():
        world = await World(gpus=2).start(version("count"))
        world.behave("count@1", load_s=0.0, inference_s=0.3, respond=numbers)
        pending = world.control.submit("count", b"3")
        await world.advance(0.15)
        world.node.lose_gpu(GPU)
        await world.advance(0.0)
        with pytest.raises(StreamBroken, match="fell off the bus"):
            await read(pending)
        assert world.control.scheduler.open_requests == 0

    run(story)


def test_a_stream_nobody_reads_is_given_up():
    async def story():
        world = await World(control=ControlConfig(stream_buffer_bytes=3)).start(version("count"))
        world.behave("count@1", load_s=0.0, inference_s=0.3, respond=numbers)
        pending = world.control.submit("count", b"3")
        await world.advance(1.0)
        with pytest.raises(StreamBroken, match="read it faster"):
            await read(pending)
        assert world.verbs("cancel")

    run(story)


def test_a_redeploy_under_load_loses_no_call():
    async def story():
        world = await World(gpus=2).start(version("cat", "1"))
        for digest in "12345":
            world.behave(f"cat@{digest}", load_s=0.2, inference_s=0.05, respond=_sign(digest))
        pending: list[PendingCall] = []
        for digest in "12345":
            world.control.deploy(version("cat", digest))
            for _ in range(20):
                pending.append(world.control.submit("cat", b""))
                await world.advance(0.01)
        results = [await world.finish(each) for each in pending]
        assert [each.record.status for each in results] == [200] * 100
        assert [each.body for each in results] == [digest.encode() for digest in "12345" for _ in range(20)]
        await world.advance(1.0)
        assert list(world.control.functions.versions) == ["cat@5"]
        assert list(world.control.scheduler.cluster.models) == ["cat@5"]

    run(story)


def _sign(digest: str):
    return lambda call: [Answer(request_id=call.request_id, body=digest.encode())]


def test_a_version_that_comes_back_while_it_drains_stays():
    async def story():
        world = await World().start(version("cat", "1"))
        pending = world.control.submit("cat", b"x")
        world.control.deploy(version("cat", "2"))
        world.control.deploy(version("cat", "1"))
        await world.finish(pending)
        await world.advance(1.0)
        assert list(world.control.functions.versions) == ["cat@1"]
        assert (await world.finish(world.control.submit("cat", b"y"))).record.model == "cat@1"

    run(story)


def test_a_removed_function_finishes_its_calls_and_takes_no_more():
    async def story():
        world = await World().start(version("cat"))
        running, waiting = world.control.submit("cat", b"1"), world.control.submit("cat", b"2")
        assert world.control.remove("cat")
        assert not world.control.remove("cat")
        with pytest.raises(KeyError):
            world.control.submit("cat", b"3")
        assert [(await world.finish(each)).body for each in (running, waiting)] == [b"1", b"2"]
        await world.advance(1.0)
        assert world.verbs("unload") == [("unload", "cat@1")]
        assert world.control.functions.versions == {}

    run(story)


def test_stopping_lets_calls_end_and_takes_no_more():
    async def story():
        world = await World().start(version("cat"))
        running = world.control.submit("cat", b"x")
        draining = asyncio.create_task(world.control.drain(5.0))
        await world.advance(0.0)
        refused = await world.finish(world.control.submit("cat", b"y"))
        assert refused.record.status == 503
        assert problem(world.control) == "the server is shutting down"
        await world.finish(running)
        await draining
        await world.control.stop()
        assert world.verbs("stop") == [("stop", "")]
        assert running.future.result().record.status == 200

    run(story)


def test_stopping_at_once_still_answers_everybody():
    async def story():
        world = await World().start(version("cat"))
        pending = [world.control.submit("cat", b"x") for _ in range(3)]
        await world.control.stop()
        assert [each.future.result().record.status for each in pending] == [503] * 3

    run(story)


def test_a_node_that_cannot_start_processes_is_not_healthy():
    async def story():
        world = await World().start()
        assert problem(world.control) is None
        world.node.well = False
        assert "cannot start a GPU process" in str(problem(world.control))

    run(story)


def test_what_functions_print_is_kept_and_can_be_followed():
    async def story():
        world = await World().start(version("cat"))
        world.node.log("cat@1", "before")
        seen: list[str] = []

        async def follow():
            seen.extend([line.text async for line in world.control.logbook.follow("cat")])

        follower = asyncio.create_task(follow())
        await world.advance(0.0)
        world.node.log("cat@1", "after")
        world.node.log("dog@1", "not ours")
        await world.advance(0.0)
        assert not follower.done()
        world.control.logbook.close()
        await follower
        assert seen == ["before", "after"]

    run(story)


def test_public_ids_lead_back_to_their_request_and_only_theirs():
    ids, others = CallIds(), CallIds()
    assert len(ids.public(7)) == 36
    assert ids.request_id(ids.public(7)) == 7
    assert ids.request_id(others.public(7)) is None
    assert ids.request_id("7") is None
    assert ids.request_id(ids.public(7)[:24] + "not-a-number") is None
