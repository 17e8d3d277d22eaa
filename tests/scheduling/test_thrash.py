"""The thrash guard, and how the default policy answers. Loads take 4 s, runs 1 s, a GPU holds one model."""

from __future__ import annotations

import pytest
from scheduling_world import World, model

from hotset.scheduling.actions import Load
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.policies import PolicySettings
from hotset.scheduling.policies.hotset import STAY_LOADS, Hotset
from hotset.scheduling.policies.interface import Rule
from hotset.scheduling.thrash import MOST_EPISODES, WINDOW_LOADS

NAMES = ("a", "b", "c", "d")
IMPATIENT = PolicySettings(max_wait_s=1.0)
"""Requests are due at once, so that order of arrival is all there is, and each finds its model gone."""


def crowded_world(settings: PolicySettings = IMPATIENT, *, rounds: int = 10) -> World:
    """One GPU for one model; requests for four in turn."""
    models = [model(name) for name in NAMES]
    world = World(
        "hotset", eviction="hotset", gpus=(1.0,), models=models, config=SchedulerConfig(journal_capacity=1000)
    )
    world.scheduler.policy = Hotset(settings)
    for _ in range(rounds):
        for name in NAMES:
            world.arrive(name)
    return world


def serve_loads(world: World, count: int) -> None:
    """Until so many loads have begun."""
    while sum(isinstance(action, Load) for action in world.log) < count:
        world.serve("g0")


def rules(world: World) -> list[Rule]:
    stories = (world.scheduler.journal.explain(number) for number in range(1, 1000))
    return [story.decisions[-1].rule for story in stories if story is not None]


def test_loads_that_outweigh_runs_while_requests_queue_are_thrash():
    world = crowded_world()
    guard = world.scheduler.cluster.thrash
    serve_loads(world, 3)
    assert guard.episode(world.now_s) is None, "too little to judge by"
    serve_loads(world, int(WINDOW_LOADS) + 2)
    episode = guard.episode(world.now_s)
    assert episode is not None
    assert episode.swapping == pytest.approx(0.8), "a load of 4 s for each run of 1 s"
    assert episode.until_s is None


def test_it_is_over_once_no_more_wait_than_there_are_gpus():
    world = crowded_world()
    guard = world.scheduler.cluster.thrash
    serve_loads(world, int(WINDOW_LOADS) + 2)
    assert guard.episode(world.now_s) is not None
    world.drain()
    assert guard.episode(world.now_s) is None
    assert guard.episodes[-1].until_s == world.now_s


def test_first_loads_into_empty_memory_are_no_thrash():
    models = [model(f"m{number}") for number in range(20)]
    world = World("hotset", eviction="hotset", gpus=(20.0,), models=models)
    for known in models:
        world.arrive(known.name)
    world.drain()
    assert not world.scheduler.cluster.thrash.episodes


def test_a_gpu_that_thrashes_stays_with_its_model_while_it_is_worth_its_load():
    world = crowded_world(rounds=40)
    serve_loads(world, int(WINDOW_LOADS) + 3)
    before = len(world.log)
    serve_loads(world, int(WINDOW_LOADS) + 5)
    served = [action for action in world.log[before:] if not isinstance(action, Load)]
    assert rules(world).count(Rule.LONGER_RUN) >= 10
    assert len(served) >= 2 * STAY_LOADS * 4.0 - 2, "each load is followed by runs for as long as it may stay"
    world.drain()
    assert not world.open


def test_it_never_stays_past_its_time():
    world = crowded_world(rounds=40)
    serve_loads(world, int(WINDOW_LOADS) + 3)
    began_s = world.now_s
    serve_loads(world, int(WINDOW_LOADS) + 4)
    assert world.now_s - began_s <= (1.0 + STAY_LOADS) * 4.0 + 1.0


def test_the_bound_on_skips_holds_even_then():
    world = crowded_world(PolicySettings(max_wait_s=1.0, max_skips=0), rounds=20)
    serve_loads(world, int(WINDOW_LOADS) + 5)
    assert world.scheduler.cluster.thrash.episode(world.now_s) is not None
    assert Rule.LONGER_RUN not in rules(world)


def test_only_the_newest_episodes_are_kept():
    world = crowded_world(rounds=1)
    guard = world.scheduler.cluster.thrash
    world.drain()
    for _ in range(MOST_EPISODES + 5):
        for name in (*NAMES, *NAMES):
            world.arrive(name)
        guard.swapped(1e6, world.now_s)
        assert guard.episode(world.now_s) is not None
        guard.swapped(1e6, world.now_s)
        world.drain()
        assert guard.episode(world.now_s) is None
    assert len(guard.episodes) == MOST_EPISODES


def test_loads_that_take_no_time_are_no_reason_to_fail():
    """As they are measured on a GPU that has nothing to copy: there is no time to take shares of."""
    world = World("hotset", gpus=(1.0,), models=[model(name, load_s=0.0, inference_s=0.0) for name in "ab"])
    for name in "abab":
        world.arrive(name)
        world.serve("g0", load_s=0.0, inference_s=0.0)
    assert not world.open
