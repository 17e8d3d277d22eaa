"""What a run is measured by. One recorder per run; memory grows with functions, not with requests."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from hotset.simulation.sketch import LatencySketch


class RunMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one run (one policy, one seed). Times are seconds; ratios are 0 to 1 unless they say otherwise."""

    requests: int
    completed: int
    mean_latency_s: float
    p50_latency_s: float
    p95_latency_s: float
    p99_latency_s: float
    latency_variance: float
    mean_queueing_s: float
    mean_load_s: float
    mean_inference_s: float
    throughput_per_s: float
    miss_ratio: float
    false_miss_ratio: float
    gpu_utilisation: float
    gpu_busy: float
    evictions: int
    top_model_copies: float
    fairness: float
    makespan_s: float


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

    def __init__(self, functions: Mapping[str, object], gpus: int) -> None:
        self.latency = LatencySketch()
        self.tallies = {name: FunctionTally() for name in functions}
        self.arrived = 0
        self.misses = 0
        self.false_misses = 0
        self.evictions = 0
        self.rejected = 0
        self.load_s = 0.0
        self.inference_s = 0.0
        self.run_s = 0.0
        self.last_end_s = 0.0
        self._gpus = gpus

    def finished(self, function: str, latency_s: float, now_s: float) -> None:
        self.latency.add(latency_s)
        tally = self.tallies[function]
        tally.requests += 1
        tally.latency_s += latency_s
        self.last_end_s = now_s

    def result(self) -> RunMetrics:
        """The run's figures so far."""
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
        )
