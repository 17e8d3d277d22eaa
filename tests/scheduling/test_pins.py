"""Models that keep copies HOT: loaded without a call, never evicted, brought back, moved, refused without room."""

from __future__ import annotations

import msgspec
import pytest
from scheduling_world import GIB, End, World, model

from hotset.scheduling.actions import Load, Offload, Reject, Restore, Unload
from hotset.scheduling.events import ModelAdded
from hotset.scheduling.eviction import EVICTIONS
from hotset.scheduling.policies import POLICIES
from hotset.scheduling.quarantine import QuarantineSettings
from hotset.scheduling.scheduler import SchedulerConfig
from hotset.vocabulary import FailureKind, Model, RejectReason

LANES = {"one lane": SchedulerConfig(), "two lanes": SchedulerConfig(overlap=True)}


def pinned(name: str, gib: float = 1.0, copies: int = 1) -> Model:
    return model(name, gib, min_copies=copies)


def pin(world: World, name: str, copies: int) -> None:
    """Ask for another number of copies of a model that is deployed."""
    known = world.scheduler.cluster.models[name]
    world.handle(ModelAdded(msgspec.structs.replace(known, min_copies=copies)))


def pins(world: World) -> dict[str, list[str]]:
    return {gpu_id: list(gpu.memory.pinned) for gpu_id, gpu in world.scheduler.cluster.gpus.items()}


def unloaded(world: World) -> list[str]:
    return [action.model for action in world.log if isinstance(action, Unload)]


@pytest.mark.parametrize("config", LANES.values(), ids=LANES)
def test_a_model_that_keeps_copies_is_loaded_without_a_call(config):
    world = World(gpus=(2.0, 2.0), models=[pinned("a", copies=2)], config=config)
    assert [(load.gpu_id, load.request_id) for load in world.actions(Load)] == [("g0", None), ("g1", None)]
    world.loaded("g0")
    world.loaded("g1")
    assert (world.doing("g0"), world.doing("g1")) == ("idle", "idle")
    world.arrive("a")
    assert world.doing("g0") == "running a", "a call finds it HOT"


def test_a_call_that_comes_while_it_loads_runs_when_it_is_there():
    world = World(gpus=(2.0,), models=[pinned("a")])
    request = world.arrive("a")
    world.loaded("g0")
    assert world.running("g0") == (request,)


@pytest.mark.parametrize("eviction", list(EVICTIONS))
@pytest.mark.parametrize("policy", list(POLICIES))
def test_it_is_nobodys_victim(policy, eviction):
    world = World(policy, gpus=(2.0,), models=[pinned("a"), "b", "c", "d"], eviction=eviction)
    world.loaded("g0")
    for name in "bcd":
        world.arrive(name)
        world.serve("g0")
    assert unloaded(world) == ["b", "c"]
    assert world.resident("g0") == ["a", "d"]


def test_a_further_copy_is_an_ordinary_one():
    world = World(gpus=(1.0, 1.0), models=[pinned("a"), "b"])
    world.loaded("g0")
    for _ in range(6):
        world.arrive("a")
    world.loaded("g1")
    assert pins(world) == {"g0": ["a"], "g1": []}
    while world.open:
        for gpu_id in ("g0", "g1"):
            if world.running(gpu_id):
                world.finish(gpu_id)
    world.arrive("b")
    assert world.doing("g1") == "loading b"
    assert unloaded(world) == ["a"]


def test_what_fits_nowhere_beside_the_pins_is_refused_and_told_why():
    world = World(gpus=(2.0,), models=[pinned("a"), model("huge", 1.5)])
    world.loaded("g0")
    request = world.arrive("huge")
    assert world.ends[request] is RejectReason.TOO_LARGE
    assert f"no GPU has more than {GIB} beside the models that are kept hot" in world.rejects[request].message
    pin(world, "a", 0)
    world.arrive("huge")
    assert world.doing("g0") == "loading huge"


def test_a_pin_refuses_those_who_wait_for_what_has_no_room_beside_it():
    world = World(gpus=(2.0,), models=["a", model("huge", 1.5), "b"])
    world.arrive("b")
    waits = world.arrive("huge")
    pin(world, "a", 1)
    assert world.ends[waits] is RejectReason.TOO_LARGE
    world.serve("g0")
    assert world.doing("g0") == "loading a"


@pytest.mark.parametrize("config", LANES.values(), ids=LANES)
def test_a_pin_is_loaded_before_any_request_that_waits(config):
    world = World(gpus=(1.0,), models=["a", "b"], config=config)
    first = world.arrive("b")
    for _ in range(3):
        world.arrive("b")
    world.loaded("g0")
    pin(world, "a", 1)
    assert world.running("g0") == (first,), "the run goes on"
    world.finish("g0")
    assert world.doing("g0") == "loading a"
    assert unloaded(world) == ["b"]
    assert [end for end in world.ends.values() if end is RejectReason.TOO_LARGE], "b has no room left"


def test_it_goes_where_it_is_already_then_where_it_is_parked_then_where_most_is_free():
    parking = SchedulerConfig(host_memory_bytes=8 * GIB)
    world = World("lb", gpus=(4.0, 1.0, 3.0), models=[model("b", 1.0, load_s=40.0), "c", "a", "z"], config=parking)
    for name in ("a", "b"):
        world.arrive(name)
    world.serve("g0")
    world.serve("g1")
    world.arrive("z")
    world.serve("g2")
    world.arrive("z")
    world.serve("g0")
    world.arrive("c")
    assert [action.model for action in world.actions(Offload)] == ["b"]
    world.serve("g1")
    pin(world, "a", 1)
    pin(world, "b", 1)
    assert pins(world) == {"g0": ["a"], "g1": ["b"], "g2": []}
    assert [(action.gpu_id, action.model, action.request_id) for action in world.actions(Restore)] == [
        ("g1", "b", None)
    ]
    pin(world, "a", 2)
    pin(world, "c", 1)
    assert pins(world) == {"g0": ["a", "c"], "g1": ["b"], "g2": ["a"]}


def test_it_comes_back_after_its_process_died():
    world = World(gpus=(2.0,), models=[pinned("a")])
    world.loaded("g0")
    world.process_dies("g0", "a")
    assert world.doing("g0") == "loading a"
    world.loaded("g0")
    world.arrive("a")
    world.run_fails("g0")
    assert world.doing("g0") == "loading a"


@pytest.mark.parametrize("config", LANES.values(), ids=LANES)
def test_one_that_does_not_load_is_tried_again_later_and_later(config):
    config = msgspec.structs.replace(config, quarantine=QuarantineSettings(after=2, first_s=2.0, longest_s=8.0))
    world = World(gpus=(2.0,), models=[pinned("a"), pinned("b")], config=config)
    world.load_fails("g0")
    assert world.doing("g0") == "loading a", "once is no reason to wait"
    world.load_fails("g0")
    assert world.doing("g0") == "loading b"
    assert world.scheduler.next_wakeup_s() == 2.0
    world.loaded("g0")
    world.wait(1.5)
    assert world.doing("g0") == "idle"
    world.wait(0.5)
    assert world.doing("g0") == "loading a"
    world.load_fails("g0", FailureKind.ERROR)
    assert world.scheduler.next_wakeup_s() == 6.0
    world.arrive("b", patience_s=3.0)
    assert world.scheduler.next_wakeup_s() == 3.5, "the deadline is sooner: it is looked at half-way"
    world.serve("g0", inference_s=0.5)
    world.wait(4.0)
    world.loaded("g0")
    assert world.resident("g0") == ["b", "a"]
    assert world.scheduler.next_wakeup_s() is None


def test_nobody_is_woken_for_one_that_was_removed_while_it_was_left_alone():
    config = SchedulerConfig(quarantine=QuarantineSettings(after=1, first_s=2.0))
    world = World(gpus=(2.0,), models=[pinned("a")], config=config)
    world.load_fails("g0")
    assert world.scheduler.next_wakeup_s() == 2.0
    world.remove("a")
    assert world.scheduler.next_wakeup_s() is None


def test_it_moves_when_its_gpu_is_lost_and_spreads_when_one_joins():
    world = World(gpus=(2.0,), models=[pinned("a", copies=2)])
    world.loaded("g0")
    assert pins(world) == {"g0": ["a"]}
    world.join(2.0)
    assert world.doing("g1") == "loading a"
    world.lose("g0")
    world.loaded("g1")
    assert pins(world) == {"g1": ["a"]}
    world.lose("g1")
    world.join(2.0)
    assert world.doing("g2") == "loading a"


def test_one_that_proves_too_large_for_its_gpu_moves_to_another():
    world = World(gpus=(2.0, 1.5, 4.0), models=[pinned("b", 2.0), pinned("a")])
    assert pins(world) == {"g0": ["a"], "g1": [], "g2": ["b"]}
    world.load_fails("g0", FailureKind.OUT_OF_MEMORY, memory_bytes=5 * GIB // 2)
    assert pins(world) == {"g0": [], "g1": [], "g2": ["b"]}, "there is no room beside b"
    pin(world, "b", 0)
    assert pins(world) == {"g0": [], "g1": [], "g2": ["a"]}


def test_one_that_proves_larger_refuses_those_who_have_no_room_beside_it_any_more():
    world = World(gpus=(2.0,), models=["a"])
    world.add(pinned("b"))
    waits = world.arrive("a")
    world.loaded("g0", memory_bytes=3 * GIB // 2)
    assert world.ends[waits] is RejectReason.TOO_LARGE


def test_one_that_proves_smaller_leaves_more_to_others():
    world = World(gpus=(2.0,), models=[pinned("a", 1.5), model("b", 1.0)])
    world.loaded("g0", memory_bytes=GIB)
    world.arrive("b")
    assert world.doing("g0") == "loading b"


def test_fewer_copies_are_kept_and_the_others_may_go():
    world = World(gpus=(1.0, 1.0), models=[pinned("a", copies=2), "b"])
    world.loaded("g0")
    world.loaded("g1")
    pin(world, "a", 1)
    assert pins(world) == {"g0": ["a"], "g1": []}
    request = world.arrive("b")
    world.serve("g1")
    assert world.ends[request] is End.ANSWERED


def test_it_leaves_with_its_function():
    world = World(gpus=(2.0,), models=[pinned("a"), model("huge", 2.0)])
    world.loaded("g0")
    world.remove("a")
    assert world.resident("g0") == []
    world.arrive("huge")
    assert not world.actions(Reject)


def test_whether_there_is_room_can_be_asked_before():
    world = World(gpus=(2.0, 1.0), models=[pinned("a", 1.5)])
    ask = world.scheduler.pins.can_keep
    assert ask(pinned("b", 1.0))
    assert not ask(pinned("b", 1.0, copies=2))
    assert not ask(pinned("b", 1.6))
    assert ask(pinned("b", 1.6), instead_of="a")
    assert not ask(pinned("a", 1.5, copies=2))
    assert pins(world) == {"g0": ["a"], "g1": []}, "asking changes nothing"


def test_a_pin_waits_for_the_only_copy_there_may_be_to_leave_another_gpu():
    world = World(gpus=(1.0, 1.0), models=[model("a", 1.0, max_copies=1), "b"])
    world.arrive("a")
    world.loaded("g0")
    pin(world, "b", 1)
    pin(world, "a", 1)
    assert pins(world) == {"g0": ["b"], "g1": ["a"]}
    assert (world.doing("g0"), world.doing("g1")) == ("running a", "idle")
    world.finish("g0")
    assert (world.doing("g0"), world.doing("g1")) == ("loading b", "loading a")


def test_pow2_multiplex_waits_where_no_gpu_may_take_the_model_now(monkeypatch):
    monkeypatch.setattr("hotset.scheduling.policies.pow2_multiplex.PATIENCE_S", -1.0)
    world = World("pow2_multiplex", gpus=(1.0,), models=[model("a", 1.0, max_copies=1), "b"])
    world.arrive("a")
    world.loaded("g0")
    world.join(1.0)
    pin(world, "b", 1)
    assert pins(world) == {"g0": ["b"], "g1": []}, "the holder has no room for another copy, the other GPU no leave"
    waits = world.arrive("a")
    assert waits in world.open
    world.drain()
    assert world.ends[waits] is End.ANSWERED


def test_one_that_proves_larger_is_refused_where_it_has_no_room_beside_a_pin():
    world = World(gpus=(3.0,), models=["b"])
    world.arrive("b")
    world.add(pinned("a", 1.0))
    waits = world.arrive("b")
    world.loaded("g0", memory_bytes=5 * GIB // 2)
    assert world.ends[waits] is RejectReason.TOO_LARGE


def test_a_pin_finds_the_room_that_a_copy_too_many_leaves():
    world = World(gpus=(2.0,), models=[model("a", 2.0)])
    world.arrive("a")
    world.loaded("g0")
    world.add(pinned("b", 0.5))
    world.handle(ModelAdded(model("a", 1.0, min_copies=1, max_copies=1)))
    assert pins(world) == {"g0": ["b"]}, "the larger copy of before still runs"
    world.finish("g0")
    assert pins(world) == {"g0": ["b", "a"]}


def test_a_pin_finds_the_room_that_a_copy_which_failed_leaves():
    world = World(gpus=(2.0,), models=[pinned("b", 0.5)])
    world.loaded("g0")
    world.add(model("a", 1.5))
    world.arrive("a")
    world.add(pinned("c", 0.4))
    world.handle(ModelAdded(pinned("a", 1.0)))
    assert pins(world) == {"g0": ["b", "c"]}, "the larger copy of before still loads"
    world.load_fails("g0")
    assert pins(world) == {"g0": ["b", "c", "a"]}


def test_a_pin_that_finds_room_late_refuses_those_who_have_none_beside_it():
    world = World(gpus=(2.0,), models=[pinned("b", 0.5), model("d", 1.1)])
    world.loaded("g0")
    world.add(model("a", 1.5))
    world.arrive("a")
    world.add(pinned("c", 0.4))
    world.handle(ModelAdded(pinned("a", 1.0)))
    waits = world.arrive("d")
    world.load_fails("g0")
    assert world.ends[waits] is RejectReason.TOO_LARGE


def test_lalb_keeps_the_gpu_of_a_pinned_model_for_the_older_request():
    world = World("lalb", gpus=(8.0, 2.0), models=[model("a", 2.0)])
    world.arrive("a")
    world.serve("g0")
    world.add(pinned("b", 5.0))
    world.loaded("g0")
    world.arrive("b")
    older = world.arrive("b")
    world.arrive("a")
    assert (world.doing("g0"), world.doing("g1")) == ("running b", "loading a"), "a does not wait for g0"
    world.finish("g0")
    assert world.running("g0") == (older,)
