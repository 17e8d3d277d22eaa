"""How fast the simulator is, whether its cost per request stays flat, and whether its memory does.

    python benchmarks/bench_simulator_speed.py

CPU time of one core; medians of five. Bars: 50,000 simulated requests a second at 12 GPUs and 35 functions under
lalb_o3; at 1,000 GPUs and 10,000 functions, kept about 80 % busy, at most 3 times the cost per request.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time

from calibration import machine_speed

from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.engine import Engine
from hotset.simulation.hardware import PAPER_GPU_MEMORY_BYTES, PAPER_GPUS, Hardware, make_gpus, paper_costs
from hotset.simulation.metrics import RunMetrics
from hotset.simulation.workloads import Popularity, Synthetic

RUNS = 5
BAR_PER_S = 50_000
BAR_RATIO = 3.0

SMALL = Synthetic(popularity=Popularity.zipf(35), rate_per_minute=325.0, minutes=120.0)
LARGE = Synthetic(popularity=Popularity.zipf(10_000), rate_per_minute=20_000.0, minutes=4.0)


def simulate(workload: Synthetic, gpus: int, *, streamed: bool = False) -> tuple[float, RunMetrics]:
    """CPU seconds per request, and the run's figures; unless ``streamed``, arrivals are made beforehand."""
    hardware = Hardware(gpus=make_gpus(gpus, PAPER_GPU_MEMORY_BYTES), costs=paper_costs(workload.functions, 1))
    engine = Engine(Scheduler(make_policy("lalb_o3"), make_eviction("lru")), hardware)
    arrivals = workload.arrivals(1) if streamed else list(workload.arrivals(1))
    started_s = time.process_time()
    metrics = engine.run(arrivals)
    return (time.process_time() - started_s) / metrics.requests, metrics


def measure(title: str, workload: Synthetic, gpus: int) -> float:
    """Median CPU seconds per request."""
    runs = [simulate(workload, gpus) for _ in range(RUNS)]
    cost_s, metrics = statistics.median(run[0] for run in runs), runs[0][1]
    print(
        f"{title}: {1 / cost_s:>9,.0f} requests/s, {cost_s * 1e6:5.1f} us each"
        f"  ({metrics.requests:,} requests, GPUs {metrics.gpu_busy:.0%} busy, miss ratio {metrics.miss_ratio:.2f})"
    )
    return cost_s


def peak_mib(minutes: float) -> float:
    """Peak memory of a fresh process that simulates so many minutes of the paper's cluster."""
    command = [sys.executable, __file__, "--peak-memory", str(minutes)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare() -> None:
    speed = machine_speed()
    print(f"this machine: {speed:.2f} of the reference machine (calibration.py)")
    small_s = measure("   12 GPUs,     35 functions", SMALL, PAPER_GPUS)
    large_s = measure("1,000 GPUs, 10,000 functions", LARGE, 1_000)
    per_s, ratio = 1 / small_s, large_s / small_s
    speed = (speed + machine_speed()) / 2
    print(
        f"speed: {per_s:,.0f} requests/s here, {per_s / speed:,.0f} at reference speed; bar {BAR_PER_S:,}: "
        f"{'met' if per_s / speed >= BAR_PER_S else 'MISSED'}"
    )
    print(f"growth: {ratio:.2f} x the cost; bar {BAR_RATIO:g} x: {'met' if ratio <= BAR_RATIO else 'MISSED'}")
    short, long = 60.0, 600.0
    print(
        f"peak memory: {peak_mib(short):.1f} MiB for {325 * short:,.0f} requests, "
        f"{peak_mib(long):.1f} MiB for {325 * long:,.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peak-memory",
        type=float,
        metavar="MINUTES",
        help="print only the peak memory in MiB of so many minutes, simulated",
    )
    minutes: float | None = parser.parse_args().peak_memory
    if minutes is None:
        compare()
    else:
        simulate(Synthetic(popularity=Popularity.zipf(35), minutes=minutes), PAPER_GPUS, streamed=True)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
