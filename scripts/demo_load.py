"""The demo's load: open-loop Poisson arrivals over functions of Zipf popularity, and what was measured."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

DRAIN_WITHIN_S = 60.0
"""Longest wait for answers after the last arrival; what has not come by then has failed."""

SHORTEST_MEAN_S = 0.05
"""Below this the client, not the GPUs, would be what is measured."""


@dataclass(frozen=True)
class Arrival:
    """One call to be made: when (from the start of the load), which function (by rank), which of its inputs."""

    at_s: float
    function: int
    call: int


def popularity(functions: int) -> list[float]:
    """How often the function of each rank is called, relative to the first: 1/rank (Zipf, exponent 1)."""
    return [1 / rank for rank in range(1, functions + 1)]


def fitting_rate(loads_s: Sequence[float], inferences_s: Sequence[float], gpus: int) -> float:
    """Calls a second that keep all GPUs just busy if every second call is a miss.

    A policy that misses more falls behind, one that misses less has time to spare, on a fast machine as on a slow one.
    ``loads_s``, ``inferences_s``: measured, by rank.
    """
    weights = popularity(len(loads_s))
    costs = zip(weights, loads_s, inferences_s, strict=True)
    mean_s = math.fsum(weight * (load_s / 2 + inference_s) for weight, load_s, inference_s in costs) / sum(weights)
    return gpus / max(mean_s, SHORTEST_MEAN_S)


def arrivals(calls: Sequence[int], rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Poisson arrivals, ``rate`` a second; the function of rank k is called in proportion to 1/k.

    ``calls``: how many different inputs each function has, by rank. Equal arguments give equal arrivals.
    """
    dice = random.Random(seed)
    weights = popularity(len(calls))
    schedule: list[Arrival] = []
    at_s = dice.expovariate(rate)
    while at_s < seconds:
        function = dice.choices(range(len(calls)), weights)[0]
        schedule.append(Arrival(at_s, function, dice.randrange(calls[function])))
        at_s += dice.expovariate(rate)
    return schedule


@dataclass
class LoadReport:
    """What came back. Latencies count from the moment a call was due, so a client that lags hides nothing."""

    policy: str
    hits: int = 0
    misses: int = 0
    latencies_s: list[float] = field(default_factory=list)
    loads_s: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    """Why calls were not answered, and how many."""

    @property
    def failed(self) -> int:
        """Calls that were not answered with 200."""
        return self.failures.total()

    @property
    def requests(self) -> int:
        """Calls that were answered with 200."""
        return len(self.latencies_s)

    @property
    def mean_latency_s(self) -> float:
        return float(np.mean(self.latencies_s)) if self.latencies_s else 0.0

    @property
    def p50_latency_s(self) -> float:
        return self._percentile(50)

    @property
    def p95_latency_s(self) -> float:
        return self._percentile(95)

    @property
    def miss_ratio(self) -> float:
        """Misses per answered call."""
        return self.misses / max(1, self.hits + self.misses)

    @property
    def mean_load_s(self) -> float:
        """Mean time that a miss spent loading its model."""
        return float(np.mean(self.loads_s)) if self.loads_s else 0.0

    def as_json(self) -> dict[str, Any]:
        """Counts and summary figures, without the single latencies."""
        names = (
            *("policy", "requests", "failed", "failures", "hits", "misses", "miss_ratio", "mean_load_s"),
            *("mean_latency_s", "p50_latency_s", "p95_latency_s"),
        )
        return {name: getattr(self, name) for name in names}

    def _percentile(self, q: float) -> float:
        return float(np.percentile(self.latencies_s, q)) if self.latencies_s else 0.0


async def drive(
    policy: str,
    url: str,
    showcases: Sequence[Any],
    schedule: Sequence[Arrival],
    show: Callable[[LoadReport], None],
    transport: httpx.AsyncBaseTransport | None = None,
) -> LoadReport:
    """Make every call when it is due, whatever has become of the earlier ones, and report; ``show`` after each answer.

    ``transport``: in place of the network, for tests.
    """
    report = LoadReport(policy)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, transport=transport) as client:
        started = time.perf_counter()

        async def call(arrival: Arrival) -> None:
            showcase = showcases[arrival.function]
            body = showcase.calls[arrival.call]
            headers = {"Content-Type": body.content_type, "X-Hotset-Timeout": str(DRAIN_WITHIN_S)}
            try:
                response = await client.post(f"/function/{showcase.name}", content=body.body, headers=headers)
            except httpx.TransportError as error:
                report.failures[repr(error)] += 1
                return
            _note(report, response, time.perf_counter() - started - arrival.at_s)
            show(report)

        waiting = []
        for arrival in schedule:
            await asyncio.sleep(max(0.0, started + arrival.at_s - time.perf_counter()))
            waiting.append(asyncio.create_task(call(arrival)))
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=DRAIN_WITHIN_S)
            if late:
                report.failures[f"no answer within {DRAIN_WITHIN_S:.0f} s of the last call"] = len(late)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
    return report


def _note(report: LoadReport, response: httpx.Response, latency_s: float) -> None:
    if response.status_code != 200:
        report.failures[_reason(response)] += 1
        return
    report.latencies_s.append(latency_s)
    if response.headers.get("X-Hotset-Cache") == "hit":
        report.hits += 1
    else:
        report.misses += 1
        report.loads_s.append(float(response.headers.get("X-Hotset-Load-Seconds", "0")))


def _reason(response: httpx.Response) -> str:
    """A short reason that equal failures share: the status, and what the server calls it."""
    try:
        answer = response.json()
        return f"{response.status_code} {answer.get('reason') or answer['error']}"
    except (ValueError, AttributeError, KeyError):
        return str(response.status_code)
