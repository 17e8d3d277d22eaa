"""Deadlines: what cannot be answered in time is refused, what barely can goes first. Loads take 4 s, runs 1 s."""

from __future__ import annotations

import pytest
from scheduling_world import End, World, model

from hotset.scheduling.actions import Load
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.policies import make_policy
from hotset.scheduling.policies.interface import Rule
from hotset.vocabulary import Model, RejectReason


def running(policy: str = "lb") -> World:
    """One GPU of two models, with ``a`` hot and running since time 0."""
    world = World(policy)
    world.arrive("a")
    world.loaded("g0", load_s=4.0)
    assert world.doing("g0") == "running a"
    return world


class TestRefusals:
    def test_a_request_that_could_not_be_done_in_time_if_it_were_next_is_refused_as_it_arrives(self):
        world = running()
        request_id = world.arrive("a", patience_s=0.5)
        assert world.ends[request_id] is RejectReason.HOPELESS
        assert world.rejects[request_id].message == ("a takes at least 1 s now and 0.5 s are left: give it more time")

    def test_the_first_for_a_model_is_let_in_as_its_load_is_for_the_next_ones_too(self):
        world = running()
        first, second = world.arrive("b", patience_s=3.0), world.arrive("b", patience_s=3.0)
        assert first in world.open
        assert world.ends[second] is RejectReason.HOPELESS
        assert world.arrive("b", patience_s=5.0) in world.open

    def test_what_was_never_measured_nor_declared_is_not_hopeless(self):
        world = World("lb", models=())
        world.add(model_without_figures())
        first, second = world.arrive("new", patience_s=0.01), world.arrive("new", patience_s=0.01)
        assert {first, second} <= set(world.open)

    def test_the_least_that_was_seen_counts_not_the_average(self):
        world = running()
        world.arrive("a")
        world.finish("g0", inference_s=3.0)
        assert world.ends[world.arrive("a", patience_s=2.0)] is RejectReason.HOPELESS
        world.arrive("a")
        world.finish("g0", inference_s=1.5)
        assert world.arrive("a", patience_s=2.0) in world.open

    def test_while_nobody_else_asks_for_a_model_a_request_is_let_in_as_things_may_have_changed(self):
        world = running()
        world.finish("g0", inference_s=50.0)
        once_more = world.arrive("a", patience_s=2.0)
        world.finish("g0", inference_s=1.0)
        assert world.ends[once_more] is End.ANSWERED
        world.arrive("a")
        assert world.arrive("a", patience_s=2.0) in world.open

    def test_what_its_runs_are_too_long_for_is_tried_for_a_tenth_of_the_time_only(self):
        world = running()
        world.finish("g0", inference_s=3.0)
        tried = world.arrive("a", patience_s=2.0)
        world.finish("g0", inference_s=3.0)
        assert world.ends[tried] is End.ANSWERED
        assert world.ends[world.arrive("a", patience_s=2.0)] is RejectReason.HOPELESS
        world.wait(30.0)
        assert world.arrive("a", patience_s=2.0) in world.open

    def test_one_that_waits_is_refused_as_soon_as_its_time_is_less_than_a_run(self):
        world = running()
        request_id = world.arrive("a", patience_s=1.25)
        assert world.scheduler.next_wakeup_s() == pytest.approx(0.25, abs=0.01)
        world.wait(0.5)
        assert world.ends[request_id] is RejectReason.HOPELESS

    def test_one_that_waits_is_refused_when_its_time_is_less_than_a_run(self):
        world = running()
        request_id = world.arrive("b", patience_s=4.0)
        world.wait(3.0)
        assert request_id in world.open
        world.wait(0.25)
        assert world.ends[request_id] is RejectReason.HOPELESS
        assert world.scheduler.next_wakeup_s() is None

    def test_one_in_a_local_queue_too(self):
        world = World("lalb", gpus=(2.0, 2.0))
        world.arrive("a")
        world.loaded("g0")
        request_id = world.arrive("a", patience_s=2.0)
        assert world.local("g0") == [request_id]
        world.wait(1.5)
        assert world.ends[request_id] is RejectReason.HOPELESS
        assert world.local("g0") == []

    def test_one_whose_model_is_loaded_for_it_has_until_its_deadline(self):
        world = World("lb")
        request_id = world.arrive("a", patience_s=2.0)
        world.wait(1.75)
        assert request_id in world.open
        world.wait(0.25)
        assert world.ends[request_id] is RejectReason.DEADLINE
        assert world.rejects[request_id].message == "no GPU could start it within its 2 s deadline"
        world.loaded("g0")
        assert world.doing("g0") == "idle"

    def test_one_that_waits_for_its_second_try(self):
        world = World("lb", gpus=(2.0, 2.0))
        request_id = world.arrive("a", patience_s=2.0)
        world.arrive("b")
        world.load_fails("g0")
        world.wait(2.0)
        assert world.ends[request_id] is RejectReason.HOPELESS

    def test_where_nothing_takes_time_nobody_waits_past_his_deadline_either(self):
        world = World("lb", models=[model("a", load_s=0.0, inference_s=0.0)])
        world.arrive("a")
        world.loaded("g0", load_s=0.0)
        world.finish("g0", inference_s=0.0)
        world.arrive("a")
        request_id = world.arrive("a", patience_s=2.0)
        world.wait(2.0)
        assert world.ends[request_id] is RejectReason.DEADLINE

    def test_a_run_that_has_begun_is_never_late(self):
        world = World("lb")
        request_id = world.arrive("a", patience_s=6.0)
        world.serve("g0", inference_s=60.0)
        assert world.ends == {request_id: End.ANSWERED}

    def test_whatever_happens_first_after_a_deadline_starts_nothing_hopeless(self):
        world = running()
        request_id = world.arrive("a", patience_s=2.0)
        world.now_s = 3.0  # the wake-up call is overdue when the run ends
        world.finish("g0")
        assert world.ends[request_id] is RejectReason.DEADLINE
        assert world.doing("g0") == "idle"

    def test_one_that_arrives_too_late_never_waits(self):
        world = World("lb")
        assert world.ends[world.arrive("a", patience_s=0.0)] is RejectReason.DEADLINE

    def test_the_next_wakeup_is_that_of_a_request_still_open(self):
        world = running()
        soon, later = world.arrive("b", patience_s=6.0), world.arrive("b", patience_s=8.0)
        assert world.scheduler.next_wakeup_s() == 3.0, "half of its time"
        world.cancel(soon)
        assert world.scheduler.next_wakeup_s() == 4.0
        world.wait(8.0)
        assert world.ends == {soon: End.CANCELLED, later: RejectReason.HOPELESS}


def model_without_figures():
    return model("new", load_s=None, inference_s=None)


class TestOrder:
    @pytest.mark.parametrize("policy", ["lb", "lalb", "hotset"])
    def test_one_whose_deadline_presses_goes_before_older_ones(self, policy: str):
        world = running(policy)
        world.arrive("b")
        world.wait(1.0)
        urgent = world.arrive("c", patience_s=8.0)
        world.wait(6.5)
        assert urgent in world.open
        world.finish("g0")
        assert world.doing("g0") == "loading c"

    def test_where_no_deadline_presses_the_order_is_that_of_arrival(self):
        world = running()
        world.arrive("b")
        world.arrive("c", patience_s=60.0)
        world.wait(3.0)
        world.finish("g0")
        assert world.doing("g0") == "loading b"
        assert not world.scheduler.cluster.queues.several

    def test_of_two_that_press_the_one_with_less_time_left_goes_first(self):
        world = running()
        later, sooner = world.arrive("b", patience_s=9.0), world.arrive("c", patience_s=8.5)
        world.wait(7.0)
        world.finish("g0")
        assert world.doing("g0") == "loading c"
        assert {later, sooner} <= set(world.open)

    @pytest.mark.parametrize(("patience_s", "first"), [(20.0, "b"), (4.0, "c")])
    def test_where_requests_are_given_up_nothing_presses_for_as_long_as_they_had(self, patience_s: float, first: str):
        world = running()
        given_up = world.arrive("a", patience_s=patience_s)
        world.wait(patience_s - 0.5)
        assert world.ends[given_up] is RejectReason.HOPELESS
        world.arrive("b")
        world.arrive("c", patience_s=10.0)
        world.wait(8.0)
        world.finish("g0")
        assert world.doing("g0") == f"loading {first}"

    def test_one_that_is_held_for_a_batch_may_press_as_well(self):
        world = World("lb", config=SchedulerConfig())
        world.arrive("a")
        world.serve("g0")
        world.arrive("a", patience_s=9.0)
        assert world.doing("g0") == "running a"


class TestOverload:
    """Once a waiting request had to be given up, what ends most waiting per second of GPU time goes first."""

    def overloaded(self, *models: Model, gpus: tuple[float, ...] = (2.0,), overlap: bool = False) -> World:
        """``a`` runs on the first GPU, ``other`` on the rest, and a request of 30 s was given up."""
        config = SchedulerConfig(journal_capacity=100, overlap=overlap)
        world = World("hotset", models=[model("a"), *models], gpus=gpus, config=config)
        world.scheduler.policy, policy = make_policy("lb"), world.scheduler.policy
        world.arrive("a")
        world.loaded("g0")
        for gpu_id in list(world.devices)[1:]:
            world.arrive("other")
            world.loaded(gpu_id)
        world.scheduler.policy = policy
        waits = world.arrive("a", patience_s=30.0)
        world.wait(29.5)
        assert world.ends[waits] is RejectReason.HOPELESS
        return world

    def test_of_two_hits_the_one_whose_run_is_short_for_its_wait(self):
        world = self.overloaded(model("short", inference_s=0.1, load_s=0.0))
        world.arrive("short")
        world.finish("g0")
        world.loaded("g0", load_s=0.0)
        long = world.arrive("a", patience_s=60.0)
        world.wait(2.0)
        short = world.arrive("short", patience_s=60.0)
        world.wait(1.0)
        world.finish("g0", inference_s=0.1)
        assert world.running("g0") == (short,)
        assert world.scheduler.journal.explain(short).decisions[-1].rule is Rule.MOST_ENDED
        world.finish("g0", inference_s=0.1)
        assert world.running("g0") == (long,)

    def test_a_load_goes_before_hits_if_enough_requests_share_it(self):
        world = self.overloaded(model("short", inference_s=0.1))
        world.arrive("a", patience_s=60.0)
        for _ in range(20):
            world.arrive("short", patience_s=60.0)
        world.wait(1.0)
        world.finish("g0")
        assert world.doing("g0") == "loading short"

    def test_whoever_a_load_is_too_late_for_has_no_share_in_it(self):
        world = self.overloaded(model("short", inference_s=0.1))
        hit = world.arrive("a", patience_s=60.0)
        for _ in range(20):
            world.arrive("short", patience_s=4.0)
        world.wait(0.5)
        world.finish("g0")
        assert world.running("g0") == (hit,)

    @pytest.mark.parametrize("patience_s", [59.0, None])
    def test_a_line_that_its_busy_holder_serves_in_time_gets_no_copy(self, patience_s: float | None):
        world = self.overloaded(model("other"), gpus=(2.0, 2.0))
        hit = world.arrive("other", patience_s=60.0)
        for _ in range(3):
            world.arrive("a", patience_s=patience_s)
        world.wait(1.0)
        world.finish("g1")
        assert world.running("g1") == (hit,)

    def test_one_that_it_would_not_serve_in_time_does(self):
        world = self.overloaded(model("other", inference_s=4.0), gpus=(2.0, 2.0))
        for _ in range(40):
            world.arrive("a", patience_s=20.0)
        world.wait(1.0)
        world.arrive("other", patience_s=59.0)
        world.finish("g1", inference_s=4.0)
        assert world.doing("g1") == "loading a"

    def test_a_model_that_is_on_its_way_is_not_loaded_once_more(self):
        world = self.overloaded(model("other"), model("b"), gpus=(2.0, 2.0), overlap=True)
        first, second = world.arrive("b", patience_s=60.0), world.arrive("b", patience_s=60.0)
        world.wait(1.0)
        world.finish("g1")
        world.finish("g0")
        copies = [action for action in world.actions(Load) if action.model == "b"]
        assert len(copies) == 1
        assert {first, second} <= set(world.open)

    def test_a_hit_is_seen_however_many_models_are_waited_for(self):
        crowd = [model(f"m{number}") for number in range(100)]
        world = self.overloaded(*crowd)
        for each in crowd:
            world.arrive(each.name, patience_s=60.0)
        hit = world.arrive("a", patience_s=60.0)
        world.wait(1.0)
        world.finish("g0")
        assert world.running("g0") == (hit,)

    def test_strict_order_comes_first(self):
        world = self.overloaded(model("long", inference_s=9.0), gpus=(3.0,))
        old = world.arrive("long", patience_s=300.0)
        world.wait(50.0)
        given_up = world.arrive("a", patience_s=20.0)
        world.wait(19.5)
        assert world.ends[given_up] is RejectReason.HOPELESS
        world.arrive("a", patience_s=20.0)
        world.finish("g0")
        assert world.doing("g0") == "loading long"
        assert old in world.open
