"""Copies that a model asks to keep in memory: eviction passes over them, but nobody waits for ever because of it."""

from __future__ import annotations

import msgspec
import pytest
from scheduling_world import GIB, World, model

from hotset.scheduling.actions import Unload
from hotset.scheduling.eviction import EVICTIONS
from hotset.vocabulary import Model


def kept(name: str, size: float = 1.0, copies: int = 1) -> Model:
    return msgspec.structs.replace(model(name, size), min_copies=copies)


def evicted(world: World) -> list[str]:
    return [action.model for action in world.log if isinstance(action, Unload)]


@pytest.mark.parametrize("eviction", list(EVICTIONS))
def test_eviction_passes_over_a_copy_that_is_kept(eviction):
    world = World(gpus=(2.0,), models=[kept("a"), "b", "c", "d"], eviction=eviction)
    for name in "abcd":
        world.arrive(name)
        world.serve("g0")
    assert evicted(world) == ["b", "c"]
    assert world.resident("g0") == ["a", "d"]


def test_of_more_copies_than_are_kept_one_may_leave():
    world = World(gpus=(1.0, 1.0), models=[kept("a"), "b", "c"])
    cache = world.scheduler.cache
    for gpu_id in ("g0", "g1"):
        cache.reserve(cache.memory(gpu_id), "a", GIB, 0.0)
    assert cache.choose_victims(cache.memory("g0"), GIB, 0.0) is not None
    cache.keep("a", 2)
    cache.memory("g0").capacity_bytes = 2 * GIB
    cache.reserve(cache.memory("g0"), "b", GIB, 0.0)
    victims = cache.choose_victims(cache.memory("g0"), GIB, 0.0)
    assert victims is not None
    assert [victim.model for victim in victims] == ["b"]


def test_a_model_that_fits_only_without_the_kept_ones_is_not_kept_waiting():
    world = World(gpus=(2.0,), models=[kept("a"), model("huge", 1.5)])
    world.arrive("a")
    world.serve("g0")
    world.arrive("huge")
    assert evicted(world) == ["a"]
    world.serve("g0")
    assert world.resident("g0") == ["huge"]


def test_a_kept_copy_leaves_with_its_function():
    world = World(gpus=(2.0,), models=[kept("a"), "b"])
    world.arrive("a")
    world.serve("g0")
    world.remove("a")
    assert world.resident("g0") == []
