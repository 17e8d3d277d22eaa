"""Every policy on every kind of load, as ratios to LALB+O3 with LRU (docs/policies.md).

    python benchmarks/policy_grid.py --quick                 # a few cells, a minute
    python benchmarks/policy_grid.py --out grid              # all of it: grid/policy_grid.csv and .png
    python benchmarks/policy_grid.py --traces DIR            # with the real traces in DIR as well

The cluster is the paper's: 12 GPUs of 7800 MiB, the 22 CNNs of its table, 325 requests a minute for 6 minutes. Cells
are working sets x load times x popularity, bursts, GPUs lost on the way, and traces in the choices that do not flatter
a cache. Figures are means over the seeds of a cell; a seed decides arrivals and which function has which model.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import msgspec

from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.bounds import yardsticks
from hotset.simulation.engine import Engine, Fault
from hotset.simulation.hardware import PAPER_GPU_MEMORY_BYTES, PAPER_GPUS, Hardware, make_gpus, paper_costs
from hotset.simulation.traces import open_trace
from hotset.simulation.traces.replay import Replay, replay, with_shares_of
from hotset.simulation.working_set import WorkingSet
from hotset.simulation.workloads import Arrival, Popularity, Process, Synthetic, Workload

BASELINE = ("lalb_o3", "lru")
CONTESTANTS = (
    ("hotset", "hotset"),
    ("hotset", "lru"),
    ("lalb_o3", "hotset"),
    ("lalb_o3", "gdsf"),
    ("lalb_o3", "lfu"),
    ("lalb_o3", "sieve"),
    ("mqfq_sticky", "lru"),
    ("pow2_multiplex", "lru"),
    ("lalb", "lru"),
    ("lb", "lru"),
)
AZURE = "azure2019_500fn_min0480-0839.csv.gz"
GENTD = "gentd26_requests_2024-11-15_2024-12-01.csv.gz"
COLUMNS = (
    "cell",
    "contestant",
    "mean_ratio",
    "p99_ratio",
    "miss_ratio_ratio",
    "goodput",
    "baseline_goodput",
    "fairness",
    "mean_over_all_resident",
)
DEADLINE_S = 10.0
"""Goodput counts the answers within this time."""
LOST = (Fault(90.0, "sim/gpu:3", 210.0), Fault(150.0, "sim/gpu:7", None), Fault(150.0, "sim/gpu:8", 240.0))


class Cell(msgspec.Struct, frozen=True):
    """One row of the table."""

    name: str
    workload: Workload
    load_scale: float = 1.0
    faults: tuple[Fault, ...] = ()


class Figures(msgspec.Struct, frozen=True):
    """What one contestant did in one cell, means over the seeds."""

    mean_s: float
    p99_s: float
    miss_ratio: float
    goodput: float
    """Share of the requests answered within ``DEADLINE_S``."""
    fairness: float
    """Mean latency of the worst function over that of all."""


def cells(quick: bool, traces: Path | None) -> Iterator[Cell]:
    working_sets = (25, 35, 100) if quick else (15, 25, 35, 50, 70, 100)
    for exponent in (0.9,) if quick else (0.9, 0.5, 1.2):
        for scale in (1.0, 0.3) if quick else (1.0, 0.3, 0.05):
            for size in working_sets:
                yield Cell(
                    f"{size} functions, Zipf {exponent:g}, loads x{scale:g}",
                    Synthetic(popularity=Popularity.zipf(size, exponent)),
                    scale,
                )
    for size in (35,) if quick else (25, 50):
        bursts = Synthetic(popularity=Popularity.zipf(size, 0.9), process=Process.BURSTS)
        yield Cell(f"{size} functions, bursts", bursts)
    for size in (35,) if quick else (25, 35, 70):
        yield Cell(f"{size} functions, GPUs lost", Synthetic(popularity=Popularity.zipf(size, 0.9)), faults=LOST)
    if traces is not None:
        yield from trace_cells(traces, quick)


def trace_cells(traces: Path, quick: bool) -> Iterator[Cell]:
    azure = open_trace(traces / AZURE)
    choices = {
        "all": WorkingSet(),
        "without the first": WorkingSet(skip=1),
        "without the first 5": WorkingSet(skip=5),
        "http": WorkingSet(trigger="http"),
    }
    for label, choice in choices.items():
        for size in (35,) if quick else (15, 25, 35):
            how = Replay(working_set=msgspec.structs.replace(choice, size=size), minutes=6.0, rate_per_minute=325.0)
            yield Cell(f"azure2019 {label}, top {size}", replay(azure, how))
            if not quick and size == 35:
                yield Cell(f"azure2019 shares, {label}, top {size}", with_shares_of(azure, how))
    if not quick:
        how = Replay(compression=60.0, minutes=60.0)
        yield Cell("gentd26, 60 times as fast", replay(open_trace(traces / GENTD), how))


def measure(cell: Cell, policy: str, eviction: str, seeds: Sequence[int]) -> Figures:
    runs = [_run(cell, policy, eviction, seed) for seed in seeds]
    return Figures(*(fmean(getattr(run, field) for run in runs) for field in Figures.__struct_fields__))


def _run(cell: Cell, policy: str, eviction: str, seed: int) -> Figures:
    engine = Engine(Scheduler(make_policy(policy), make_eviction(eviction)), hardware(cell, seed), cell.faults)
    in_time = 0
    finished = engine.recorder.finished

    def watch(function: str, latency_s: float, now_s: float) -> None:
        nonlocal in_time
        in_time += latency_s <= DEADLINE_S
        finished(function, latency_s, now_s)

    engine.recorder.finished = watch  # type: ignore[method-assign]
    metrics = engine.run(_arrivals(cell, seed))
    return Figures(
        metrics.mean_latency_s,
        metrics.p99_latency_s,
        metrics.miss_ratio,
        in_time / max(metrics.requests, 1),
        metrics.fairness,
    )


def hardware(cell: Cell, seed: int) -> Hardware:
    costs = paper_costs(cell.workload.functions, seed, load_scale=cell.load_scale)
    return Hardware(gpus=make_gpus(PAPER_GPUS, PAPER_GPU_MEMORY_BYTES), costs=costs)


def _arrivals(cell: Cell, seed: int) -> Iterator[Arrival]:
    """Models have their own run times here, not those of the trace's functions (which ran on CPUs)."""
    for arrival in cell.workload.arrivals(seed):
        yield Arrival(arrival.time_s, arrival.function, None, arrival.caller)


def plot(rows: Sequence[tuple[str, dict[str, float]]], names: Sequence[str], path: Path) -> None:
    """Heat map of mean latency: contestants across, cells down; 1 is the baseline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import TwoSlopeNorm

    figure, axes = pyplot.subplots(figsize=(1.1 * len(names) + 4, 0.22 * len(rows) + 2), layout="constrained")
    values = [[min(row[name], 3.0) for name in names] for _, row in rows]
    image = axes.imshow(values, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.4, 3.0))
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7)
    for down, (_, row) in enumerate(rows):
        for across, name in enumerate(names):
            axes.text(across, down, f"{row[name]:.2f}", ha="center", va="center", fontsize=6)
    axes.set_title("Mean latency over that of LALB+O3 with LRU")
    figure.colorbar(image, shrink=0.5)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cells, two seeds")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--traces", type=Path, help="folder with the public traces (docs/traces.md)")
    parser.add_argument("--only", help="contestants whose name has this in it, such as 'hotset+hotset'")
    parser.add_argument("--out", type=Path, help="folder for the table and the heat map")
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + (2 if arguments.quick else arguments.seeds))
    contestants = [pair for pair in CONTESTANTS if not arguments.only or arguments.only in "+".join(pair)]
    names = ["+".join(pair) for pair in contestants]
    table: list[list[object]] = []
    heat: list[tuple[str, dict[str, float]]] = []
    for cell in cells(arguments.quick, arguments.traces):
        baseline = measure(cell, *BASELINE, seeds)
        ideal_s = fmean(yardsticks(_arrivals(cell, seed), hardware(cell, seed)).ideal_mean_latency_s for seed in seeds)
        ratios: dict[str, float] = {}
        print(f"{cell.name}: LALB+O3 mean {baseline.mean_s:.2f} s ({baseline.mean_s / ideal_s:.2f} x all-resident)")
        for pair, name in zip(contestants, names, strict=True):
            figures = measure(cell, *pair, seeds)
            ratios[name] = figures.mean_s / baseline.mean_s
            row = [
                cell.name,
                name,
                ratios[name],
                figures.p99_s / baseline.p99_s,
                figures.miss_ratio / baseline.miss_ratio if baseline.miss_ratio else 1.0,
                figures.goodput,
                baseline.goodput,
                figures.fairness,
                figures.mean_s / ideal_s,
            ]
            table.append(row)
            print(
                f"  {name:16} mean {row[2]:5.2f}  p99 {row[3]:5.2f}  misses {row[4]:5.2f}  "
                f"goodput {figures.goodput:6.1%}  ({row[8]:.2f} x all-resident)",
                flush=True,
            )
        heat.append((cell.name, ratios))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with (arguments.out / "policy_grid.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(table)
        plot(heat, names, arguments.out / "policy_grid.png")
        print(f"wrote {arguments.out}/policy_grid.csv and .png", file=sys.stderr)


if __name__ == "__main__":
    main()
