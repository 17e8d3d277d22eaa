"""Whether the default policy answers as many in time as plain order of arrival (``lb``): random small clusters.

    python benchmarks/bench_goodput.py                   # 4,000 of them, three minutes
    python benchmarks/bench_goodput.py --first 1 --cases 500

1 to 6 GPUs, 2 to 20 models, 50 to 800 requests at 1 to 5 times the load that fits were nothing ever loaded. A deadline
is told to the scheduler, or only counted, or there is none: then every answer counts, and the sooner all are given the
better. A cluster in which fewer are answered is played again with other arrivals, to tell what it does to a cluster
from what a few arrivals do.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterable
from statistics import mean, stdev

import msgspec

from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.engine import Engine
from hotset.simulation.hardware import Hardware, ModelCost, make_gpus
from hotset.simulation.workloads import Arrival

CHANCE_T = 2.13
"""Student's t of 16 differences that chance exceeds, on one side, in one of 40 cases."""


class Case(msgspec.Struct, frozen=True):
    """One cluster and what it is asked for."""

    costs: dict[str, ModelCost]
    gpus: int
    memory_bytes: int
    weights: dict[str, float]
    """How often each model is asked for."""
    per_s: float
    requests: int
    bursts: bool
    arrivals: list[Arrival]
    deadline_s: float | None
    told: bool

    @property
    def kind(self) -> str:
        if self.deadline_s is None:
            return "no deadline"
        return "deadlines told" if self.told else "deadlines not told"

    def again(self, seed: str) -> Case:
        """The same cluster, asked for the same at other moments."""
        arrivals = _arrivals(random.Random(seed), self.weights, self.per_s, self.requests, self.bursts)
        return msgspec.structs.replace(self, arrivals=arrivals)


class Outcome(msgspec.Struct, frozen=True):
    good: int
    """Answers in time."""
    good_per_s: float


class Comparison(msgspec.Struct, frozen=True):
    """Of one cluster, over several arrivals: what counts there, of the default policy and of order of arrival."""

    ours: list[float]
    fifo: list[float]

    @property
    def ratio(self) -> float:
        return mean(self.ours) / mean(self.fifo) if any(self.fifo) else 1.0

    @property
    def is_below(self) -> bool:
        return mean(self.ours) < mean(self.fifo)

    @property
    def is_beyond_chance(self) -> bool:
        """It is below, and by more than chance would have it."""
        apart = [ours - fifo for ours, fifo in zip(self.ours, self.fifo, strict=True)]
        return mean(apart) < -CHANCE_T * stdev(apart) / math.sqrt(len(apart))


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
    weights = {name: 1 / rank**exponent for rank, name in enumerate(names, 1)}
    mean_run_s = sum(weight * costs[name].inference_s for name, weight in weights.items()) / sum(weights.values())
    per_s = rng.choice([1.0, 1.2, 1.5, 2, 3, 5]) * gpus / mean_run_s
    requests, bursts = rng.choice([50, 100, 200, 400, 800]), rng.random() < 0.3
    arrivals = _arrivals(rng, weights, per_s, requests, bursts)
    deadline_s = rng.choice([None, None, 2, 5, 10, 20, 60])
    told = deadline_s is not None and rng.random() < 0.5
    return Case(costs, gpus, memory, weights, per_s, requests, bursts, arrivals, deadline_s, told)


def _arrivals(
    rng: random.Random, weights: dict[str, float], per_s: float, requests: int, bursts: bool
) -> list[Arrival]:
    time_s, arrivals, names, shares = 0.0, list[Arrival](), list(weights), list(weights.values())
    for _ in range(requests):
        if not bursts:
            time_s += rng.expovariate(per_s)
        elif rng.random() < 0.1:
            time_s += rng.expovariate(per_s / 10)
        arrivals.append(Arrival(time_s, rng.choices(names, shares)[0]))
    return arrivals


def play(case: Case, policy: str, eviction: str) -> Outcome:
    hardware = Hardware(gpus=make_gpus(case.gpus, case.memory_bytes), costs=case.costs)
    scheduler = Scheduler(make_policy(policy), make_eviction(eviction))
    engine = Engine(scheduler, hardware, deadline_s=case.deadline_s if case.told else None)
    engine.recorder.deadline_s = math.inf if case.deadline_s is None else case.deadline_s
    metrics = engine.run(case.arrivals)
    return Outcome(round(metrics.goodput_per_s * metrics.makespan_s), metrics.goodput_per_s)


def compare(cases: Iterable[Case]) -> Comparison:
    """The default policy with plain order of arrival: by answers in time; by their rate where all count."""
    ours, fifo = list[float](), list[float]()
    for case in cases:
        for policy, eviction, counted in (("hotset", "hotset", ours), ("lb", "lru", fifo)):
            outcome = play(case, policy, eviction)
            counted.append(outcome.good_per_s if case.deadline_s is None else outcome.good)
    return Comparison(ours, fifo)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=4_000)
    parser.add_argument("--first", type=int, default=700_000, help="seed of the first")
    parser.add_argument("--again", type=int, default=16, help="times that a cluster with fewer answers is played again")
    arguments = parser.parse_args()
    first: dict[str, list[Comparison]] = {}
    again: dict[str, list[tuple[Comparison, str]]] = {}
    for seed in range(arguments.first, arguments.first + arguments.cases):
        case = draw(seed)
        once = compare([case])
        first.setdefault(case.kind, []).append(once)
        if once.ours[0] < once.fifo[0] * (0.999 if case.deadline_s is None else 1.0):
            more = compare(case.again(f"{seed}:{number}") for number in range(1, arguments.again + 1))
            what = f"{case.gpus} GPUs, {len(case.costs)} models, deadline {case.deadline_s}, seed {seed}"
            again.setdefault(case.kind, []).append((more, what))
    for kind, cases in sorted(first.items()):
        ours, fifo = (mean(getattr(one, side)[0] for one in cases) for side in ("ours", "fifo"))
        fewer = again.get(kind, [])
        below = [one for one in fewer if one[0].is_below]
        beyond = sorted((one for one in below if one[0].is_beyond_chance), key=lambda one: one[0].ratio)
        print(
            f"{kind}: {ours / fifo:.2f} times as many as in order of arrival, but fewer in {len(fewer)} of {len(cases)}"
        )
        print(f"    with {arguments.again} other arrivals fewer in {len(below)}, beyond chance in {len(beyond)}")
        for more, what in beyond:
            print(f"    {more.ratio:.3f}: {mean(more.ours):.4g} for {mean(more.fifo):.4g}, {what}")


if __name__ == "__main__":
    main()
