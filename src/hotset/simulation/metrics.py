"""What a run is measured by. One recorder per run; memory grows with functions, not with requests."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import msgspec

from hotset.simulation.sketch import LatencySketch


class RunMetrics(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The figures of one run (one policy, one seed), or their means over seeds. Times are seconds, ratios 0 to 1.

    A latency is completion minus arrival; every request counts, those too that finish after the last arrival.
    """

    requests: float
    """Arrivals."""
    completed: float
    """Those that ran to their end; the others were rejected."""
    mean_latency_s: float
    p50_latency_s: float
    """Percentiles are within 0.1 % (``LatencySketch``)."""
    p95_latency_s: float
    p99_latency_s: float
    latency_variance: float
    """Population variance, in seconds squared."""
    mean_queueing_s: float
    """Mean latency = queueing + load + inference. Queueing is all time in which nothing was done for the request."""
    mean_load_s: float
    """All load time (restores and offloads too) over all requests: a load delays the one request that caused it."""
    mean_inference_s: float
    throughput_per_s: float
    """Completed requests over the makespan."""
    miss_ratio: float
    """Loads and restores over requests."""
    false_miss_ratio: float
    """Loads of a model that another GPU held at that moment, over requests."""
    gpu_utilisation: float
    """Share of all GPUs' time spent on inference, loads not counted (the paper's SM utilisation)."""
    gpu_busy: float
    """The same with loads, restores and offloads counted; may exceed 1 where they overlap with inference."""
    evictions: float
    top_model_copies: float
    """GPUs that hold, or load, the model with most requests: mean over time."""
    fairness: float
    """The slowest function's mean latency over the mean latency of all requests; 1 is even."""
    makespan_s: float
    """Start to the last completion."""
    goodput_per_s: float
    """Requests that were answered within their deadline, over the makespan; without deadlines, the throughput."""
    deadline_misses: float
    """Requests that were answered too late, or rejected because no run could begin in time."""
    rejected: float
    """For whatever reason."""
    restores: float | None = None
    """Misses that only had to come back from host memory. This and what follows: None, and not in JSON, where there is
    no host memory for models and no overlap."""
    offloads: float | None = None
    """Models that left a GPU for host memory."""
    prefetches: float | None = None
    """Loads and restores that were started before a GPU was free for the request."""
    useless_prefetches: float | None = None
    """Those whose model left again without a run."""
    others_p99_latency_s: float | None = None
    """Of the requests of all callers but the busiest. This and what follows: None where there are not several."""
    jain_index: float | None = None
    """Jain's index of fairness, over the GPU seconds spent on each caller, loads included: 1 is the same for all, 1 /
    callers is all for one. Callers who ask for less than their share lower it too."""


class FunctionTally:
    """One function's share of a run."""

    __slots__ = ("copies", "copies_since_s", "copy_seconds", "latency_s", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.latency_s = 0.0
        self.copies = 0
        self.copies_since_s = 0.0
        self.copy_seconds = 0.0

    def change_copies(self, change: int, now_s: float) -> None:
        self.copy_seconds += self.copies * (now_s - self.copies_since_s)
        self.copies_since_s = now_s
        self.copies += change


class Recorder:
    """Collects one run's figures as it goes."""

    def __init__(self, functions: Mapping[str, object], gpus: int, *, tiers: bool = False) -> None:
        self.latency = LatencySketch()
        self.tallies = {name: FunctionTally() for name in functions}
        self.arrived = 0
        self.misses = 0
        self.false_misses = 0
        self.evictions = 0
        self.restores = 0
        self.offloads = 0
        self.prefetches = 0
        self.useless_prefetches = 0
        self.rejected = 0
        self.deadline_s = math.inf
        """Within which a request is to be answered."""
        self.expired = 0
        """Rejected because no run could begin in time."""
        self.late = 0
        """Answered after their deadline."""
        self.by_caller: dict[str, LatencySketch] = {}
        self.load_s = 0.0
        self.inference_s = 0.0
        self.run_s = 0.0
        self.last_end_s = 0.0
        self._gpus = gpus
        self._tiers = tiers
        """Whether there is anything to say of host memory and overlap."""

    def finished(self, function: str, latency_s: float, now_s: float) -> None:
        self.latency.add(latency_s)
        tally = self.tallies[function]
        tally.requests += 1
        tally.latency_s += latency_s
        self.late += latency_s > self.deadline_s
        self.last_end_s = now_s

    def finished_for(self, caller: str, latency_s: float) -> None:
        """The same request, on its caller's account."""
        latency = self.by_caller.get(caller)
        if latency is None:
            latency = self.by_caller[caller] = LatencySketch()
        latency.add(latency_s)

    def _others_p99_s(self) -> float | None:
        if len(self.by_caller) < 2:
            return None
        others = LatencySketch()
        busiest = max(self.by_caller.values(), key=lambda latency: latency.count)
        for latency in self.by_caller.values():
            if latency is not busiest:
                others.take_in(latency)
        return others.percentile(99)

    def result(self, spent_s: Collection[float] = ()) -> RunMetrics:
        """The run's figures so far. ``spent_s``: GPU seconds of each caller."""
        latency = self.latency
        done = max(latency.count, 1)
        arrived = max(self.arrived, 1)
        span_s = self.last_end_s or 1.0
        called = [tally for tally in self.tallies.values() if tally.requests]
        top = max(called, key=lambda tally: tally.requests, default=FunctionTally())
        top.change_copies(0, self.last_end_s)
        slowest_s = max((tally.latency_s / tally.requests for tally in called), default=0.0)
        return RunMetrics(
            requests=self.arrived,
            completed=latency.count,
            mean_latency_s=latency.mean,
            p50_latency_s=latency.percentile(50),
            p95_latency_s=latency.percentile(95),
            p99_latency_s=latency.percentile(99),
            latency_variance=latency.variance,
            mean_queueing_s=latency.mean - (self.load_s + self.inference_s) / done,
            mean_load_s=self.load_s / done,
            mean_inference_s=self.inference_s / done,
            throughput_per_s=latency.count / span_s,
            miss_ratio=self.misses / arrived,
            false_miss_ratio=self.false_misses / arrived,
            gpu_utilisation=self.run_s / (self._gpus * span_s),
            gpu_busy=(self.run_s + self.load_s) / (self._gpus * span_s),
            evictions=self.evictions,
            top_model_copies=top.copy_seconds / span_s,
            fairness=slowest_s / latency.mean if latency.mean else 1.0,
            makespan_s=self.last_end_s,
            goodput_per_s=(latency.count - self.late) / span_s,
            deadline_misses=self.late + self.expired,
            rejected=self.rejected,
            restores=self.restores if self._tiers else None,
            offloads=self.offloads if self._tiers else None,
            prefetches=self.prefetches if self._tiers else None,
            useless_prefetches=self.useless_prefetches if self._tiers else None,
            others_p99_latency_s=self._others_p99_s(),
            jain_index=_jain(spent_s) if len(self.by_caller) > 1 else None,
        )


def _jain(shares: Collection[float]) -> float:
    """Jain, Chiu, Hawe, DEC-TR-301, 1984."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0
