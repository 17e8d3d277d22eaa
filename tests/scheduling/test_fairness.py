"""Fair shares between callers, priorities, and places in a full queue. Loads take 4 s, runs 1 s."""

from __future__ import annotations

from collections import Counter

import pytest
from scheduling_world import End, World, model

from hotset.scheduling import fairness, standing
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.fairness import CREDIT, FairShares, Usage
from hotset.scheduling.queue import Entry, Share
from hotset.vocabulary import RejectReason, Request


def hot(policy: str = "lb", models: str = "a", **options: object) -> World:
    """One GPU that holds these models, idle."""
    world = World(policy, models=tuple(models), gpus=(float(len(models)),), **options)  # type: ignore[arg-type]
    for name in models:
        world.arrive(name, caller="flood")
        world.serve("g0")
    return world


def served(world: World, ids: list[int]) -> list[int]:
    return [request_id for request_id in ids if world.ends.get(request_id) is End.ANSWERED]


def usage(world: World, caller: str) -> Usage:
    return world.scheduler.cluster.queues.usage[caller]


ARRIVALS = {"flood": 200, "second": 60}


class TestShares:
    @pytest.mark.parametrize("policy", ["lb", "lalb", "lalb_o3", "hotset", "mqfq_sticky", "pow2_multiplex"])
    def test_a_caller_within_his_share_does_not_wait_behind_a_flood(self, policy: str):
        world = hot(policy)
        for _ in range(50):
            world.arrive("a", caller="flood")
        quiet = world.arrive("a", caller="quiet")
        world.finish("g0")
        world.finish("g0")
        assert world.ends[quiet] is End.ANSWERED

    def test_not_even_behind_hits_with_a_model_that_must_be_loaded(self):
        world = World("hotset", eviction="hotset", models=("a", "b"), gpus=(1.0,))
        for _ in range(50):
            world.arrive("a", caller="flood")
        world.serve("g0")
        world.arrive("b", caller="quiet")
        world.finish("g0")
        assert world.doing("g0") == "loading b"

    def test_two_floods_share_alike(self):
        world = hot()
        ids = {caller: [world.arrive("a", caller=caller) for _ in range(count)] for caller, count in ARRIVALS.items()}
        for _ in range(60):
            world.finish("g0")
        first, second = (len(served(world, ids[caller])) for caller in ARRIVALS)
        assert first + second == 60
        assert abs(first - second) <= 10, "but for what the second was behind, and the slack"

    def test_a_weight_is_a_share(self):
        world = hot()
        ids = {
            caller: [world.arrive("a", caller=caller, weight=weight) for _ in range(200)]
            for caller, weight in (("light", 1.0), ("heavy", 3.0))
        }
        for _ in range(120):
            world.finish("g0")
        assert 2.2 <= len(served(world, ids["heavy"])) / len(served(world, ids["light"])) <= 4.0

    def test_what_the_others_leave_is_everybodys(self):
        world = hot()
        flood = [world.arrive("a", caller="flood") for _ in range(20)]
        world.arrive("a", caller="quiet")
        world.drain()
        assert served(world, flood) == flood

    def test_a_load_is_on_the_account_of_who_caused_it(self):
        world = World("lb", models=("a", "b"), gpus=(2.0,))
        world.arrive("a", caller="one")
        world.arrive("a", caller="two")
        world.wait(4.0)
        world.loaded("g0", load_s=4.0)
        world.finish("g0", inference_s=1.0)
        world.finish("g0", inference_s=2.0)
        assert (usage(world, "one").load_s, usage(world, "one").run_s) == (4.0, 1.0)
        assert (usage(world, "two").load_s, usage(world, "two").run_s) == (0.0, 2.0)
        shares = world.scheduler.cluster.queues._shares[0]
        spent = {caller: account.spent_s for caller, account in shares.accounts.items()}
        assert spent["one"] > spent["two"]

    def test_a_run_that_is_shared_is_paid_for_in_parts(self):
        world = World("lb", models=("a",), gpus=(1.0,), config=SchedulerConfig(burst_s=10.0))
        world.arrive("a", caller="one")
        world.arrive("a", caller="two")
        world.arrive("a", caller="two")
        world.loaded("g0")
        world.finish("g0", inference_s=3.0)
        assert (usage(world, "one").run_s, usage(world, "two").run_s) == (1.0, 2.0)

    def test_a_caller_who_cancels_a_flood_has_gained_nothing(self):
        world = hot()
        for _ in range(5):
            world.arrive("a", caller="flood")
        taken_back = [world.arrive("a", caller="flood") for _ in range(40)]
        quiet = world.arrive("a", caller="quiet")
        for request_id in taken_back:
            world.cancel(request_id)
        world.finish("g0")
        world.finish("g0")
        assert world.ends[quiet] is End.ANSWERED

    def test_nobody_is_behind_by_more_than_the_credit(self):
        shares = FairShares(lambda: 10.0)
        flood = shares.open(Request(request_id=1, model="a", arrival_s=0.0, caller="flood"), Usage())
        quiet = shares.open(Request(request_id=2, model="a", arrival_s=0.0, caller="quiet"), Usage())
        assert quiet.spent_s == -10 * CREDIT
        shares.charge(flood, 1000.0)
        assert shares.most_s == flood.spent_s == 1000.0
        assert shares.is_behind(quiet)
        assert not shares.is_behind(flood)
        shares.charge(quiet, 1.0)
        assert quiet.spent_s == 1000.0 - 10 * CREDIT + 1.0

    def test_work_is_paid_for_when_it_begins_and_what_was_too_much_is_given_back(self):
        shares = FairShares(lambda: 10.0)
        request = Request(request_id=1, model="a", arrival_s=0.0, caller="flood")
        entry, account = Entry(request, "a"), shares.open(request, Usage())
        shares.begin(entry, account, 5.0)
        assert account.spent_s == 5.0
        shares.settle(entry, account, 2.0)
        assert account.spent_s == 5.0, "it was paid for already"
        shares.ended(entry, account)
        assert account.spent_s == 2.0

    def test_who_pushes_out_a_model_pays_for_its_way_back(self):
        world = World("lb", models=("a", "b"), gpus=(1.0,))
        for name, caller in (("a", "quiet"), ("b", "flood"), ("a", "quiet")):
            world.arrive(name, caller=caller)
            world.wait(4.0)
            world.loaded("g0", load_s=4.0)
            world.finish("g0", inference_s=1.0)
        assert (usage(world, "quiet").load_s, usage(world, "flood").load_s) == (4.0, 8.0)

    def test_who_waits_for_little_crowds_nobody_whatever_he_has_had(self):
        world = hot()
        for _ in range(50):
            world.arrive("a", caller="flood")
        quiet = world.arrive("a", caller="quiet")
        shares = world.scheduler.cluster.queues._shares[0]
        shares.charge(shares.accounts["quiet"], 500.0)
        assert not shares.is_behind(shares.accounts["quiet"])
        world.finish("g0")
        world.finish("g0")
        assert world.ends[quiet] is End.ANSWERED

    def test_a_caller_is_within_his_share_again_once_half_of_a_part_waits(self):
        world = hot()
        world.arrive("a", caller="other")
        flood = [world.arrive("a", caller="flood") for _ in range(20)]
        account = world.scheduler.cluster.queues._shares[0].accounts["flood"]
        assert account.beyond
        for _ in range(3):
            world.finish("g0")
        assert account.beyond
        for _ in range(15):
            world.finish("g0")
        assert not account.beyond
        assert not any(entry.share for entry in account.waiting)
        world.drain()
        assert served(world, flood) == flood

    def test_who_is_beyond_stays_so_where_a_gpu_gives_back_what_waited_for_it(self):
        world = World("lalb", models=("a", "b"), gpus=(1.0, 1.0))
        for name in "ab":
            world.arrive(name, caller="quiet")
        world.drain()
        for _ in range(60):
            world.arrive("a", caller="flood")
        local = [entry for gpu in world.scheduler.cluster.gpus.values() for entry in gpu.local_queue]
        assert local
        account = local[0].account
        assert account is not None
        waited_s = account.waiting_s
        world.lose(local[0].gpu_id)
        assert account.beyond
        assert account.waiting_s >= waited_s
        world.drain()

    def test_where_many_are_beyond_they_take_turns_in_being_looked_at(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(fairness, "MOST_LOOKED_AT", 2)
        world = hot()
        ids = {caller: [world.arrive("a", caller=caller) for _ in range(25)] for caller in ("one", "two", "three")}
        assert len(world.scheduler.cluster.queues._shares[0].beyond()) == 2
        for _ in range(24):
            world.finish("g0")
        assert all(len(served(world, own)) >= 6 for own in ids.values())

    def test_a_flood_does_not_make_the_runs_of_others_longer(self):
        world = World("hotset", eviction="hotset", models=(model("a", max_batch=8),), gpus=(1.0,))
        world.arrive("a", caller="flood")
        world.drain()
        for _ in range(30):
            world.arrive("a", caller="flood")
        quiet = [world.arrive("a", caller="quiet") for _ in range(2)]
        world.finish("g0")
        assert world.running("g0") == tuple(quiet), "those within their share run together, and nobody else"
        world.finish("g0")
        assert len(world.running("g0")) == 8

    def test_silent_callers_are_forgotten_once_they_are_as_good_as_new(self):
        world = hot()
        world.arrive("a", caller="flood")
        world.arrive("a", caller="quiet")
        world.drain()
        shares = world.scheduler.cluster.queues._shares[0]
        assert shares.contended
        for _ in range(30):
            world.arrive("a", caller="flood")
        world.drain()
        assert list(shares.accounts) == ["flood"]
        assert not shares.contended
        assert not shares.beyond()
        for _ in range(20):
            world.arrive("a", caller="flood")
        back = world.arrive("a", caller="quiet")
        world.finish("g0")
        world.finish("g0")
        assert world.ends[back] is End.ANSWERED

    def test_memory_does_not_grow_with_callers(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(fairness, "MOST_IDLE", 3)
        monkeypatch.setattr(standing, "MOST_CALLERS", 4)
        world = hot()
        for number in range(10):
            world.arrive("a", caller=f"caller {number}")
            world.finish("g0", inference_s=0.0)
        queues = world.scheduler.cluster.queues
        assert len(queues._shares[0].accounts) <= 4
        assert list(queues.usage) == ["flood", "caller 0", "caller 1", "caller 2", standing.OTHERS]
        assert queues.usage[standing.OTHERS].requests == 7

    def test_without_a_gpu_everybody_waits_for_one(self):
        world = World("lb", gpus=(), models=("a",))
        ids = [world.arrive("a", caller=caller) for caller in ("one", "two", "one", "two")]
        world.join(1.0)
        world.serve("g0")
        world.finish("g0", inference_s=20.0)
        world.lose("g0")
        ids.append(world.arrive("a", caller="two"))
        world.join(1.0)
        world.drain()
        assert served(world, ids) == ids


class TestMemory:
    """A flood has its share of the GPUs' memory too: its backlog is no claim on more."""

    def test_below_a_crowd_nobody_is_preferred(self):
        world = hot()
        for _ in range(3):
            world.arrive("a", caller="flood")
        quiet = world.arrive("a", caller="quiet")
        world.finish("g0")
        world.finish("g0")
        assert quiet in world.open, "in order of arrival: everybody's turn is near"

    def test_who_is_within_his_share_may_take_the_place_of_a_model_that_only_a_flood_waits_for(self):
        world = World("hotset", eviction="hotset", models=("a", "b", "c"), gpus=(2.0,))
        for _ in range(30):
            world.arrive("b", caller="quiet")
        world.drain()
        for _ in range(20):
            world.arrive("a", caller="flood")
        world.serve("g0")
        assert sorted(world.resident("g0")) == ["a", "b"]
        world.arrive("c", caller="quiet")
        while "c" not in world.resident("g0"):
            world.serve("g0")
        assert "b" in world.resident("g0"), "20 wait for a, nobody for b, but they wait beyond their share"

    @pytest.mark.parametrize("waited_s", [0.0, 100.0])
    def test_a_load_beyond_a_share_does_not_push_out_what_others_ask_for(self, waited_s: float):
        world = World("hotset", eviction="hotset", models=("a", "b", "z"), gpus=(1.0, 1.0))
        for _ in range(10):
            for name, caller in (("a", "flood"), ("b", "flood"), ("a", "quiet"), ("b", "flood")):
                world.arrive(name, caller=caller)
            world.drain()
        assert (world.resident("g0"), world.resident("g1")) == (["a"], ["b"])
        busy = [world.arrive(name, caller="quiet") for name in "ab"]
        for _ in range(40):
            world.arrive("z", caller="flood")
        world.wait(waited_s)
        world.finish("g0", inference_s=1.0)
        assert world.ends[busy[0]] is End.ANSWERED
        assert (world.doing("g0"), world.resident("g0")) == ("idle", ["a"])
        world.finish("g1")
        assert "loading z" in (world.doing("g0"), world.doing("g1")), "one at a time, lest all stand still"
        world.drain()
        assert not world.open

    def test_nothing_is_loaded_ahead_for_a_flood(self):
        config = SchedulerConfig(overlap=True)
        world = World("hotset", eviction="hotset", models=("a", "b", "z"), gpus=(2.0,), config=config)
        world.arrive("a", caller="quiet")
        world.drain()
        world.arrive("a", caller="quiet")
        for _ in range(20):
            world.arrive("a", caller="flood")
        before = world.scheduler.prefetches
        world.arrive("z", caller="flood")
        assert world.scheduler.prefetches == before, "it is beyond his share"
        world.arrive("b", caller="another")
        assert world.scheduler.prefetches == before + 1

    def test_what_a_flood_asks_for_beyond_its_share_is_not_expected_of_it_again(self):
        world = hot("hotset", "ab")
        rates, now_s = world.scheduler.cluster.rates, world.now_s
        world.arrive("b", caller="quiet")
        for _ in range(80):
            world.arrive("a", caller="flood")
        counted = rates.per_s("a", now_s) / rates.per_s("b", now_s)
        assert counted < 6, "those before there was a crowd"


class TestPriorities:
    def test_the_higher_goes_first(self):
        world = hot()
        world.arrive("a")
        order = [world.arrive("a", priority=priority) for priority in (-1, 0, 2, 1)]
        ended = []
        while world.open:
            world.finish("g0")
            ended += [request_id for request_id in order if request_id in world.ends and request_id not in ended]
        assert [order.index(request_id) for request_id in ended] == [2, 3, 1, 0]

    def test_a_low_one_is_passed_over_so_many_times_and_no_more(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(standing, "MOST_PASSED", 4)
        world = hot()
        for _ in range(20):
            world.arrive("a", priority=1)
        low = [world.arrive("a", priority=-1) for _ in range(3)]
        for _ in range(16):
            world.finish("g0")
        assert served(world, low) == low[:3]
        world.drain()

    def test_shares_are_told_apart_within_a_priority(self):
        world = hot()
        for _ in range(20):
            world.arrive("a", caller="flood", priority=1)
        quiet = world.arrive("a", caller="quiet", priority=1)
        low = world.arrive("a", caller="quiet")
        world.finish("g0")
        world.finish("g0")
        assert world.ends[quiet] is End.ANSWERED
        assert low in world.open

    def test_who_is_within_his_share_goes_before_whose_deadline_presses(self):
        world = hot()
        for _ in range(15):
            world.arrive("a", caller="flood")
        pressed = [world.arrive("a", caller="flood", patience_s=3.5) for _ in range(2)]
        world.wait(2.0)
        quiet = world.arrive("a", caller="quiet")
        world.finish("g0")
        world.finish("g0")
        assert world.ends[quiet] is End.ANSWERED
        assert pressed[0] in world.open
        assert world.running("g0") == (pressed[0],), "and then those that press"


class TestFullQueue:
    def full(self, priority: int = 0) -> tuple[World, list[int]]:
        world = hot(config=SchedulerConfig(max_queue=3))
        return world, [world.arrive("a", caller="flood", priority=priority) for _ in range(4)]

    def test_a_flood_makes_place_for_others(self):
        world, flood = self.full()
        quiet = world.arrive("a", caller="quiet")
        assert quiet in world.open
        assert world.ends == {1: End.ANSWERED, flood[-1]: RejectReason.QUEUE_FULL}
        assert world.rejects[flood[-1]].retry_after_s == 3.0

    def test_but_not_for_its_own(self):
        world, flood = self.full()
        assert world.ends[world.arrive("a", caller="flood")] is RejectReason.QUEUE_FULL
        assert set(flood) <= set(world.open)

    def test_places_are_shared_until_everybody_has_as_many(self):
        world, flood = self.full()
        ids = [world.arrive("a", caller="quiet") for _ in range(6)]
        ends = Counter(world.ends[request_id] for request_id in (*flood, *ids) if request_id in world.ends)
        assert ends == {RejectReason.QUEUE_FULL: 6}
        assert len([request_id for request_id in ids if request_id in world.open]) >= 2

    def test_a_place_that_was_given_up_already_is_not_taken(self):
        world, flood = self.full()
        world.arrive("a", caller="quiet")
        world.cancel(flood[2])
        world.arrive("a", caller="quiet")
        assert world.arrive("a", caller="third") in world.open
        assert world.ends[flood[1]] is RejectReason.QUEUE_FULL

    def test_a_lower_priority_makes_place_for_a_higher_one(self):
        world, flood = self.full(priority=-1)
        assert world.arrive("a", caller="flood") in world.open
        assert world.ends[flood[-1]] is RejectReason.QUEUE_FULL

    def test_a_higher_priority_makes_none_for_a_lower_one(self):
        world, _ = self.full()
        assert world.ends[world.arrive("a", caller="quiet", priority=-1)] is RejectReason.QUEUE_FULL


class TestFullLine:
    """Of one model's queue, where that is bounded."""

    def full(self, priority: int = 0) -> tuple[World, list[int]]:
        world = hot(models="ab", config=SchedulerConfig(max_queue_per_model=3))
        world.arrive("b", caller="flood")
        flood = [world.arrive("a", caller="flood", priority=priority) for _ in range(3)]
        for _ in range(3):
            world.arrive("b", caller="flood", priority=priority)
        return world, flood

    def test_a_flood_makes_place_in_the_line_that_is_full(self):
        world, flood = self.full()
        quiet = world.arrive("a", caller="quiet")
        assert quiet in world.open
        assert world.ends[flood[-1]] is RejectReason.QUEUE_FULL
        assert world.scheduler.cluster.queues.waiting_for("a") == 3

    def test_places_are_shared_until_everybody_has_as_many(self):
        world, flood = self.full()
        ids = [world.arrive("a", caller="quiet") for _ in range(4)]
        assert [request_id in world.open for request_id in ids] == [True, False, False, False]
        assert sum(request_id in world.open for request_id in flood) == 2

    def test_but_not_for_its_own(self):
        world, flood = self.full()
        assert world.ends[world.arrive("a", caller="flood")] is RejectReason.QUEUE_FULL
        assert set(flood) <= set(world.open)

    def test_a_lower_priority_makes_place_for_a_higher_one(self):
        world, flood = self.full(priority=-1)
        assert world.arrive("a", caller="flood") in world.open
        assert world.ends[flood[-1]] is RejectReason.QUEUE_FULL

    def test_a_higher_priority_makes_none_for_a_lower_one(self):
        world, flood = self.full(priority=1)
        assert world.ends[world.arrive("a", caller="quiet")] is RejectReason.QUEUE_FULL
        assert set(flood) <= set(world.open)


def test_calls_that_come_back_from_a_lost_gpu_stand_as_they_did():
    world = World("lalb", gpus=(1.0, 1.0))
    world.arrive("a", caller="x")
    world.serve("g0")
    world.arrive("a", caller="x")
    world.arrive("a", caller="y")
    assert len(world.local("g0")) == 1
    world.lose("g0")
    (queue,) = [queue for queue in world.scheduler.cluster.queues.all if queue.waiting]
    assert queue.standing.share is Share.WITHIN
    world.drain()
    assert set(world.ends.values()) == {End.ANSWERED}
