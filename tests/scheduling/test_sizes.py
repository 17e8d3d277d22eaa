"""What a model takes after its runs: accounts follow, GPUs that were outgrown are relieved, the next load knows."""

from __future__ import annotations

import pytest
from scheduling_world import GIB, World, model

from hotset.scheduling.actions import Load, Offload, Unload
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.profiles import NEWEST_SIZES, Footprint
from hotset.vocabulary import RejectReason

MIB = 1 << 20


def crowded(*mib: int, gpu_mib: int = 1000, config: SchedulerConfig | None = None, **changes: int) -> World:
    """One GPU that holds models ``a``, ``b``, ... of these sizes, the first used longest ago."""
    names = "abcd"[: len(mib)]
    world = World(
        gpus=(gpu_mib / 1024,),
        models=[model(name, size / 1024, **changes) for name, size in zip(names, mib, strict=True)],
        config=config,
    )
    for name, size in zip(names, mib, strict=True):
        call(world, name, size)
    return world


def call(world: World, name: str, mib: int) -> None:
    """Load it if it is not there, and run it."""
    world.arrive(name)
    if (copy := world.devices["g0"].loading) is not None:
        world.loaded("g0", load_s=4.0 if isinstance(copy, Load) else 0.1, memory_bytes=mib * MIB)
    world.finish("g0")


def measured(world: World, name: str, mib: int) -> list[object]:
    return list(world.measured("g0", name, mib * MIB))


def used_mib(world: World) -> int:
    return world.scheduler.cache.memory("g0").used_bytes // MIB


def need_mib(world: World, name: str) -> int:
    return world.scheduler.cluster.models[name].memory_bytes // MIB


def outgrown(world: World) -> bool:
    return bool(world.scheduler._sizes.outgrown)


def test_a_model_that_shrinks_gives_its_memory_back():
    world = crowded(300, 300)
    assert measured(world, "a", 120) == []
    assert used_mib(world) == 420
    assert need_mib(world, "a") == 300, "its next load will take as much again"


def test_a_model_that_grows_into_free_memory_disturbs_nobody_and_is_loaded_into_as_much():
    world = crowded(300, 300)
    assert measured(world, "a", 500) == []
    assert used_mib(world) == 800
    assert need_mib(world, "a") == 500
    world.process_dies("g0", "a")
    world.arrive("a")
    assert used_mib(world) == 800
    world.loaded("g0", memory_bytes=300 * MIB)
    assert used_mib(world) == 800, "what runs will add is kept for it"
    assert measured(world, "a", 400) == []
    assert used_mib(world) == 800
    assert measured(world, "a", 550) == []
    assert used_mib(world) == 850
    assert need_mib(world, "a") == 550


def test_who_leaves_for_what_has_grown_is_the_eviction_policys_choice():
    world = crowded(300, 300, 300)
    assert measured(world, "c", 500) == [Unload("g0", "a")]
    assert world.resident("g0") == ["b", "c"]
    assert used_mib(world) == 800
    assert not outgrown(world)


def test_a_victim_is_parked_where_there_is_room_for_it():
    world = crowded(300, 300, 300, config=SchedulerConfig(host_memory_bytes=GIB))
    assert measured(world, "c", 500) == [Offload("g0", "a")]
    assert world.parked("g0") == ["a"]
    assert used_mib(world) == 800


def test_two_victims_are_parked_though_the_first_alone_does_not_make_it_fit():
    world = crowded(300, 300, 300, config=SchedulerConfig(host_memory_bytes=GIB))
    assert measured(world, "c", 900) == [Offload("g0", "a"), Offload("g0", "b")]
    assert used_mib(world) == 900


def test_what_runs_is_left_alone_until_it_has_run():
    world = crowded(500, 400)
    world.arrive("a")
    running = world.running("g0")
    assert measured(world, "a", 700) == [Unload("g0", "b")]
    assert measured(world, "a", 1100) == []
    assert outgrown(world)
    assert world.running("g0") == running
    world.finish("g0")
    assert world.log[-1] == Unload("g0", "a"), "nobody else is there"
    assert world.resident("g0") == []
    assert not outgrown(world)


def test_nobody_leaves_who_is_waited_for():
    """Or it would be loaded again at once, and grow again."""
    world = crowded(500, 400)
    call(world, "a", 500)
    world.arrive("b")
    waits = world.arrive("a")
    assert measured(world, "a", 1200) == []
    world.finish("g0")
    assert world.running("g0") == (waits,)
    assert world.actions(Unload) == []
    world.finish("g0")
    assert world.actions(Unload) == [Unload("g0", "a")], "it does not help that b goes"


def test_a_model_that_outgrew_its_gpu_alone_leaves_and_comes_back_for_the_next_call_only():
    world = crowded(500)
    call(world, "a", 500)
    assert measured(world, "a", 1300) == [Unload("g0", "a")]
    assert need_mib(world, "a") == 1000, "alone on a GPU it crowds nobody"
    world.wait(1000)
    assert len(world.actions(Load)) == 1, "nobody has asked for it"
    call(world, "a", 500)
    assert len(world.actions(Load)) == 2
    assert used_mib(world) == 1000


def test_a_model_whose_first_run_takes_more_than_any_gpu_has_is_refused():
    world = crowded(500)
    assert measured(world, "a", 1300) == [Unload("g0", "a")]
    refused = world.arrive("a")
    assert world.ends[refused] is RejectReason.TOO_LARGE
    assert "the largest GPU has" in world.rejects[refused].message
    world.join(2.0)
    assert world.arrive("a") in world.open


def test_a_pin_takes_the_room_that_its_model_has_grown_into():
    world = World(gpus=(1000 / 1024,), models=[model("a", 300 / 1024, min_copies=1), model("b", 400 / 1024)])
    world.loaded("g0", memory_bytes=300 * MIB)
    call(world, "b", 400)
    assert measured(world, "a", 700) == [Unload("g0", "b")]
    assert world.scheduler.cache.memory("g0").pinned == {"a": 700 * MIB}
    assert world.ends[world.arrive("b")] is RejectReason.TOO_LARGE
    assert measured(world, "a", 500) == []
    assert world.resident("g0") == ["a"]


def test_a_pin_that_outgrew_its_gpu_is_lost():
    world = World(gpus=(1000 / 1024,), models=[model("a", 300 / 1024, min_copies=1)])
    world.loaded("g0", memory_bytes=300 * MIB)
    assert measured(world, "a", 1200) == [Unload("g0", "a")]
    assert world.scheduler.pins.placed("a") == 0
    assert world.resident("g0") == []


def test_what_is_on_its_way_here_is_waited_for():
    world = crowded(300, 300, config=SchedulerConfig(overlap=True))
    world.add(model("c", 300 / 1024))
    world.arrive("c")
    assert measured(world, "a", 500) == []
    assert outgrown(world)
    world.loaded("g0", memory_bytes=300 * MIB)
    assert world.log[-1] != Unload("g0", "c")
    assert not outgrown(world)


def test_a_model_that_left_meanwhile_teaches_all_the_same():
    world = crowded(600, 600)  # a has left
    assert measured(world, "a", 800) == []
    assert used_mib(world) == 600
    assert need_mib(world, "a") == 800
    assert measured(world, "nobody", 800) == []
    world.lose("g0")
    assert measured(world, "b", 900) == []


def test_a_parked_model_is_accounted_for_as_its_offload_says():
    world = crowded(600, 600, config=SchedulerConfig(host_memory_bytes=3 * GIB))
    assert world.parked("g0") == ["a"]
    assert measured(world, "a", 700) == [], "said before it was parked, heard after that was decided"
    host = world.scheduler.cache.memory("g0").host
    assert host.used_bytes == 600 * MIB
    call(world, "a", 700)  # restored
    assert used_mib(world) == 700
    assert measured(world, "a", 800) == []
    call(world, "b", 600)
    assert world.parked("g0") == ["a"]
    assert host.used_bytes == 700 * MIB, "100 more than when it was parked last"


def test_an_outgrown_gpu_that_is_lost_is_forgotten():
    world = crowded(900)
    world.arrive("a")
    measured(world, "a", 1200)
    assert outgrown(world)
    world.lose("g0")
    assert not outgrown(world)


def test_growth_is_forgotten_with_the_loads_after_which_it_was_seen():
    footprint = Footprint()
    footprint.observe(100)
    footprint.observe_again(180)
    footprint.observe_again(150)
    assert (footprint.newest_bytes, footprint.need_bytes, footprint.growth_bytes) == (180, 180, 80)
    for _ in range(NEWEST_SIZES - 1):
        footprint.observe(100)
        assert footprint.need_bytes == 180
    footprint.observe(100)
    assert (footprint.need_bytes, footprint.growth_bytes) == (100, 0)


def test_a_leak_does_not_add_up_over_loads():
    footprint = Footprint()
    for _ in range(2 * NEWEST_SIZES):
        footprint.observe(100)
        for grown in range(100, 300, 10):
            footprint.observe_again(grown)
    assert footprint.need_bytes == 290


def test_growth_is_kept_over_a_restart():
    assert Footprint((100, 100), growth_bytes=50).need_bytes == 150
    assert Footprint((), growth_bytes=50).need_bytes == 0


def test_what_was_never_seen_loaded_counts_as_a_load():
    footprint = Footprint()
    footprint.observe_again(70)
    assert footprint.sizes_bytes == (70,)


@pytest.mark.parametrize("first_run", [False, True])
def test_only_what_the_first_run_added_is_needed_by_all_means(first_run: bool):
    footprint = Footprint((100,))
    footprint.observe_again(300, first_run=first_run)
    assert footprint.least_bytes == (300 if first_run else 100)


def test_a_copy_that_is_to_be_kept_leaves_what_it_has_outgrown_and_comes_back():
    world = crowded(500, min_copies=1)
    call(world, "a", 500)
    assert measured(world, "a", 1200) == [Unload("g0", "a"), Load("g0", "a", None, False)]
    assert not outgrown(world)


def test_a_request_that_is_tried_again_may_run_where_its_model_is_though_another_load_would_not_fit_there():
    world = World(gpus=(8.0, 2.0), models=["b", model("c", 2.0, max_copies=1)])
    world.arrive("b")
    world.loaded("g0")
    again = world.arrive("c")
    world.loaded("g1")
    world.run_fails("g1")
    world.arrive("c")
    world.loaded("g1")
    world.measured("g0", "c", 5 * GIB // 2)  # it has left that GPU meanwhile
    assert need_mib(world, "c") == 2560
    world.finish("g1")
    assert world.running("g1") == (again,)
    world.drain()
    assert not world.open
