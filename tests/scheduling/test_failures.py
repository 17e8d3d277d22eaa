"""Processes die, loads fail, GPUs vanish: who is tried again, where, and what the others notice of it."""

from __future__ import annotations

import pytest
from scheduling_world import GIB, End, World, model

from hotset.errors import InvariantError
from hotset.scheduling.actions import Load
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.events import ProcessLost
from hotset.scheduling.quarantine import QuarantineSettings
from hotset.vocabulary import FailureKind, RejectReason

DEADLY = [kind for kind in FailureKind if kind is not FailureKind.ERROR]


def strict(after: int = 1) -> SchedulerConfig:
    return SchedulerConfig(quarantine=QuarantineSettings(after=after, first_s=2.0, longest_s=10.0), max_attempts=1)


class TestRetries:
    @pytest.mark.parametrize("kind", DEADLY)
    def test_a_request_whose_run_died_runs_once_more_elsewhere(self, kind: FailureKind):
        world = World("lb", gpus=(2.0, 2.0))
        request_id = world.arrive("a")
        world.loaded("g0")
        world.run_fails("g0", kind)
        assert world.doing("g0") == "idle"
        assert world.resident("g0") == []
        world.serve("g1")
        assert world.ends[request_id] is End.ANSWERED

    @pytest.mark.parametrize("kind", DEADLY)
    def test_a_request_whose_load_died_is_loaded_once_more_elsewhere(self, kind: FailureKind):
        world = World("lb", gpus=(2.0, 2.0))
        request_id = world.arrive("a")
        world.load_fails("g0", kind)
        assert world.doing("g1") == "loading a"
        world.serve("g1")
        assert world.ends[request_id] is End.ANSWERED

    def test_a_second_death_is_an_error(self):
        world = World("lb", gpus=(2.0, 2.0))
        request_id = world.arrive("a")
        world.load_fails("g0")
        world.load_fails("g1", reason="out of ideas")
        assert world.ends[request_id] is RejectReason.FAILED
        assert world.rejects[request_id].message == "out of ideas"

    def test_an_error_of_the_functions_own_load_is_not_tried_again(self):
        world = World("lb", gpus=(2.0, 2.0))
        request_id = world.arrive("a")
        world.load_fails("g0", FailureKind.ERROR, "no such file")
        assert world.ends[request_id] is RejectReason.FAILED

    def test_nor_is_a_function_that_does_not_allow_it(self):
        world = World("lb", gpus=(2.0, 2.0), models=[model("a", retry=False)])
        request_id = world.arrive("a")
        world.load_fails("g0")
        assert world.ends[request_id] is RejectReason.FAILED

    def test_where_there_is_no_other_gpu_the_same_one_serves(self):
        world = World("lb", gpus=(2.0, 1.0), models=[model("a", 2.0)])
        request_id = world.arrive("a")
        world.load_fails("g0")
        assert world.doing("g0") == "loading a"
        world.serve("g0")
        assert world.ends[request_id] is End.ANSWERED

    def test_an_idle_holder_is_preferred(self):
        world = World("lb", gpus=(2.0, 2.0, 2.0))
        world.arrive("b")
        world.arrive("b")
        world.arrive("a")
        for gpu_id in ("g0", "g1", "g2"):
            world.loaded(gpu_id)
        world.finish("g2")
        world.finish("g0")
        world.arrive("a")  # g2 has been idle longest
        world.finish("g1")
        world.arrive("b")  # g0
        retried = world.running("g0")
        world.run_fails("g0")
        assert world.running("g1") == retried

    def test_a_retry_waits_for_another_gpu_and_goes_before_everyone_else(self):
        world = World("lb", gpus=(2.0, 2.0))
        retried = world.arrive("a")
        world.arrive("b")
        world.arrive("c")
        world.load_fails("g0")
        assert world.doing("g0") == "loading c"
        world.serve("g1")
        assert world.doing("g1") == "loading a"
        world.drain()
        assert world.ends[retried] is End.ANSWERED

    def test_those_answered_before_the_process_died_are_not_run_again(self):
        world = World("lb", gpus=(2.0, 2.0), models=[model("a", max_batch=3)])
        ids = [world.arrive("a")]
        world.loaded("g0")
        world.arrive("a")  # on g1
        ids += [world.arrive("a") for _ in range(3)]
        world.finish("g0")
        assert world.running("g0") == tuple(ids[1:])
        world.cancel(ids[3])
        world.run_fails("g0", answered=(ids[1],))
        world.serve("g1")
        assert world.running("g1") == (ids[2],)
        world.drain()
        assert world.ends[ids[3]] is End.CANCELLED
        assert world.ends[ids[1]] is world.ends[ids[2]] is End.ANSWERED

    def test_the_local_queue_goes_on_with_a_new_process(self):
        world = World("lalb", gpus=(2.0, 2.0))
        world.arrive("a")
        world.serve("g0")
        world.arrive("a")
        local = world.arrive("a")
        world.run_fails("g0")
        assert world.doing("g0") == "loading a"
        assert world.doing("g1") == "loading a"  # the retry
        world.drain()
        assert world.ends[local] is End.ANSWERED


class TestLearnedMemory:
    def test_a_load_that_proved_larger_is_tried_again_at_once_with_room_made(self):
        world = World("lb", gpus=(4.0,), models=["a", "b", "c", "x"])
        for name in "abc":
            world.arrive(name)
            world.serve("g0")
        request_id = world.arrive("x")
        world.load_fails("g0", FailureKind.OUT_OF_MEMORY, "needs 3 GiB", memory_bytes=3 * GIB)
        assert world.doing("g0") == "loading x"
        assert world.resident("g0") == ["c", "x"]
        world.serve("g0")
        assert world.ends[request_id] is End.ANSWERED
        assert world.scheduler.quarantine.reason("x") == "", "nobody is to blame"

    def test_a_load_that_failed_although_it_fits_goes_elsewhere(self):
        world = World("lb", gpus=(4.0, 4.0))
        world.arrive("a")
        world.load_fails("g0", FailureKind.OUT_OF_MEMORY, "others use it", memory_bytes=GIB)
        assert world.doing("g1") == "loading a"

    def test_one_too_large_for_all_ends_everyone_who_waits_for_it(self):
        world = World("lb", gpus=(4.0,))
        ids = [world.arrive(name) for name in "aab"]
        world.load_fails("g0", FailureKind.OUT_OF_MEMORY, "needs 9 GiB", memory_bytes=9 * GIB)
        assert world.ends == {ids[0]: RejectReason.TOO_LARGE, ids[1]: RejectReason.TOO_LARGE}
        assert "a needs 9663676416 bytes" in world.rejects[ids[0]].message
        assert world.ends[world.arrive("a")] is RejectReason.TOO_LARGE
        world.drain()
        assert world.ends[ids[2]] is End.ANSWERED

    def test_one_too_large_for_this_gpu_leaves_its_local_queue_for_a_larger_one(self):
        world = World("lalb", gpus=(2.0, 2.0, 8.0))
        world.arrive("a")
        world.serve("g0")
        world.arrive("a")
        local = world.arrive("a")
        assert world.local("g0") == [local]
        world.run_fails("g0", FailureKind.OUT_OF_MEMORY)  # tried again on g1, the local one on g0
        assert (world.doing("g0"), world.doing("g1")) == ("loading a", "loading a")
        behind = world.arrive("b")
        world.load_fails("g1", FailureKind.OUT_OF_MEMORY, memory_bytes=4 * GIB)
        world.load_fails("g0", FailureKind.OUT_OF_MEMORY, memory_bytes=4 * GIB)
        world.drain()
        assert world.ends[local] is world.ends[behind] is End.ANSWERED

    def test_a_local_queue_whose_model_no_longer_fits_there_returns_to_the_global_one(self):
        world = World("lalb", gpus=(2.0, 8.0))
        world.arrive("a")
        world.serve("g0")
        world.arrive("a")
        first, second = world.arrive("a"), world.arrive("a")
        assert world.local("g0") == [first, second]
        world.add(model("a", 4.0))  # redeployed, and larger
        world.run_fails("g0")
        assert world.local("g0") == []
        assert world.doing("g0") == "idle"
        world.drain()
        assert world.ends[first] is world.ends[second] is End.ANSWERED


class TestQuarantine:
    def test_a_model_that_keeps_failing_is_left_alone_longer_each_time(self):
        world = World("lb", config=strict())
        for pause_s in (2.0, 4.0, 8.0, 10.0, 10.0):
            world.arrive("a")
            world.load_fails("g0", reason="segmentation fault")
            refused = world.arrive("a")
            assert world.ends[refused] is RejectReason.QUARANTINED
            assert world.rejects[refused].retry_after_s == pause_s
            assert world.rejects[refused].message == (
                f"a keeps failing (segmentation fault) and is left alone for {pause_s:.3g} s more"
            )
            world.wait(pause_s)

    def test_it_takes_some_failures_in_a_row(self):
        world = World("lb", config=strict(after=3))
        for _ in range(2):
            world.arrive("a")
            world.load_fails("g0")
        world.arrive("a")
        world.serve("g0")  # all is forgiven
        for _ in range(3):
            assert world.arrive("a") in world.open
            world.run_fails("g0") if world.doing("g0") == "running a" else world.load_fails("g0")
        assert world.ends[world.arrive("a")] is RejectReason.QUARANTINED

    def test_those_who_wait_for_it_are_told_and_others_go_on(self):
        world = World("lalb", gpus=(2.0, 2.0), config=strict())
        world.arrive("a")
        world.serve("g0")
        world.arrive("a")
        local = world.arrive("a")
        world.arrive("b")
        queued, other = world.arrive("c"), world.arrive("b")
        world.run_fails("g0")
        assert world.ends[local] is RejectReason.QUARANTINED
        assert world.doing("g0") == "loading c"
        world.drain()
        assert world.ends[queued] is world.ends[other] is End.ANSWERED

    def test_the_request_that_tipped_the_scales_is_not_tried_again(self):
        world = World("lb", gpus=(2.0, 2.0), config=SchedulerConfig(quarantine=QuarantineSettings(after=1)))
        request_id = world.arrive("a")
        world.load_fails("g0", reason="it died")
        assert world.ends[request_id] is RejectReason.FAILED
        assert world.doing("g1") == "idle"


class TestIdleProcesses:
    def test_a_model_whose_idle_process_died_is_cold_again(self):
        world = World("lb")
        world.arrive("a")
        world.serve("g0")
        world.process_dies("g0", "a")
        assert world.resident("g0") == []
        world.arrive("a")
        assert world.doing("g0") == "loading a"

    def test_it_counts_as_a_failure(self):
        world = World("lb", gpus=(1.0,), config=strict())
        world.arrive("a")
        world.serve("g0")
        world.arrive("b")
        waiting = world.arrive("c")
        world.serve("g0")
        world.serve("g0")
        world.process_dies("g0", "c")
        assert world.ends[waiting] is End.ANSWERED
        assert world.ends[world.arrive("c")] is RejectReason.QUARANTINED

    def test_those_who_wait_in_the_local_queue_for_it_are_told(self):
        world = World("lalb", gpus=(2.0,), config=strict())
        for name in "ab":
            world.arrive(name)
            world.serve("g0")
        world.join(2.0)
        world.arrive("b")
        waiting = world.arrive("a")
        assert world.local("g0") == [waiting]
        world.process_dies("g0", "a")
        assert world.ends[waiting] is RejectReason.QUARANTINED
        assert world.doing("g0") == "running b"

    def test_otherwise_their_gpu_loads_it_again(self):
        world = World("lalb", gpus=(2.0,))
        for name in "ab":
            world.arrive(name)
            world.serve("g0")
        world.join(2.0)
        world.arrive("b")
        waiting = world.arrive("a")
        world.process_dies("g0", "a")
        world.finish("g0")
        assert world.doing("g0") == "loading a"
        world.serve("g0")
        assert world.ends[waiting] is End.ANSWERED

    def test_news_of_what_is_gone_or_busy_already_changes_nothing(self):
        world = World("lb")
        world.arrive("a")
        world.loaded("g0")
        for gpu_id, name in (("g0", "a"), ("g0", "b"), ("g9", "a")):
            assert world.handle(ProcessLost(gpu_id, name, "late news")) == []
        world.finish("g0")
        assert world.resident("g0") == ["a"]


class TestLostGpus:
    def test_idle(self):
        world = World("lb", gpus=(2.0, 2.0))
        world.lose("g0")
        request_id = world.arrive("a")
        world.serve("g1")
        assert world.ends[request_id] is End.ANSWERED

    @pytest.mark.parametrize("stage", ["loading", "running"])
    def test_what_it_worked_on_is_tried_elsewhere(self, stage: str):
        world = World("lb", gpus=(2.0, 2.0))
        request_id = world.arrive("a")
        if stage == "running":
            world.loaded("g0")
        world.lose("g0")
        assert world.doing("g1") == "loading a"
        world.serve("g1")
        assert world.ends[request_id] is End.ANSWERED
        assert world.scheduler.quarantine.reason("a") == "", "the model is not to blame"

    def test_a_second_loss_is_an_error_that_says_which(self):
        world = World("lb", gpus=(2.0, 2.0))
        request_id = world.arrive("a")
        world.lose("g0")
        world.lose("g1", reason="node down")
        assert world.ends[request_id] is RejectReason.FAILED
        assert world.rejects[request_id].message == "g1 was lost: node down"

    def test_a_cancelled_request_does_not_come_back(self):
        world = World("lb", gpus=(2.0, 2.0))
        request_id = world.arrive("a")
        world.cancel(request_id)
        world.lose("g0", reason="")
        assert world.doing("g1") == "idle"

    def test_its_local_queue_returns_to_the_front_of_the_global_queue(self):
        world = World("lalb", gpus=(1.0, 1.0))
        world.arrive("a")
        world.serve("g0")
        world.arrive("a")
        local = [world.arrive("a") for _ in range(2)]
        world.arrive("b")
        younger = [world.arrive(name) for name in "cab"]
        running = world.running("g0")
        world.lose("g0")
        order = [entry.request.request_id for entry in world.scheduler.cluster.queue.in_order()]
        assert order == [*local, *younger]
        world.serve("g1")
        assert world.doing("g1") == "loading a"
        world.loaded("g1")
        assert world.running("g1") == running, "the one it worked on goes first"
        world.drain()
        assert all(end is End.ANSWERED for end in world.ends.values())

    def test_local_queues_of_two_lost_gpus_return_in_order_of_arrival(self):
        world = World("lalb", gpus=(1.0, 1.0, 1.0))
        for gpu_id, name in (("g0", "a"), ("g1", "b")):
            world.arrive(name)
            world.serve(gpu_id)
        for name in "ab":
            world.arrive(name)
        first, second, third = world.arrive("a"), world.arrive("b"), world.arrive("a")
        world.arrive("c")
        assert (world.local("g0"), world.local("g1")) == ([first, third], [second])
        world.lose("g0")
        world.lose("g1")
        order = [entry.request.request_id for entry in world.scheduler.cluster.queue.in_order()]
        assert order == [first, second, third]

    def test_a_request_that_left_from_the_middle_returns_to_its_place(self):
        world = World("lalb", gpus=(1.0, 4.0, 1.0), models=["a", "b", model("large", 4.0)])
        world.arrive("a")
        world.serve("g0")
        world.arrive("large")
        world.arrive("a")
        large = world.arrive("large")  # waits for g1
        local = world.arrive("a")  # waits for g0, though g2 is idle
        assert world.local("g0") == [local]
        world.arrive("b")
        younger = world.arrive("b")
        world.lose("g0")
        order = [entry.request.request_id for entry in world.scheduler.cluster.queue.in_order()]
        assert order == [large, local, younger]

    def test_a_request_that_came_back_no_longer_counts_as_a_skip(self):
        world = World("lalb_o3", gpus=(1.0, 1.0), o3_limit=25)
        world.arrive("a")
        world.serve("g0")
        world.arrive("a")
        world.arrive("b")
        older = world.arrive("c")
        younger = world.arrive("a")
        world.finish("g0")
        assert world.running("g0") == (younger,)
        assert world.scheduler.cluster.queue.skips_of_head == 1
        world.lose("g1")
        world.lose("g0")
        world.join(1.0)
        world.drain()
        assert world.ends[older] is world.ends[younger] is End.ANSWERED

    def test_when_the_largest_is_lost_what_only_it_could_hold_ends(self):
        world = World("lb", gpus=(2.0, 8.0), models=["a", model("large", 4.0)])
        running, waiting = world.arrive("large"), world.arrive("large")
        world.arrive("a")
        world.lose("g1")
        assert world.ends[running] is world.ends[waiting] is RejectReason.TOO_LARGE
        assert world.ends[world.arrive("large")] is RejectReason.TOO_LARGE

    def test_a_retry_that_waits_for_a_large_gpu_ends_with_it(self):
        world = World("lb", gpus=(2.0, 8.0, 8.0), models=["a", model("large", 4.0)])
        retried = world.arrive("large")
        world.arrive("large")
        world.lose("g1")
        assert retried in world.open
        world.lose("g2")
        assert world.ends[retried] is RejectReason.TOO_LARGE

    def test_when_the_last_is_lost_requests_wait_for_the_next(self):
        world = World("lb")
        request_id = world.arrive("a")
        world.lose("g0")
        queued = world.arrive("b")
        world.join(2.0, gpu_id="g0")
        world.drain()
        assert world.ends[request_id] is world.ends[queued] is End.ANSWERED

    def test_unless_the_next_is_too_small(self):
        world = World("lb", gpus=(), models=[model("large", 4.0)])
        request_id = world.arrive("large")
        world.join(2.0)
        assert world.ends[request_id] is RejectReason.TOO_LARGE

    def test_a_gpu_that_joins_takes_from_the_queue_at_once(self):
        world = World("lb")
        world.arrive("a")
        world.arrive("b")
        world.join(2.0)
        assert world.doing("g1") == "loading b"

    def test_losing_what_is_not_there_changes_nothing(self):
        world = World("lb")
        world.lose("nobody's")
        assert world.log == []

    def test_joining_twice_is_a_bug(self):
        world = World("lb")
        with pytest.raises(InvariantError, match="g0 joined twice"):
            world.join(2.0, gpu_id="g0")

    def test_no_load_is_asked_of_a_lost_gpu(self):
        world = World("lb", gpus=(2.0, 2.0))
        world.lose("g0")
        for name in "abc":
            world.arrive(name)
        assert {action.gpu_id for action in world.log if isinstance(action, Load)} == {"g1"}
