"""Yardsticks: bounds must never be beaten, and are exact where exact answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.bounds import AllResident, Clairvoyant, yardsticks
from hotset.simulation.engine import Engine
from hotset.simulation.hardware import Hardware, ModelCost, make_gpus
from hotset.simulation.workloads import Arrival

words = st.lists(st.sampled_from("abcde"), min_size=1, max_size=14)


def bound(requests: Sequence[str], capacity: int, sizes: dict[str, int]) -> int:
    clairvoyant = Clairvoyant(capacity)
    for request in requests:
        clairvoyant.arrive(request)
    return clairvoyant.misses(sizes)


def fewest_misses(requests: Sequence[str], capacity: int, sizes: dict[str, int]) -> int:
    """The optimum, by trying every choice of what to keep."""

    @cache
    def best(position: int, held: frozenset[str]) -> int:
        if position == len(requests):
            return 0
        request = requests[position]
        wanted = held | {request}
        after = [best(position + 1, kept) for kept in subsets(wanted) if sum(sizes[name] for name in kept) <= capacity]
        return (request not in held) + min(after)

    return best(0, frozenset())


def subsets(names: frozenset[str]) -> list[frozenset[str]]:
    found: list[frozenset[str]] = [frozenset()]
    for name in sorted(names):
        found += [subset | {name} for subset in found]
    return found


@given(requests=words, capacity=st.integers(1, 6), sizes=st.lists(st.integers(1, 3), min_size=5, max_size=5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_clairvoyant_bound_is_never_above_the_optimum(requests: list[str], capacity: int, sizes: list[int]):
    size_of = dict(zip("abcde", sizes, strict=True))
    misses = bound(requests, capacity, size_of)
    assert len(set(requests)) <= misses <= fewest_misses(tuple(requests), capacity, size_of)


def test_with_room_for_all_only_first_requests_miss():
    assert bound("abcabcabc", 3, dict.fromkeys("abc", 1)) == 3


def test_with_room_for_one_only_repetitions_hit():
    assert bound("aabbcc", 1, dict.fromkeys("abc", 1)) == 3


def test_long_gaps_are_rounded_down_so_that_the_bound_stays_one():
    requests = ["a", *(f"b{number}" for number in range(998)), "a"]
    sizes = dict.fromkeys(requests, 1)
    assert bound(requests, 1, sizes) == len(requests) - 1, "keeping a for 999 requests fits 1000 byte-requests"


def test_all_resident_is_first_come_first_served_without_loads():
    ideal = AllResident(2)
    for time_s, inference_s in ((0.0, 3.0), (0.0, 1.0), (0.5, 1.0), (9.0, 1.0)):
        ideal.arrive(time_s, inference_s)
    # The third starts at 1 s on the second GPU; the fourth finds both idle.
    assert ideal.latency.mean == pytest.approx((3.0 + 1.0 + 1.5 + 1.0) / 4)


def test_no_policy_beats_the_yardsticks():
    arrivals = [Arrival(index * 0.4, "abcdabac"[index % 8]) for index in range(400)]
    costs = {
        name: ModelCost(memory_bytes=size, load_s=2.0, inference_s=1.0)
        for name, size in zip("abcd", (1, 2, 2, 3), strict=True)
    }
    hardware = Hardware(gpus=make_gpus(3, 3), costs=costs)
    best = yardsticks(arrivals, hardware)
    for policy in ("lb", "lalb"):  # those that keep the order of arrival
        metrics = Engine(Scheduler(make_policy(policy), make_eviction("lru")), hardware).run(arrivals)
        assert metrics.mean_latency_s >= best.ideal_mean_latency_s
        assert metrics.miss_ratio >= best.clairvoyant_miss_ratio
    assert best.ideal_mean_latency_s == pytest.approx(1.0, rel=0.3)


def test_recorded_durations_count_in_the_ideal():
    hardware = Hardware(gpus=make_gpus(1, 1), costs={"a": ModelCost(memory_bytes=1, load_s=1.0, inference_s=1.0)})
    assert yardsticks([Arrival(0.0, "a", inference_s=7.0)], hardware).ideal_mean_latency_s == 7.0
    assert yardsticks([], hardware).clairvoyant_miss_ratio == 0.0
