"""Models that may be on so many GPUs at once and no more (``Model.max_copies``): their requests wait for these GPUs."""

from __future__ import annotations

import pytest
from scheduling_world import World, model

from hotset.scheduling.actions import Load, Restore, Unload
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.policies import POLICIES
from hotset.scheduling.policies.interface import Rule
from hotset.vocabulary import FailureKind

GPUS = (2.0, 2.0, 2.0)
TWO_LANES = SchedulerConfig(overlap=True)


def holders(world: World, name: str) -> list[str]:
    return sorted(world.scheduler.cache.holders(name))


@pytest.mark.parametrize("config", [SchedulerConfig(), TWO_LANES], ids=["paper", "overlap"])
@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("most", [1, 2])
def test_no_policy_makes_more_copies_however_many_wait(policy, most, config):
    # A load is so short that every policy would copy the model to all three GPUs.
    world = World(policy, gpus=GPUS, models=[model("a", load_s=0.01, max_copies=most), "b"], config=config)
    for _ in range(12):
        world.arrive("a")
        assert len(holders(world, "a")) <= most
    world.arrive("b")
    world.drain()
    assert not world.open
    loads = [action.model for action in world.log if isinstance(action, Load | Restore)]
    if policy != "pow2_multiplex":  # which waits for a holder for seconds, rather
        assert loads.count("a") == most, "as many as it may"


@pytest.mark.parametrize("policy", list(POLICIES))
def test_others_go_on_where_the_bounded_model_may_not_go(policy):
    world = World(policy, gpus=(2.0, 2.0), models=[model("a", max_copies=1), "b"])
    for _ in range(5):
        world.arrive("a")
    other = world.arrive("b")
    assert {world.doing("g0"), world.doing("g1")} == {"loading a", "loading b"}
    world.serve("g1" if world.doing("g1") == "loading b" else "g0")
    assert world.ends[other] is not None
    world.drain()
    assert not world.open


def test_lalb_says_why_it_waits():
    world = World(gpus=GPUS, models=[model("a", load_s=0.01, max_copies=1)], config=SchedulerConfig(journal_capacity=9))
    first, second = world.arrive("a"), world.arrive("a")
    rules = [world.scheduler.journal.explain(number).decisions[0].rule for number in (first, second)]
    assert rules == [Rule.NOWHERE, Rule.NO_MORE_COPIES]
    assert world.local("g0") == [second]


def test_a_copy_whose_process_died_is_made_anew_elsewhere():
    world = World(gpus=GPUS, models=[model("a", max_copies=1)])
    world.arrive("a")
    world.load_fails("g0", FailureKind.CRASH)
    assert holders(world, "a") == ["g1"]
    world.drain()
    assert not world.open


def test_a_request_whose_process_died_goes_back_there_when_that_is_the_only_copy_again():
    world = World(gpus=(2.0, 2.0), models=[model("a", max_copies=1), model("b", 2.0)])
    world.arrive("b")
    world.arrive("a")  # g1
    world.loaded("g1")
    world.run_fails("g1")  # its request is to avoid g1, but g0 is taken
    world.arrive("a")  # brings it to g1 again
    assert holders(world, "a") == ["g1"]
    world.drain()
    assert not world.open


def test_copies_beyond_a_new_bound_leave_the_idle_ones_at_once_the_others_when_they_are_done():
    world = World(gpus=GPUS, models=[model("a", load_s=0.01)])
    for _ in range(3):
        world.arrive("a")
    for gpu_id in ("g0", "g1", "g2"):
        world.loaded(gpu_id)
    world.finish("g0")
    world.add(model("a", max_copies=1))
    assert [action.gpu_id for action in world.log if isinstance(action, Unload)] == ["g0"]
    world.finish("g1")
    assert holders(world, "a") == ["g2"]
    world.finish("g2")
    assert holders(world, "a") == ["g2"]


def test_pins_have_the_first_claim_to_copies():
    world = World(gpus=GPUS, models=[])
    world.add(model("a", min_copies=1, max_copies=2))
    pinned = holders(world, "a")
    world.loaded(pinned[0])
    for _ in range(6):
        world.arrive("a")
    assert len(holders(world, "a")) <= 2
    world.drain()
    world.add(model("a", min_copies=2, max_copies=2))
    world.drain()
    assert len(holders(world, "a")) == 2
    assert all("a" in world.scheduler.cache.memory(gpu_id).pinned for gpu_id in holders(world, "a"))


def test_a_pin_takes_the_place_of_a_copy_that_is_in_use_once_it_is_not():
    """What is pinned on g0 and still missing there leaves no room for another copy."""
    world = World(gpus=(2.0, 2.0), models=[model("b", 2.0)])
    world.arrive("b")  # g0 is taken
    world.add(model("c", 1.5))
    world.arrive("c")  # g1 too
    world.add(model("a", 1.5, min_copies=1, max_copies=1))
    world.arrive("a")
    world.drain()
    assert len(holders(world, "a")) == 1
    assert not world.open


@pytest.mark.parametrize("policy", POLICIES)
def test_the_only_copy_there_may_be_serves_on_where_a_larger_one_would_not_fit(policy):
    world = World(policy, gpus=(2.0,), models=[model("a", 1.0, max_copies=1)])
    world.arrive("a")
    world.serve("g0")
    world.join(8.0)
    world.add(model("a", 5.0, max_copies=1))
    waits = world.arrive("a")
    assert world.running("g0") == (waits,)
