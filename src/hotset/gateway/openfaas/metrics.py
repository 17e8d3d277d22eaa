"""Metrics under the names that OpenFaaS's gateway, watchdog and queue worker have, for its dashboards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from hotset.gateway.metrics import BUCKETS_S, FunctionMetrics, StatusMetrics, cumulative
from hotset.gateway.openfaas.labels import Scaling
from hotset.gateway.openfaas.naming import key_of, name_of
from hotset.gateway.openfaas.queue import AsyncQueue
from hotset.gateway.provider_metrics import BUCKETS_S as SMALL_BUCKETS_S
from hotset.gateway.provider_metrics import ProviderMetrics
from hotset.gateway.usage import Used

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

QUEUE = "faas-request"
"""What OpenFaaS calls the queue that a function gets unless it asks for another."""
NAME = "function_name"


class FunctionGauges(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one function, now."""

    full_name: str
    """``NAME.NAMESPACE``."""
    namespace: str
    scaling: Scaling
    replicas: int
    ready: int
    open_calls: int
    used: Used


class GatewayCollector:
    """What a gateway counts: calls of functions, and their replicas."""

    def __init__(self, functions: Sequence[FunctionMetrics], gauges: Sequence[FunctionGauges]) -> None:
        self._functions = functions
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
            UnknownMetricFamily,
        )

        labels = [NAME, "code"]
        calls = CounterMetricFamily("gateway_function_invocation", "Calls that ended.", labels=labels)
        seconds = HistogramMetricFamily("gateway_functions_seconds", "Time a call took.", labels=labels)
        # A counter, but one whose name has no _total.
        started = UnknownMetricFamily("gateway_function_invocation_started", "Calls begun.", labels=[NAME])
        open_calls = {each.full_name: each.open_calls for each in self._gauges}
        for each in self._functions:
            full = name_of(each.function).full
            for status, of_status in each.by_status.items():
                calls.add_metric([full, str(status)], of_status.count)
                seconds.add_metric([full, str(status)], cumulative(BUCKETS_S, of_status.buckets), of_status.duration_s)
            started.add_metric([full], each.total + open_calls.get(full, 0))
        yield from (calls, seconds, started)
        inflight = GaugeMetricFamily("gateway_function_invocation_inflight", "Open calls.", labels=[NAME])
        wanted = GaugeMetricFamily("gateway_service_count", "Replicas wanted.", labels=[NAME])
        ready = GaugeMetricFamily("gateway_service_ready_count", "Replicas that take calls.", labels=[NAME])
        least = GaugeMetricFamily("gateway_service_min", "Fewest replicas.", labels=[NAME])
        target = GaugeMetricFamily("gateway_service_target", "Load of one replica.", labels=[NAME])
        of_type = GaugeMetricFamily("gateway_service_target_load", "The same.", labels=[NAME, "scaling_type"])
        cpu = CounterMetricFamily(
            "pod_cpu_usage_seconds", "Processor time of its processes.", labels=[NAME, "namespace"]
        )
        memory = GaugeMetricFamily("pod_memory_working_set_bytes", "Their host memory.", labels=[NAME, "namespace"])
        for gauge in self._gauges:
            full, scaling = gauge.full_name, gauge.scaling
            inflight.add_metric([full], gauge.open_calls)
            wanted.add_metric([full], gauge.replicas)
            ready.add_metric([full], gauge.ready)
            least.add_metric([full], scaling.minimum)
            target.add_metric([full], scaling.target)
            of_type.add_metric([full, scaling.kind.value if scaling.kind else "rps"], scaling.target)
            cpu.add_metric([full, gauge.namespace], gauge.used.cpu_s)
            memory.add_metric([full, gauge.namespace], gauge.used.memory_bytes)
        yield from (inflight, wanted, ready, least, target, of_type, cpu, memory)


class HttpCollector:
    """``http_requests_*``: a gateway's own routes by ``method`` and ``path``, and beside them, as each function's
    watchdog would count them, the calls by ``function_name``."""

    def __init__(
        self, requests: ProviderMetrics, functions: Sequence[FunctionMetrics], gauges: Sequence[FunctionGauges]
    ) -> None:
        self._requests = requests
        self._functions = functions
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        requests = CounterMetricFamily("http_requests", "Requests answered.")
        seconds = HistogramMetricFamily("http_request_duration_seconds", "Time until answered.")

        def add(labels: dict[str, str], bounds: Sequence[float], counted: StatusMetrics) -> None:
            requests.add_sample("http_requests_total", labels, counted.count)
            for bound, count in cumulative(bounds, counted.buckets):
                seconds.add_sample("http_request_duration_seconds_bucket", labels | {"le": bound}, count)
            seconds.add_sample("http_request_duration_seconds_count", labels, counted.count)
            seconds.add_sample("http_request_duration_seconds_sum", labels, counted.duration_s)

        for route, counted in self._requests.counts.items():
            labels = {"method": route.method, "path": route.path, "status": route.status}
            add(labels, SMALL_BUCKETS_S, counted)
        for each in self._functions:
            for status, of_status in each.by_status.items():
                add({NAME: name_of(each.function).full, "status": str(status)}, BUCKETS_S, of_status)
        yield from (requests, seconds)
        inflight = GaugeMetricFamily("http_requests_in_flight", "Open calls.", labels=[NAME])
        for gauge in self._gauges:
            inflight.add_metric([gauge.full_name], gauge.open_calls)
        yield inflight


class QueueCollector:
    """What a queue worker counts: asynchronous calls."""

    def __init__(self, queue: AsyncQueue) -> None:
        self._queue = queue

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        submitted = CounterMetricFamily("queue_worker_messages_submitted", "Calls accepted.", labels=["queue_name"])
        submitted.add_metric([QUEUE], self._queue.accepted)
        processed = CounterMetricFamily("queue_worker_messages_processed", "Calls that ended.", labels=["queue_name"])
        processed.add_metric([QUEUE], self._queue.ended)
        yield from (submitted, processed)
        labels = ["queue_name", NAME]
        for name, text, counts in (
            ("queue_worker_pending_messages", "Calls that wait to be made.", self._queue.pending()),
            ("queue_worker_function_invocation_inflight", "Calls being made.", self._queue.inflight),
        ):
            family = GaugeMetricFamily(name, text, labels=labels)
            for full, count in _by_full_name(counts).items():
                family.add_metric([QUEUE, full], count)
            yield family


def _by_full_name(counts: Mapping[str, int]) -> dict[str, int]:
    """A function is called by more than one name."""
    totals: dict[str, int] = {}
    for called, count in counts.items():
        full = name_of(key_of(called)).full
        totals[full] = totals.get(full, 0) + count
    return totals
