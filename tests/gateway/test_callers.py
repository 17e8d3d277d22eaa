"""Who makes a call, and what the scheduler is told of him."""

from __future__ import annotations

import io

import msgspec
import pytest
from gateway_world import World, run, version
from rich.console import Console

from hotset.cli.top import render_state
from hotset.gateway.auth import ApiKeys, key_digest
from hotset.gateway.callers import NOBODY, Caller, CallerError, Callers, at_priority
from hotset.gateway.metrics import CallersCollector, HotsetCollector, exposition
from hotset.gateway.state import state_of
from hotset.store.datastore import ApiKeyRecord

KEY = ApiKeyRecord(name="team-a", function="cat", digest=key_digest(b"hs_a"), created_at_s=0.0, weight=2.0, priority=1)


class TestWho:
    def test_without_keys_and_a_trusted_header_everybody_is_nobody(self):
        assert Callers().of({b"authorization": b"Bearer hs_a", b"x-tenant": b"ann"}) is NOBODY

    def test_a_key_names_its_caller(self):
        callers = Callers(ApiKeys([KEY]), "X-Tenant")
        expected = Caller("team-a", 2.0, 1)
        assert callers.of({b"authorization": b"Bearer hs_a", b"x-tenant": b"ann"}) == expected
        assert callers.of({b"x-api-key": b"hs_a"}) == expected
        assert callers.of({b"x-api-key": b"hs_b"}) == NOBODY

    def test_else_a_header_does_if_it_is_trusted(self):
        callers = Callers(header="X-Tenant")
        assert callers.of({b"x-tenant": b"ann"}) == Caller("ann")
        assert callers.of({b"x-tenant": b""}) == NOBODY
        with pytest.raises(CallerError, match="63 characters at most"):
            callers.of({b"x-tenant": b"a" * 64})

    def test_a_key_that_was_taken_back_names_nobody(self):
        keys = ApiKeys([KEY])
        keys.remove(KEY)
        assert Callers(keys).of({b"x-api-key": b"hs_a"}) == NOBODY


class TestPriority:
    def test_it_is_bounded_by_what_the_caller_may_have(self):
        callers = Callers(ApiKeys([KEY]))
        key = {b"x-api-key": b"hs_a"}
        assert [callers.of({**key, b"x-hotset-priority": asked}).priority for asked in (b"2", b"1", b"-1")] == [
            1,
            1,
            -1,
        ]
        assert callers.of({b"x-hotset-priority": b"2"}).priority == 0

    @pytest.mark.parametrize("asked", ["high", "3", "-3", "1.5", ""])
    def test_it_is_a_small_whole_number(self, asked: str):
        with pytest.raises(CallerError, match="a whole number from -2 to 2"):
            at_priority(NOBODY, asked)


class TestTheCall:
    def test_the_scheduler_learns_who_calls_and_metrics_and_state_tell_what_was_spent_on_whom(self):
        async def story():
            world = await World().start(version("cat"))
            world.behave("cat@1", load_s=2.0, inference_s=1.0)
            calls = [
                world.control.submit("cat", b"x", caller=caller)
                for caller in (Caller("ann", 2.0), Caller("bob", 1.0, -1), Caller("ann", 2.0))
            ]
            accounts = world.control.scheduler.cluster.queues
            assert [accounts.usage[name].requests for name in ("ann", "bob")] == [2, 1]
            for call in calls:
                assert (await world.finish(call)).record.status == 200
            body = exposition(
                CallersCollector(accounts.usage),
                HotsetCollector(list(world.control.functions.metrics()), [], {}),
            )[0].decode()
            assert 'hotset_caller_gpu_seconds_total{caller="ann",spent_on="runs"} 2.0' in body
            assert 'hotset_caller_gpu_seconds_total{caller="ann",spent_on="loads"} 2.0' in body
            assert 'hotset_caller_requests_total{caller="bob"} 1.0' in body
            assert 'hotset_answers_in_time_total{function="cat"} 3.0' in body
            first, second = state_of(world.control).callers
            assert (first.name, first.run_s, first.load_s) == ("ann", 2.0, 2.0)
            assert second.name == "bob"
            console = Console(width=120, file=io.StringIO())
            console.print(render_state(msgspec.to_builtins(state_of(world.control))))
            shown = console.file.getvalue()  # type: ignore[attr-defined]
            assert "ann" in shown
            assert "80%" in shown, "four of five GPU seconds"

        run(story)

    def test_one_that_cannot_be_in_time_is_refused_at_once_and_counted(self):
        async def story():
            world = await World().start(version("cat"))
            world.behave("cat@1", load_s=0.0, inference_s=5.0)
            assert (await world.finish(world.control.submit("cat", b"x"))).record.status == 200
            running = world.control.submit("cat", b"x")
            await world.advance()
            hopeless = world.control.submit("cat", b"x", timeout_s=1.0)
            result = await hopeless.future
            assert result.record.status == 504
            assert b'"reason":"hopeless"' in result.body
            assert (await world.finish(running)).record.status == 200
            (metrics,) = world.control.functions.metrics()
            assert (metrics.hopeless, metrics.in_time) == (1, 2)

        run(story)

    def test_a_flood_is_answered_with_what_the_others_leave(self):
        async def latencies(flood: int) -> list[float]:
            world = await World(gpus=2).start(version("cat", patience_s=600.0))
            world.behave("cat@1", load_s=0.1, inference_s=0.1)
            for _ in range(flood):
                world.control.submit("cat", b"x", caller=Caller("flood"))
            await world.advance(5.0, steps=100)
            quiet = []
            for _ in range(10):
                quiet.append(await world.finish(world.control.submit("cat", b"x", caller=Caller("quiet"))))
                await world.advance(0.5, steps=10)
            assert len(world.control.calls) > flood / 2 or not flood, "the flood goes on"
            return [result.record.duration_s for result in quiet]

        async def story():
            alone, flooded = await latencies(0), await latencies(800)
            assert max(flooded) <= max(alone) + 0.1, "no more than the rest of a run that has begun"

        run(story)
