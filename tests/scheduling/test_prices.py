"""What copies are worth: with host memory, of many residents, and the arrival rates that it is worked out from."""

from __future__ import annotations

import pytest
from scheduling_world import GIB, World, model

from hotset.scheduling.actions import Load, Restore
from hotset.scheduling.cache import Resident
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.holders import MANY_COPIES
from hotset.scheduling.policies.hotset import _load_on
from hotset.scheduling.prices import MOST_COMPARED, PricedResident, _cheap, _cheapest
from hotset.scheduling.rates import LEAST_HISTORY_S, MEMORY_S, ArrivalRates

EXPLAINED = SchedulerConfig(journal_capacity=100)


def hotset_world(**options) -> World:
    return World("hotset", eviction="hotset", config=EXPLAINED, **options)


def warm(world: World, *names: str) -> None:
    """Each name is asked for once, alone, and answered."""
    for name in names:
        world.arrive(name)
        for gpu_id in world.devices:
            if world.doing(gpu_id) != "idle":
                world.serve(gpu_id)


class TestTiers:
    """Host memory: restores and offloads are taken to last a tenth of a load until one was seen."""

    def world(self, *, host_gib: float = 8.0, gpus: tuple[float, ...] = (1.0,), overlap: bool = False) -> World:
        config = SchedulerConfig(host_memory_bytes=int(host_gib * GIB), overlap=overlap, journal_capacity=100)
        return World("hotset", eviction="hotset", gpus=gpus, config=config)

    def price_of(self, world: World, name: str) -> float:
        gpu = world.scheduler.cluster.gpus["g0"]
        return world.scheduler.cluster.prices.price_s(gpu, [gpu.memory.residents[name]], world.now_s)

    def test_losing_what_would_be_parked_costs_the_way_out_and_back(self):
        prices = {}
        for host_gib in (0.0, 8.0):
            world = self.world(host_gib=host_gib)
            warm(world, "a")
            prices[host_gib] = self.price_of(world, "a")
        assert prices[8.0] == pytest.approx(0.2 * prices[0.0])

    def test_where_the_host_is_full_it_costs_a_load(self):
        world = self.world(host_gib=1.0)
        warm(world, "a", "b")
        assert world.parked("g0") == ["a"]
        full = self.price_of(world, "b")
        world.remove("a")
        assert self.price_of(world, "b") < full

    def test_a_parked_model_goes_back_where_it_is_parked(self):
        world = self.world(gpus=(1.0, 1.0))
        warm(world, "a", "b", "c")
        holder = next(gpu_id for gpu_id in ("g0", "g1") if world.parked(gpu_id))
        (name,) = world.parked(holder)
        for _ in range(3):
            warm(world, *world.resident(holder))  # which makes the other GPU's room the cheaper one
        before = len(world.log)
        world.arrive(name)
        assert [action.gpu_id for action in world.log[before:] if isinstance(action, Restore)] == [holder]

    def test_a_foothold_is_worth_less_the_more_there_are_and_nothing_without_room(self):
        worth = []
        for host_gib, holders in ((8.0, 1), (8.0, 2), (1.5, 2)):
            world = self.world(host_gib=host_gib, gpus=(1.0, 1.0))
            for _ in range(5):
                warm(world, "a", "b")
            cluster = world.scheduler.cluster
            gpu = cluster.gpus[next(gpu_id for gpu_id in world.devices if gpu_id not in cluster.cache.holders("a"))]
            if holders == 2:
                cluster.cache.park(gpu.memory, Resident("a", GIB, 0.0))
            worth.append(cluster.prices.foothold_s(gpu, "a", world.now_s))
        assert worth[0] > worth[1] > worth[2] == 0.0

    def test_beyond_many_gpus_a_foothold_more_is_worth_nothing(self):
        world = self.world(host_gib=16.0, gpus=(1.0,) * 10)
        warm(world, *(9 * "a"))
        cluster = world.scheduler.cluster
        (holder,) = cluster.cache.holders("a")
        first, *others = (gpu for gpu in cluster.gpus.values() if gpu.gpu_id != holder)
        worth = [cluster.prices.foothold_s(first, "a", world.now_s)]
        for gpu in others:
            cluster.cache.park(gpu.memory, Resident("a", GIB, 0.0))
            worth.append(cluster.prices.foothold_s(first, "a", world.now_s))
        assert min(worth[:MANY_COPIES]) > worth[MANY_COPIES] == 0.0
        assert sorted(worth, reverse=True) == worth

    def test_a_line_gets_its_models_next_gpu_sooner_where_it_can_be_parked_there(self):
        loads = {}
        for host_gib in (0.0, 8.0):
            config = SchedulerConfig(host_memory_bytes=int(host_gib * GIB))
            world = World("hotset", eviction="hotset", gpus=(1.0, 1.0), config=config)
            warm(world, *"ab", *(8 * "a"))
            world.arrive("a")
            before = len(world.log)
            world.arrive("a")
            loads[host_gib] = [action.model for action in world.log[before:] if isinstance(action, Load)]
        assert loads == {0.0: [], 8.0: ["a"]}

    def test_a_load_beside_runs_keeps_nobody_waiting_but_by_its_run(self):
        totals = {}
        for overlap in (False, True):
            world = self.world(gpus=(2.0,), overlap=overlap)
            warm(world, "a")
            cluster = world.scheduler.cluster
            gpu = cluster.gpus["g0"]
            load = _load_on(cluster, gpu, cluster.prices.outlook("b", gpu, world.now_s), world.now_s)
            assert load is not None
            totals[overlap] = load.total_s
        # Of those who come within 1 s in place of 5 s, a fifth as many, each waits for a fifth of the time.
        assert totals[True] == pytest.approx(totals[False] / 25), "a run of 1 s, not a load of 4 s and a run"


def residents(*figures: tuple[float, int]) -> list[PricedResident]:
    ranked = [
        PricedResident(price_s, Resident(str(number), size, 0.0), 1) for number, (price_s, size) in enumerate(figures)
    ]
    return sorted(ranked, key=lambda one: one.price_s)


class TestVictims:
    def test_the_cheapest_set_is_found(self):
        ranked = residents((1.0, 1), (1.5, 2), (1.9, 3), (5.0, 9))
        assert [one.price_s for one in _cheapest(ranked, 3)] == [1.9]
        assert [one.price_s for one in _cheapest(ranked, 4)] == [1.0, 1.9]
        assert [one.price_s for one in _cheapest(ranked, 9)] == [5.0]
        assert [one.price_s for one in _cheapest(ranked, 15)] == [1.0, 1.5, 1.9, 5.0]

    def test_with_many_it_is_nearly_found(self):
        ranked = residents((1.0, 1), (1.5, 2), (1.9, 3), (5.0, 9))
        assert [one.price_s for one in _cheap(ranked, 2)] == [1.5]
        assert [one.price_s for one in _cheap(ranked, 3)] == [1.0, 1.5]
        assert [one.price_s for one in _cheap(ranked, 9)] == [5.0]

    def test_many_small_models_on_one_gpu(self):
        names = [f"m{number}" for number in range(MOST_COMPARED + 2)]
        world = hotset_world(gpus=(10.0,), models=[*map(model, names), model("large", 10.0)])
        warm(world, *names)
        world.arrive("large")
        assert world.resident("g0") == ["large"]


class TestRates:
    def test_a_steady_stream_is_learned(self):
        rates = ArrivalRates()
        for number in range(2000):
            rates.arrived("a", number * 0.5)
        assert rates.per_s("a", 1000.0) == pytest.approx(2.0, rel=0.05)
        assert rates.last_s("a") == 999.5

    def test_the_first_arrivals_are_no_flood(self):
        rates = ArrivalRates()
        rates.arrived("a", 0.0)
        assert rates.per_s("a", 0.0) == pytest.approx(1 / LEAST_HISTORY_S)
        assert rates.per_s("b", 0.0) == 0.0
        assert rates.last_s("b") is None

    def test_it_forgets(self):
        rates = ArrivalRates()
        for number in range(1000):
            rates.arrived("a", float(number))
        before = rates.per_s("a", 1000.0)
        assert rates.per_s("a", 1000.0 + MEMORY_S) < 0.4 * before
        rates.forget("a")
        rates.forget("a")
        assert rates.per_s("a", 1000.0) == 0.0
