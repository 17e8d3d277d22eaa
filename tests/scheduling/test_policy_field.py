"""The field's policies, each by the rule of its source. Loads take 4 s, runs 1 s, a GPU of 2 GiB holds two models."""

from __future__ import annotations

from scheduling_world import End, World, model

from hotset.scheduling.actions import Load
from hotset.scheduling.policies import PolicySettings, make_policy
from hotset.scheduling.policies.mqfq_sticky import MqfqSticky


def loads(world: World) -> list[tuple[str, str]]:
    return [(action.gpu_id, action.model) for action in world.log if isinstance(action, Load)]


class TestMqfqSticky:
    def test_the_least_served_function_is_next(self):
        world = World("mqfq_sticky", gpus=(1.0,))
        for name in "aaab":
            world.arrive(name)
        world.serve("g0")
        assert world.doing("g0") == "running a", "sticky: it needs no load"
        world.drain()
        assert not world.open

    def test_a_function_too_far_ahead_is_throttled(self):
        world = World("mqfq_sticky", gpus=(1.0,))
        world.scheduler.policy = MqfqSticky(PolicySettings(overrun_s=2.0))
        for _ in range(9):
            world.arrive("a")
        world.arrive("b")
        served = 0
        world.wait(4.0)
        world.loaded("g0")
        while world.doing("g0") == "running a":
            world.finish("g0")
            served += 1
        assert world.doing("g0") == "loading b"
        assert served <= 5
        world.drain()
        assert not world.open

    def test_of_two_that_need_a_load_the_less_served_goes_first(self):
        world = World("mqfq_sticky", gpus=(1.0,), models=("a", "b", "c"))
        for name in "aab":
            world.arrive(name)
        world.serve("g0")
        world.serve("g0")
        assert world.doing("g0") == "loading b"
        world.arrive("a")
        world.arrive("c")
        world.serve("g0")
        assert world.doing("g0") == "loading c", "a has had two runs, c none"

    def test_an_account_is_kept_for_a_while_and_then_closed(self):
        world = World("mqfq_sticky", gpus=(2.0,))
        policy = world.scheduler.policy
        assert isinstance(policy, MqfqSticky)
        world.arrive("a")
        world.serve("g0")
        world.arrive("b")
        world.serve("g0")
        for _ in range(3):
            world.arrive("b")
            world.serve("g0")
        assert set(policy._flows) == {"b"}

    def test_what_fits_on_no_idle_gpu_waits(self):
        world = World("mqfq_sticky", gpus=(1.0, 3.0), models=(model("large", 3.0), model("a")))
        world.arrive("large")
        second = world.arrive("large")
        assert world.doing("g0") == "idle"
        world.arrive("a")
        assert world.doing("g0") == "loading a"
        world.drain()
        assert world.ends[second] is End.ANSWERED

    def test_nothing_waits_nothing_happens(self):
        world = World("mqfq_sticky")
        assert make_policy("mqfq_sticky").next_placement(world.scheduler.cluster, 0.0) is None


class TestPow2Multiplex:
    def test_a_holder_takes_the_request(self):
        world = World("pow2_multiplex", gpus=(2.0, 2.0, 2.0))
        world.arrive("a")
        holder = loads(world)[0][0]
        world.serve(holder)
        world.arrive("a")
        assert world.doing(holder) == "running a"

    def test_it_waits_in_the_queue_of_a_busy_holder(self):
        world = World("pow2_multiplex", gpus=(2.0, 2.0, 2.0))
        world.arrive("a")
        holder = loads(world)[0][0]
        world.serve(holder)
        world.arrive("a")
        waits = world.arrive("a")
        assert world.local(holder) == [waits]

    def test_it_leaves_holders_that_have_too_much_to_do(self):
        world = World("pow2_multiplex", gpus=(2.0,) * 6)
        for _ in range(12):
            world.arrive("a")
        assert len({gpu_id for gpu_id, _ in loads(world)}) > 1
        world.drain()
        assert not world.open

    def test_one_that_fits_nowhere_yet_is_passed_by(self):
        world = World("pow2_multiplex", gpus=(4.0, 1.0), models=(model("large", 4.0), model("a")))
        first = world.arrive("large")
        assert loads(world) == [("g0", "large")]
        small = world.arrive("a")
        world.drain()
        assert world.ends[first] is world.ends[small] is End.ANSWERED

    def test_there_is_nothing_to_decide_without_an_idle_gpu(self):
        world = World("pow2_multiplex", gpus=(1.0,))
        world.arrive("a")
        world.arrive("b")
        policy = make_policy("pow2_multiplex")
        assert policy.next_placement(world.scheduler.cluster, 0.0) is None
