"""The Cache Manager: accounts, LRU order, victims."""

from __future__ import annotations

import pytest
from scheduling_world import GIB, World, model

from hotset.errors import InvariantError
from hotset.scheduling.actions import Unload
from hotset.scheduling.cache import CacheManager
from hotset.scheduling.events import ModelLoaded
from hotset.scheduling.eviction.lru import Lru
from hotset.vocabulary import Residency


def evicted(world: World) -> list[str]:
    return [action.model for action in world.log if isinstance(action, Unload)]


def test_the_least_recently_used_model_leaves_first():
    world = World(gpus=(3.0,))
    for name in "abca":
        world.arrive(name)
        world.serve("g0")
    assert world.resident("g0") == ["b", "c", "a"]
    world.arrive("d")
    assert evicted(world) == ["b"]
    assert world.resident("g0") == ["c", "a", "d"]
    assert world.scheduler.cache.evictions == 1


def test_as_many_leave_as_it_takes_and_no_more():
    world = World(gpus=(4.0,), models=["a", "b", "c", model("huge", 2.5)])
    for name in "abc":
        world.arrive(name)
        world.serve("g0")
    world.arrive("huge")
    assert evicted(world) == ["a", "b"]


def test_nothing_leaves_while_there_is_room():
    world = World(gpus=(2.0,))
    for name in "ab":
        world.arrive(name)
        world.serve("g0")
    assert evicted(world) == []


def test_a_model_is_reserved_then_hot():
    world = World()
    world.arrive("a")
    resident = world.scheduler.cache.memory("g0").residents["a"]
    assert (resident.state, resident.in_use) == (Residency.LOADING, True)
    world.loaded("g0")
    assert (resident.state, resident.in_use, resident.uses) == (Residency.HOT, True, 1)
    world.finish("g0")
    assert not resident.in_use
    assert world.scheduler.cache.is_resident("g0", "a")


def test_what_was_measured_replaces_what_was_declared():
    world = World(gpus=(2.0,))
    world.arrive("a")
    world.loaded("g0", memory_bytes=GIB // 2)
    assert world.scheduler.cache.memory("g0").used_bytes == GIB // 2
    assert world.scheduler.cluster.models["a"].memory_bytes == GIB // 2


def test_a_measurement_beyond_the_gpu_does_not_make_a_resident_model_too_large():
    world = World(gpus=(2.0,))
    world.arrive("a")
    world.devices["g0"].lane.clear()
    world.devices["g0"].resident["a"] = 2 * GIB
    world.handle(ModelLoaded("g0", "a", 4.0, 3 * GIB))
    world.finish("g0")
    assert world.arrive("a") in world.running("g0")


def test_a_measurement_never_overdraws_the_account():
    cache = CacheManager(Lru())
    memory = cache.add_gpu("g", 10)
    cache.reserve(memory, "a", 4, 0.0)
    cache.reserve(memory, "b", 4, 0.0)
    assert cache.loaded(memory, "a", 9).memory_bytes == 6
    assert memory.free_bytes == 0


def test_a_model_in_use_is_never_a_victim():
    cache = CacheManager(Lru())
    memory = cache.add_gpu("g", 3)
    for name in "abc":
        cache.reserve(memory, name, 1, 0.0)
    cache.use(memory, "a", 1.0)
    cache.use(memory, "b", 1.0)
    cache.release(memory, "b")
    victims = cache.choose_victims(memory, 2, 2.0)
    assert victims is not None
    assert [victim.model for victim in victims] == ["c", "b"]
    assert cache.choose_victims(memory, 3, 2.0) is None, "the room cannot be made"
    assert cache.choose_victims(memory, 0, 2.0) == []


@pytest.mark.parametrize(("name", "memory_bytes"), [("a", 1), ("b", 9)], ids=["it is there", "no room"])
def test_a_reservation_that_cannot_be_is_a_bug(name: str, memory_bytes: int):
    cache = CacheManager(Lru())
    memory = cache.add_gpu("g", 4)
    cache.reserve(memory, "a", 2, 0.0)
    with pytest.raises(InvariantError, match="cannot be reserved on g"):
        cache.reserve(memory, name, memory_bytes, 0.0)
