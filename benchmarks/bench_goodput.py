"""Whether the default policy answers as many in time as plain order of arrival (``lb``): random small clusters.

    python benchmarks/bench_goodput.py                   # 4,000 of them, a minute
    python benchmarks/bench_goodput.py --first 1 --cases 500

1 to 6 GPUs, 2 to 20 models, 50 to 800 requests at 1 to 5 times the load that fits were nothing ever loaded. A deadline
is told to the scheduler, or only counted, or there is none: then every answer counts, and the sooner all are given the
better.
"""

from __future__ import annotations

import argparse
import math
import random

import msgspec

from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.engine import Engine
from hotset.simulation.hardware import Hardware, ModelCost, make_gpus
from hotset.simulation.workloads import Arrival


class Case(msgspec.Struct, frozen=True):
    """One cluster and what it is asked for."""

    costs: dict[str, ModelCost]
    gpus: int
    memory_bytes: int
    arrivals: list[Arrival]
    deadline_s: float | None
    told: bool

    @property
    def kind(self) -> str:
        if self.deadline_s is None:
            return "no deadline"
        return "deadlines told" if self.told else "deadlines not told"


class Outcome(msgspec.Struct, frozen=True):
    good: int
    """Answers in time."""
    good_per_s: float


def draw(seed: int) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    models, gpus = rng.choice([2, 3, 4, 6, 8, 12, 20]), rng.choice([1, 1, 2, 3, 4, 6])
    memory = 10 * rng.choice([1, 2, 3, 4, 6])
    costs = {
        f"m{number}": ModelCost(
            memory_bytes=min(memory, rng.choice([5, 10, 10, 10, 20, 30])),
            load_s=rng.choice([0, 0.1, 0.5, 1, 2, 4, 8]),
            inference_s=rng.choice([0.05, 0.1, 0.5, 1, 1, 2, 4]),
        )
        for number in range(models)
    }
    exponent, names = rng.choice([0, 0.5, 0.9, 1.2, 2]), list(costs)
    rng.shuffle(names)
    weights = [1 / rank**exponent for rank in range(1, models + 1)]
    named = zip(weights, names, strict=True)
    mean_run_s = sum(weight * costs[name].inference_s for weight, name in named) / sum(weights)
    per_s = rng.choice([1.0, 1.2, 1.5, 2, 3, 5]) * gpus / mean_run_s
    requests, bursts = rng.choice([50, 100, 200, 400, 800]), rng.random() < 0.3
    time_s, arrivals = 0.0, []
    for _ in range(requests):
        if not bursts:
            time_s += rng.expovariate(per_s)
        elif rng.random() < 0.1:
            time_s += rng.expovariate(per_s / 10)
        arrivals.append(Arrival(time_s, rng.choices(names, weights)[0]))
    deadline_s = rng.choice([None, None, 2, 5, 10, 20, 60])
    return Case(costs, gpus, memory, arrivals, deadline_s, told=deadline_s is not None and rng.random() < 0.5)


def play(case: Case, policy: str, eviction: str) -> Outcome:
    hardware = Hardware(gpus=make_gpus(case.gpus, case.memory_bytes), costs=case.costs)
    scheduler = Scheduler(make_policy(policy), make_eviction(eviction))
    engine = Engine(scheduler, hardware, deadline_s=case.deadline_s if case.told else None)
    engine.recorder.deadline_s = math.inf if case.deadline_s is None else case.deadline_s
    metrics = engine.run(case.arrivals)
    return Outcome(round(metrics.goodput_per_s * metrics.makespan_s), metrics.goodput_per_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=4_000)
    parser.add_argument("--first", type=int, default=700_000, help="seed of the first")
    arguments = parser.parse_args()
    drawn: dict[str, int] = {}
    below: dict[str, list[tuple[float, str]]] = {}
    for seed in range(arguments.first, arguments.first + arguments.cases):
        case = draw(seed)
        ours, fifo = play(case, "hotset", "hotset"), play(case, "lb", "lru")
        drawn[case.kind] = drawn.get(case.kind, 0) + 1
        fewer = ours.good < fifo.good
        if fewer or (case.deadline_s is None and ours.good_per_s < 0.999 * fifo.good_per_s):
            ratio = ours.good / fifo.good if fewer else ours.good_per_s / fifo.good_per_s
            line = f"{ratio:.2f}: {ours.good} for {fifo.good}, {case.gpus} GPUs, {len(case.costs)} models, seed {seed}"
            below.setdefault(case.kind, []).append((ratio, line))
    for kind, cases in sorted(drawn.items()):
        worst = sorted(below.get(kind, []))
        print(f"{kind}: below order of arrival in {len(worst)} of {cases}")
        for _, line in worst[:5]:
            print(f"    {line}")


if __name__ == "__main__":
    main()
