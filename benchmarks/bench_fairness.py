"""What a flood by one caller does to the others, with every policy: their p99 with it over their p99 without it.

    python benchmarks/bench_fairness.py                  # 3 seeds
    python benchmarks/bench_fairness.py --seeds 10 --policies hotset,lalb_o3

The cluster is the paper's 12 GPUs. Nine callers send ``--others`` requests a minute in all; the tenth sends ten times
his share of the GPUs' time, were there no loads. The flood calls the others' functions, or ``--own`` of its own.
"""

from __future__ import annotations

import argparse
from statistics import fmean

from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import POLICIES, make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.callers import Flood, Shared
from hotset.simulation.engine import Engine
from hotset.simulation.hardware import PAPER_GPU_MEMORY_BYTES, PAPER_GPUS, Hardware, make_gpus, paper_costs
from hotset.simulation.metrics import RunMetrics
from hotset.simulation.workloads import Popularity, Process, Synthetic, Workload

CALLERS = 9
TIMES_ITS_SHARE = 10


def workloads(others_per_minute: float, functions: int, own: int, mean_run_s: float) -> tuple[Workload, Workload]:
    """The others alone, and with the flood."""
    base = Synthetic(popularity=Popularity.zipf(functions), rate_per_minute=others_per_minute, process=Process.POISSON)
    share_per_minute = 60 * PAPER_GPUS / (CALLERS + 1) / mean_run_s
    flood = Flood(rate_per_minute=TIMES_ITS_SHARE * share_per_minute, own_functions=own)
    return Shared(base=base, callers=CALLERS), Shared(base=base, callers=CALLERS, flood=flood)


def run(workload: Workload, policy: str, seed: int) -> RunMetrics:
    """One run, in a queue of bounded length."""
    hardware = Hardware(gpus=make_gpus(PAPER_GPUS, PAPER_GPU_MEMORY_BYTES), costs=paper_costs(workload.functions, seed))
    eviction = "hotset" if policy == "hotset" else "lru"
    scheduler = Scheduler(make_policy(policy), make_eviction(eviction), SchedulerConfig(max_queue=2_000))
    return Engine(scheduler, hardware).run(workload.arrivals(seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--others", type=float, default=220.0, help="requests a minute of the nine others in all")
    parser.add_argument("--functions", type=int, default=35)
    parser.add_argument("--own", type=int, default=0, help="functions that only the flood calls; 0: the others'")
    arguments = parser.parse_args()
    for policy in arguments.policies.split(","):
        ratios, alone_s, flooded_s, served, jain = [], [], [], [], []
        for seed in range(1, arguments.seeds + 1):
            names = Popularity.zipf(arguments.functions).names
            mean_run_s = fmean(cost.inference_s for cost in paper_costs(names, seed).values())
            alone, flooded = (
                run(each, policy, seed)
                for each in workloads(arguments.others, arguments.functions, arguments.own, mean_run_s)
            )
            before_s, after_s = alone.p99_latency_s, flooded.others_p99_latency_s or 0.0
            ratios.append(after_s / before_s)
            alone_s.append(before_s)
            flooded_s.append(after_s)
            served.append(flooded.completed / flooded.requests)
            jain.append(flooded.jain_index or 0.0)
        print(
            f"{policy:15} others' p99 {fmean(alone_s):7.2f} s alone, {fmean(flooded_s):7.2f} s with the flood: "
            f"{fmean(ratios):5.2f}x (worst seed {max(ratios):5.2f}x); answered {fmean(served):.0%}, "
            f"Jain's index {fmean(jain):.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
