"""Batches are filled for as long as a model asks for, and no bound on waiting gives way to that."""

from __future__ import annotations

import pytest
from scheduling_world import GIB, End, World, model

from hotset.scheduling.config import SchedulerConfig
from hotset.vocabulary import RejectReason


def hot(policy: str = "hotset", *, gpus: int = 1, max_batch: int = 3, wait_s: float = 0.5) -> World:
    """Every GPU is idle and holds ``a``, which batches, and ``b``, which does not; runs take a second."""
    batching = model("a", max_batch=max_batch, max_batch_wait_s=wait_s)
    world = World(policy, gpus=(2.0,) * gpus, models=[batching, "b"])
    for name in "ab":
        for _ in range(gpus):
            world.arrive(name)
        for gpu_id in list(world.devices):
            world.serve(gpu_id)
    assert all(world.resident(gpu_id) == ["a", "b"] for gpu_id in world.devices)
    return world


class TestABatchIsFilled:
    def test_until_its_oldest_request_was_held_for_as_long_as_its_model_says(self):
        world = hot()
        first = world.arrive("a")
        world.wait(0.25)
        second = world.arrive("a")
        world.wait(0.125)
        assert world.doing("g0") == "idle"
        world.wait(0.125)
        assert world.running("g0") == (first, second)

    def test_until_it_is_full(self):
        world = hot()
        batch = tuple(world.arrive("a") for _ in range(3))
        assert world.running("g0") == batch

    @pytest.mark.parametrize("policy", ["lb", "lalb_o3", "hotset", "mqfq_sticky", "pow2_multiplex"])
    def test_and_whoever_comes_next_fills_another_whatever_the_policy(self, policy: str):
        world = hot(policy)
        full = tuple(world.arrive("a") for _ in range(3))
        late = world.arrive("a")
        assert world.running("g0") == full
        world.serve("g0")
        world.wait(0.5)
        assert world.running("g0") == (late,)

    def test_while_the_gpu_takes_others(self):
        world = hot()
        held = world.arrive("a")
        other = world.arrive("b")
        assert world.running("g0") == (other,)
        world.serve("g0")
        assert world.running("g0") == (held,)

    def test_and_a_load_that_is_done_meanwhile_takes_along_who_is_held(self):
        world = World("hotset", models=[model("a", max_batch=3, max_batch_wait_s=0.5)])
        first = world.arrive("a")
        world.wait(3.75)
        held = world.arrive("a")
        world.wait(0.25)
        world.loaded("g0")
        assert world.running("g0") == (first, held)
        world.finish("g0")
        world.wait(1.0)
        assert world.doing("g0") == "idle"

    def test_and_a_run_that_begins_anyway_takes_along_who_waits(self):
        world = hot()
        waiting = world.arrive("a")
        world.arrive("b")
        world.wait(0.5)  # its time is up, but the GPU is taken
        with_it = world.arrive("a")
        world.finish("g0")
        assert world.running("g0") == (waiting, with_it)

    def test_but_not_for_a_model_that_is_nowhere(self):
        world = World("hotset", models=[model("a", max_batch=3, max_batch_wait_s=0.5)])
        world.arrive("a")
        assert world.doing("g0") == "loading a"

    def test_and_not_where_nothing_is_said(self):
        world = hot(wait_s=0.0)
        request = world.arrive("a")
        assert world.running("g0") == (request,)


class TestBounds:
    def test_a_request_is_held_no_longer_than_its_deadline_leaves_for_a_full_batch(self):
        world = hot()
        request = world.arrive("a", patience_s=3.25)  # three of a run of one second each, as far as anybody knows
        world.wait(0.25)
        assert world.running("g0") == (request,)

    def test_a_hurried_request_hurries_those_it_joins(self):
        world = hot(max_batch=4)
        patient, hurried = world.arrive("a"), world.arrive("a", patience_s=1.0)
        assert world.running("g0") == (patient, hurried)

    def test_one_whose_time_is_up_meanwhile_is_refused_as_ever(self):
        world = hot()
        world.arrive("b")
        request = world.arrive("a", patience_s=0.125)
        world.wait(0.25)
        assert world.ends[request] is RejectReason.HOPELESS

    def test_a_request_that_was_held_stands_behind_those_that_came_meanwhile(self):
        world = hot("lb")
        held = world.arrive("a")
        busy, queued = world.arrive("b"), world.arrive("b")
        world.wait(0.5)
        assert world.running("g0") == (busy,)
        world.serve("g0")
        assert world.running("g0") == (queued,)
        world.serve("g0")
        assert world.running("g0") == (held,)


class TestWhatHappensMeanwhile:
    def test_a_cancelled_request_is_held_no_more(self):
        world = hot()
        world.cancel(world.arrive("a"))
        world.wait(1.0)
        assert world.doing("g0") == "idle"
        again = world.arrive("a")
        world.wait(0.5)
        assert world.running("g0") == (again,)

    def test_nobody_is_held_once_the_options_have_changed(self):
        world = hot()
        held = (world.arrive("a"), world.arrive("a"))
        world.add(model("a", max_batch=2, max_batch_wait_s=0.5))
        assert world.running("g0") == held

    def test_one_of_several_may_leave(self):
        world = hot()
        first, second = world.arrive("a"), world.arrive("a")
        world.cancel(first)
        world.wait(0.5)
        assert world.running("g0") == (second,)

    def test_their_model_may_leave_its_gpu(self):
        world = hot()
        held = world.arrive("a")
        world.process_dies("g0", "a")
        joined = world.arrive("a", patience_s=60.0)
        assert world.doing("g0") == "loading a", "there is nothing left to wait for"
        world.loaded("g0")
        assert world.running("g0") == (held, joined)

    def test_their_function_may_be_removed(self):
        world = hot()
        request = world.arrive("a")
        world.remove("a")
        assert world.ends[request] is RejectReason.REMOVED

    def test_their_model_may_prove_too_large(self):
        world = hot()
        held = world.arrive("a")
        world.add(model("a", 4.0, max_batch=3, max_batch_wait_s=0.5))
        assert world.ends[held] is RejectReason.TOO_LARGE
        assert world.scheduler.cluster.models["a"].memory_bytes == 4 * GIB


def test_one_that_came_out_of_a_batch_survives_its_process_and_then_its_gpu():
    batching = model("a", max_batch=2, max_batch_wait_s=0.5)
    world = World("lb", gpus=(2.0, 1.0), models=[batching], config=SchedulerConfig(overlap=True))
    first = world.arrive("a")
    world.wait(0.5)
    second = world.arrive("a")
    world.loaded("g0")
    assert world.running("g0") == (first, second), "the second never was in a queue"
    world.run_fails("g0")
    world.lose("g1")
    assert world.local("g0") == [second]
    world.join(2.0)
    world.lose("g0")
    world.drain()
    assert world.ends == {first: End.ANSWERED, second: End.ANSWERED}
