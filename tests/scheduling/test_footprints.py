"""What is kept free for a model's next load: what its loads took, and a margin learned from how much they differ."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling_world import GIB, World, model

from hotset.scheduling.actions import Restore, Unload
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.profiles import NEWEST_SIZES, Footprint
from hotset.vocabulary import FailureKind, RejectReason

MIB = 1 << 20
sizes = st.integers(1, 80 * GIB)
HIGH = 400
"""Draws from a distribution lie between 0 and about this."""
DISTRIBUTIONS: dict[str, Callable[[random.Random], float]] = {
    "uniform": lambda draw: draw.uniform(0, HIGH),
    "normal": lambda draw: draw.gauss(200, 40),
    "exponential": lambda draw: draw.expovariate(1 / 50),
    "now and then large": lambda draw: HIGH if draw.random() < 0.05 else 100,
    "one of three": lambda draw: draw.choice((100, 150, HIGH)),
}


@given(size=sizes, times=st.integers(1, 2 * NEWEST_SIZES))
def test_a_steady_model_has_no_margin(size: int, times: int):
    footprint = Footprint()
    for _ in range(times):
        footprint.observe(size)
    assert footprint.need_bytes == footprint.newest_bytes == size


@given(st.lists(sizes, min_size=1, max_size=3 * NEWEST_SIZES))
def test_what_was_just_seen_is_covered_and_a_restart_changes_nothing(seen: list[int]):
    footprint = Footprint()
    for size in seen:
        footprint.observe(size)
    newest = seen[-NEWEST_SIZES:]
    assert max(newest) <= footprint.need_bytes <= max(newest) + max(newest) - min(newest)
    assert Footprint(footprint.sizes_bytes).need_bytes == footprint.need_bytes


@given(st.lists(sizes, max_size=2 * NEWEST_SIZES), sizes)
def test_the_margin_goes_once_the_sizes_no_longer_differ(varying: list[int], steady: int):
    footprint = Footprint(varying)
    for _ in range(NEWEST_SIZES):
        footprint.observe(steady)
    assert footprint.need_bytes == steady


@pytest.mark.parametrize("shape", DISTRIBUTIONS)
@settings(max_examples=5, derandomize=True, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_more_than_19_of_20_loads_take_no_more_than_was_kept_free(shape: str, seed: int):
    draw = random.Random(seed)
    footprint, covered, loads = Footprint(), 0, 4000
    for _ in range(loads):
        size = MIB + int(MIB * abs(DISTRIBUTIONS[shape](draw)))
        covered += size <= footprint.need_bytes
        footprint.observe(size)
    assert covered >= 0.95 * loads


def need_mib(world: World, name: str) -> float:
    return world.scheduler.cluster.models[name].memory_bytes / MIB


def load(world: World, name: str, mib: float, *, load_s: float = 4.0) -> None:
    """Somebody calls a model that is on no GPU."""
    world.arrive(name)
    world.loaded("g0", load_s=load_s, memory_bytes=int(mib * MIB))
    world.finish("g0")


def test_steady_models_fill_a_gpu_to_the_brim():
    world = World(gpus=(320 / 1024,), models=[model(name, 100 / 1024) for name in "abc"])
    for _ in range(3):
        for name in "abc":
            world.arrive(name)
            if world.devices["g0"].loading is not None:
                world.loaded("g0", memory_bytes=100 * MIB)
            world.finish("g0")
    assert world.resident("g0") == ["a", "b", "c"]
    assert world.scheduler.cache.evictions == 0


def test_room_is_made_for_what_a_varying_model_may_take_before_it_is_loaded():
    world = World(gpus=(400 / 1024,), models=[model("v", 100 / 1024), model("b", 350 / 1024), model("c", 250 / 1024)])
    load(world, "v", 100)
    load(world, "b", 350)  # v leaves
    load(world, "v", 140)  # b leaves
    assert need_mib(world, "v") == 180
    load(world, "b", 350)
    load(world, "c", 250)
    world.arrive("v")
    assert world.log[-2:-1] == [Unload("g0", "c")], "150 MiB were free, enough for the 140 that it last took"
    assert world.scheduler.cache.memory("g0").used_bytes == 180 * MIB
    world.loaded("g0", memory_bytes=120 * MIB)
    assert world.scheduler.cache.memory("g0").used_bytes == 120 * MIB, "what is there is accounted for as it is"
    assert need_mib(world, "v") == 160


def test_a_margin_never_keeps_a_model_from_a_gpu_it_was_seen_to_fit_on():
    world = World(gpus=(400 / 1024,), models=[model("v", 200 / 1024), model("b", 350 / 1024)])
    for mib in (200, 380):
        load(world, "v", mib)
        load(world, "b", 350)
    assert need_mib(world, "v") == 400
    larger = world.join(1.0)
    assert need_mib(world, "v") == 560
    world.lose(larger)
    assert need_mib(world, "v") == 400
    load(world, "v", 300)
    assert world.resident("g0") == ["v"]


def test_what_is_measured_counts_for_more_than_what_is_declared_anew():
    world = World(gpus=(1.0,), models=[model("a", 0.25)])
    load(world, "a", 100)
    world.add(model("a", 0.5, max_batch=4))
    assert need_mib(world, "a") == 100
    assert world.scheduler.cluster.models["a"].max_batch == 4
    world.remove("a")
    world.add(model("a", 0.5))
    assert need_mib(world, "a") == 512


def test_what_was_learned_before_a_restart_counts():
    world = World(gpus=(1.0,), models=[model("a", 0.5, sizes_bytes=(100 * MIB, 140 * MIB))])
    assert need_mib(world, "a") == 180


def test_a_load_that_failed_for_its_size_is_one_more():
    world = World("lb", gpus=(1.0,), models=[model("a", 0.1)])
    load_a = world.arrive("a")
    world.load_fails("g0", FailureKind.OUT_OF_MEMORY, memory_bytes=500 * MIB)
    assert need_mib(world, "a") == 500
    world.loaded("g0", memory_bytes=400 * MIB)
    world.finish("g0")
    assert load_a in world.ends
    assert need_mib(world, "a") == 600
    world.process_dies("g0", "a")
    waiting = world.arrive("a")
    world.load_fails("g0", FailureKind.OUT_OF_MEMORY, memory_bytes=5 * GIB)
    assert world.ends[waiting] is RejectReason.TOO_LARGE


def test_a_restore_is_no_other_load_but_shows_growth():
    world = World(
        gpus=(400 / 1024,),
        models=[model("v", 100 / 1024), model("b", 350 / 1024)],
        config=SchedulerConfig(host_memory_bytes=GIB),
    )
    load(world, "v", 100)
    for mib in (100, 130, 90):
        load(world, "b", 350)
        assert world.parked("g0") == ["v"]
        load(world, "v", mib, load_s=0.1)
        assert world.actions(Restore)
    footprint = world.scheduler.profiles.footprints["v"]
    assert (footprint.sizes_bytes, footprint.growth_bytes) == ((100 * MIB,), 30 * MIB)
    assert need_mib(world, "v") == 130
