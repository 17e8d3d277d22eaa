"""The paper's policies, one rule at a time. Loads take 4 s, runs 1 s, a GPU holds two models."""

from __future__ import annotations

import pytest
from scheduling_world import End, World, model

from hotset.errors import UnknownNameError
from hotset.scheduling import holders
from hotset.scheduling.actions import Load, Run
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import POLICIES, make_policy


def loads(world: World) -> list[tuple[str, str]]:
    return [(action.gpu_id, action.model) for action in world.log if isinstance(action, Load)]


def runs(world: World) -> list[tuple[str, int, bool]]:
    return [(action.gpu_id, action.request_ids[0], action.hit) for action in world.log if isinstance(action, Run)]


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(UnknownNameError, match="unknown policy 'fifo'; known: lb, lalb"):
        make_policy("fifo")
    with pytest.raises(UnknownNameError, match="unknown eviction policy 'fifo'"):
        make_eviction("fifo")
    assert [make_policy(name).name for name in POLICIES] == list(POLICIES)


class TestLb:
    def test_the_gpu_idle_longest_is_next_whatever_it_holds(self):
        world = World("lb", gpus=(2.0, 2.0, 2.0))
        for name in "abc":
            world.arrive(name)
        assert loads(world) == [("g0", "a"), ("g1", "b"), ("g2", "c")]
        world.wait(4.0)
        for gpu_id in ("g0", "g1", "g2"):
            world.loaded(gpu_id)
        for gpu_id in ("g1", "g2", "g0"):
            world.finish(gpu_id)

        world.arrive("a")  # g0 holds it, but g1 has been idle longer
        assert loads(world)[3:] == [("g1", "a")]
        world.arrive("a")
        assert loads(world)[4:] == [("g2", "a")]
        hit = world.arrive("a")  # luck
        assert runs(world)[-1] == ("g0", hit, True)

    def test_requests_leave_in_order_of_arrival(self):
        world = World("lb", gpus=(2.0,))
        ids = [world.arrive(name) for name in "abab"]
        world.drain()
        assert [request_id for _, request_id, _ in runs(world)] == ids


class TestLalb:
    def test_2a_a_hit_on_the_gpu_idle_longest(self):
        world = World("lalb", gpus=(2.0, 2.0))
        world.arrive("a")
        world.serve("g0")
        world.arrive("b")
        world.serve("g1")
        hit = world.arrive("a")
        assert runs(world)[-1] == ("g0", hit, True)

    def test_2b_held_nowhere_it_is_loaded_on_the_gpu_idle_longest(self):
        world = World("lalb", gpus=(2.0, 2.0))
        world.arrive("a")
        assert loads(world) == [("g0", "a")]
        world.serve("g0")
        world.arrive("b")  # g1 has been idle since the beginning
        assert loads(world)[1:] == [("g1", "b")]
        assert not any(action.false_miss for action in world.log if isinstance(action, Load))

    def test_2c_held_by_another_idle_gpu_it_runs_there(self):
        world = World("lalb", gpus=(2.0, 2.0))
        world.arrive("a")
        world.serve("g0")  # now g1 has been idle longer
        hit = world.arrive("a")
        assert runs(world)[-1] == ("g0", hit, True)

    def test_2d_a_short_wait_for_the_busy_holder_beats_a_load(self):
        world = World("lalb", gpus=(2.0, 2.0))
        world.arrive("a")
        world.serve("g0")
        world.arrive("a")
        waiting = world.arrive("a")  # g0 is free in 1 s, a load on g1 takes 4 s
        assert world.local("g0") == [waiting]
        assert world.doing("g1") == "idle"
        assert loads(world) == [("g0", "a")]

    def test_2d_the_local_queue_counts_and_a_long_wait_is_answered_by_another_copy(self):
        world = World("lalb", gpus=(2.0, 2.0))
        world.arrive("a")
        world.serve("g0")
        ids = [world.arrive("a") for _ in range(5)]
        # Waits of 1, 2 and 3 s beat a load of 4 s; one of 4 s does not.
        assert world.local("g0") == ids[1:4]
        assert loads(world)[1:] == [("g1", "a")]
        assert [action.false_miss for action in world.log if isinstance(action, Load)] == [False, True]

    def test_2d_of_several_busy_holders_the_one_done_first(self):
        world = World("lalb", gpus=(2.0, 2.0, 2.0))
        for _ in range(2):
            world.arrive("a")
        world.wait(4.0)
        world.loaded("g0")
        world.wait(0.5)
        world.loaded("g1", load_s=4.5)
        waiting = world.arrive("a")  # g0 ends in 0.5 s, g1 in 1 s
        assert world.local("g0") == [waiting]
        behind = world.arrive("a")  # g0 would be free in 1.5 s now
        assert world.local("g1") == [behind]

    @pytest.mark.parametrize("many_copies", [0, 8], ids=["indexed", "compared"])
    def test_2d_a_cancelled_request_shortens_the_wait_it_was_part_of(
        self, many_copies: int, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(holders, "MANY_COPIES", many_copies)
        world = World("lalb", gpus=(2.0, 2.0, 2.0))
        for _ in range(2):
            world.arrive("a")
        world.wait(4.0)
        world.loaded("g0")
        world.wait(0.5)
        world.loaded("g1", load_s=4.5)
        gone = world.arrive("a")
        assert world.local("g0") == [gone]
        world.cancel(gone)
        heir = world.arrive("a")  # g0 ends in 0.5 s again, g1 in 1 s
        assert world.local("g0") == [heir]

    def test_an_overdue_holder_counts_as_done_any_moment(self):
        world = World("lalb", gpus=(2.0, 2.0))
        world.arrive("a")
        world.serve("g0")
        world.arrive("a")
        world.wait(10.0)  # it should have ended 9 s ago
        ids = [world.arrive("a") for _ in range(5)]
        assert world.local("g0") == ids[:4]
        assert loads(world)[1:] == [("g1", "a")]

    def test_a_free_gpu_serves_its_local_queue_before_the_global_one(self):
        world = World("lalb", gpus=(1.0, 1.0))
        world.arrive("a")
        world.serve("g0")
        world.arrive("a")
        local = world.arrive("a")
        world.arrive("b")
        other = world.arrive("c")  # both GPUs are busy
        assert world.doing("g1") == "loading b"
        world.finish("g0")
        assert world.running("g0") == (local,)
        world.finish("g0")
        assert world.doing("g0") == "loading c"
        world.serve("g0")
        assert world.ends[other] is End.ANSWERED

    def test_a_younger_request_goes_on_while_an_older_one_waits_for_its_holder(self):
        world = World("lalb", gpus=(2.0, 2.0))
        world.arrive("a")
        world.serve("g0")
        world.arrive("a")
        world.arrive("a")
        world.arrive("b")
        assert world.doing("g1") == "loading b"

    def test_there_is_nothing_to_decide_without_an_idle_gpu(self):
        for policy in ("lb", "lalb", "lalb_o3"):
            world = World(policy)
            assert make_policy(policy).next_placement(world.scheduler.cluster, 0.0) is None
            world.arrive("a")
            assert make_policy(policy).next_placement(world.scheduler.cluster, 0.0) is None


class TestOutOfOrder:
    def busy_on_a(self, limit: int) -> World:
        """One GPU of one model, running ``a``."""
        world = World("lalb_o3", gpus=(1.0,), o3_limit=limit)
        world.arrive("a")
        world.wait(4.0)
        world.loaded("g0")
        return world

    def test_a_younger_hit_is_taken_past_an_older_miss(self):
        world = self.busy_on_a(limit=25)
        world.arrive("b")
        hit = world.arrive("a")
        world.finish("g0")
        assert world.running("g0") == (hit,)

    def test_of_several_hits_the_oldest(self):
        world = self.busy_on_a(limit=25)
        world.arrive("b")
        hits = [world.arrive("a") for _ in range(3)]
        for hit in hits:
            world.finish("g0")
            assert world.running("g0") == (hit,)

    @pytest.mark.parametrize("limit", [0, 1, 2, 5])
    def test_nobody_is_skipped_more_often_than_the_limit(self, limit: int):
        world = self.busy_on_a(limit)
        skipped = world.arrive("b")
        hits = [world.arrive("a") for _ in range(8)]
        for skips in range(limit):
            world.finish("g0")
            assert world.running("g0") == (hits[skips],)
            assert world.scheduler.cluster.queue.skips_of_head == skips + 1
        world.finish("g0")
        assert world.doing("g0") == "loading b"
        world.serve("g0")
        assert world.ends[skipped] is End.ANSWERED

    def test_each_request_has_its_own_count(self):
        world = self.busy_on_a(limit=2)
        world.arrive("b")
        first = world.arrive("a")
        world.arrive("c")  # arrives after the first skip candidate
        second = world.arrive("a")
        world.finish("g0")
        assert world.running("g0") == (first,)  # b skipped once, c not at all
        world.finish("g0")
        assert world.running("g0") == (second,)  # b skipped twice, c once
        third = world.arrive("b")
        world.finish("g0")
        assert world.doing("g0") == "loading b"
        assert world.scheduler.cluster.queue.skips_of_head == 1
        world.serve("g0")
        assert world.running("g0") == (third,)  # c skipped twice: the limit
        world.arrive("b")
        world.finish("g0")
        assert world.doing("g0") == "loading c"

    def test_a_hit_at_the_head_skips_nobody(self):
        world = self.busy_on_a(limit=25)
        world.arrive("a")
        world.arrive("b")
        world.finish("g0")
        assert world.scheduler.cluster.queue.skips_of_head == 0


class TestGpusOfUnequalSize:
    SIZES = (1.0, 4.0)
    MODELS = (model("small"), model("large", 4.0), model("other"))

    @pytest.mark.parametrize("policy", ["lb", "lalb", "lalb_o3"])
    def test_a_large_model_goes_where_it_fits(self, policy: str):
        world = World(policy, gpus=self.SIZES, models=self.MODELS)
        world.arrive("large")
        assert loads(world) == [("g1", "large")]

    @pytest.mark.parametrize("policy", ["lb", "lalb", "lalb_o3"])
    def test_the_small_gpu_serves_younger_requests_while_a_large_one_waits(self, policy: str):
        world = World(policy, gpus=self.SIZES, models=self.MODELS)
        world.arrive("large")
        waiting = world.arrive("large")
        assert waiting not in world.running("g1")
        world.arrive("small")
        assert world.doing("g0") == "loading small"

    @pytest.mark.parametrize("policy", ["lb", "lalb", "lalb_o3"])
    def test_younger_requests_never_keep_the_large_gpu_from_a_large_model(self, policy: str):
        world = World(policy, gpus=self.SIZES, models=self.MODELS, o3_limit=3)
        world.arrive("other")
        world.arrive("small")  # on the large GPU
        world.serve("g1")
        world.arrive("small")
        large = world.arrive("large")
        for _ in range(12):
            world.arrive("small")
            for gpu_id in world.devices:
                if world.doing(gpu_id) != "idle":
                    world.serve(gpu_id)
        assert world.ends[large] is End.ANSWERED

    def test_a_hit_waits_for_no_idle_gpu_of_its_size(self):
        world = World("lalb", gpus=self.SIZES, models=self.MODELS)
        world.arrive("large")
        world.serve("g1")
        hit = world.arrive("large")
        assert runs(world)[-1] == ("g1", hit, True)
