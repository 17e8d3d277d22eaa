"""Experiments: every policy on the same workloads, seed by seed, and what came out, with its uncertainty.

An experiment is a table of runs: workloads x variants (policy, eviction, limit, load scale) x seeds. Runs of one
workload and seed see the same arrivals and the same hardware, so differences between policies are paired.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any

import msgspec

from hotset.errors import ConfigurationError, NodeError, TraceError, UnknownNameError
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.policies.interface import PolicySettings
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.bounds import Yardsticks, yardsticks
from hotset.simulation.engine import Engine, Fault
from hotset.simulation.hardware import (
    COPY_BYTES_PER_S,
    PAPER_GPU_MEMORY_BYTES,
    PAPER_GPUS,
    Hardware,
    ModelCost,
    batching,
    copied,
    make_gpus,
    paper_costs,
    scaled,
)
from hotset.simulation.metrics import RunMetrics
from hotset.simulation.statistics import confidence_interval, mean
from hotset.simulation.workloads import Arrival, Workload

BASELINE_POLICY = "lb"
BASELINE_EVICTION = "lru"

_KEEP_ARRIVALS = 65_536
"""A workload of at most this many requests is read once per seed and kept for all variants, else read for each anew."""
_WORTH_PROCESSES = 60_000
"""Simulated requests from which on starting processes costs less time than it saves."""


def _nobody(share: float) -> None:
    """Nobody listens to the progress."""


class ClusterSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Equal GPUs, and where the models' costs come from. The defaults are the paper's."""

    gpus: int = PAPER_GPUS
    gpu_memory_bytes: int = PAPER_GPU_MEMORY_BYTES
    models: Mapping[str, ModelCost] | ModelCost | None = None
    """A table by function; one cost for all functions; None: the paper's 22 architectures, dealt out by the seed."""
    max_batch: int = 1
    """Most requests of one function that a run may join."""
    batch_marginal: float = 1.0
    """What each further request of a batch adds to a run, as a share of the first."""
    max_batch_wait_s: float = 0.0
    """How long requests may be held back to fill a batch."""
    min_copies: int = 0
    """Of every model, kept in GPU memory whether they are asked for or not."""
    max_copies: int | None = None
    """Most GPUs that hold one model at once; None: as many as it pays."""
    host_memory_bytes: int = 0
    """Of the one node that all GPUs are on, for models that left a GPU; 0: they are unloaded."""
    copy_bytes_per_s: float = COPY_BYTES_PER_S
    """Between host memory and a GPU, for models whose restore and offload times are not known."""
    overlap: bool = False
    """GPUs load and compute at the same time."""
    prefetch_recurring: bool = False
    """They also load what is about to be called."""

    def hardware(self, functions: Sequence[str], seed: int, load_scale: float = 1.0) -> Hardware:
        """The cluster for these functions. Raises ``ConfigurationError`` when one has no cost, or none fits a GPU."""
        models = self.models
        if models is None:
            costs = paper_costs(functions, seed, load_scale=load_scale)
        elif isinstance(models, ModelCost):
            costs = dict.fromkeys(functions, scaled(models, load_scale))
        else:
            missing = next((name for name in functions if name not in models), None)
            if missing is not None:
                raise ConfigurationError(f"the table of models has no row for function {missing!r}; add one")
            costs = {name: scaled(models[name], load_scale) for name in functions}
        if self.host_memory_bytes:
            costs = {name: copied(cost, self.copy_bytes_per_s) for name, cost in costs.items()}
        if self.max_batch > 1:
            batch = (self.max_batch, self.batch_marginal, self.max_batch_wait_s)
            costs = {name: batching(cost, *batch) for name, cost in costs.items()}
        if self.min_copies or self.max_copies is not None:
            bounds = {"min_copies": self.min_copies, "max_copies": self.max_copies}
            costs = {name: msgspec.structs.replace(cost, **bounds) for name, cost in costs.items()}
        smallest_bytes = min((cost.memory_bytes for cost in costs.values()), default=0)
        if smallest_bytes > self.gpu_memory_bytes:
            raise ConfigurationError(
                f"no model fits: the smallest takes {smallest_bytes} bytes, a GPU has {self.gpu_memory_bytes}; "
                "give GPUs more memory"
            )
        return Hardware(gpus=make_gpus(self.gpus, self.gpu_memory_bytes), costs=costs)


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """What differs between two runs of one workload and seed."""

    policy: str
    eviction: str = BASELINE_EVICTION
    o3_limit: int | None = None
    """None: the policy has no such limit."""
    load_scale: float = 1.0
    """Factor on every load time."""


class ExperimentSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to run. A seed decides the arrivals and which function has which architecture."""

    workloads: Sequence[Workload]
    policies: Sequence[str]
    evictions: Sequence[str] = (BASELINE_EVICTION,)
    o3_limits: Sequence[int] = (PolicySettings().o3_limit,)
    settings: PolicySettings = PolicySettings()
    """What else policies read; ``o3_limits`` says the limit."""
    load_scales: Sequence[float] = (1.0,)
    cluster: ClusterSpec = ClusterSpec()
    seeds: int = 1
    """How many: ``first_seed``, ``first_seed + 1``, ..."""
    first_seed: int = 0
    faults: Sequence[Fault] = ()
    deadline_s: float | None = None
    """After its arrival, within which each request is to be answered; one that cannot begin by then is rejected."""
    baseline: bool = True
    """Compare with LB and LRU even where they are not asked for (they are then run, but not listed)."""

    def __post_init__(self) -> None:
        if not (self.workloads and self.policies and self.evictions and self.o3_limits and self.load_scales):
            raise ConfigurationError(
                "an experiment needs at least one workload, policy, eviction, limit and load scale"
            )
        if self.seeds < 1:
            raise ConfigurationError(f"an experiment needs at least 1 seed, not {self.seeds}")
        if self.deadline_s is not None and self.deadline_s <= 0:
            raise ConfigurationError("a deadline must be above 0")
        if min(self.o3_limits) < 0 or min(self.load_scales) < 0:
            raise ConfigurationError("a load scale and an O3 limit must be 0 or more")

    def variants(self) -> list[Variant]:
        """Every combination, in the order asked for; a policy without an O3 limit is not repeated for each limit."""
        return [
            Variant(policy=policy, eviction=eviction, o3_limit=limit, load_scale=scale)
            for policy in self.policies
            for eviction in self.evictions
            for limit in (self.o3_limits if has_o3_limit(policy) else (None,))
            for scale in self.load_scales
        ]


class SeedRun(RunMetrics, frozen=True, kw_only=True):
    """One run, and what was possible on its workload."""

    seed: int
    ideal_mean_latency_s: float
    clairvoyant_miss_ratio: float


class VersusLb(msgspec.Struct, frozen=True, kw_only=True):
    """How a policy compares with LB (with LRU) on the same arrivals and hardware; from the means over all seeds."""

    latency_reduction: float
    """1 - mean latency / LB's."""
    miss_reduction: float
    """1 - miss ratio / LB's; 0 where LB has no misses."""
    speedup: float
    """LB's mean latency / mean latency."""
    ci95: dict[str, tuple[float, float]] | None
    """Of the mean of the same three figures taken seed by seed; None for one seed."""


class RunResult(RunMetrics, frozen=True, kw_only=True):
    """One row of an experiment. The figures of ``RunMetrics`` are means, over the seeds, of one run's figure."""

    policy: str
    eviction: str
    workload: str
    working_set: int
    """Functions that the workload may call."""
    o3_limit: int | None
    load_scale: float
    seeds: int
    first_seed: int
    ideal_mean_latency_s: float
    clairvoyant_miss_ratio: float
    vs_lb: VersusLb | None
    ci95: dict[str, tuple[float, float]] | None
    """95 % confidence interval of each figure's mean over seeds (Student's t); None for one seed."""
    per_seed: list[SeedRun]


FIGURES: tuple[str, ...] = (*RunMetrics.__struct_fields__, "ideal_mean_latency_s", "clairvoyant_miss_ratio")
"""The fields that are means over seeds."""


class _Case(msgspec.Struct, frozen=True, kw_only=True):
    """All runs of one workload and seed: what one process does at a time."""

    workload: Workload
    cluster: ClusterSpec
    variants: Sequence[Variant]
    settings: PolicySettings
    seed: int
    faults: Sequence[Fault]
    deadline_s: float | None


def has_o3_limit(policy: str) -> bool:
    """Whether a policy heeds the O3 limit: made with two limits, it differs. Raises ``UnknownNameError``."""
    one, other = (make_policy(policy, PolicySettings(o3_limit=limit)) for limit in (1, 2))
    return vars(one) != vars(other)


def run_experiment(
    spec: ExperimentSpec, progress: Callable[[float], None] = _nobody, jobs: int | None = None
) -> list[RunResult]:
    """Run everything; results are by workload, then in the order of ``spec.variants()``.

    ``progress`` hears the share done, 0 to 1. ``jobs`` bounds the processes (None: one per usable core); the results do
    not depend on it. Raises ``UnknownNameError`` for a policy or eviction nobody registered.
    """
    return run_experiments([spec], progress, jobs)[0]


def run_experiments(
    specs: Sequence[ExperimentSpec], progress: Callable[[float], None] = _nobody, jobs: int | None = None
) -> list[list[RunResult]]:
    """Several experiments with the same processes; otherwise like ``run_experiment`` for each."""
    played = _play_all([case for spec in specs for case in _cases(spec)], progress, jobs)
    return [_results(spec, played) for spec in specs]


def _cases(spec: ExperimentSpec) -> list[_Case]:
    for eviction in spec.evictions:
        make_eviction(eviction)
    return [
        _Case(
            workload=workload,
            cluster=spec.cluster,
            variants=_all_variants(spec),
            settings=spec.settings,
            seed=seed,
            faults=spec.faults,
            deadline_s=spec.deadline_s,
        )
        for workload in spec.workloads
        for seed in range(spec.first_seed, spec.first_seed + spec.seeds)
    ]


def _all_variants(spec: ExperimentSpec) -> list[Variant]:
    """Those that are listed and those that they are compared with."""
    baselines = [_baseline(scale) for scale in spec.load_scales] if spec.baseline else []
    return list(dict.fromkeys([*spec.variants(), *baselines]))


def _results(spec: ExperimentSpec, played: Iterator[list[SeedRun]]) -> list[RunResult]:
    """Takes this experiment's cases from what was played."""
    variants = _all_variants(spec)
    results: list[RunResult] = []
    for workload in spec.workloads:
        columns = zip(*islice(played, spec.seeds), strict=True)
        by_variant = {variant: list(column) for variant, column in zip(variants, columns, strict=True)}
        for variant in spec.variants():
            baseline = by_variant.get(_baseline(variant.load_scale))
            results.append(_summary(workload, variant, by_variant[variant], baseline))
    return results


def _baseline(load_scale: float) -> Variant:
    return Variant(policy=BASELINE_POLICY, eviction=BASELINE_EVICTION, load_scale=load_scale)


def _play_all(cases: list[_Case], progress: Callable[[float], None], jobs: int | None) -> Iterator[list[SeedRun]]:
    """Each case's runs, in order."""
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(cases))
    requests = sum(expected_requests(case.workload) * len(case.variants) for case in cases)
    if jobs < 2 or requests < _WORTH_PROCESSES:
        for done, case in enumerate(cases):
            yield _play(case, lambda share, done=done: progress((done + share) / len(cases)))  # type: ignore[misc]
        return
    # Spawned, not forked: the same on every platform and safe when the caller has threads.
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    runs_in_all, finished = sum(len(case.variants) for case in cases), 0
    try:
        for runs in pool.map(_play_elsewhere, cases):
            finished += len(runs)
            progress(finished / runs_in_all)
            yield runs
    except BrokenProcessPool:
        raise NodeError("a simulation process died, perhaps for want of memory; try again with one job") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _play_elsewhere(case: _Case) -> list[SeedRun]:
    try:
        return _play(case)
    except (TraceError, UnknownNameError) as error:
        raise ConfigurationError(str(error)) from None  # these two cannot be sent to another process


def _play(case: _Case, progress: Callable[[float], None] = _nobody) -> list[SeedRun]:
    workload, seed, count = case.workload, case.seed, len(case.variants)
    stream = workload.arrivals(seed)
    kept = list(islice(stream, _KEEP_ARRIVALS + 1))
    whole = len(kept) <= _KEEP_ARRIVALS
    functions, duration_s = workload.functions, workload.duration_s or 0.0
    possible = yardsticks(kept if whole else chain(kept, stream), case.cluster.hardware(functions, seed))
    del stream
    if not whole:
        kept.clear()
    runs: list[SeedRun] = []
    for number, variant in enumerate(case.variants):
        arrivals: Iterable[Arrival] = kept if whole else workload.arrivals(seed)

        def heard(now_s: float, number: int = number) -> None:
            progress((number + min(now_s / duration_s if duration_s else 0.0, 1.0)) / count)

        runs.append(_run(case, variant, arrivals, possible, heard))
        progress((number + 1) / count)
    return runs


def _run(
    case: _Case, variant: Variant, arrivals: Iterable[Arrival], possible: Yardsticks, heard: Callable[[float], None]
) -> SeedRun:
    settings, cluster = case.settings, case.cluster
    if variant.o3_limit is not None:
        settings = msgspec.structs.replace(settings, o3_limit=variant.o3_limit)
    config = SchedulerConfig(
        host_memory_bytes=cluster.host_memory_bytes,
        overlap=cluster.overlap,
        prefetch_recurring=cluster.prefetch_recurring,
    )
    scheduler = Scheduler(make_policy(variant.policy, settings), make_eviction(variant.eviction), config)
    hardware = case.cluster.hardware(case.workload.functions, case.seed, variant.load_scale)
    metrics = Engine(scheduler, hardware, case.faults, deadline_s=case.deadline_s).run(arrivals, heard)
    return SeedRun(seed=case.seed, **msgspec.structs.asdict(metrics), **msgspec.structs.asdict(possible))


def expected_requests(workload: Workload) -> float:
    """About how many requests a workload has; infinite when it cannot say."""
    requests = getattr(workload, "requests", None)
    if requests is not None:
        return float(sum(requests))
    rate, minutes = getattr(workload, "rate_per_minute", None), getattr(workload, "minutes", None)
    return float("inf") if rate is None or minutes is None else float(rate * minutes)


def _summary(workload: Workload, variant: Variant, runs: list[SeedRun], baseline: list[SeedRun] | None) -> RunResult:
    columns = {name: [getattr(run, name) for run in runs] for name in FIGURES}
    columns = {name: values for name, values in columns.items() if None not in values}
    means: dict[str, Any] = {name: _mean(values) for name, values in columns.items()}
    return RunResult(
        **msgspec.structs.asdict(variant),
        **means,
        workload=workload.name,
        working_set=len(workload.functions),
        seeds=len(runs),
        first_seed=runs[0].seed,
        vs_lb=_versus(runs, baseline) if baseline else None,
        ci95=_intervals(columns),
        per_seed=runs,
    )


def _versus(runs: list[SeedRun], baseline: list[SeedRun]) -> VersusLb | None:
    """None when a run completed nothing, so that there is nothing to compare."""
    if not all(run.completed for run in (*runs, *baseline)):
        return None
    pairs = list(zip(runs, baseline, strict=True))
    columns = {
        "latency_reduction": [1 - run.mean_latency_s / other.mean_latency_s for run, other in pairs],
        "miss_reduction": [_reduction(run.miss_ratio, other.miss_ratio) for run, other in pairs],
        "speedup": [other.mean_latency_s / run.mean_latency_s for run, other in pairs],
    }
    latency_s, lb_latency_s = (mean([run.mean_latency_s for run in side]) for side in (runs, baseline))
    misses, lb_misses = (mean([run.miss_ratio for run in side]) for side in (runs, baseline))
    return VersusLb(
        latency_reduction=1 - latency_s / lb_latency_s,
        miss_reduction=_reduction(misses, lb_misses),
        speedup=lb_latency_s / latency_s,
        ci95=_intervals(columns),
    )


def _reduction(value: float, before: float) -> float:
    return 1 - value / before if before else 0.0


def _intervals(columns: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]] | None:
    intervals = {name: confidence_interval(values) for name, values in columns.items()}
    return {name: interval for name, interval in intervals.items() if interval is not None} or None


def _mean(values: Sequence[float]) -> float:
    """The mean; of equal values, the value itself, so that counts stay whole numbers."""
    return values[0] if min(values) == max(values) else mean(values)
