"""What one event costs the scheduler, under every policy: CPU time of ``Scheduler.handle``, p50 and p99.

    python benchmarks/bench_decision_cost.py [POLICY ...]

The default policy is measured with its own eviction, the others with LRU. The run is repeated, event by event the same,
and the least of each event's costs counts: what other processes of this machine do to its caches is not the decision's.

Bars: p99 of 30 us at 12 GPUs and 35 functions, of 100 us at 1,000 GPUs and 10,000 functions with 10,000 requests
waiting. Every completion is followed by an arrival, so that as many requests wait from the first event to the last.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from heapq import heappop, heappush
from itertools import pairwise

from calibration import machine_speed

from hotset.scheduling.actions import Action, Load, Run
from hotset.scheduling.events import Event, GpuJoined, ModelAdded, ModelLoaded, RequestArrived, RunFinished
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import POLICIES, make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.hardware import PAPER_GPU_MEMORY_BYTES, PAPER_GPUS, Hardware, make_gpus, paper_costs
from hotset.simulation.workloads import Popularity
from hotset.vocabulary import Request

EVENTS = 20_000
RUNS = 5


class ClosedLoop:
    """A cluster with a constant number of requests in it."""

    def __init__(self, policy: str, gpus: int, functions: int, waiting: int) -> None:
        popularity = Popularity.zipf(functions)
        self.hardware = Hardware(gpus=make_gpus(gpus, PAPER_GPU_MEMORY_BYTES), costs=paper_costs(popularity.names, 1))
        self.scheduler = Scheduler(make_policy(policy), make_eviction("hotset" if policy == "hotset" else "lru"))
        self.now_s = 0.0
        self.costs_ns: list[int] = []
        self._agenda: list[tuple[float, int, Event]] = []
        self._number = 0
        self._functions = iter(
            random.Random(1).choices(popularity.names, weights=popularity.weights, k=gpus + waiting + EVENTS * 2)
        )
        for model in self.hardware.models():
            self.scheduler.handle(ModelAdded(model), 0.0)
        for gpu in self.hardware.gpus:
            self.scheduler.handle(GpuJoined(gpu), 0.0)
        for _ in range(gpus + waiting):
            self._arrive()
        self.costs_ns.clear()

    def run(self) -> None:
        gc.collect()
        while len(self.costs_ns) < EVENTS:
            self.now_s, _, event = heappop(self._agenda)
            self._handle(event)
            if type(event) is RunFinished:
                self._arrive()

    def _arrive(self) -> None:
        self._number += 1
        request = Request(request_id=self._number, model=next(self._functions), arrival_s=self.now_s)
        self._handle(RequestArrived(request))

    def _handle(self, event: Event) -> None:
        started_ns = time.thread_time_ns()
        actions = self.scheduler.handle(event, self.now_s)
        self.costs_ns.append(time.thread_time_ns() - started_ns)
        for action in actions:
            self._carry_out(action)

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, Load):
            load_s = self.hardware.costs[action.model].load_s
            self._schedule(load_s, ModelLoaded(action.gpu_id, action.model, load_s))
        elif isinstance(action, Run):
            run_s = self.hardware.costs[action.model].run_s(len(action.request_ids))
            self._schedule(run_s, RunFinished(action.gpu_id, action.model, run_s))

    def _schedule(self, delay_s: float, event: Event) -> None:
        self._number += 1
        heappush(self._agenda, (self.now_s + delay_s, self._number, event))


def clock_cost_ns() -> float:
    """What reading the clock adds to each figure."""
    readings = [time.thread_time_ns() for _ in range(2_000)]
    return statistics.median(later - earlier for earlier, later in pairwise(readings))


def measure(policy: str, gpus: int, functions: int, waiting: int, bar_us: float, speed: float) -> None:
    """``speed``: of this machine, relative to the reference machine."""
    runs: list[list[int]] = []
    for _ in range(RUNS):
        loop = ClosedLoop(policy, gpus, functions, waiting)
        loop.run()
        runs.append(loop.costs_ns)
    clock_ns = clock_cost_ns()
    costs_us = sorted(max(min(costs_ns) - clock_ns, 0.0) / 1e3 for costs_ns in zip(*runs, strict=True))
    p50_us, p99_us = costs_us[len(costs_us) // 2], costs_us[len(costs_us) * 99 // 100]
    verdict = "met" if p99_us * speed <= bar_us else "MISSED"
    print(
        f"{policy:>18} {gpus:>6,} {functions:>10,} {waiting:>8,} {p50_us:>8.1f} {p99_us:>8.1f}"
        f" {p99_us * speed:>13.1f} {bar_us:>6g}  {verdict}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="*", metavar="POLICY", help=f"one of {', '.join(POLICIES)}; default: all")
    chosen: list[str] = parser.parse_args().policies or list(POLICIES)
    if unknown := [name for name in chosen if name not in POLICIES]:
        parser.error(f"there is no policy {unknown[0]!r}: choose from {', '.join(POLICIES)}")
    speed = machine_speed()
    print(f"this machine: {speed:.2f} of the reference machine (calibration.py); times in us")
    print("            policy   GPUs  functions  waiting      p50      p99 p99 reference    bar")
    for name in chosen:
        measure(name, PAPER_GPUS, 35, 100, 30.0, speed)
        measure(name, 1_000, 10_000, 10_000, 100.0, speed)


if __name__ == "__main__":
    main()
