"""Tuning: which of many candidates serves a workload best on a machine, and how sure that is.

Candidates are compared by successive halving (Jamieson, Talwalkar, "Non-stochastic Best Arm Identification and
Hyperparameter Optimization", AISTATS 2016): all on a short prefix of the workload, the better half on one three times
as long, and so on. The few best are then refined, one kind of setting after the other, in the same way. The gain of the
winner is measured on requests that had no part in choosing it: other seeds
where the seed makes the workload, else the trace's second half. So it is not flattered by having been chosen.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import islice, pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

from hotset.errors import ConfigurationError
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.candidates import Candidate
from hotset.simulation.engine import Engine
from hotset.simulation.experiment import expected_requests
from hotset.simulation.hardware import Hardware
from hotset.simulation.metrics import Recorder
from hotset.simulation.statistics import confidence_interval, mean
from hotset.simulation.workloads import Arrival, Workload

FIRST_PREFIX = 2_000
"""Requests of the first comparison."""
GROWTH = 3
FINALISTS = 3
"""So many are kept to the end, and refined."""
BLOCKS = 10
"""Parts of the second half of a trace without seeds: each gives one independent-enough value of the gain."""
LIKELY_VARIATIONS = 10
"""Of a candidate, when it is refined; for the progress bar."""
CHOOSING_SHARE = 0.6
"""Of the time given; the rest is for measuring the gain."""


class Objective(Enum):
    """What to make small, or (goodput) large."""

    MEAN = "mean"
    """Mean latency."""
    P99 = "p99"
    """The latency that 1 request in 100 exceeds."""
    GOODPUT = "goodput"
    """Share of requests that are answered within their deadline."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """A workload, and the machine that is to serve it."""

    workload: Workload
    hardware: Callable[[int], Hardware]
    """The machine and what the models cost there, by seed."""
    config: SchedulerConfig = SchedulerConfig()
    """What candidates do not say."""
    deadline_s: float | None = None
    """Within which each request must be answered; None: whenever."""


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """How a candidate did on the longest prefix on which it was tried; means over seeds."""

    candidate: Candidate
    requests: int
    """Of one run."""
    objective: float
    """Seconds, or a share."""
    mean_latency_s: float
    p99_latency_s: float
    miss_ratio: float


class Gain(msgspec.Struct, frozen=True, kw_only=True):
    """How much better than the current setting, on requests that had no part in choosing.

    Of a latency: the share of it that is saved. Of goodput: the share of requests that are answered in time
    and were not before.
    """

    mean: float
    ci95: tuple[float, float] | None
    """95 % confidence interval (Student's t); None: a single value, of which nothing is known."""
    values: int
    """Seeds, or parts of the trace, that it is the mean of."""


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """What came out."""

    objective: Objective
    current: Candidate
    best: Candidate
    """The best of the longest comparison."""
    gain: Gain
    """Of ``best`` over ``current``."""
    worthwhile: bool
    """The whole interval of the gain is above zero: it is no noise."""
    seeded: bool
    """The gain's values are of other seeds; False: of later parts of the same trace."""
    complete: bool
    """Time sufficed for all that was to be compared; False: the choice rests on a shorter prefix."""
    scores: list[Score]
    """Of all candidates: those that were tried longest first, best first."""

    @property
    def choice(self) -> Candidate:
        """What to set: the best, or the current if that is not surely worse."""
        return self.best if self.worthwhile else self.current


Refine = Callable[[Candidate], Sequence[Candidate]]
"""Variations of a candidate that did well, itself not among them."""


def tune(
    problem: Problem,
    current: Candidate,
    tried: Sequence[Candidate],
    objective: Objective = Objective.MEAN,
    *,
    refine: Sequence[Refine] = (),
    seeds: int = 5,
    first_seed: int = 0,
    seconds: float = math.inf,
    progress: Callable[[float], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuning:
    """Compare the candidates with the current setting, then variations of the best, in about that many seconds.

    The first comparison and the measurement of the gain are carried out however long they take. As long as time
    suffices (``Tuning.complete``) equal arguments give equal results. Raises ``ConfigurationError`` for a workload
    without requests, and for goodput without a deadline.
    """
    if objective is Objective.GOODPUT and problem.deadline_s is None:
        raise ConfigurationError("goodput counts answers within a deadline: give one")
    seeded = _depends_on_seed(problem, first_seed)
    total = _requests(problem.workload, first_seed)
    if not total:
        raise ConfigurationError("there is no request in this workload: nothing to tune for")
    choosing = range(first_seed, first_seed + (seeds if seeded else 1))
    most = total if seeded else math.ceil(total / 2)
    everyone = list(dict.fromkeys([current, *tried]))
    work = sum(rung.requests * rung.candidates for rung in _ladder(most, len(everyone)))
    work += sum(rung.requests * rung.candidates for rung in _ladder(most, FINALISTS * LIKELY_VARIATIONS)) * len(refine)
    watch = _Watch(progress, clock, seconds, planned=work * len(choosing) + 2 * total * len(choosing))
    tuner = _Tuner(problem, objective, watch, choosing)

    complete = True
    for number, vary in enumerate((None, *refine), start=1):
        if vary is not None:
            finalists = everyone[:FINALISTS]
            everyone = list(dict.fromkeys([*finalists, current, *(more for each in finalists for more in vary(each))]))
        watch.give(CHOOSING_SHARE * number / (1 + len(refine)))
        complete &= tuner.halve(everyone, current, most)
    best = everyone[0]
    if seeded:
        gain = tuner.gain_on_seeds(best, current, range(first_seed + seeds, first_seed + 2 * seeds))
    else:
        gain = tuner.gain_on_rest(best, current, first_seed, min(total, 2 * tuner.reached))
    return Tuning(
        objective=objective,
        current=current,
        best=best,
        gain=gain,
        worthwhile=gain.ci95 is not None and gain.ci95[0] > 0,
        seeded=seeded,
        complete=complete,
        scores=sorted(tuner.scores.values(), key=lambda score: (-score.requests, tuner.cost(score))),
    )


class _Rung(msgspec.Struct, frozen=True):
    """One comparison."""

    requests: int
    candidates: int


def _ladder(most: int, count: int) -> list[_Rung]:
    """Prefixes that grow by ``GROWTH`` while the better half is kept; the last is as long as possible."""
    rungs = []
    requests = FIRST_PREFIX
    while requests < most:
        rungs.append(_Rung(requests, count))
        requests *= GROWTH
        count = max(min(count, FINALISTS), math.ceil(count / 2))
    return [*rungs, _Rung(most, count)]


class _OutOfTimeError(Exception):
    """No time is left for this comparison."""


class _Watch:
    """Tells how much is done, and when the time that was given for something is up."""

    def __init__(
        self, progress: Callable[[float], None], clock: Callable[[], float], seconds: float, planned: int
    ) -> None:
        self._progress = progress
        self._clock = clock
        self._seconds = seconds
        self._start_s = clock()
        self._planned = planned
        """Requests to simulate in all, about."""
        self._until = 1.0
        self._told = 0.0

    def give(self, until: float) -> None:
        """What comes next has time until that share of all is used."""
        self._until = until

    def look(self, done: int, *, hurry: bool) -> None:
        """So many requests were simulated; raises ``_OutOfTimeError`` if time is up, and only when in a hurry."""
        used = (self._clock() - self._start_s) / self._seconds
        self._told = max(self._told, min(1.0, max(done / self._planned, used)))
        self._progress(self._told)
        if hurry and used > self._until:
            raise _OutOfTimeError


class _Run(msgspec.Struct, frozen=True):
    """One simulated run, request by request."""

    arrivals_s: NDArray[np.float64]
    """Of all requests."""
    ended_from_s: NDArray[np.float64]
    """Arrivals of those that were answered."""
    latencies_s: NDArray[np.float64]
    miss_ratio: float

    def part(self, first: int, last: int) -> _Run:
        """That of the requests ``first`` to ``last`` in order of arrival."""
        times = self.arrivals_s
        begin_s = _between(times, first)
        end_s = _between(times, last)
        inside = (self.ended_from_s >= begin_s) & (self.ended_from_s < end_s)
        return _Run(times[first:last], self.ended_from_s[inside], self.latencies_s[inside], self.miss_ratio)


def _between(times: NDArray[np.float64], index: int) -> float:
    """A moment before that arrival and after the one before it: an arrival that was worked out from a completion and a
    latency is not exact."""
    if index == 0:
        return -math.inf
    return math.inf if index == len(times) else float(times[index - 1] + times[index]) / 2


class _Keeping(Recorder):
    """Also keeps every latency."""

    def __init__(self, functions: Mapping[str, object], gpus: int) -> None:
        super().__init__(functions, gpus)
        self.from_s = array("d")
        self.latencies_s = array("d")

    def finished(self, function: str, latency_s: float, now_s: float) -> None:
        super().finished(function, latency_s, now_s)
        self.from_s.append(now_s - latency_s)
        self.latencies_s.append(latency_s)


class _Tuner:
    """Runs candidates on a problem."""

    def __init__(self, problem: Problem, objective: Objective, watch: _Watch, seeds: Sequence[int]) -> None:
        self._problem = problem
        self._objective = objective
        self._watch = watch
        self._seeds = seeds
        self._done = 0
        self.scores: dict[Candidate, Score] = {}
        """Of every candidate, the one of its longest run."""
        self.reached = 0
        """Requests of the longest comparison that was finished."""

    def halve(self, everyone: list[Candidate], current: Candidate, most: int) -> bool:
        """Sort the candidates, best first, dropping the worse half on the way but never the current one.

        False: time ran out, and the order is that of the longest comparison that was finished, if any was.
        """
        for rung in _ladder(most, len(everyone)):
            kept = everyone[: rung.candidates]
            if current not in kept:
                kept[-1] = current
            try:
                results = {each: self._score(each, rung.requests, hurry=self.reached > 0) for each in kept}
            except _OutOfTimeError:
                return False
            self.reached = max(self.reached, rung.requests)
            self.scores |= results
            everyone[:] = sorted(kept, key=lambda each: (self.cost(results[each]), kept.index(each)))
        return True

    def _score(self, candidate: Candidate, requests: int, *, hurry: bool) -> Score:
        """Means over the seeds."""
        known = self.scores.get(candidate)
        if known is not None and known.requests == requests:
            return known
        runs = [self._play(candidate, seed, requests, hurry=hurry) for seed in self._seeds]
        return Score(
            candidate=candidate,
            requests=len(runs[0].arrivals_s),
            objective=mean([self._value(run) for run in runs]),
            mean_latency_s=mean([_mean_s(run) for run in runs]),
            p99_latency_s=mean([_p99_s(run) for run in runs]),
            miss_ratio=mean([run.miss_ratio for run in runs]),
        )

    def cost(self, score: Score) -> float:
        """What is to be small."""
        return -score.objective if self._objective is Objective.GOODPUT else score.objective

    def gain_on_seeds(self, best: Candidate, current: Candidate, seeds: Sequence[int]) -> Gain:
        """One value for each seed."""
        ours, theirs = (
            [self._value(self._play(candidate, seed, self.reached, hurry=False)) for seed in seeds]
            for candidate in (best, current)
        )
        return self._gain(ours, theirs)

    def gain_on_rest(self, best: Candidate, current: Candidate, seed: int, requests: int) -> Gain:
        """One value for each of the parts that follow the requests that were seen when choosing (batch means)."""
        bounds = np.linspace(self.reached, requests, BLOCKS + 1).astype(int)
        parts = [(int(first), int(last)) for first, last in pairwise(bounds) if first < last]
        ours, theirs = (
            [self._value(run.part(*part)) for part in parts]
            for run in (self._play(candidate, seed, requests, hurry=False) for candidate in (best, current))
        )
        return self._gain(ours, theirs)

    def _gain(self, ours: Sequence[float], theirs: Sequence[float]) -> Gain:
        if self._objective is Objective.GOODPUT:
            gains = [our - their for our, their in zip(ours, theirs, strict=True)]
        else:
            whole_s = mean(theirs) if theirs else 0.0
            gains = [(their - our) / whole_s if whole_s else 0.0 for our, their in zip(ours, theirs, strict=True)]
        return Gain(mean=mean(gains) if gains else 0.0, ci95=confidence_interval(gains), values=len(gains))

    def _value(self, run: _Run) -> float:
        if self._objective is Objective.MEAN:
            return _mean_s(run)
        if self._objective is Objective.P99:
            return _p99_s(run)
        within_s = math.inf if self._problem.deadline_s is None else self._problem.deadline_s
        return float(np.count_nonzero(run.latencies_s <= within_s)) / max(len(run.arrivals_s), 1)

    def _play(self, candidate: Candidate, seed: int, requests: int, *, hurry: bool) -> _Run:
        problem = self._problem
        hardware = problem.hardware(seed)
        config = candidate.applied_to(problem.config)
        scheduler = Scheduler(
            make_policy(candidate.policy, candidate.settings), make_eviction(candidate.eviction), config
        )
        engine = Engine(scheduler, hardware, deadline_s=problem.deadline_s)
        recorder = engine.recorder = _Keeping(hardware.costs, len(hardware.gpus))
        times = array("d")

        def noted() -> Iterator[Arrival]:
            for arrival in islice(problem.workload.arrivals(seed), requests):
                times.append(arrival.time_s)
                yield arrival

        def heard(_: float) -> None:
            self._watch.look(self._done + len(times), hurry=hurry)

        heard(0.0)
        metrics = engine.run(noted(), heard)
        self._done += len(times)
        return _Run(np.array(times), np.array(recorder.from_s), np.array(recorder.latencies_s), metrics.miss_ratio)


def _mean_s(run: _Run) -> float:
    return float(run.latencies_s.mean()) if len(run.latencies_s) else 0.0


def _p99_s(run: _Run) -> float:
    return float(np.percentile(run.latencies_s, 99, method="inverted_cdf")) if len(run.latencies_s) else 0.0


def _depends_on_seed(problem: Problem, seed: int) -> bool:
    """Whether another seed gives other arrivals or other models; the first requests tell."""
    one, other = (list(islice(problem.workload.arrivals(each), FIRST_PREFIX)) for each in (seed, seed + 1))
    return one != other or problem.hardware(seed) != problem.hardware(seed + 1)


def _requests(workload: Workload, seed: int) -> int:
    expected = expected_requests(workload)
    return math.ceil(expected) if math.isfinite(expected) else sum(1 for _ in workload.arrivals(seed))
