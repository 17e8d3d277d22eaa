"""What a flood by one caller does to the others: their p99 with it over their p99 without it, in many kinds of cluster.

    python benchmarks/bench_floods.py                         # every cell, 3 seeds, the default policy
    python benchmarks/bench_floods.py --cells "12 GPUs, 10 callers" --seeds 10 --json
    python benchmarks/bench_floods.py --cells "223 a minute" --policies hotset,lalb_o3,lalb,mqfq_sticky

One caller sends ten times what his share of the GPUs' time would answer, were there no loads, of the others' functions
or of his own; the others together send what the cell says. Both runs have the same calls of the others. Models and
their times are the paper's, the queue holds 2,000. Answers are counted from the flood's beginning on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from statistics import fmean

import msgspec
from rich.console import Console
from rich.progress import track

from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.callers import FLOOD, Flood, Shared
from hotset.simulation.engine import Engine
from hotset.simulation.hardware import PAPER_GPU_MEMORY_BYTES, Hardware, copied, make_gpus, paper_costs
from hotset.simulation.workloads import Popularity, Process, Synthetic

TIMES_ITS_SHARE = 10
MOST_RATIO = 1.5
"""The bar."""
HOST_BYTES_PER_GPU = 16 * 1024**3
COPY_BYTES_PER_S = 12e9
RUN_S = 1.29
"""Mean run of the paper's models."""


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of cluster, its callers, and the flood."""

    gpus: int = 12
    callers: int = 10
    """The flooding one among them."""
    functions: int = 35
    """Of the others."""
    load: float = 0.4
    """Share of the GPUs' time that the others' runs take, were there no loads."""
    own: int = 0
    """Functions that only the flood calls; 0: the others'."""
    weight: float = 1.0
    """Of the flooding caller; the others have 1."""
    load_scale: float = 1.0
    begins: float = 0.0
    """When the flood begins, as a share of the run."""
    overlap: bool = False
    """Loads have a lane of their own, and host memory keeps what leaves a GPU."""
    max_batch: int = 1
    process: Process = Process.POISSON

    @property
    def name(self) -> str:
        parts = [f"{self.gpus} GPUs", f"{self.callers} callers", f"{60 * self.load * self.gpus / RUN_S:.0f} a minute"]
        parts.append(f"{self.functions} functions")
        parts.append(f"flood of {self.own} own" if self.own else "flood of theirs")
        parts += [f"weight {self.weight:g}"] * (self.weight != 1.0)
        parts += [f"loads x{self.load_scale:g}"] * (self.load_scale != 1.0)
        parts += [f"from {self.begins:.0%} on"] * (self.begins > 0.0)
        parts += ["overlap"] * self.overlap
        parts += [f"batches of {self.max_batch}"] * (self.max_batch > 1)
        parts += [self.process.value] * (self.process is not Process.POISSON)
        return ", ".join(parts)

    @property
    def minutes(self) -> float:
        """So long that the others' p99 rests on some thousand calls."""
        return max(6.0, 1_200 / (60 * self.load * self.gpus / RUN_S))

    def workload(self, *, flooded: bool) -> Shared:
        base = Synthetic(
            popularity=Popularity.zipf(self.functions),
            rate_per_minute=60 * self.load * self.gpus / RUN_S,
            minutes=self.minutes,
            process=self.process,
        )
        if not flooded:
            return Shared(base=base, callers=self.callers - 1)
        share = self.weight / (self.weight + self.callers - 1)
        flood = Flood(
            rate_per_minute=60 * TIMES_ITS_SHARE * share * self.gpus / RUN_S,
            own_functions=self.own,
            begins_s=self.begins * 60 * self.minutes,
            weight=self.weight,
        )
        return Shared(base=base, callers=self.callers - 1, flood=flood)


def cells() -> Iterator[Cell]:
    """All of them."""
    for load in (0.4, 0.54):  # 223 and 301 a minute
        for own in (0, 1, 3, 10, 35):
            yield Cell(load=load, own=own)
        yield Cell(load=load, functions=70)
        yield Cell(load=load, functions=70, own=10)
    for callers in (2, 4):
        for own in (0, 1, 10):
            yield Cell(callers=callers, own=own)
    for gpus, functions in ((1, 4), (2, 6), (4, 12)):
        for callers in (2, 4, 10):
            for own in (0, 1, 4):
                yield Cell(gpus=gpus, callers=callers, functions=functions, load=0.25, own=own)
    yield Cell(gpus=4, callers=4, functions=4, load=0.5)
    yield Cell(gpus=1, callers=4, functions=2, load=0.5, own=1)
    for own in (0, 10):
        yield Cell(own=own, begins=0.5)
        yield Cell(own=own, weight=3.0)
        yield Cell(own=own, load_scale=0.05, load=0.54)
        yield Cell(own=own, overlap=True)
        yield Cell(own=own, max_batch=8)
        yield Cell(own=own, process=Process.BURSTS)
    yield Cell(gpus=2, callers=4, functions=6, load=0.25, own=1, begins=0.5)
    yield Cell(gpus=2, callers=4, functions=6, load=0.25, own=1, overlap=True)


class Outcome(msgspec.Struct, frozen=True):
    """One cell with one seed."""

    cell: str
    policy: str
    seed: int
    p99_alone_s: float
    p99_flooded_s: float
    ratio: float
    others_answered: float
    """Share of the others' calls that were answered under the flood."""
    answered: float
    """The same of all calls."""
    jain: float
    """Jain's index of GPU seconds over weight, flood included."""


class _Measured(msgspec.Struct, frozen=True):
    p99_s: float
    others: int
    """Answers that the others got, from first to last."""
    answered: float
    jain: float


def measure(cell: Cell, policy: str, seed: int) -> Outcome:
    alone, flooded = (_run(cell, policy, seed, flooded=flooded) for flooded in (False, True))
    return Outcome(
        cell=cell.name,
        policy=policy,
        seed=seed,
        p99_alone_s=alone.p99_s,
        p99_flooded_s=flooded.p99_s,
        ratio=flooded.p99_s / alone.p99_s,
        others_answered=flooded.others / alone.others,
        answered=flooded.answered,
        jain=flooded.jain,
    )


def _run(cell: Cell, policy: str, seed: int, *, flooded: bool) -> _Measured:
    workload = cell.workload(flooded=flooded)
    costs = paper_costs(workload.functions, seed, load_scale=cell.load_scale)
    if cell.overlap:
        costs = {name: copied(cost, COPY_BYTES_PER_S) for name, cost in costs.items()}
    if cell.max_batch > 1:
        costs = {
            name: msgspec.structs.replace(cost, max_batch=cell.max_batch, batch_marginal=0.5)
            for name, cost in costs.items()
        }
    config = SchedulerConfig(
        max_queue=2_000, overlap=cell.overlap, host_memory_bytes=cell.gpus * HOST_BYTES_PER_GPU * cell.overlap
    )
    scheduler = Scheduler(make_policy(policy), make_eviction("hotset" if policy == "hotset" else "lru"), config)
    engine = Engine(scheduler, Hardware(gpus=make_gpus(cell.gpus, PAPER_GPU_MEMORY_BYTES), costs=costs))
    latencies_s: list[float] = []
    others, from_s = 0, cell.begins * 60 * cell.minutes

    def watch(caller: str, latency_s: float) -> None:
        nonlocal others
        others += caller != FLOOD
        if caller != FLOOD and engine.now_s - latency_s >= from_s:
            latencies_s.append(latency_s)

    engine.recorder.finished_for = watch  # type: ignore[method-assign]
    metrics = engine.run(workload.arrivals(seed))
    latencies_s.sort()
    usage = scheduler.cluster.queues.usage
    spent_s = [(each.run_s + each.load_s) / (cell.weight if caller == FLOOD else 1.0) for caller, each in usage.items()]
    jain = sum(spent_s) ** 2 / (len(spent_s) * sum(each * each for each in spent_s))
    return _Measured(latencies_s[int(0.99 * len(latencies_s))], others, metrics.completed / metrics.requests, jain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="", help="those whose name contains this; several after semicolons")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--policies", default="hotset")
    parser.add_argument("--json", action="store_true", help="one line for each cell, policy and seed")
    arguments = parser.parse_args()
    chosen = [cell for cell in cells() if any(part.strip() in cell.name for part in arguments.cells.split(";"))]
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    jobs = [(cell, policy, seed) for cell in chosen for policy in arguments.policies.split(",") for seed in seeds]
    by_row: dict[tuple[str, str], list[Outcome]] = {}
    for cell, policy, seed in track(jobs, "floods", console=Console(file=sys.stderr), transient=True):
        outcome = measure(cell, policy, seed)
        by_row.setdefault((cell.name, policy), []).append(outcome)
        if arguments.json:
            print(msgspec.json.encode(outcome).decode(), flush=True)
    if arguments.json:
        return
    for (name, policy), outcomes in by_row.items():
        ratios = [each.ratio for each in outcomes]
        alone_s, flooded_s = (fmean(getattr(each, which) for each in outcomes) for which in _P99S)
        print(
            f"{fmean(ratios):5.2f} (worst {max(ratios):5.2f}) {policy:8} p99 {alone_s:6.2f} -> {flooded_s:6.2f} s, "
            f"others answered {fmean(each.others_answered for each in outcomes):4.0%}, "
            f"all {fmean(each.answered for each in outcomes):4.0%}, "
            f"Jain {fmean(each.jain for each in outcomes):.2f}  {name}"
        )
    every = [each.ratio for outcomes in by_row.values() for each in outcomes]
    above = sum(fmean(each.ratio for each in outcomes) > MOST_RATIO for outcomes in by_row.values())
    print(
        f"{fmean(every):.2f} in the mean; above {MOST_RATIO}: {above} of {len(by_row)} cells, "
        f"{sum(ratio > MOST_RATIO for ratio in every)} of {len(every)} runs"
    )


_P99S = ("p99_alone_s", "p99_flooded_s")


if __name__ == "__main__":
    main()
