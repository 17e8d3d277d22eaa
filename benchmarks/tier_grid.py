"""How far each policy is from the ideal in which nothing ever has to be loaded, as misses get cheaper.

    python benchmarks/tier_grid.py [--quick] [--plot FILE.png]

Working set x cost of a load x two lanes a GPU x host memory for models that left: mean latency over that of all models
resident on all GPUs (1.0 is the ideal), as Markdown tables (docs/residency.md) and, with ``--plot``, as a picture.
Simulated time only: the figures do not depend on the machine. A few minutes of CPU time; ``--quick`` a tenth of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from hotset.simulation.experiment import ClusterSpec, ExperimentSpec, RunResult, run_experiments
from hotset.simulation.workloads import Popularity, Synthetic

EVICTION_OF = {"lb": "lru", "lalb": "lru", "lalb_o3": "lru", "hotset": "hotset"}
WORKING_SETS = (15, 25, 35, 50, 100)
LOAD_SCALES = (1.0, 0.3, 0.05)
ENOUGH_BYTES = 10**13
"""Host memory for every model of every GPU."""
CLUSTERS: Mapping[str, ClusterSpec] = {
    "as the paper": ClusterSpec(),
    "two lanes": ClusterSpec(overlap=True),
    "host memory": ClusterSpec(host_memory_bytes=ENOUGH_BYTES),
    "both": ClusterSpec(host_memory_bytes=ENOUGH_BYTES, overlap=True),
}
RATE_PER_MINUTE = 325.0


class Grid:
    """Mean latency over the ideal one, by cluster, load scale, working set and policy."""

    def __init__(self, working_sets: Sequence[int], minutes: float, seeds: int) -> None:
        self.working_sets = working_sets
        workloads = [
            Synthetic(popularity=Popularity.zipf(size), rate_per_minute=RATE_PER_MINUTE, minutes=minutes)
            for size in working_sets
        ]
        cells = list(product(CLUSTERS, EVICTION_OF))
        specs = [
            ExperimentSpec(
                workloads=workloads,
                policies=[policy],
                evictions=[EVICTION_OF[policy]],
                load_scales=LOAD_SCALES,
                cluster=CLUSTERS[cluster],
                seeds=seeds,
                baseline=False,
            )
            for cluster, policy in cells
        ]
        self.runs: dict[tuple[str, str, float, int], RunResult] = {}
        for (cluster, policy), results in zip(cells, run_experiments(specs), strict=True):
            for run in results:
                self.runs[cluster, policy, run.load_scale, run.working_set] = run

    def distance(self, cluster: str, policy: str, load_scale: float, working_set: int) -> float:
        run = self.runs[cluster, policy, load_scale, working_set]
        return run.mean_latency_s / run.ideal_mean_latency_s

    def table(self, load_scale: float) -> str:
        """Markdown: a row per cluster and policy, a column per working set."""
        sizes = self.working_sets
        lines = [
            f"| loads x {load_scale:g} | policy | " + " | ".join(map(str, sizes)) + " |",
            "| --- | --- |" + " ---: |" * len(sizes),
        ]
        for cluster, policy in product(CLUSTERS, EVICTION_OF):
            cells = [_short(self.distance(cluster, policy, load_scale, size)) for size in sizes]
            lines.append(f"| {cluster} | `{policy}` | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def prefetches(self) -> str:
        """How many loads were started ahead, and how many of those in vain, with two lanes at the paper's loads."""
        runs = [self.runs["two lanes", policy, 1.0, self.working_sets[-1]] for policy in EVICTION_OF]
        told = ", ".join(f"{run.policy} {run.prefetches:.0f} ({run.useless_prefetches:.0f})" for run in runs)
        return f"prefetches (useless ones) in a run of {runs[0].requests:.0f} requests: {told}"


def _short(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}"


def plot(grid: Grid, path: Path) -> None:
    from matplotlib.figure import Figure

    colours = {"lb": "#9a9a9a", "lalb": "#0072b2", "lalb_o3": "#d55e00", "hotset": "#009e73"}
    figure = Figure(figsize=(11, 8), dpi=110, layout="constrained")
    axes = figure.subplots(len(LOAD_SCALES), len(CLUSTERS), sharex=True, sharey=True)
    for (row, scale), (column, cluster) in product(enumerate(LOAD_SCALES), enumerate(CLUSTERS)):
        axis = axes[row][column]
        for policy, colour in colours.items():
            distances = [grid.distance(cluster, policy, scale, size) for size in grid.working_sets]
            axis.plot(grid.working_sets, distances, color=colour, marker="o", markersize=3, label=policy)
        axis.set_yscale("log")
        axis.set_xticks(list(grid.working_sets))
        axis.grid(color="#e4e7eb")
        axis.set_title(f"{cluster}, loads x {scale:g}", fontsize=9, loc="left")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.supxlabel("working set, functions", fontsize=9)
    figure.supylabel("mean latency over that of all models resident everywhere", fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two working sets, one seed, two minutes")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    grid = Grid((15, 35), 2.0, 1) if arguments.quick else Grid(WORKING_SETS, 6.0, 3)
    for scale in LOAD_SCALES:
        print(grid.table(scale), end="\n\n")
    print(grid.prefetches())
    if arguments.plot is not None:
        plot(grid, arguments.plot)
        print(f"plot: {arguments.plot}", file=sys.stderr)


if __name__ == "__main__":
    main()
