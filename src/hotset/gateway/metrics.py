"""Prometheus metrics. Counting is a few additions per call; all formatting happens when somebody scrapes.

Exported (docs/operations.md): ``hotset_requests_total``, ``hotset_request_seconds``, ``hotset_queue_seconds_total``,
``hotset_load_seconds_total``, ``hotset_inference_seconds_total``, ``hotset_hits_total``, ``hotset_restores_total``,
``hotset_misses_total``, ``hotset_false_misses_total``, ``hotset_offloads_total``, ``hotset_evictions_total`` and
``hotset_queue_length`` by function; ``hotset_thrashing``;
``hotset_gpu_up``, ``hotset_gpu_memory_used_bytes``, ``hotset_gpu_memory_capacity_bytes`` and ``hotset_gpu_busy_ratio``
by GPU; ``hotset_host_memory_used_bytes`` and ``hotset_host_memory_capacity_bytes`` by node; ``hotset_prefetches_total``
by outcome.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from hotset.gateway.calls import CallRecord
    from hotset.scheduling.fairness import Usage

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper bounds of the latency histogram: from a small model that is hot to a big one that must be loaded first."""


class StatusMetrics:
    """Calls of one function that ended with one HTTP status."""

    __slots__ = ("buckets", "count", "duration_s")

    def __init__(self, bounds: int = len(BUCKETS_S)) -> None:
        """``bounds``: of the histogram; one bucket more is for what is above them all."""
        self.buckets = [0] * (bounds + 1)
        self.count = 0
        self.duration_s = 0.0


class FunctionMetrics:
    """Counters of one function, over all its versions."""

    __slots__ = (
        "by_status",
        "evictions",
        "false_misses",
        "function",
        "hits",
        "hopeless",
        "inference_s",
        "load_s",
        "misses",
        "offloads",
        "queue_s",
        "restores",
        "total",
    )

    def __init__(self, function: str) -> None:
        self.function = function
        self.by_status: dict[int, StatusMetrics] = {}
        self.total = 0
        """Calls that ended, whatever their status."""
        self.queue_s = 0.0
        self.load_s = 0.0
        self.inference_s = 0.0
        self.hits = 0
        self.hopeless = 0
        """Calls that were refused because they could not be answered in time any more."""
        self.misses = 0
        self.false_misses = 0
        self.evictions = 0
        self.restores = 0
        self.offloads = 0

    def observe(self, record: CallRecord) -> None:
        """Count a call that ended."""
        of_status = self.by_status.get(record.status)
        if of_status is None:
            of_status = self.by_status[record.status] = StatusMetrics()
        of_status.count += 1
        of_status.buckets[bisect_left(BUCKETS_S, record.duration_s)] += 1
        of_status.duration_s += record.duration_s
        self.total += 1
        self.queue_s += record.queue_s
        self.load_s += record.load_s
        self.inference_s += record.inference_s

    @property
    def requests(self) -> dict[int, int]:
        """HTTP status -> calls that ended with it."""
        return {status: of_status.count for status, of_status in self.by_status.items()}

    @property
    def good(self) -> int:
        """Calls that ended with 200."""
        good = self.by_status.get(200)
        return 0 if good is None else good.count

    @property
    def in_time(self) -> int:
        """Calls that were answered within their deadline, and not with an error (goodput)."""
        return sum(of_status.count for status, of_status in self.by_status.items() if status < 400)

    @property
    def duration_s(self) -> float:
        """Of all calls together."""
        return sum(of_status.duration_s for of_status in self.by_status.values())

    @property
    def buckets(self) -> list[int]:
        """Calls by duration, as ``BUCKETS_S`` divides it."""
        empty = [0] * (len(BUCKETS_S) + 1)
        return [sum(counts) for counts in zip(empty, *(each.buckets for each in self.by_status.values()), strict=True)]


class GpuMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU, now."""

    gpu_id: str
    capacity_bytes: int
    used_bytes: int
    busy_ratio: float
    """Share of the last second that it was computing, 0 to 1."""


class HostReport(msgspec.Struct, frozen=True, kw_only=True):
    """The host memory of one node that is set apart for parked models, now."""

    node: str
    capacity_bytes: int
    used_bytes: int


_COUNTERS = (
    ("queue_s", "hotset_queue_seconds", "Seconds that calls waited for a GPU."),
    ("load_s", "hotset_load_seconds", "Seconds spent on loads and restores for the calls that caused them."),
    ("inference_s", "hotset_inference_seconds", "Seconds spent in the function itself."),
    ("in_time", "hotset_answers_in_time", "Calls that were answered within their deadline: goodput."),
    ("hopeless", "hotset_hopeless", "Calls that were refused as they could not be answered in time any more."),
    ("hits", "hotset_hits", "Calls that found their model in GPU memory."),
    ("restores", "hotset_restores", "Calls whose model was parked in host memory and had to be restored."),
    ("misses", "hotset_misses", "Calls whose model had to be loaded."),
    ("false_misses", "hotset_false_misses", "Loads of a model that another GPU held at that moment."),
    ("offloads", "hotset_offloads", "Times the function's model was parked in host memory to make room."),
    ("evictions", "hotset_evictions", "Times the function's model was unloaded to make room."),
)


class HotsetCollector:
    """Turns the counters into Prometheus families at scrape time."""

    def __init__(
        self,
        functions: Sequence[FunctionMetrics],
        gpus: Sequence[GpuMetrics],
        waiting: Mapping[str, int],
        lost_gpus: Collection[str] = (),
        prefetches: Mapping[str, int] | None = None,
        *,
        hosts: Sequence[HostReport] = (),
        thrashing: bool = False,
    ) -> None:
        """``waiting``: function -> calls whose run has not begun. ``lost_gpus``: by their ids, not among ``gpus``.
        ``prefetches``: outcome -> models that were loaded ahead; None: none ever is. ``hosts``: nodes that park models.
        ``thrashing``: GPUs swap models more than they run them."""
        self._functions = functions
        self._gpus = gpus
        self._waiting = waiting
        self._lost_gpus = lost_gpus
        self._prefetches = prefetches or {}
        self._hosts = hosts
        self._thrashing = thrashing

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        functions = self._functions
        requests = CounterMetricFamily("hotset_requests", "Calls that ended.", labels=["function", "code"])
        seconds = HistogramMetricFamily("hotset_request_seconds", "Latency of a call, all in all.", labels=["function"])
        for each in functions:
            for status, count in each.requests.items():
                requests.add_metric([each.function, str(status)], count)
            seconds.add_metric([each.function], cumulative(BUCKETS_S, each.buckets), each.duration_s)
        yield requests
        yield seconds
        for attribute, name, text in _COUNTERS:
            family = CounterMetricFamily(name, text, labels=["function"])
            for each in functions:
                family.add_metric([each.function], getattr(each, attribute))
            yield family
        length = GaugeMetricFamily("hotset_queue_length", "Calls whose run has not begun.", labels=["function"])
        for function, count in self._waiting.items():
            length.add_metric([function], count)
        yield length
        ahead = CounterMetricFamily("hotset_prefetches", "Models that were loaded ahead.", labels=["outcome"])
        for outcome, count in self._prefetches.items():
            ahead.add_metric([outcome], count)
        yield ahead
        thrashing = GaugeMetricFamily("hotset_thrashing", "1 while GPUs swap models more than they run them.")
        thrashing.add_metric([], self._thrashing)
        yield thrashing
        up = GaugeMetricFamily("hotset_gpu_up", "1 while the GPU serves, 0 once it is lost.", labels=["gpu"])
        for gpu_id in self._lost_gpus:
            up.add_metric([gpu_id], 0)
        capacity = GaugeMetricFamily("hotset_gpu_memory_capacity_bytes", "What models may use.", labels=["gpu"])
        used = GaugeMetricFamily("hotset_gpu_memory_used_bytes", "What models use or have reserved.", labels=["gpu"])
        busy = GaugeMetricFamily("hotset_gpu_busy_ratio", "Share of the last second spent computing.", labels=["gpu"])
        for gpu in self._gpus:
            up.add_metric([gpu.gpu_id], 1)
            capacity.add_metric([gpu.gpu_id], gpu.capacity_bytes)
            used.add_metric([gpu.gpu_id], gpu.used_bytes)
            busy.add_metric([gpu.gpu_id], gpu.busy_ratio)
        yield from (up, capacity, used, busy)
        budget = GaugeMetricFamily("hotset_host_memory_capacity_bytes", "What parked models may take.", labels=["node"])
        parked = GaugeMetricFamily("hotset_host_memory_used_bytes", "What parked models take.", labels=["node"])
        for host in self._hosts:
            budget.add_metric([host.node], host.capacity_bytes)
            parked.add_metric([host.node], host.used_bytes)
        yield from (budget, parked)


def cumulative(bounds: Sequence[float], buckets: Sequence[int]) -> list[tuple[str, float]]:
    """Prometheus wants each bucket to hold all smaller ones, the last being ``+Inf``."""
    total = 0
    out: list[tuple[str, float]] = []
    for bound, count in zip([*map(str, bounds), "+Inf"], buckets, strict=True):
        total += count
        out.append((bound, total))
    return out


class CallersCollector:
    """What was spent on each caller. So many callers are told apart and no more (``standing.MOST_CALLERS``)."""

    def __init__(self, usage: Mapping[str, Usage]) -> None:
        self._usage = usage

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily

        text = "GPU seconds spent on a caller: on runs, and on the loads that its calls caused."
        spent = CounterMetricFamily("hotset_caller_gpu_seconds", text, labels=["caller", "spent_on"])
        calls = CounterMetricFamily("hotset_caller_requests", "Calls of a caller that could wait.", labels=["caller"])
        for caller, usage in self._usage.items():
            spent.add_metric([caller, "runs"], usage.run_s)
            spent.add_metric([caller, "loads"], usage.load_s)
            calls.add_metric([caller], usage.requests)
        yield from (spent, calls)


class Collector(Protocol):
    """Yields metric families at scrape time."""

    def collect(self) -> Iterator[Metric]: ...


def exposition(*collectors: Collector) -> tuple[bytes, str]:
    """The body and content type of ``GET /metrics``."""
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    for collector in collectors:
        registry.register(collector)
    return generate_latest(registry), CONTENT_TYPE_LATEST
