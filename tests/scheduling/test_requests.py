"""A request's way through the scheduler: joined, cancelled, late, turned away."""

from __future__ import annotations

import pytest
from scheduling_world import End, World, model

from hotset.errors import InvariantError
from hotset.scheduling.actions import Load, Reject, Run
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.events import ModelLoaded, RequestArrived, RunFinished
from hotset.vocabulary import RejectReason, Request


def busy_holder(policy: str = "lalb") -> World:
    """``g0`` runs ``a``, ``g1`` is idle and empty: a second ``a`` will wait in g0's local queue."""
    world = World(policy, gpus=(2.0, 2.0))
    world.arrive("a")
    world.serve("g0")
    world.arrive("a")
    return world


class TestJoining:
    def test_waiting_requests_of_a_function_that_batches_join_one_run(self):
        world = World("lb", gpus=(2.0,), models=[model("a", max_batch=3), "b"])
        first = world.arrive("a")
        others = [world.arrive(name) for name in "abaa"]
        world.loaded("g0")
        assert world.running("g0") == (first, others[0], others[2])
        world.finish("g0")
        assert all(world.ends[request_id] is End.ANSWERED for request_id in (first, others[0], others[2]))
        assert world.doing("g0") == "loading b"

    def test_without_batching_each_request_has_its_own_run(self):
        world = World("lb", gpus=(2.0,))
        for _ in range(3):
            world.arrive("a")
        world.drain()
        assert [len(action.request_ids) for action in world.log if isinstance(action, Run)] == [1, 1, 1]

    def test_a_burst_joins_runs_of_a_function_that_does_not_batch_up_to_a_time(self):
        models = [model("a", inference_s=0.25)]
        world = World("lb", gpus=(2.0,), models=models, config=SchedulerConfig(burst_s=1.0))
        ids = [world.arrive("a") for _ in range(6)]
        world.loaded("g0")
        assert world.running("g0") == tuple(ids[:4])

    def test_a_burst_never_hands_a_batching_function_more_than_it_takes(self):
        models = [model("a", inference_s=0.01, max_batch=3)]
        world = World("lb", gpus=(2.0,), models=models, config=SchedulerConfig(burst_s=1.0))
        ids = [world.arrive("a") for _ in range(6)]
        world.loaded("g0")
        assert world.running("g0") == tuple(ids[:3])

    @pytest.mark.parametrize(("inference_s", "joined"), [(1e-6, 5), (0.0, 1)], ids=["at most so many", "no estimate"])
    def test_a_burst_is_bounded_in_number(self, inference_s: float, joined: int):
        models = [model("a", inference_s=inference_s)]
        world = World("lb", models=models, config=SchedulerConfig(burst_s=1.0, max_burst=5))
        ids = [world.arrive("a") for _ in range(9)]
        world.loaded("g0")
        assert world.running("g0") == tuple(ids[:joined])

    def test_joining_is_not_skipping(self):
        world = World("lalb_o3", gpus=(1.0,), models=[model("a", max_batch=8), "b"])
        world.arrive("a")
        world.arrive("b")
        for _ in range(100):
            world.arrive("a")
        world.loaded("g0")
        assert len(world.running("g0")) == 8
        assert world.scheduler.cluster.queue.skips_of_head == 0
        world.finish("g0")
        assert len(world.running("g0")) == 8
        assert world.scheduler.cluster.queue.skips_of_head == 1, "the first of the eight passed over b"
        world.drain()
        assert not world.open

    def test_holes_left_by_those_who_joined_are_cleared_away(self):
        world = World("lb", gpus=(1.0,), models=[model("a", max_batch=512), "b"])
        world.arrive("a")
        world.arrive("b")
        for _ in range(200):
            world.arrive("a")
        world.arrive("b")
        world.loaded("g0")
        assert world.scheduler.cluster.queue.waiting == 2
        assert len(world.scheduler.cluster.queue._fifo) < 100


class TestCancelling:
    def test_in_the_global_queue(self):
        world = World("lb")
        world.arrive("a")
        ids = [world.arrive(name) for name in "bcb"]
        world.cancel(ids[2])
        world.cancel(ids[0])
        world.serve("g0")
        assert world.doing("g0") == "loading c"
        world.drain()
        assert not world.scheduler.open_requests

    def test_from_within_its_own_line(self):
        world = World("lb")
        world.arrive("b")
        ids = [world.arrive("a") for _ in range(3)]
        world.cancel(ids[1])
        world.drain()
        assert [action.request_ids[0] for action in world.log if isinstance(action, Run)] == [1, ids[0], ids[2]]

    def test_in_a_local_queue(self):
        world = busy_holder()
        first, second = world.arrive("a"), world.arrive("a")
        world.cancel(first)
        assert world.local("g0") == [second]
        world.finish("g0")
        assert world.running("g0") == (second,)

    def test_while_its_model_loads_the_load_goes_on_for_nobody(self):
        world = World("lb")
        world.cancel(world.arrive("a"))
        assert world.doing("g0") == "loading a"
        world.loaded("g0")
        assert world.doing("g0") == "idle"
        hit = world.arrive("a")
        assert world.running("g0") == (hit,)

    def test_while_its_model_loads_the_next_of_its_model_takes_its_place(self):
        world = World("lb")
        gone, other, heir = world.arrive("a"), world.arrive("b"), world.arrive("a")
        world.cancel(gone)
        world.loaded("g0")
        assert world.running("g0") == (heir,)
        world.drain()
        assert world.ends == {gone: End.CANCELLED, heir: End.ANSWERED, other: End.ANSWERED}

    def test_while_it_runs_its_result_goes_unread(self):
        world = World("lb")
        request_id = world.arrive("a")
        world.loaded("g0")
        world.cancel(request_id)
        assert world.doing("g0") == "running a"
        world.finish("g0")
        assert world.ends == {request_id: End.CANCELLED}

    def test_while_it_waits_for_its_second_try(self):
        world = World("lb", gpus=(2.0, 2.0))
        request_id = world.arrive("a")
        world.arrive("b")
        world.load_fails("g0")  # g1 is busy: it waits for that one
        world.cancel(request_id)
        world.drain()
        assert world.ends[request_id] is End.CANCELLED

    def test_twice_or_when_nobody_knows_it(self):
        world = World("lb")
        request_id = world.arrive("a")
        world.drain()
        world.cancel(request_id)
        world.cancel(12345)
        assert world.ends == {request_id: End.ANSWERED}


class TestAdmission:
    def test_an_unknown_model(self):
        world = World("lb")
        request_id = world.arrive("nobody")
        assert world.rejects[request_id] == Reject(
            request_id, RejectReason.UNKNOWN_MODEL, "no model 'nobody' is deployed"
        )

    def test_a_full_queue_says_when_to_come_back(self):
        config = SchedulerConfig(max_queue=3)
        world = World("lb", config=config)
        for _ in range(4):
            world.arrive("a")
        refused = world.arrive("b")
        assert world.ends[refused] is RejectReason.QUEUE_FULL
        assert world.rejects[refused].message == "3 requests are waiting already: try again later"
        assert world.rejects[refused].retry_after_s == 1.0  # never sooner
        world.serve("g0", inference_s=15.0)
        assert world.arrive("b") in world.open, "there is room again"
        # Three runs of the 15 s that was learned, on one GPU.
        assert world.rejects[world.arrive("b")].retry_after_s == 45.0
        world.finish("g0", inference_s=1000.0)
        world.arrive("b")
        assert world.rejects[world.arrive("b")].retry_after_s == 60.0  # never later

    def test_a_full_line_of_one_model_leaves_the_others_alone(self):
        world = World("lb", config=SchedulerConfig(max_queue_per_model=1))
        world.arrive("a")
        world.arrive("a")
        assert world.ends[world.arrive("a")] is RejectReason.QUEUE_FULL
        assert world.arrive("b") in world.open

    def test_a_model_too_large_for_every_gpu(self):
        world = World("lb", gpus=(2.0,), models=[model("huge", 3.0)])
        request_id = world.arrive("huge")
        assert world.ends[request_id] is RejectReason.TOO_LARGE
        assert world.rejects[request_id].message == (
            "huge needs 3221225472 bytes of GPU memory and the largest GPU has 2147483648: "
            "use a larger GPU or a smaller model"
        )

    def test_without_any_gpu_requests_wait_for_one(self):
        world = World("lb", gpus=())
        request_id = world.arrive("a")
        world.join(2.0)
        world.drain()
        assert world.ends[request_id] is End.ANSWERED


class TestBugs:
    """What cannot happen is reported as a bug, at once."""

    def test_one_id_twice(self):
        world = World("lb")
        request_id = world.arrive("a")
        with pytest.raises(InvariantError, match="arrived twice"):
            world.scheduler.handle(RequestArrived(Request(request_id=request_id, model="a", arrival_s=0.0)), 0.0)

    def test_a_report_on_what_was_not_asked_for(self):
        world = World("lb")
        with pytest.raises(InvariantError, match="g0 reports on a"):
            world.scheduler.handle(RunFinished("g0", "a", 1.0), 0.0)
        world.arrive("a")
        with pytest.raises(InvariantError, match="g0 reports on b"):
            world.scheduler.handle(ModelLoaded("g0", "b", 1.0), 0.0)

    def test_a_policy_that_places_a_model_where_it_does_not_fit(self):
        world = World("lb", gpus=(2.0, 8.0), models=[model("large", 4.0)])
        world.scheduler.cluster.first_idle = lambda name=None: world.scheduler.cluster.gpus["g0"]  # type: ignore[method-assign]
        with pytest.raises(InvariantError, match="lb placed large on g0, where it does not fit"):
            world.arrive("large")
        assert not [action for action in world.log if isinstance(action, Load)]
