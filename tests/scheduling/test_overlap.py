"""Two lanes a GPU: loads while it computes, some of them ahead. Loads take 4 s, runs 1 s, a GPU holds two models."""

from __future__ import annotations

import pytest
from scheduling_world import GIB, End, World, model

from hotset.scheduling import holders
from hotset.scheduling.actions import Action, Load, Restore, Run, Unload
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.policies import POLICIES
from hotset.scheduling.policies.interface import Rule
from hotset.vocabulary import FailureKind, RejectReason


def lanes(
    policy: str = "lalb_o3", *, gpus: tuple[float, ...] = (2.0,), host_gib: float = 0.0, **others: object
) -> World:
    config = SchedulerConfig(overlap=True, host_memory_bytes=int(host_gib * GIB), journal_capacity=100)
    return World(policy, gpus=gpus, config=config, **others)  # type: ignore[arg-type]


def hot(world: World, names: str) -> World:
    for name in names:
        world.arrive(name)
        world.drain()
    return world


def kinds(world: World) -> list[tuple[type[Action], str]]:
    return [(type(action), action.model) for action in world.log if isinstance(action, Load | Restore | Run | Unload)]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_gpu_runs_what_it_holds_while_it_loads_for_another(policy: str):
    world = hot(lanes(policy), "a")
    miss = world.arrive("b")
    assert world.doing("g0") == "loading b"
    hit = world.arrive("a")
    assert world.running("g0") == (hit,), "the load goes on meanwhile"
    assert world.doing("g0") == "running a, loading b"
    world.loaded("g0")
    assert world.doing("g0") == "running a"
    world.finish("g0")
    assert world.running("g0") == (miss,)
    world.finish("g0")
    assert world.ends[miss] is world.ends[hit] is End.ANSWERED


def test_a_miss_is_a_miss_though_its_load_had_a_lane_of_its_own():
    world = lanes()
    world.arrive("a")
    world.loaded("g0")
    (run,) = world.actions(Run)
    assert isinstance(run, Run)
    assert not run.hit
    world.finish("g0")
    world.arrive("a")
    assert world.actions(Run)[-1].hit  # type: ignore[attr-defined]


class TestAhead:
    @pytest.mark.parametrize("policy", POLICIES)
    def test_the_model_of_a_waiting_request_is_loaded_while_the_gpu_computes(self, policy: str):
        world = hot(lanes(policy), "a")
        world.arrive("a")
        waiting = world.arrive("b")
        assert world.doing("g0") == "running a, loading b"
        assert world.scheduler.prefetches == 1
        assert world.scheduler.cluster.queue.waiting == 1, "bound to no GPU yet"
        world.loaded("g0")
        world.finish("g0")
        assert world.running("g0") == (waiting,)
        assert world.actions(Run)[-1].hit  # type: ignore[attr-defined]
        explanation = world.scheduler.journal.explain(waiting)
        assert explanation is not None
        assert explanation.decisions[0].rule is Rule.AHEAD

    def test_a_load_in_flight_is_shared_by_all_that_wait_for_it(self):
        world = hot(lanes(), "a")
        world.arrive("a")
        for _ in range(3):
            world.arrive("b")
        world.drain()
        assert kinds(world).count((Load, "b")) == 1
        assert not world.open

    def test_the_gpu_that_is_free_first_takes_it(self):
        world = lanes(gpus=(1.0, 2.0, 2.0), models=["a", "b", model("long", inference_s=9.0), "d"])
        for name in ("a", "long", "b"):
            world.arrive(name)
        for gpu_id in ("g1", "g2", "g0"):
            world.wait(1.0)
            world.loaded(gpu_id)
        world.arrive("d")
        assert [world.doing(gpu_id) for gpu_id in world.devices] == [
            "running a",
            "running long",
            "running b, loading d",
        ]

    def test_where_it_is_warm_comes_first(self):
        world = hot(lanes(gpus=(2.0, 2.0), host_gib=8.0, policy="lb"), "")
        for name in "abcd":
            world.arrive(name)
            world.drain()
        world.add(model("e"))
        world.arrive("e")
        world.drain()
        (warm_on,) = world.scheduler.cache.parked_on("a")
        for name in "bc" if warm_on == "g0" else "cb":
            world.arrive(name)
        for device in list(world.devices.values()):
            if device.loading is not None:
                world.loaded(device.gpu.gpu_id)
        world.drain()
        assert not world.open

    def test_nothing_that_is_waited_for_leaves_for_it(self):
        world = hot(lanes("lb", gpus=(2.0,)), "ab")
        world.arrive("a")
        world.arrive("b")
        world.arrive("c")
        assert world.doing("g0") == "running a", "b is about to run"
        world.drain()
        assert not world.open

    def test_a_model_too_large_for_a_gpu_is_not_loaded_ahead_there(self):
        world = lanes(gpus=(1.0, 4.0), models=["a", model("b", 3.0), "c"])
        world.arrive("a")
        world.arrive("c")
        for gpu_id in world.devices:
            world.loaded(gpu_id)
        world.arrive("b")
        assert [world.doing("g0"), world.doing("g1")] == ["running a", "running c, loading b"]
        world.drain()
        assert not world.open

    def test_one_that_was_never_used_is_counted_and_no_more_are_loaded_before(self):
        world = hot(lanes(gpus=(2.0,)), "a")
        world.arrive("a")
        fickle = world.arrive("b")
        world.loaded("g0")
        world.cancel(fickle)
        assert world.resident("g0") == ["a", "b"]
        waiting = world.arrive("c")
        assert world.doing("g0") == "running a", "b was loaded ahead and has not been used"
        world.finish("g0")
        world.drain()
        assert world.ends[waiting] is End.ANSWERED
        for name in "cd":
            world.arrive(name)
            world.drain()
        assert world.scheduler.cache.useless_prefetches == 1

    def test_a_policy_that_has_a_gpu_to_choose_is_left_its_choice(self):
        world = hot(lanes(gpus=(2.0, 2.0)), "a")
        world.arrive("a")
        world.arrive("b")
        assert world.scheduler.prefetches == 0


class TestTheLane:
    def test_what_a_gpu_loads_already_is_not_loaded_elsewhere(self):
        world = lanes("lalb", gpus=(2.0, 2.0))
        world.arrive("a")
        assert world.doing("g0") == "loading a"
        world.wait(2.0)
        world.arrive("a")
        assert world.local("g0") == [1, 2]
        assert len(world.actions(Load)) == 1

    def test_lb_waits_for_no_lane_it_can_do_without(self):
        world = lanes("lb", gpus=(2.0, 2.0))
        world.arrive("a")
        world.arrive("b")
        assert [world.doing("g0"), world.doing("g1")] == ["loading a", "loading b"]
        third = world.arrive("c")
        assert world.scheduler.cluster.queue.waiting == 1, "both lanes are taken"
        world.loaded("g0")
        world.drain()
        assert world.ends[third] is End.ANSWERED

    def test_the_local_queue_starts_what_can_be_started(self):
        world = hot(lanes("lalb", gpus=(2.0,)), "a")
        world.arrive("b")
        assert world.local("g0") == [2]
        world.arrive("a")
        world.arrive("a")
        world.finish("g0")
        assert world.doing("g0") == "running a, loading b"
        world.drain()
        assert not world.open

    def test_what_can_run_goes_before_what_must_be_loaded(self):
        world = lanes("lalb", gpus=(3.0, 3.0), models=["a", model("d", 2.0)])
        hot(world, "d")
        (holder,) = world.scheduler.cache.holders("d")
        world.arrive("a")
        world.drain()
        (other,) = set(world.devices) - {holder}
        world.lose(other)
        world.arrive("a")
        world.drain()
        world.join(3.0)
        running = world.arrive("a")
        late = [world.arrive("d"), world.arrive("a")]
        assert world.running(holder) == (running,)
        assert world.local(holder) == late
        world.process_dies(holder, "d")
        world.add(model("d", 2.5))
        world.finish(holder)
        assert world.doing(holder) == "running a", "though d was before it"
        world.finish(holder)
        assert world.doing(holder) == "loading d"
        world.drain()
        assert not world.open

    def test_a_gpu_whose_lane_is_taken_has_no_room_for_more(self):
        world = lanes(gpus=(4.0,))
        world.arrive("a")
        assert world.scheduler.cache.choose_victims(world.scheduler.cache.memory("g0"), GIB, 0.0) is None

    def test_a_request_that_expires_leaves_its_load_behind(self):
        world = lanes()
        late = world.arrive("a", patience_s=1.0)
        world.wait(2.0)
        assert world.ends[late] is RejectReason.HOPELESS
        world.loaded("g0")
        assert world.doing("g0") == "idle"
        assert world.resident("g0") == ["a"]

    def test_a_model_removed_while_it_is_loaded_is_unloaded(self):
        world = lanes()
        world.arrive("a")
        world.remove("a")
        world.loaded("g0")
        assert kinds(world)[-1] == (Unload, "a")
        assert "a" not in world.scheduler.cluster.models


class TestFailures:
    def test_a_load_that_fails_is_tried_on_another_gpu(self):
        world = lanes(gpus=(2.0, 2.0))
        request = world.arrive("a")
        world.load_fails("g0", FailureKind.CRASH)
        assert world.doing("g1") == "loading a"
        world.drain()
        assert world.ends[request] is End.ANSWERED

    def test_twice_is_an_error(self):
        world = lanes(gpus=(2.0, 2.0))
        request = world.arrive("a")
        world.load_fails("g0")
        world.load_fails("g1")
        assert world.ends[request] is RejectReason.FAILED

    def test_a_load_ahead_that_fails_harms_nobody_who_runs(self):
        world = hot(lanes(), "a")
        running = world.arrive("a")
        waiting = world.arrive("b")
        world.load_fails("g0")
        assert world.running("g0") == (running,)
        world.drain()
        assert world.ends[running] is world.ends[waiting] is End.ANSWERED

    def test_a_lost_gpus_requests_are_served_elsewhere(self):
        world = lanes(gpus=(2.0, 2.0))
        request = world.arrive("a")
        world.lose("g0")
        assert world.doing("g1") == "loading a"
        world.drain()
        assert world.ends[request] is End.ANSWERED

    def test_a_retry_waits_for_a_free_lane(self):
        world = hot(lanes(gpus=(2.0,)), "a")
        broken = world.arrive("a")
        world.arrive("b")
        world.run_fails("g0")
        assert world.doing("g0") == "loading b"
        world.loaded("g0")
        world.drain()
        assert world.ends[broken] is End.ANSWERED


def test_many_copies_are_found_with_lanes_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(holders, "MANY_COPIES", 0)
    world = lanes("lalb", gpus=(2.0, 2.0, 2.0))
    world.arrive("a")
    world.arrive("a")
    world.cancel(2)
    world.arrive("b")
    world.loaded("g0")
    world.drain()
    assert not world.open


def test_a_lost_gpu_is_no_holder_among_many(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(holders, "MANY_COPIES", 0)
    world = hot(World("lalb", gpus=(2.0, 2.0)), "aa")
    world.lose("g0")
    world.arrive("a")
    assert world.doing("g1") == "loading a"


def test_a_run_that_fails_too_late_is_not_tried_again():
    world = World(gpus=(2.0,))
    request = world.arrive("a", patience_s=5.0)
    world.loaded("g0")
    world.wait(6.0)
    world.run_fails("g0")
    assert world.ends[request] is RejectReason.DEADLINE


class TestFootholds:
    """With host memory: a busy model's next GPU, to be restored on ever after."""

    def world(self, host_gib: float = 8.0, calls: int = 8) -> World:
        """``a``, called so often, runs on g0; ``b`` on g1."""
        world = lanes(gpus=(2.0, 2.0), host_gib=host_gib)
        for name in "ab":
            world.arrive(name)
        for name in "ab" + calls * "a":
            world.drain()
            world.arrive(name)
        assert [world.doing("g0"), world.doing("g1")] == ["running a", "idle"]
        world.wait(1.0)
        return world

    def test_a_model_whose_holder_is_busy_is_brought_to_a_gpu_that_computes(self):
        world = self.world()
        world.arrive("b")
        assert [world.doing("g0"), world.doing("g1")] == ["running a", "running b, loading a"]
        assert world.scheduler.prefetches == 1
        world.drain()
        world.arrive("a")
        world.arrive("a")
        assert [world.doing("g0"), world.doing("g1")] == ["running a", "running a"]
        assert world.scheduler.cache.useless_prefetches == 0

    @pytest.mark.parametrize(("host_gib", "calls"), [(0.0, 8), (0.5, 8), (8.0, 1)])
    def test_not_without_room_to_park_it_nor_for_one_that_is_rarely_called(self, host_gib: float, calls: int):
        world = self.world(host_gib, calls)
        world.arrive("b")
        assert world.doing("g1") == "running b"

    def test_not_for_a_model_that_is_to_go(self):
        world = self.world()
        world.remove("a")
        world.arrive("b")
        assert world.doing("g1") == "running b"
