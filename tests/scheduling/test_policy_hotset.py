"""The default policy and eviction, one term at a time. Loads take 4 s, runs 1 s, a GPU of 2 GiB holds two models."""

from __future__ import annotations

import pytest
from scheduling_world import End, World, model

from hotset.scheduling.actions import Load, Unload
from hotset.scheduling.cluster import Cluster
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.policies import POLICIES, PolicySettings, make_policy
from hotset.scheduling.policies.hotset import Hotset, _load_on, _wait_for
from hotset.scheduling.policies.interface import Placement, Rule

EXPLAINED = SchedulerConfig(journal_capacity=100)


def hotset_world(**options) -> World:
    return World("hotset", eviction="hotset", config=EXPLAINED, **options)


def loads(world: World) -> list[tuple[str, str]]:
    return [(action.gpu_id, action.model) for action in world.log if isinstance(action, Load)]


def rule_of(world: World, request_id: int) -> Rule | None:
    """Why it was placed; None: it waits."""
    explanation = world.scheduler.journal.explain(request_id)
    return explanation.decisions[-1].rule if explanation is not None else None


def warm(world: World, *names: str) -> None:
    """Each name is asked for once, alone, and answered."""
    for name in names:
        world.arrive(name)
        for gpu_id in world.devices:
            if world.doing(gpu_id) != "idle":
                world.serve(gpu_id)


class TestOrder:
    def test_a_younger_hit_goes_before_an_older_miss(self):
        world = hotset_world(gpus=(1.0,))
        warm(world, "a")
        world.arrive("a")
        miss, hit = world.arrive("b"), world.arrive("a")
        world.finish("g0")
        assert world.running("g0") == (hit,)
        assert rule_of(world, hit) is Rule.OUT_OF_ORDER_HIT
        world.serve("g0")
        world.drain()
        assert rule_of(world, miss) is Rule.CHEAPEST_ROOM
        assert world.ends[miss] is End.ANSWERED

    def test_where_requests_queue_up_a_load_of_much_shorter_runs_goes_before_hits(self):
        world = hotset_world(
            gpus=(2.0,), models=[model("a", load_s=0.5, inference_s=2.0), model("b", load_s=0.5, inference_s=0.1)]
        )
        world.arrive("a")
        world.loaded("g0", load_s=0.5)
        shorter, hit = world.arrive("b"), world.arrive("a")
        world.wait(15.0)
        world.finish("g0", inference_s=2.0)
        assert world.doing("g0") == "loading b"
        assert rule_of(world, shorter) is Rule.SHORTER_LOAD
        world.drain()
        assert world.ends[hit] is End.ANSWERED

    @pytest.mark.parametrize(
        ("load_s", "run_s", "waits_s", "gpus"),
        [
            pytest.param(0.5, 1.0, 20.0, (2.0,), id="its runs are not so much shorter"),
            pytest.param(4.0, 0.1, 30.0, (2.0,), id="nor with its load"),
            pytest.param(0.8, 0.1, 20.0, (1.0,), id="nor with what its victim loses"),
            pytest.param(0.5, 0.1, 2.0, (2.0,), id="it has not waited for long"),
            pytest.param(0.5, 0.1, 20.0, (2.0, 2.0), id="no more wait than there are GPUs"),
        ],
    )
    def test_else_hits_do(self, load_s: float, run_s: float, waits_s: float, gpus: tuple[float, ...]):
        models = [model("a", load_s=0.5, inference_s=2.0), model("b", load_s=load_s, inference_s=run_s)]
        world = World("lb", eviction="hotset", gpus=gpus, models=models)
        for gpu_id in world.devices:
            world.arrive("a")
            world.loaded(gpu_id, load_s=0.5)
        world.scheduler.policy = make_policy("hotset")
        world.arrive("b")
        world.arrive("a")
        world.wait(waits_s)
        world.finish("g0", inference_s=2.0)
        assert world.doing("g0") == "running a"

    def test_a_hit_takes_the_holder_whose_other_models_are_asked_for_least(self):
        world = hotset_world(gpus=(2.0, 2.0))
        policy, world.scheduler.policy = world.scheduler.policy, make_policy("lb")
        for name in "aab":
            world.arrive(name)
        world.drain()
        world.scheduler.policy = policy
        assert world.resident("g0") == ["a", "b"]
        for _ in range(12):
            warm(world, "b")
        assert next(iter(world.scheduler.cluster.idle)).gpu_id == "g1"
        world.wait(10.0)
        world.arrive("b")
        world.finish("g0")
        world.arrive("c")
        world.drain()
        assert [gpu.gpu_id for gpu in world.scheduler.cluster.idle] == ["g0", "g1"], "g0 has been idle longer"
        world.wait(10.0)
        world.arrive("a")
        assert world.doing("g1") == "running a"

    def test_the_longest_overdue_line_is_loaded_first(self):
        """Of the models nobody holds, the one that ends most waiting per second of GPU time."""
        world = hotset_world(gpus=(1.0,))
        world.arrive("a")
        world.arrive("b")
        for _ in range(3):
            world.arrive("c")
        world.serve("g0")
        assert world.doing("g0") == "loading c"

    def test_a_model_too_large_for_the_idle_gpu_waits_for_its_own(self):
        world = hotset_world(gpus=(4.0, 1.0), models=(model("a"), model("large", 3.0)))
        world.arrive("a")
        holder = next(gpu_id for gpu_id in ("g0", "g1") if world.doing(gpu_id) != "idle")
        assert holder == "g0"
        large = world.arrive("large")
        assert world.doing("g1") == "idle"
        world.serve("g0")
        world.serve("g0")
        assert world.ends[large] is End.ANSWERED


class TestBounds:
    def bounded(self, *, max_skips: int = 10_000, max_wait_s: float = 1e9) -> World:
        world = hotset_world(gpus=(1.0,))
        world.scheduler.policy = Hotset(PolicySettings(max_skips=max_skips, max_wait_s=max_wait_s))
        warm(world, "a")
        world.arrive("a")
        return world

    @pytest.mark.parametrize("most", [0, 1, 3])
    def test_no_request_is_passed_over_more_often_than_allowed(self, most: int):
        world = self.bounded(max_skips=most)
        miss = world.arrive("b")
        for _ in range(6):
            world.arrive("a")
        for _ in range(most):
            world.finish("g0")
            assert world.doing("g0") == "running a"
        world.finish("g0")
        assert world.doing("g0") == "loading b"
        assert rule_of(world, miss) is Rule.OLDEST_FIRST

    def test_no_request_that_waited_long_enough_is_passed_over(self):
        world = self.bounded(max_wait_s=5.0)
        world.arrive("b")
        for _ in range(9):
            world.arrive("a")
        for _ in range(4):
            world.wait(1.0)
            world.finish("g0")
            assert world.doing("g0") == "running a"
        world.wait(1.0)
        world.finish("g0")
        assert world.doing("g0") == "loading b"

    def test_the_oldest_goes_where_its_model_is(self):
        world = hotset_world(gpus=(1.0, 1.0))
        world.scheduler.policy = Hotset(PolicySettings(max_skips=0))
        warm(world, "a", "b")
        world.arrive("b")
        assert world.doing("g1") == "running b"

    def test_one_that_fits_on_no_idle_gpu_is_passed_by(self):
        world = hotset_world(gpus=(1.0, 3.0), models=(model("a"), model("large", 3.0)))
        world.scheduler.policy = Hotset(PolicySettings(max_skips=0))
        world.arrive("large")
        waits = world.arrive("large")
        passes = world.arrive("a")
        assert world.doing("g0") == "loading a"
        world.drain()
        assert world.ends[waits] is world.ends[passes] is End.ANSWERED

    def test_nothing_waits_nothing_happens(self):
        world = hotset_world()
        policy = make_policy("hotset")
        assert policy.next_placement(world.scheduler.cluster, 0.0) is None
        assert policy.most_skips == PolicySettings().max_skips


class TestCopies:
    def test_a_long_line_gets_a_further_copy(self):
        world = hotset_world(gpus=(2.0, 2.0))
        warm(world, "a")
        line = [world.arrive("a") for _ in range(12)]
        assert loads(world) == [("g0", "a"), ("g1", "a")]
        copied = next(request_id for request_id in line if rule_of(world, request_id) is Rule.EXTRA_COPY)
        ahead = line.index(copied)
        assert 3 <= ahead < 12, "those before it are started by the holder before the load is done"
        world.drain()
        assert all(world.ends[request_id] is End.ANSWERED for request_id in line)

    def test_a_line_that_shares_one_run_needs_no_further_copy(self):
        """Eight that run together are done soon after one; eight in turn would be worth a load."""
        for max_batch, copies in ((1, 2), (8, 1)):
            world = hotset_world(gpus=(2.0,), models=[model("a", max_batch=max_batch)])
            warm(world, "a")
            for _ in range(8):
                world.arrive("a")
            while world.running("g0"):
                world.finish("g0", inference_s=1.0)  # of one, then of seven: a run of many takes no longer
            world.join(2.0)
            for _ in range(9):
                world.arrive("a")
            assert world.scheduler.cache.copies("a") == copies

    def test_a_short_line_waits_for_its_holder(self):
        world = hotset_world(gpus=(2.0, 2.0))
        warm(world, "a")
        world.arrive("a")
        world.arrive("a")
        assert world.doing("g1") == "idle"
        assert loads(world) == [("g0", "a")]

    def test_a_line_counts_the_older_requests_its_holder_may_be_given_first(self):
        world = hotset_world(gpus=(2.0, 0.5))
        warm(world, "a", "b")
        for name in "aab":
            world.arrive(name)
        cluster = world.scheduler.cluster
        holder, entry = cluster.gpus["g0"], cluster.queue.first_of("b")
        assert entry is not None
        assert _wait_for(cluster, holder, "b", entry, world.now_s) == 2.0, "one that runs, one that is older"
        first = cluster.queue.first_of("a")
        assert first is not None
        assert _wait_for(cluster, holder, "a", first, world.now_s) == 1.0

    def test_nothing_is_loaded_where_a_load_is_in_flight_beside_the_run(self):
        world = hotset_world(gpus=(2.0,))
        cluster = world.scheduler.cluster
        gpu = cluster.gpus["g0"]
        outlook = cluster.prices.outlook("a", gpu, 0.0)
        assert _load_on(cluster, gpu, outlook, 0.0) is not None
        gpu.memory.copying = "b"
        assert _load_on(cluster, gpu, outlook, 0.0) is None

    def test_a_copy_is_not_worth_the_last_copy_of_a_busy_model(self):
        world = hotset_world(gpus=(1.0, 1.0))
        for _ in range(10):
            warm(world, "a", "b")
        for _ in range(7):
            world.arrive("a")
        assert loads(world) == [("g0", "a"), ("g1", "b")]
        for _ in range(7):
            world.arrive("a")
        assert loads(world) == [("g0", "a"), ("g1", "b"), ("g1", "a")], "until it is"

    def test_loads_and_runs_that_cost_nothing_divide_nothing_by_zero(self):
        free = [model(name, load_s=0.0, inference_s=0.0) for name in "ab"]
        world = hotset_world(gpus=(1.0, 1.0), models=free)
        for name in "aaabbb":
            world.arrive(name)
        world.drain()
        assert not world.open

    def test_a_hit_that_was_not_seen_at_once_is_found(self):
        class Blind(Hotset):
            def next_placement(self, cluster: Cluster, now_s: float) -> Placement | None:
                return None

        names = "axyzpqr"
        world = hotset_world(gpus=(1.0,) * 7, models=tuple(names))
        warm(world, *names)
        for name in "pqr":
            world.arrive(name)
        policy, world.scheduler.policy = world.scheduler.policy, Blind(PolicySettings())
        for name in "apqr":
            world.arrive(name)
        world.scheduler.policy = policy
        world.arrive("p")
        assert world.doing("g0") == "running a"

    def test_a_copy_of_a_model_that_fits_on_no_idle_gpu_is_not_made(self):
        world = hotset_world(gpus=(3.0, 1.0), models=(model("large", 3.0), model("a")))
        warm(world, "large")
        ids = [world.arrive("large") for _ in range(12)]
        assert world.doing("g1") == "idle"
        world.drain()
        assert all(world.ends[request_id] is End.ANSWERED for request_id in ids)


class TestPrices:
    def cluster(self, *names: str, gpus: tuple[float, ...] = (3.0, 3.0)) -> tuple[World, Cluster]:
        world = hotset_world(gpus=gpus, models=[model(name) for name in names])
        return world, world.scheduler.cluster

    def test_the_model_asked_for_least_leaves_whatever_was_used_last(self):
        world = hotset_world(gpus=(2.0,))
        for _ in range(5):
            warm(world, "a")
        warm(world, "b")
        world.arrive("c")
        assert [action.model for action in world.log if isinstance(action, Unload)] == ["b"]

    def test_the_model_that_loads_fast_leaves_before_the_one_that_loads_slowly(self):
        models = (model("slow", load_s=30.0), model("fast", load_s=1.0), model("c"))
        world = hotset_world(gpus=(2.0,), models=models)
        for name, load_s in (("slow", 30.0), ("fast", 1.0)):
            world.arrive(name)
            world.serve("g0", load_s=load_s)
        world.arrive("c")
        assert [action.model for action in world.log if isinstance(action, Unload)] == ["fast"]

    def test_a_second_copy_is_cheaper_than_a_last_one(self):
        world = hotset_world(gpus=(2.0, 2.0))
        warm(world, "a")
        for _ in range(12):
            world.arrive("a")
        world.drain()
        prices, gpus, now_s = world.scheduler.cluster.prices, world.scheduler.cluster.gpus, world.now_s
        both = prices.price_s(gpus["g0"], [gpus["g0"].memory.residents["a"]], now_s)
        assert not prices.is_current(gpus["g0"]), "it was priced when it was the only copy"
        room = prices.room(gpus["g0"], 1, now_s, False)
        assert room is not None
        assert room.price_s == both
        world.process_dies("g1", "a")
        assert not prices.is_current(gpus["g0"]), "the other copy is gone"
        last = prices.price_s(gpus["g0"], [gpus["g0"].memory.residents["a"]], now_s)
        assert 0 < both < last
        assert prices.is_current(gpus["g0"])

    def test_a_model_on_very_many_gpus_has_copies_to_give_away(self):
        world = hotset_world(gpus=(1.0,) * 10)
        policy = world.scheduler.policy
        world.scheduler.policy = make_policy("lb")
        for _ in range(10):
            world.arrive("a")
        world.drain()
        world.scheduler.policy = policy
        cluster = world.scheduler.cluster
        gpu = cluster.gpus["g0"]
        assert cluster.cache.copies("a") == 10
        assert cluster.prices.price_s(gpu, [gpu.memory.residents["a"]], world.now_s) == 0.0
        assert cluster.prices.another_copy_s(gpu, "a", world.now_s) == 0.0

    def test_what_somebody_waits_for_goes_only_in_need(self):
        world = hotset_world(gpus=(2.0,))
        for _ in range(4):
            warm(world, "b")
        warm(world, "a")
        world.arrive("b")
        world.arrive("a")  # waits; it is the cheaper one
        memory = world.scheduler.cache.memory("g0")
        eviction = world.scheduler.cache.eviction
        memory.residents["b"].in_use = False
        assert [r.model for r in eviction.choose(memory, 1, 0.0) or ()] == ["b"]
        assert {r.model for r in eviction.choose(memory, memory.capacity_bytes, 0.0) or ()} == {"a", "b"}
        assert {r.model for r in eviction.victims(memory, 0.0)} == {"a", "b"}
        memory.residents["b"].in_use = True
        assert eviction.choose(memory, memory.capacity_bytes, 0.0) is None
        assert eviction.price_s(memory, 2 * memory.capacity_bytes, 0.0) is None

    def test_other_evictions_are_priced_by_the_victims_they_would_choose(self):
        world = World("hotset", eviction="lru", gpus=(2.0,))
        for _ in range(5):
            warm(world, "a")
        warm(world, "b")
        warm(world, "a")
        memory, eviction = world.scheduler.cache.memory("g0"), world.scheduler.cache.eviction
        gpu = world.scheduler.cluster.gpus["g0"]
        expected = world.scheduler.cluster.prices.price_s(gpu, [memory.residents["b"]], world.now_s)
        assert eviction.price_s(memory, 1, world.now_s) == expected
        assert eviction.price_s(memory, 2 * memory.capacity_bytes, world.now_s) is None
        world.arrive("c")
        assert world.resident("g0") == ["a", "c"]

    def test_a_removed_model_leaves_no_price_behind(self):
        world = hotset_world(gpus=(2.0, 2.0))
        warm(world, "a")
        for _ in range(12):
            world.arrive("a")
        world.drain()
        prices = world.scheduler.cluster.prices
        assert "a" in prices.known
        world.remove("a")
        assert "a" not in prices.known

    def test_a_miss_waits_for_a_gpu_whose_room_is_cheaper_and_that_is_free_soon(self):
        world = hotset_world(gpus=(1.0, 1.0), models=(model("busy"), model("rare", inference_s=0.1), model("c")))
        for _ in range(12):
            warm(world, "busy")
        world.wait(2.0)
        world.arrive("busy")
        world.arrive("rare")
        world.loaded("g1")
        world.finish("g0")
        assert world.resident("g0") == ["busy"]
        assert world.doing("g1") == "running rare"
        world.arrive("c")
        assert world.doing("g0") == "idle", "put off: rare is done in a moment"
        world.finish("g1", inference_s=0.1)
        assert world.doing("g1") == "loading c"

    def test_it_does_not_wait_for_a_gpu_that_is_no_cheaper(self):
        world = hotset_world(gpus=(1.0, 1.0))
        for _ in range(5):
            warm(world, "a", "b")
        world.arrive("b")
        world.arrive("c")
        assert world.doing("g0") == "loading c"

    def test_a_price_from_before_a_copy_was_lost_does_not_count(self):
        world = hotset_world(gpus=(1.0, 1.0))
        policy, world.scheduler.policy = world.scheduler.policy, make_policy("lb")
        for name in "aa":
            world.arrive(name)
        world.drain()
        world.scheduler.policy = policy
        cluster = world.scheduler.cluster
        memory = cluster.gpus["g0"].memory
        second = cluster.cache.eviction.price_s(memory, 1, world.now_s)
        world.lose("g1")
        assert cluster.cache.eviction.price_s(memory, 1, world.now_s) == second, "an estimate may be a little old"
        world.arrive("b")
        assert "a" not in memory.residents or cluster.gpus["g0"].prices is None

    def test_it_does_not_wait_for_a_gpu_that_others_wait_for(self):
        world = hotset_world(gpus=(1.0, 1.0), models=(model("busy"), model("rare", inference_s=0.1), model("c")))
        for _ in range(12):
            warm(world, "busy")
        world.arrive("busy")
        world.arrive("rare")
        world.loaded("g1")
        world.arrive("rare")
        world.finish("g0")
        world.arrive("c")
        assert world.doing("g0") == "loading c"


class TestManyModels:
    def test_lines_beyond_those_looked_at_take_their_turn(self):
        names = [f"m{number}" for number in range(60)]
        world = hotset_world(gpus=(1.0, 1.0), models=names)
        ids = [world.arrive(name) for name in ("m0", "m1", "m0", *names[2:])]
        lines = world.scheduler.cluster.queue.models
        assert next(iter(lines)) == "m0"
        world.serve("g1")
        assert list(lines)[-1] == "m0", "seen: its holder is busy"
        world.drain()
        assert all(world.ends[request_id] is End.ANSWERED for request_id in ids)

    def test_in_a_large_cluster_a_miss_is_not_put_off(self):
        names = [f"m{number}" for number in range(40)]
        world = hotset_world(gpus=(1.0,) * 20, models=names)
        for name in names:
            world.arrive(name)
        world.drain()
        assert not world.open


def test_a_request_that_has_just_come_is_placed_where_loads_take_no_time():
    world = hotset_world(gpus=(2.0,))
    world.arrive("b")
    world.loaded("g0", load_s=0.0)
    world.finish("g0")
    world.arrive("a")
    assert world.doing("g0") == "loading a"


def test_it_is_registered():
    assert isinstance(POLICIES["hotset"](PolicySettings()), Hotset)
