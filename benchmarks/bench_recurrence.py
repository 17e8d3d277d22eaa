"""Prefetch by recurrence (docs/policies.md): what it gains where calls recur, and costs where they do not.

    python benchmarks/bench_recurrence.py [--traces DIR] [--seeds 5]

The paper's cluster with loads that overlap with runs, the default policy and LALB+O3 with LRU, with and without
``prefetch_recurring``; ratios of mean latency and p99. Habits: 40 pairs of functions, the second called 3 to 8 s after
the first, nine times in ten; 80 functions with periods of 2 to 10 minutes, give or take 2 s; both beside 120 calls a
minute of ten popular functions. No habits: the cells of the policy grid with loads as the paper's, and the traces.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import msgspec
from policy_cells import cells

from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.engine import Engine
from hotset.simulation.hardware import PAPER_GPU_MEMORY_BYTES, PAPER_GPUS, Hardware, make_gpus, paper_costs
from hotset.simulation.workloads import Arrival, Popularity, Synthetic, Workload

PAIRS = (("hotset", "hotset"), ("lalb_o3", "lru"))
MINUTES = 60.0


class Compared(msgspec.Struct, frozen=True):
    """One run with prefetch against the same without."""

    mean: float
    p99: float
    prefetches: float
    """In addition to those for requests that wait."""
    useless: float


def _popular(rng: random.Random) -> list[Arrival]:
    workload = Synthetic(popularity=Popularity.zipf(10, 0.9), rate_per_minute=120, minutes=MINUTES)
    return list(workload.arrivals(rng.randrange(1_000_000)))


def successions(seed: int) -> list[Arrival]:
    rng = random.Random(seed)
    calls = _popular(rng)
    for pair in range(40):
        time_s = rng.expovariate(1 / 150)
        while time_s < MINUTES * 60:
            calls.append(Arrival(time_s, f"first-{pair}"))
            if rng.random() < 0.9:
                calls.append(Arrival(time_s + rng.uniform(3, 8), f"second-{pair}"))
            time_s += rng.expovariate(1 / 150)
    return sorted(calls, key=lambda call: call.time_s)


def rhythms(seed: int) -> list[Arrival]:
    rng = random.Random(seed)
    calls = _popular(rng)
    for function in range(80):
        period_s = rng.uniform(120, 600)
        time_s = rng.uniform(2, period_s)
        while time_s < MINUTES * 60:
            calls.append(Arrival(time_s + rng.uniform(-2, 2), f"beat-{function}"))
            time_s += period_s
    return sorted(calls, key=lambda call: call.time_s)


def calls_of(workload: Workload, seed: int) -> list[Arrival]:
    """Models have their own run times, not those of the trace's functions."""
    return [Arrival(each.time_s, each.function, None) for each in workload.arrivals(seed)]


def compare(calls: Sequence[Arrival], policy: str, eviction: str, seed: int) -> Compared:
    names = sorted({call.function for call in calls})
    random.Random(seed).shuffle(names)
    hardware = Hardware(gpus=make_gpus(PAPER_GPUS, PAPER_GPU_MEMORY_BYTES), costs=paper_costs(names, seed))
    without, with_it = (
        Engine(
            Scheduler(
                make_policy(policy),
                make_eviction(eviction),
                SchedulerConfig(overlap=True, prefetch_recurring=recurring),
            ),
            hardware,
        ).run(calls)
        for recurring in (False, True)
    )
    return Compared(
        with_it.mean_latency_s / without.mean_latency_s,
        with_it.p99_latency_s / without.p99_latency_s,
        (with_it.prefetches or 0) - (without.prefetches or 0),
        (with_it.useless_prefetches or 0) - (without.useless_prefetches or 0),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, help="folder with the public traces (docs/traces.md)")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    loads: dict[str, Callable[[int], list[Arrival]]] = {"successions": successions, "rhythms": rhythms}
    for cell in cells(arguments.traces):
        if cell.load_scale == 1.0 and not cell.faults and cell.deadline_s is None:
            loads[cell.name] = partial(calls_of, cell.workload)
    print(f"{'':46}{'':18}    mean     p99  prefetches  useless")
    for name, make in loads.items():
        for policy, eviction in PAIRS:
            runs = [compare(make(seed), policy, eviction, seed) for seed in range(1, arguments.seeds + 1)]
            figures = [fmean(getattr(run, field) for run in runs) for field in Compared.__struct_fields__]
            print(
                f"{name:46}{policy + ' + ' + eviction:18}{figures[0]:8.3f}{figures[1]:8.3f}{figures[2]:12.1f}"
                f"{figures[3]:9.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
