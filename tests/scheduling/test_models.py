"""Models are deployed, changed and removed while requests are on their way."""

from __future__ import annotations

import pytest
from scheduling_world import GIB, End, World, model

from hotset.scheduling.actions import Unload
from hotset.vocabulary import FailureKind, RejectReason


def forgotten(world: World, name: str) -> bool:
    scheduler = world.scheduler
    profiles = scheduler.profiles
    known = {key[0] for table in (profiles._loads, profiles._runs) for key in table}
    return (
        name not in scheduler.cluster.models
        and name not in scheduler.cluster.removed
        and name not in known
        and name not in profiles.footprints
        and not scheduler.cache.holders(name)
    )


class TestRemoval:
    def test_of_an_idle_resident_unloads_it(self):
        world = World("lb")
        world.arrive("a")
        world.serve("g0")
        world.remove("a")
        assert world.log[-1] == Unload("g0", "a")
        assert forgotten(world, "a")
        assert world.ends[world.arrive("a")] is RejectReason.UNKNOWN_MODEL

    def test_ends_those_who_wait_in_either_queue(self):
        world = World("lalb", gpus=(2.0, 2.0))
        world.arrive("a")
        world.serve("g0")
        running = world.arrive("a")
        local = world.arrive("a")
        world.arrive("b")
        queued = [world.arrive("c"), world.arrive("a")]
        world.remove("a")
        assert world.ends[local] is world.ends[queued[1]] is RejectReason.REMOVED
        assert world.rejects[local].message == "a was removed while the request waited"
        world.finish("g0")
        assert world.ends[running] is End.ANSWERED
        assert Unload("g0", "a") in world.log
        assert forgotten(world, "a")
        world.drain()
        assert world.ends[queued[0]] is End.ANSWERED

    def test_while_it_loads_lets_the_request_that_asked_for_it_finish(self):
        world = World("lb")
        request_id = world.arrive("a")
        world.remove("a")
        assert world.ends[world.arrive("a")] is RejectReason.UNKNOWN_MODEL
        world.serve("g0")
        assert world.ends[request_id] is End.ANSWERED
        assert forgotten(world, "a")

    def test_while_it_loads_for_nobody_unloads_it_once_loaded(self):
        world = World("lb")
        world.cancel(world.arrive("a"))
        world.remove("a")
        world.loaded("g0")
        assert world.log[-1] == Unload("g0", "a")
        assert forgotten(world, "a")

    @pytest.mark.parametrize("stage", ["loading", "running"])
    def test_then_its_process_dies_and_nothing_is_tried_again(self, stage: str):
        world = World("lb", gpus=(2.0, 2.0))
        request_id = world.arrive("a")
        if stage == "running":
            world.loaded("g0")
        world.remove("a")
        if stage == "running":
            world.run_fails("g0")
        else:
            world.load_fails("g0", FailureKind.OUT_OF_MEMORY, memory_bytes=2 * GIB)
        assert world.ends[request_id] is RejectReason.FAILED
        assert forgotten(world, "a")

    def test_then_its_gpu_is_lost(self):
        world = World("lb", gpus=(2.0, 2.0))
        request_id = world.arrive("a")
        world.remove("a")
        world.lose("g0")
        assert world.ends[request_id] is RejectReason.FAILED
        assert forgotten(world, "a")

    def test_of_several_copies_the_busy_one_goes_last(self):
        world = World("lb", gpus=(2.0, 2.0))
        world.arrive("a")
        world.arrive("a")
        world.serve("g0")
        world.remove("a")
        assert world.resident("g0") == []
        assert not forgotten(world, "a")
        world.serve("g1")
        assert world.resident("g1") == []
        assert forgotten(world, "a")

    def test_while_it_waits_for_a_second_try(self):
        world = World("lb", gpus=(2.0, 2.0))
        request_id = world.arrive("a")
        world.arrive("b")
        world.load_fails("g0")
        world.remove("a")
        assert world.ends[request_id] is RejectReason.REMOVED
        assert forgotten(world, "a")

    def test_of_what_is_not_deployed_changes_nothing(self):
        world = World("lb")
        world.remove("nobody")
        assert world.log == []


class TestDeployment:
    def test_a_model_removed_and_deployed_again_in_the_middle_of_a_run_stays(self):
        world = World("lb")
        world.arrive("a")
        world.loaded("g0")
        world.remove("a")
        world.add(model("a"))
        again = world.arrive("a")
        world.finish("g0")
        assert world.running("g0") == (again,)

    def test_a_new_version_is_another_model_and_the_old_one_finishes(self):
        world = World("lb", gpus=(2.0,), models=["f@1"])
        old = world.arrive("f@1")
        world.loaded("g0")
        world.add(model("f@2"))
        new = world.arrive("f@2")
        world.remove("f@1")
        world.finish("g0")
        assert world.ends[old] is End.ANSWERED
        assert world.resident("g0") == ["f@2"]
        world.drain()
        assert world.ends[new] is End.ANSWERED

    def test_changed_figures_hold_from_the_next_load_on(self):
        world = World("lb", gpus=(2.0,))
        world.arrive("b")
        world.add(model("a", 2.0, max_batch=2))
        ids = [world.arrive("a") for _ in range(2)]
        world.serve("g0")
        world.loaded("g0")
        assert world.running("g0") == tuple(ids)
        assert world.resident("g0") == ["a"]

    def test_a_model_redeployed_too_large_ends_those_who_wait(self):
        world = World("lb")
        world.arrive("b")
        request_id = world.arrive("a")
        world.add(model("a", 4.0))
        assert world.ends[request_id] is RejectReason.TOO_LARGE
