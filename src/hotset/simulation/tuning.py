"""Tuning: which policy, eviction and settings serve a workload best on a machine, and how sure that is.

Candidates are compared by successive halving (Jamieson, Talwalkar, "Non-stochastic Best Arm Identification and
Hyperparameter Optimization", AISTATS 2016): all on a short prefix of the workload, the better half on one three times
as long, and so on. The gain of the winner is then measured on requests that had no part in choosing it: other seeds
where the seed makes the workload, else the trace's second half. So it is not flattered by having been chosen.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import islice, pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

from hotset.errors import ConfigurationError
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.eviction import EVICTIONS, make_eviction
from hotset.scheduling.policies import POLICIES, make_policy
from hotset.scheduling.policies.interface import PolicySettings
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.engine import Engine
from hotset.simulation.experiment import expected_requests
from hotset.simulation.hardware import Hardware
from hotset.simulation.metrics import Recorder
from hotset.simulation.statistics import confidence_interval, mean
from hotset.simulation.workloads import Arrival, Workload

SETTINGS: Mapping[str, Sequence[float]] = {
    "o3_limit": (0, 5, 10, 50, 100, 400),
    "max_skips": (100, 1_000),
    "max_wait_s": (10.0, 30.0, 300.0),
}
"""What is tried of each of ``PolicySettings`` beside its default, one at a time, with the policies that heed it."""
FIRST_PREFIX = 2_000
"""Requests of the first comparison."""
GROWTH = 3
FINALISTS = 3
"""So many are kept to the end."""
BLOCKS = 10
"""Parts of the second half of a trace without seeds: each gives one independent-enough value of the gain."""
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


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run the scheduler."""

    policy: str
    eviction: str
    settings: PolicySettings = PolicySettings()

    def changed(self) -> dict[str, float]:
        """The settings that are not at their default."""
        return {
            name: getattr(self.settings, name)
            for name in SETTINGS
            if getattr(self.settings, name) != getattr(_DEFAULTS, name)
        }


_DEFAULTS = PolicySettings()


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """A workload, and the machine that is to serve it."""

    workload: Workload
    hardware: Callable[[int], Hardware]
    """The machine and what the models cost there, by seed."""
    config: SchedulerConfig = SchedulerConfig()
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


def heeds(policy: str, setting: str) -> bool:
    """Whether a policy reads a setting: made with two values of it, it differs. Raises ``UnknownNameError``."""
    one, other = (
        make_policy(policy, msgspec.structs.replace(_DEFAULTS, **{setting: value})) for value in SETTINGS[setting][:2]
    )
    return vars(one) != vars(other)


def candidates(
    policies: Iterable[str] = tuple(POLICIES), evictions: Iterable[str] = tuple(EVICTIONS)
) -> list[Candidate]:
    """Every policy with every eviction, with default settings and with each setting changed alone."""
    names = list(evictions)
    found: list[Candidate] = []
    for policy in policies:
        changes = [{name: value} for name in SETTINGS if heeds(policy, name) for value in SETTINGS[name]]
        for eviction in names:
            make_eviction(eviction)
            found += [
                Candidate(policy=policy, eviction=eviction, settings=msgspec.structs.replace(_DEFAULTS, **change))
                for change in ({}, *changes)
            ]
    return list(dict.fromkeys(found))


def tune(
    problem: Problem,
    current: Candidate,
    tried: Sequence[Candidate],
    objective: Objective = Objective.MEAN,
    *,
    seeds: int = 5,
    first_seed: int = 0,
    seconds: float = math.inf,
    progress: Callable[[float], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuning:
    """Compare the candidates with the current setting, in about that many seconds.

    The first comparison and the measurement of the gain are carried out however long they take. As long as time
    suffices (``Tuning.complete``) equal arguments give equal results. Raises ``ConfigurationError`` for a workload
    without requests, and for goodput without a deadline.
    """
    if objective is Objective.GOODPUT and problem.deadline_s is None:
        raise ConfigurationError("goodput counts answers within a deadline: give one")
    tuner = _Tuner(problem, objective, _Watch(progress, clock, seconds))
    everyone = list(dict.fromkeys([current, *tried]))
    seeded = _depends_on_seed(problem, first_seed)
    total = _requests(problem.workload, first_seed)
    if not total:
        raise ConfigurationError("there is no request in this workload: nothing to tune for")
    choosing = list(range(first_seed, first_seed + (seeds if seeded else 1)))
    ladder = _ladder(total if seeded else math.ceil(total / 2), len(everyone))
    tuner.planned = sum(rung.requests * rung.candidates for rung in ladder) * len(choosing) + 2 * total * len(choosing)

    scores: dict[Candidate, Score] = {}
    reached = 0
    complete = True
    for rung in ladder:
        kept = everyone[: rung.candidates]
        if current not in kept:
            kept[-1] = current
        try:
            results = [tuner.score(candidate, choosing, rung.requests, hurry=reached > 0) for candidate in kept]
        except _OutOfTimeError:
            complete = False
            break
        reached = rung.requests
        scores |= {score.candidate: score for score in results}
        everyone = sorted(kept, key=lambda candidate: (tuner.cost(scores[candidate]), kept.index(candidate)))
    best = everyone[0]
    if seeded:
        fresh = range(first_seed + seeds, first_seed + 2 * seeds)
        gain = tuner.gain_on_seeds(best, current, fresh, reached)
    else:
        gain = tuner.gain_on_rest(best, current, first_seed, reached, min(total, 2 * reached))
    return Tuning(
        objective=objective,
        current=current,
        best=best,
        gain=gain,
        worthwhile=gain.ci95 is not None and gain.ci95[0] > 0,
        seeded=seeded,
        complete=complete,
        scores=sorted(scores.values(), key=lambda score: (-score.requests, tuner.cost(score))),
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
    """Tells how much is done, and when time is up."""

    def __init__(self, progress: Callable[[float], None], clock: Callable[[], float], seconds: float) -> None:
        self._progress = progress
        self._clock = clock
        self._seconds = seconds
        self._start_s = clock()

    def look(self, share: float, *, hurry: bool) -> None:
        used = (self._clock() - self._start_s) / self._seconds
        self._progress(min(1.0, max(share, used)))
        if hurry and used > CHOOSING_SHARE:
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

    def __init__(self, problem: Problem, objective: Objective, watch: _Watch) -> None:
        self._problem = problem
        self._objective = objective
        self._watch = watch
        self._done = 0
        self.planned = 1
        """Requests to simulate in all."""

    def score(self, candidate: Candidate, seeds: Sequence[int], requests: int, *, hurry: bool) -> Score:
        """Means over the seeds; raises ``_OutOfTimeError`` only when in a hurry."""
        runs = [self._play(candidate, seed, requests, hurry=hurry) for seed in seeds]
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

    def gain_on_seeds(self, best: Candidate, current: Candidate, seeds: Sequence[int], requests: int) -> Gain:
        """One value for each seed."""
        ours, theirs = (
            [self._value(self._play(candidate, seed, requests, hurry=False)) for seed in seeds]
            for candidate in (best, current)
        )
        return self._gain(ours, theirs)

    def gain_on_rest(self, best: Candidate, current: Candidate, seed: int, seen: int, requests: int) -> Gain:
        """One value for each of the parts that follow the requests that were seen when choosing (batch means)."""
        bounds = np.linspace(seen, requests, BLOCKS + 1).astype(int)
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
        scheduler = Scheduler(
            make_policy(candidate.policy, candidate.settings), make_eviction(candidate.eviction), problem.config
        )
        engine = Engine(scheduler, hardware, deadline_s=problem.deadline_s)
        recorder = engine.recorder = _Keeping(hardware.costs, len(hardware.gpus))
        times = array("d")

        def noted() -> Iterator[Arrival]:
            for arrival in islice(problem.workload.arrivals(seed), requests):
                times.append(arrival.time_s)
                yield arrival

        def heard(_: float) -> None:
            self._watch.look((self._done + len(times)) / self.planned, hurry=hurry)

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
