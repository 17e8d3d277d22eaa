"""Three levels: HOT, WARM, COLD. Loads take 4 s, restores 0.4 s until measured; a GPU holds two models of 1 GiB."""

from __future__ import annotations

import pytest
from scheduling_world import GIB, World, model

from hotset.errors import InvariantError
from hotset.scheduling.actions import Action, Load, Offload, Restore, Run, Unload
from hotset.scheduling.cache import CacheManager
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.events import ProcessLost
from hotset.scheduling.eviction.lru import Lru
from hotset.scheduling.parking import ParkedSize
from hotset.scheduling.policies import POLICIES
from hotset.vocabulary import FailureKind, Model, Profile, Residency


def warm(policy: str = "lalb", *, host_gib: float = 8.0, gpus: tuple[float, ...] = (2.0,), **others: object) -> World:
    config = SchedulerConfig(host_memory_bytes=int(host_gib * GIB), journal_capacity=100)
    return World(policy, gpus=gpus, config=config, **others)  # type: ignore[arg-type]


def served(world: World, names: str, gpu_id: str = "g0") -> World:
    for name in names:
        world.arrive(name)
        world.serve(gpu_id)
    return world


def moves(world: World) -> list[tuple[type[Action], str]]:
    return [
        (type(action), action.model) for action in world.log if isinstance(action, Load | Restore | Offload | Unload)
    ]


def host_bytes(world: World, gpu_id: str = "g0") -> int:
    return world.scheduler.cache.memory(gpu_id).host.used_bytes


@pytest.mark.parametrize("policy", POLICIES)
def test_what_leaves_a_gpu_is_parked_and_comes_back_without_a_load(policy: str):
    world = served(warm(policy), "abca")
    assert moves(world)[2:] == [(Offload, "a"), (Load, "c"), (Offload, "b"), (Restore, "a")]
    assert world.resident("g0") == ["c", "a"]
    assert world.parked("g0") == ["b"]
    assert not world.open
    last = [action for action in world.log if isinstance(action, Run)][-1]
    assert not last.hit, "a restore is a miss, if a cheap one"


def test_without_host_memory_models_are_unloaded():
    world = served(warm(host_gib=0.0), "abca")
    assert {kind for kind, _ in moves(world)} == {Load, Unload}


def test_the_host_is_paid_for_until_the_model_is_hot_again():
    world = served(warm(), "abc")
    assert host_bytes(world) == GIB
    world.arrive("a")
    resident = world.scheduler.cache.memory("g0").residents["a"]
    assert resident.state is Residency.LOADING
    assert host_bytes(world) == 2 * GIB, "a is on its way, b takes its place"
    world.loaded("g0", load_s=0.25)
    assert resident.state is Residency.HOT
    assert host_bytes(world) == GIB
    assert resident.uses == 2, "it is the same resident that came back"


class TestPrices:
    def test_a_warm_model_costs_a_restore_on_its_gpu_and_a_load_elsewhere(self):
        world = served(warm(gpus=(2.0, 2.0)), "")
        cluster = world.scheduler.cluster
        world.arrive("a")
        world.serve("g0")
        g0, g1 = cluster.gpus["g0"], cluster.gpus["g1"]
        for name in "bc":
            world.scheduler.cluster.idle.move_to_end(g1)
            g1.idle_rank, g0.idle_rank = g0.idle_rank, g1.idle_rank
            world.arrive(name)
            world.serve("g0")
            g1.idle_rank, g0.idle_rank = min(g0.idle_rank, g1.idle_rank), max(g0.idle_rank, g1.idle_rank)
            cluster.idle.move_to_end(g0)
        assert cluster.load_s("a", g1) == 4.0
        assert cluster.load_s("a", g0) < 1.0

    def test_restores_are_learned_apart_from_loads(self):
        world = served(warm(), "abc")
        world.arrive("a")
        world.loaded("g0", load_s=0.25)
        profiles = world.scheduler.profiles
        assert profiles.restore_s("a", "virtual") == 0.25
        assert profiles.load_s("a", "virtual") == 4.0
        assert profiles.offload_s("b", "virtual") == 0.5
        assert profiles.restore_s("d", "virtual") == pytest.approx((0.25 + 2 * 0.5) / 3), (
            "by bytes, as others were copied"
        )

    def test_before_any_copy_was_seen_it_is_a_share_of_the_load_or_what_was_declared(self):
        world = warm(models=["a", model("b")])
        profiles = world.scheduler.profiles
        assert profiles.restore_s("a", "virtual") == pytest.approx(0.4)
        declared = model("c")
        world.add(type(declared)(name="c", memory_bytes=GIB, profile=Profile(load_s=4.0, restore_s=0.125)))
        assert profiles.restore_s("c", "virtual") == 0.125
        assert profiles.restore_s("nobody's", "virtual") == pytest.approx(0.1 * profiles.load_s("nobody's", "virtual"))

    def test_a_copy_of_nothing_says_nothing_about_bytes(self):
        profiles = warm().scheduler.profiles
        profiles.observe_offload("a", "virtual", 0.5, 0)
        assert profiles.restore_s("b", "virtual") == pytest.approx(0.4)

    def test_what_is_loaded_as_fast_as_it_comes_back_is_not_parked(self):
        world = warm(models=[model(name, load_s=None) for name in "abc"])
        for name in "ab":
            world.arrive(name)
            world.serve("g0", load_s=0.5)
        profiles = world.scheduler.profiles
        profiles.observe_restore("a", "virtual", 0.5, GIB)
        world.arrive("c")
        assert moves(world)[2:] == [(Unload, "a"), (Load, "c")]


class TestHostBudget:
    def test_the_one_used_longest_ago_makes_room_on_the_host(self):
        world = served(warm(host_gib=2.0), "abcde"[:4])
        assert world.parked("g0") == ["a", "b"]
        world.add(model("e"))
        world.arrive("e")
        assert moves(world)[-3:] == [(Unload, "a"), (Offload, "c"), (Load, "e")]
        assert world.parked("g0") == ["b", "c"]

    def test_what_is_worth_more_than_the_victim_stays(self):
        world = served(warm(host_gib=1.0, gpus=(2.0, 1.0)), "")
        for name in "abc":
            world.arrive(name)
            world.drain()
        parked = {name for gpu_id in world.devices for name in world.parked(gpu_id)}
        assert len(parked) <= 1

    def test_a_model_larger_than_the_host_is_unloaded(self):
        world = served(warm(host_gib=0.5), "abc")
        assert moves(world)[2:] == [(Unload, "a"), (Load, "c")]

    def test_room_is_not_made_by_forgetting_what_comes_back_itself(self):
        world = served(warm(host_gib=1.0), "abc")
        assert world.parked("g0") == ["a"]
        world.arrive("a")  # its host memory is taken until it is back, so b cannot be parked
        assert moves(world)[-2:] == [(Unload, "b"), (Restore, "a")]

    def test_as_many_are_forgotten_as_it_takes(self):
        world = warm(host_gib=2.0, gpus=(2.0,), models=["a", "b", "c", model("big", 2.0), model("huge", 2.0)])
        served(world, "ab")
        world.arrive("big")
        world.serve("g0")
        assert world.parked("g0") == ["a", "b"]
        world.arrive("huge")
        assert moves(world)[-4:] == [(Unload, "a"), (Unload, "b"), (Offload, "big"), (Load, "huge")]

    def test_models_waited_for_are_forgotten_last(self):
        world = served(warm(host_gib=2.0), "abcd")
        world.arrive("c")
        world.arrive("a")
        world.add(model("e"))
        world.arrive("e")
        world.finish("g0")  # a comes back; then e
        world.loaded("g0")
        world.finish("g0")
        assert (Unload, "a") not in moves(world)
        world.drain()
        assert not world.open

    def test_a_size_that_does_not_fit_the_host_is_believed(self):
        world = served(warm(host_gib=2.0), "ab")
        world.arrive("c")
        world.offloaded("g0", size=ParkedSize(device_bytes=0, host_bytes=3 * GIB))
        assert moves(world)[-1] == (Unload, "a")
        assert world.parked("g0") == []
        world.drain()
        served(world, "abc")
        assert moves(world)[-2:] == [(Unload, "a"), (Restore, "c")], "a is known to be too large for the host"

    def test_each_node_has_its_own(self):
        world = warm(host_gib=1.0, gpus=(), policy="lb")
        world.join(1.0, node="one")
        world.join(1.0, node="two")
        for name in "abcd":
            world.arrive(name)
            world.drain()
        assert [world.parked("g0"), world.parked("g1")] == [["a"], ["b"]]
        world.lose("g0")
        world.lose("g1")
        world.join(1.0, gpu_id="g0", node="one")
        assert host_bytes(world) == 0


class TestResidue:
    """What a parked process holds of its GPU."""

    def parked_with(self, device_gib: float, models: str = "abc") -> World:
        world = warm(gpus=(2.5,), models=[*"abcd", model("e", 2.5)])
        served(world, models[:2])
        world.arrive(models[2])
        world.offloaded("g0", size=ParkedSize(device_bytes=int(device_gib * GIB), host_bytes=GIB))
        world.serve("g0")
        return world

    def test_it_is_on_the_gpus_account(self):
        world = self.parked_with(0.25)
        assert world.scheduler.cache.memory("g0").used_bytes == 2.25 * GIB

    def test_it_goes_when_the_room_is_needed(self):
        world = self.parked_with(0.25)
        world.arrive("e")
        assert world.parked("g0") == ["b", "c"], "they are known to leave nothing"
        assert (Unload, "a") in moves(world)

    def test_a_parked_process_that_holds_more_than_there_is_must_go(self):
        world = self.parked_with(0.75)
        assert world.parked("g0") == []
        assert moves(world)[-1] == (Unload, "a")

    def test_a_model_whose_process_keeps_it_all_is_not_parked(self):
        world = warm(gpus=(3.5,), models=[*"abcd"])
        served(world, "abc")
        world.arrive("d")
        world.offloaded("g0", size=ParkedSize(device_bytes=GIB // 2, host_bytes=GIB))
        world.serve("g0")
        world.scheduler.cache._sizes["b"] = ParkedSize(device_bytes=GIB, host_bytes=GIB)
        world.arrive("a")
        assert (Unload, "b") in moves(world)

    def test_fewer_are_parked_where_their_residues_would_fill_the_gpu(self):
        world = warm(gpus=(2.0,), models=["a", "b", model("c", 2.0)])
        served(world, "ab")
        for name in "ab":
            world.sizes[name] = world.scheduler.cache._sizes[name] = ParkedSize(GIB // 4, GIB)
        world.arrive("c")
        assert moves(world)[2:] == [(Unload, "b"), (Unload, "a"), (Load, "c")]


class TestNear:
    """A model that another GPU of the node has is loaded from the node's host memory: in 0.5 s, if so declared."""

    def world(self, host_gib: float = 8.0, **profile: float) -> World:
        """``a`` is HOT on g0, and nothing is on g1."""
        world = warm("lb", host_gib=host_gib, gpus=(1.0, 1.0))
        for name in "ab":
            world.add(Model(name=name, memory_bytes=GIB, profile=Profile(load_s=4.0, inference_s=1.0, **profile)))
        return served(world, "a")

    def load_s(self, world: World, gpu_id: str, name: str = "a") -> float:
        cluster = world.scheduler.cluster
        return cluster.load_s(name, cluster.gpus[gpu_id])

    def test_while_it_is_hot_or_warm_there(self):
        world = self.world(reload_s=0.5)
        assert (self.load_s(world, "g1"), self.load_s(world, "g1", "b")) == (0.5, 4.0)
        served(served(world, "b", "g1"), "c")
        assert world.parked("g0") == ["a"]
        assert self.load_s(world, "g1") == 0.5
        world.process_dies("g0", "a")
        assert self.load_s(world, "g1") == 4.0

    def test_not_while_it_is_only_loaded_there_nor_on_another_node(self):
        world = self.world(reload_s=0.5)
        world.arrive("b")
        world.now_s += 1.0
        (loading,) = (gpu_id for gpu_id in world.devices if world.doing(gpu_id) == "loading b")
        assert self.load_s(world, "g0" if loading == "g1" else "g1", "b") == 4.0
        world.join(1.0, gpu_id="far", node="far")
        assert self.load_s(world, "far") == 4.0

    def test_not_where_no_host_memory_is_accounted_for(self):
        assert self.load_s(self.world(0.0, reload_s=0.5), "g1") == 4.0

    def test_what_it_takes_is_learned_apart(self):
        world = self.world()
        assert self.load_s(world, "g1") == 4.0, "none was seen yet"
        world.arrive("a")
        world.arrive("a")
        world.loaded("g1", load_s=0.25)
        profiles = world.scheduler.profiles
        assert (profiles.load_s("a", "virtual", near=True), profiles.load_s("a", "virtual")) == (0.25, 4.0)

    def test_one_that_is_quickly_loaded_again_is_not_parked_unless_it_is_the_last(self):
        world = self.world(restore_s=0.3, reload_s=0.2)
        world.arrive("a")
        world.arrive("a")
        world.loaded("g1", load_s=0.2)
        world.drain()
        world.arrive("b")
        world.drain()
        assert moves(world)[-2:] == [(Unload, "a"), (Load, "b")]
        world.arrive("b")
        world.arrive("c")
        world.drain()
        assert (Offload, "a") in moves(world), "its weights would have left the node"

    def test_what_losing_a_copy_costs_depends_on_who_else_has_it(self):
        world = self.world(reload_s=0.2, restore_s=3.0)
        prices, gpu = world.scheduler.cluster.prices, world.scheduler.cluster.gpus["g0"]
        outlook = prices.outlook("a", gpu, world.now_s)
        assert outlook.load_s == 0.2, "on another GPU, from host memory"
        victim = [gpu.memory.residents["a"]]
        back_s = min(4.0, outlook.parked_s)
        assert prices.price_s(gpu, victim, world.now_s) == pytest.approx(outlook.wanted * back_s)
        gpu.memory.host.used_bytes = gpu.memory.host.capacity_bytes
        assert prices.price_s(gpu, victim, world.now_s) == pytest.approx(outlook.wanted * 4.0), "from disk"
        gpu.memory.host.used_bytes = 0
        world.process_dies("g0", "a")
        assert prices.outlook("a", gpu, world.now_s).load_s == 4.0


class TestFailures:
    def test_an_offload_that_fails_makes_the_model_cold(self):
        world = served(warm(), "ab")
        world.arrive("c")
        world.offload_fails("g0")
        assert world.parked("g0") == []
        world.serve("g0")
        world.arrive("a")
        assert moves(world)[-1] == (Load, "a")

    def test_a_restore_that_fails_is_tried_again_as_a_load(self):
        world = served(warm(), "abc")
        request = world.arrive("a")
        world.load_fails("g0", FailureKind.CRASH)
        assert moves(world)[-1] == (Load, "a")
        world.drain()
        assert request in world.ends

    def test_a_parked_process_may_die(self):
        world = served(warm(), "abc")
        world.process_dies("g0", "a")
        assert host_bytes(world) == 0
        world.arrive("a")
        assert moves(world)[-1] == (Load, "a")

    def test_a_death_of_what_is_gone_is_no_news(self):
        world = warm()
        assert world.handle(ProcessLost("g0", "a", "late")) == []
        assert world.handle(ProcessLost("nobody's", "a", "late")) == []

    def test_a_report_about_what_was_forgotten_meanwhile_is_learned_from(self):
        world = served(warm(host_gib=8.0), "ab")
        world.arrive("c")
        world.remove("a")
        assert moves(world)[-1] == (Unload, "a")
        world.add(model("a"))
        world.offloaded("g0", size=ParkedSize(device_bytes=0, host_bytes=GIB // 2))
        world.drain()
        served(world, "ad")
        assert world.scheduler.cache.memory("g0").parked["b"].host_bytes == GIB
        served(world, "b")
        assert world.scheduler.cache.memory("g0").parked["a"].host_bytes == GIB // 2

    def test_a_lost_gpu_takes_its_parked_models_along(self):
        world = served(warm(gpus=(2.0, 0.5)), "abc")
        world.lose("g0")
        assert host_bytes(world, "g1") == 0
        assert not world.scheduler.cache.parked_on("a")

    def test_a_gpu_lost_in_the_middle_of_a_restore_gives_the_hosts_memory_back(self):
        world = served(warm(gpus=(2.0, 0.5)), "abc")
        world.arrive("a")
        world.lose("g0")
        assert host_bytes(world, "g1") == 0

    def test_a_removed_model_leaves_the_host(self):
        world = served(warm(), "abc")
        world.remove("a")
        assert moves(world)[-1] == (Unload, "a")
        assert "a" not in world.scheduler.cluster.models


class TestPlacement:
    @pytest.mark.parametrize("policy", ["lb", "lalb", "lalb_o3"])
    def test_a_miss_goes_where_the_model_is_warm_if_that_gpu_is_idle(self, policy: str):
        world = warm(policy, gpus=(1.0, 1.0, 1.0))
        for name in "abcd":  # d evicts a on g0, which is then idle for the shortest time
            world.arrive(name)
            world.drain()
        assert world.parked("g0") == ["a"]
        world.arrive("a")
        assert moves(world)[-2:] == [(Offload, "d"), (Restore, "a")]

    def test_if_it_is_busy_the_gpu_idle_longest_takes_it(self):
        world = warm("lb", gpus=(1.0, 1.0))
        for name in "abc":
            world.arrive(name)
            world.drain()
        world.arrive("b")
        world.arrive("c")
        world.arrive("a")
        world.drain()
        assert not world.open

    def test_a_copy_that_others_hold_is_worth_less_on_the_host(self):
        cache = served(warm(host_gib=1.0), "abc").scheduler.cache
        memory = cache.memory("g0")
        (parked,) = memory.parked.values()
        sole = cache._worth(parked)
        cache._holders["a"] = {"g7": None}
        assert cache._worth(parked) < sole
        del cache._holders["a"]


def test_a_model_parked_where_there_is_no_room_is_a_bug():
    cache = CacheManager(Lru(), host_memory_bytes=1)
    memory = cache.add_gpu("g", 10)
    cache.reserve(memory, "a", 4, 0.0)
    with pytest.raises(InvariantError, match="a cannot be parked for g"):
        cache.park(memory, cache.drop(memory, "a"))


def test_the_journal_tells_who_made_room():
    world = served(warm(), "abc")
    request = world.arrive("a")
    explanation = world.scheduler.journal.explain(request)
    assert explanation is not None
    (decision,) = explanation.decisions
    assert (decision.hit, decision.evicted) == (False, ("b",))
    assert 0 < decision.load_s < 1
