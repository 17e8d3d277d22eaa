"""The field's policies, each by the rule of its source. Loads take 4 s, runs 1 s, a GPU of 2 GiB holds two models."""

from __future__ import annotations

from random import Random

import pytest
from scheduling_world import End, World, model

from hotset.scheduling.actions import Load
from hotset.scheduling.cluster import Cluster
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.policies import PolicySettings, make_policy
from hotset.scheduling.policies.interface import Placement, Rule
from hotset.scheduling.policies.mqfq_sticky import FORGOTTEN_AT, MqfqSticky


def loads(world: World) -> list[tuple[str, str]]:
    return [(action.gpu_id, action.model) for action in world.log if isinstance(action, Load)]


class Compared(MqfqSticky):
    """Beside the ranking, the rule as it is stated: every flow is looked at for every decision."""

    def __init__(self, settings: PolicySettings) -> None:
        super().__init__(settings)
        self.starts_s: dict[str, float] = {}
        self.time_s = 0.0
        self.placed = 0

    def next_placement(self, cluster: Cluster, now_s: float) -> Placement | None:
        lines, starts_s, options = cluster.queue.models, self.starts_s, []
        if cluster.idle and lines:
            for name in lines:
                starts_s[name] = max(starts_s.get(name, 0.0), self.time_s)
            self.time_s = max(self.time_s, min(starts_s[name] for name in lines))
            for name, line in lines.items():
                holder = cluster.idle_holder(name)
                gpu = holder or cluster.first_idle(name)
                if gpu is not None and starts_s[name] - self.time_s <= self.overrun_s:
                    options.append((holder is None, starts_s[name], line[0].seq, gpu.gpu_id))
        placement = super().next_placement(cluster, now_s)
        if placement is None:
            assert not options
        else:
            entry, gpu = placement.entry, placement.gpu
            missing = placement.rule is Rule.FAIR_MISS
            assert (missing, starts_s[entry.model], entry.seq, gpu.gpu_id) == min(options)
            starts_s[entry.model] += cluster.inference_s(entry.model, gpu)
            self.placed += 1
        return placement


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

    def test_flows_with_which_the_others_have_caught_up_are_forgotten(self):
        names = [f"f{number}" for number in range(3 * FORGOTTEN_AT)]
        world = World("mqfq_sticky", gpus=(2.0,), models=names)
        policy = world.scheduler.policy
        assert isinstance(policy, MqfqSticky)
        for name in names:
            for _ in range(2):
                world.arrive(name)
                world.serve("g0")
        assert 0 < len(policy._flows) <= 2 * FORGOTTEN_AT
        assert names[-1] in policy._flows, "it is ahead of all others"

    @pytest.mark.parametrize("overlap", [False, True])
    def test_the_ranking_says_what_a_look_at_every_flow_says(self, overlap: bool):
        """Through GPUs that leave and join: with overlap, requests come back to their places in the queue."""
        random, names = Random(1), [f"f{number}" for number in range(12)]
        models = [model(name, random.choice((0.5, 1.0, 1.5))) for name in names]
        config = SchedulerConfig(overlap=overlap)
        world = World("mqfq_sticky", gpus=(2.0,) * 3, models=models, config=config)
        world.scheduler.policy = policy = Compared(PolicySettings(overrun_s=3.0))
        for step in range(2_000):
            if step % 40 == 39:
                world.lose(random.choice(list(world.devices)))
                world.join(2.0)
            elif random.random() < 0.6 and len(world.open) < 40:
                world.arrive(random.choice(names))
            else:
                gpu_id = random.choice(list(world.devices))
                if world.devices[gpu_id].loading is not None:
                    world.loaded(gpu_id)
                elif world.running(gpu_id):
                    world.finish(gpu_id)
        world.drain()
        assert not world.open
        assert policy.placed > 500

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
