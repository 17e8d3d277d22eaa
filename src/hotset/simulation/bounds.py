"""Two yardsticks no policy can beat on its own terms: no loads at all, and perfect foresight of arrivals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from heapq import heapreplace

import msgspec

from hotset.simulation.hardware import Hardware
from hotset.simulation.sketch import LatencySketch
from hotset.simulation.workloads import Arrival

_GAP_SCALE = 100.0
"""Gaps are kept to within about 1 %, rounded down: the bound stays a bound."""


class AllResident:
    """The ideal in which every model is on every GPU: one queue, first come first served, no loads."""

    def __init__(self, gpus: int) -> None:
        self._free_s = [0.0] * gpus
        self.latency = LatencySketch()

    def arrive(self, time_s: float, inference_s: float) -> None:
        free = self._free_s
        end_s = max(time_s, free[0]) + inference_s
        heapreplace(free, end_s)
        self.latency.add(end_s - time_s)
        self.latency.fold(at_least=8192)


class Clairvoyant:
    """Fewest misses of a cache as large as all GPU memories together that knows every arrival beforehand.

    With models of unequal size the exact optimum (Belady's) is NP-hard. This is the lower bound PFOO-L (Berger,
    Beckmann, Harchol-Balter, "Practical Bounds on Optimal Caching with Variable Object Sizes", SIGMETRICS 2018):
    keeping a model from one request to its next costs bytes x requests in between, and the cheapest intervals are kept
    until capacity x requests is used up. It serves requests in order of arrival; a policy that groups the requests of
    one model out of order may have fewer misses.

    Streaming: intervals are counted by model and length, so memory grows with the number of models.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._requests = 0
        self._last: dict[str, int] = {}
        self._gaps: dict[tuple[str, int], int] = {}

    def arrive(self, function: str) -> None:
        now = self._requests
        self._requests = now + 1
        last = self._last.get(function)
        self._last[function] = now
        if last is not None:
            gap = now - last
            key = (function, gap if gap < _GAP_SCALE else -int(math.log(gap) * _GAP_SCALE))
            self._gaps[key] = self._gaps.get(key, 0) + 1

    def misses(self, memory_bytes: Mapping[str, int]) -> int:
        """The bound for these model sizes."""
        costs = sorted(
            (memory_bytes[function] * (gap if gap > 0 else math.exp(-gap / _GAP_SCALE)), count)
            for (function, gap), count in self._gaps.items()
        )
        budget = float(self._capacity_bytes) * self._requests
        hits = 0
        for cost, count in costs:
            kept = min(count, int(budget / cost))
            hits += kept
            budget -= kept * cost
            if kept < count:
                break
        return self._requests - hits


class Yardsticks(msgspec.Struct, frozen=True):
    """What no policy can beat on one workload and cluster."""

    ideal_mean_latency_s: float
    """Mean latency were every model on every GPU."""
    clairvoyant_miss_ratio: float


def yardsticks(arrivals: Iterable[Arrival], hardware: Hardware) -> Yardsticks:
    """Both bounds in one pass over the arrivals; they do not depend on the policy."""
    ideal = AllResident(len(hardware.gpus))
    clairvoyant = Clairvoyant(sum(gpu.memory_bytes for gpu in hardware.gpus))
    costs, requests = hardware.costs, 0
    for arrival in arrivals:
        requests += 1
        recorded_s = arrival.inference_s
        ideal.arrive(arrival.time_s, costs[arrival.function].inference_s if recorded_s is None else recorded_s)
        clairvoyant.arrive(arrival.function)
    misses = clairvoyant.misses({name: cost.memory_bytes for name, cost in costs.items()})
    return Yardsticks(ideal.latency.mean, misses / max(requests, 1))
