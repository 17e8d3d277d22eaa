"""Requests to the small routes: counted here, and exported under the names an OpenFaaS provider has."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, MutableMapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

import msgspec

from hotset.gateway.app import Application, Scope, Send
from hotset.gateway.calls import Receive
from hotset.gateway.metrics import StatusMetrics, cumulative

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_KNOWN_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


_COUNTED = ("/system/", "/async-function/")


class Route(msgspec.Struct, frozen=True):
    """What is counted together; names are left out of the path."""

    status: str
    method: str
    path: str


class ProviderMetrics:
    """Counts requests by route and status."""

    def __init__(self) -> None:
        self.counts: dict[Route, StatusMetrics] = {}

    def around(self, application: Application) -> Application:
        """The same application, counted."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or not scope["path"].startswith(_COUNTED):
                await application(scope, receive, send)
                return
            began_s = perf_counter()

            async def noted(message: MutableMapping[str, Any]) -> None:
                if message["type"] == "http.response.start":
                    self._observe(scope["method"], scope["path"], message["status"], perf_counter() - began_s)
                await send(message)

            await application(scope, receive, noted)

        return counted

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        labels = ["code", "method", "path"]
        requests = CounterMetricFamily("provider_http_requests", "Requests answered.", labels=labels)
        seconds = HistogramMetricFamily("provider_http_request_duration_seconds", "Time until answered.", labels=labels)
        for route, counted in self.counts.items():
            if route.path.startswith("/system"):
                values = [route.status, route.method, route.path]
                requests.add_metric(values, counted.count)
                seconds.add_metric(values, cumulative(BUCKETS_S, counted.buckets), counted.duration_s)
        yield requests
        yield seconds

    def _observe(self, method: str, path: str, status: int, duration_s: float) -> None:
        # The first two parts only: a name in a label would make a series of every function.
        first, *rest = path.split("/", 3)[1:3]
        short = f"/{first}" if first != "system" or status == 404 else f"/system/{rest[0]}"
        route = Route(str(status), method if method in _KNOWN_METHODS else "other", short)
        counted = self.counts.get(route)
        if counted is None:
            counted = self.counts[route] = StatusMetrics(len(BUCKETS_S))
        counted.count += 1
        counted.buckets[bisect_left(BUCKETS_S, duration_s)] += 1
        counted.duration_s += duration_s
