"""A call's own deadline: whoever notices first that it has passed, the caller hears it once."""

from __future__ import annotations

import json

from gateway_world import World, run, version


def test_a_callers_own_deadline_ends_a_call_that_already_runs():
    async def story():
        world = await World().start(version("cat"))
        world.behave("cat@1", load_s=0.0, inference_s=10.0)
        pending = world.control.submit("cat", b"x", timeout_s=1.5)
        await world.advance(2.0, steps=20)
        result = pending.future.result()
        assert result.record.status == 504
        assert json.loads(result.body)["error"] == "the call took longer than the 1.5 s it was given"
        assert ("cancel", "") in world.verbs()

    run(story)


def test_a_caller_cannot_ask_for_more_time_than_the_function_has():
    async def story():
        world = await World().start(version("cat"), version("dog", patience_s=1.0))
        world.behave("cat@1", load_s=0.0, inference_s=10.0)
        world.control.submit("cat", b"long")
        late = world.control.submit("dog", b"late", timeout_s=3600.0)
        await world.advance(1.1)
        assert late.future.result().record.status == 504

    run(story)


def test_calls_that_are_late_together_each_end_once():
    """The look of the control loop comes first: telling the scheduler of one call makes it end the others itself."""

    async def story():
        world = await World().start(version("cat"))
        world.behave("cat@1", load_s=0.0, inference_s=50.0)
        calls = [world.control.submit("cat", b"x", timeout_s=1.0) for _ in range(20)]
        await world.advance()
        world.clock.now_s = 5.0  # the loop was held up: all timers are due at once
        world.control._look()
        assert [call.future.result().record.status for call in calls] == [504] * 20
        assert not world.control.calls
        await world.advance(60.0)
        assert (await world.finish(world.control.submit("cat", b"x"))).record.status == 200

    run(story)


def test_a_client_that_leaves_after_its_deadline_has_its_call_ended_once():
    async def story():
        world = await World().start(version("cat"))
        world.behave("cat@1", load_s=0.0, inference_s=50.0)
        world.control.submit("cat", b"runs")
        late = world.control.submit("cat", b"x", timeout_s=1.0)
        await world.advance()
        world.clock.now_s = 5.0
        world.control.cancel(late)
        assert late.future.result().record.status == 504

    run(story)
