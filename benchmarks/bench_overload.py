"""How many are answered in time where the paper's 12 GPUs are asked for more than the paper's 325 calls a minute.

    python benchmarks/bench_overload.py              # 54 cells of two seeds, half a minute

1.2, 2 and 3 times as many: 0.7, 1.2 and 1.8 times what the GPUs could run were nothing ever loaded. 3 minutes of
Poisson arrivals, Zipf 0.9. An answer counts within 10 s of its call; the scheduler is told so, and refuses what is
hopeless, or is not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import mean

from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.engine import Engine
from hotset.simulation.hardware import PAPER_GPU_MEMORY_BYTES, PAPER_GPUS, Hardware, make_gpus, paper_costs
from hotset.simulation.metrics import RunMetrics
from hotset.simulation.workloads import Popularity, Process, Synthetic

PATIENCE_S = 10.0
CALLS_PER_MINUTE = 325
CONTESTANTS = (("hotset", "hotset"), ("lalb_o3", "lru"), ("lb", "lru"))


def play(functions: int, times: float, policy: str, eviction: str, *, told: bool, seed: int) -> RunMetrics:
    """So many times the paper's calls."""
    popularity = Popularity.zipf(functions)
    costs = paper_costs(popularity.names, seed)
    calls = Synthetic(
        popularity=popularity,
        rate_per_minute=times * CALLS_PER_MINUTE,
        minutes=3,
        process=Process.POISSON,
    )
    hardware = Hardware(gpus=make_gpus(PAPER_GPUS, PAPER_GPU_MEMORY_BYTES), costs=costs)
    scheduler = Scheduler(make_policy(policy), make_eviction(eviction))
    engine = Engine(scheduler, hardware, deadline_s=PATIENCE_S if told else None)
    engine.recorder.deadline_s = PATIENCE_S
    return engine.run(calls.arrivals(seed))


def _in_time(runs: Sequence[RunMetrics]) -> float:
    return mean(run.goodput_per_s * run.makespan_s / run.requests for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    seeds = range(1, parser.parse_args().seeds + 1)
    for told in (False, True):
        print("hopeless ones are refused" if told else "nothing is refused")
        for times in (1.2, 2.0, 3.0):
            for functions in (35, 50, 100):
                for policy, eviction in CONTESTANTS:
                    runs = [play(functions, times, policy, eviction, told=told, seed=seed) for seed in seeds]
                    mean_s, misses = (
                        mean(getattr(run, field) for run in runs) for field in ("mean_latency_s", "miss_ratio")
                    )
                    what = f"x{times:g}, {functions} functions, {policy}"
                    print(f"    {what}: {_in_time(runs):.2f} in time, mean {mean_s:.1f} s, misses {misses:.2f}")


if __name__ == "__main__":
    main()
