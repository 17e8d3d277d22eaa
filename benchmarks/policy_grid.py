"""Every policy on every kind of load, as ratios to LALB+O3 with LRU (docs/policies.md).

    python benchmarks/policy_grid.py --out grid --traces DIR    # all of it
    python benchmarks/policy_grid.py --out grid --seconds 200   # as much as time allows; again: goes on from there
    python benchmarks/policy_grid.py --out grid --cells "35 functions" --only hotset+hotset

The default policy is run with ``--seeds`` seeds a cell and the rest of the field with ``--field-seeds`` of these; a
seed decides arrivals and which function has which model. Each run is a line of ``OUT/runs.csv``, written as it is done,
so that a grid can be made in several goes; lines of other code are not noticed: change the folder with the code.
``OUT/policy_grid.csv`` is the table, ``OUT/policy_grid.png`` the heat map, and cells in which the default misses its
bars are named. All of it takes about five minutes of one core.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean

import msgspec
from policy_cells import Cell, cells

from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import POLICIES, make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.bounds import yardsticks
from hotset.simulation.engine import Engine
from hotset.simulation.hardware import PAPER_GPU_MEMORY_BYTES, PAPER_GPUS, Hardware, make_gpus, paper_costs
from hotset.simulation.workloads import Arrival

DEFAULT = "hotset+hotset"
BASELINE = "lalb_o3+lru"
EVICTIONS = ("hotset", "gdsf", "lfu", "sieve")
"""Tried beside LRU, with LALB+O3."""
CONTESTANTS = (DEFAULT, *(f"{policy}+lru" for policy in POLICIES), *(f"lalb_o3+{eviction}" for eviction in EVICTIONS))
GOOD_S = 10.0
"""Goodput counts the answers within this time."""
MOST_MEAN, MOST_P99 = 1.02, 1.05
"""What the default policy may reach in any cell, as ratios to the baseline."""


class Run(msgspec.Struct, frozen=True):
    """One contestant, one cell, one seed."""

    cell: str
    contestant: str
    seed: int
    mean_s: float
    p99_s: float
    miss_ratio: float
    goodput: float
    """Share of the requests answered within ``GOOD_S``."""
    fairness: float
    """Mean latency of the worst function over that of all."""
    ideal_s: float
    """Mean latency were every model on every GPU."""


class Ratios(msgspec.Struct, frozen=True):
    """One contestant in one cell: means over the seeds that it and the baseline were run with, as ratios of these."""

    cell: str
    contestant: str
    seeds: int
    mean: float
    p99: float
    miss_ratio: float
    goodput: float
    fairness: float
    over_all_resident: float
    """Mean latency over that of the ideal."""


class Job(msgspec.Struct, frozen=True):
    """Contestants to run on one cell with one seed: they share its arrivals."""

    cell: Cell
    seed: int
    contestants: tuple[str, ...]
    one_caller: bool = False
    """Requests are nobody's in particular, whatever the trace says: the policies alone, without fair shares."""


def hardware(cell: Cell, seed: int) -> Hardware:
    costs = paper_costs(cell.workload.functions, seed, load_scale=cell.load_scale)
    return Hardware(gpus=make_gpus(PAPER_GPUS, PAPER_GPU_MEMORY_BYTES), costs=costs)


def measure(job: Job) -> list[Run]:
    cell, seed = job.cell, job.seed
    # Models have their own run times here, not those of the trace's functions (which ran on CPUs).
    arrivals = [
        Arrival(each.time_s, each.function, None, "" if job.one_caller else each.caller)
        for each in cell.workload.arrivals(seed)
    ]
    ideal_s = yardsticks(arrivals, hardware(cell, seed)).ideal_mean_latency_s
    return [_run(cell, seed, contestant, arrivals, ideal_s) for contestant in job.contestants]


def _run(cell: Cell, seed: int, contestant: str, arrivals: Sequence[Arrival], ideal_s: float) -> Run:
    policy, _, eviction = contestant.partition("+")
    scheduler = Scheduler(make_policy(policy), make_eviction(eviction))
    engine = Engine(scheduler, hardware(cell, seed), cell.faults, deadline_s=cell.deadline_s)
    in_time = 0
    finished = engine.recorder.finished

    def watch(function: str, latency_s: float, now_s: float) -> None:
        nonlocal in_time
        in_time += latency_s <= GOOD_S
        finished(function, latency_s, now_s)

    engine.recorder.finished = watch  # type: ignore[method-assign]
    metrics = engine.run(arrivals)
    return Run(
        cell=cell.name,
        contestant=contestant,
        seed=seed,
        mean_s=metrics.mean_latency_s,
        p99_s=metrics.p99_latency_s,
        miss_ratio=metrics.miss_ratio,
        goodput=in_time / max(metrics.requests, 1),
        fairness=metrics.fairness,
        ideal_s=ideal_s,
    )


def jobs_of(
    chosen: Sequence[Cell], contestants: Sequence[str], seeds: range, field_seeds: int, done: Sequence[Run]
) -> Iterator[Job]:
    """What is still to be run; the first seeds of all cells first, so that a grid that is cut short is whole."""
    known = {(run.cell, run.contestant, run.seed) for run in done}
    for number, seed in enumerate(seeds):
        for cell in chosen:
            wanted = contestants if number < field_seeds else [each for each in contestants if each == DEFAULT]
            missing = [each for each in dict.fromkeys((BASELINE, *wanted)) if (cell.name, each, seed) not in known]
            if missing:
                yield Job(cell, seed, tuple(missing))


def read_runs(path: Path) -> list[Run]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [msgspec.convert(row, Run, strict=False) for row in csv.DictReader(file)]


def carry_out(todo: Sequence[Job], path: Path, processes: int, seconds: float) -> None:
    """Append every run to the file as it is done; after so many seconds no further job is begun."""
    until_s = time.monotonic() + seconds
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(Run.__struct_fields__)

        def keep(runs: Sequence[Run], number: int) -> None:
            writer.writerows(msgspec.structs.astuple(run) for run in runs)
            file.flush()
            print(f"\r{number} of {len(todo)} jobs", end="", file=sys.stderr, flush=True)

        if processes == 1:
            for number, job in enumerate(todo, start=1):
                if time.monotonic() >= until_s:
                    break
                keep(measure(job), number)
        else:
            with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
                futures = [pool.submit(measure, job) for job in todo]
                for number, future in enumerate(as_completed(futures), start=1):
                    keep(future.result(), number)
                    if time.monotonic() >= until_s:
                        pool.shutdown(cancel_futures=True)
                        break
        print(file=sys.stderr)


def table(runs: Sequence[Run]) -> list[Ratios]:
    by_pair: dict[tuple[str, str], dict[int, Run]] = {}
    for run in runs:
        by_pair.setdefault((run.cell, run.contestant), {})[run.seed] = run
    rows = []
    for (cell, contestant), ours in by_pair.items():
        theirs = by_pair.get((cell, BASELINE), {})
        seeds = sorted(ours.keys() & theirs.keys())
        if not seeds or contestant == BASELINE:
            continue
        pairs = [(ours[seed], theirs[seed]) for seed in seeds]
        rows.append(
            Ratios(
                cell=cell,
                contestant=contestant,
                seeds=len(seeds),
                mean=_ratio(pairs, "mean_s"),
                p99=_ratio(pairs, "p99_s"),
                miss_ratio=_ratio(pairs, "miss_ratio"),
                goodput=_ratio(pairs, "goodput"),
                fairness=_ratio(pairs, "fairness"),
                over_all_resident=fmean(ours[seed].mean_s / ours[seed].ideal_s for seed in seeds),
            )
        )
    return rows


def _ratio(pairs: Sequence[tuple[Run, Run]], field: str) -> float:
    our, their = (fmean(getattr(run, field) for run in side) for side in zip(*pairs, strict=True))
    return our / their if their else 1.0 if not our else math.inf


def plot(rows: Sequence[Ratios], names: Sequence[str], path: Path) -> None:
    """Heat map of mean latency: contestants across, cells down; 1 is the baseline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    values = {(row.cell, row.contestant): row.mean for row in rows}
    shown = list(dict.fromkeys(row.cell for row in rows))
    names = [name for name in names if any((cell, name) in values for cell in shown)]
    figure, axes = pyplot.subplots(figsize=(0.8 * len(names) + 4, 0.2 * len(shown) + 2), layout="constrained")
    grid = [[min(max(values.get((cell, name), math.nan), 0.25), 4.0) for name in names] for cell in shown]
    image = axes.imshow(grid, aspect="auto", cmap="RdBu_r", norm=LogNorm(0.25, 4.0))
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(shown)), shown, fontsize=7)
    for down, cell in enumerate(shown):
        for across, name in enumerate(names):
            if (cell, name) in values:
                value = values[cell, name]
                color = "white" if not 0.4 < value < 2.5 else "black"
                axes.text(across, down, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
    axes.set_title("Mean latency over that of LALB+O3 with LRU")
    bar = figure.colorbar(image, shrink=0.5, ticks=[0.25, 0.5, 1, 2, 4], format="%g")
    bar.ax.minorticks_off()
    figure.savefig(path, dpi=100)


def report(rows: Sequence[Ratios], names: Sequence[str]) -> None:
    """Say how the default did in every cell, how the field did on average, and which bars were missed."""
    for row in rows:
        if row.contestant == DEFAULT:
            print(
                f"{row.cell:42} mean {row.mean:5.2f}  p99 {row.p99:5.2f}  misses {row.miss_ratio:5.2f}  goodput "
                f"{row.goodput:5.2f}  fairness {row.fairness:5.2f}  ({row.over_all_resident:.2f} x all-resident)"
            )
    print()
    for name in names:
        ours = [row for row in rows if row.contestant == name]
        if ours:
            means = [fmean(math.log(getattr(row, field)) for row in ours) for field in ("mean", "p99")]
            print(
                f"{name:22} geometric mean over {len(ours)} cells: mean {math.exp(means[0]):5.2f}  "
                f"p99 {math.exp(means[1]):5.2f}; worst mean {max(row.mean for row in ours):6.2f}"
            )
    missed = [row for row in rows if row.contestant == DEFAULT and (row.mean > MOST_MEAN or row.p99 > MOST_P99)]
    print(f"\n{DEFAULT} misses mean <= {MOST_MEAN} or p99 <= {MOST_P99} in {len(missed)} cells:")
    for row in missed:
        print(f"  {row.cell}: mean {row.mean:.3f}, p99 {row.p99:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs, the table and the heat map")
    parser.add_argument("--traces", type=Path, help="folder with the public traces (docs/traces.md)")
    parser.add_argument("--cells", default="", help="cells whose name has this in it")
    parser.add_argument("--only", default="", help="contestants whose name has this in it, such as 'hotset+hotset'")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--field-seeds", type=int, default=2, help="of these, for all but the default policy")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--one-caller", action="store_true", help="without the fair shares of the traces' callers")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after so long")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "runs.csv"
    contestants = [each for each in CONTESTANTS if arguments.only in each]
    chosen = [cell for cell in cells(arguments.traces) if arguments.cells in cell.name]
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    todo = list(jobs_of(chosen, contestants, seeds, arguments.field_seeds, read_runs(path)))
    todo = [msgspec.structs.replace(job, one_caller=arguments.one_caller) for job in todo]
    carry_out(todo, path, arguments.jobs, arguments.seconds)
    names = {cell.name for cell in chosen}
    rows = table([run for run in read_runs(path) if run.cell in names])
    report(rows, contestants)
    with (arguments.out / "policy_grid.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Ratios.__struct_fields__)
        writer.writerows(
            [round(each, 4) if isinstance(each, float) else each for each in msgspec.structs.astuple(row)]
            for row in rows
        )
    plot(rows, contestants, arguments.out / "policy_grid.png")
    left = list(jobs_of(chosen, contestants, seeds, arguments.field_seeds, read_runs(path)))
    print(f"{len(left)} jobs are left; the same command goes on with them" if left else f"complete: {arguments.out}")


if __name__ == "__main__":
    main()
