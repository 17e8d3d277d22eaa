"""The paper's evaluation, run again: which experiments it takes, what the paper says came out, and whether it does.

"GPU-enabled Function-as-a-Service for Machine Learning Inference", Zhao, Jha, Hong, IPDPS 2023 (arXiv 2303.05601).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum

import msgspec

from hotset.errors import ConfigurationError
from hotset.scheduling.policies.interface import PolicySettings
from hotset.simulation.experiment import ExperimentSpec, RunResult, SeedRun, run_experiments
from hotset.simulation.presets import PRESETS, Preset, TraceUse, from_trace, synthetic
from hotset.simulation.traces.trace import Trace
from hotset.simulation.working_set import WorkingSet
from hotset.simulation.workloads import Workload

O3_LIMITS = tuple(range(0, 50, 5))
O3_LIMIT = PolicySettings().o3_limit
ZIPF_EXPONENTS = (0.5, 0.7, 0.9, 1.1, 1.2)
LOAD_SCALES = (0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0)
_PLAUSIBLE_LOADS = 0.5
"""The profile is recalled, but not so wrong that loads take less than half of what it says."""
CHOICES = {
    "the busiest": WorkingSet(),
    "without the first": WorkingSet(skip=1),
    "without the first 5": WorkingSet(skip=5),
    "http only": WorkingSet(trigger="http"),
}
"""Ways to take a working set from a trace."""
_SENSITIVITY_SEEDS = 4
"""At most so many seeds for the what-ifs: they show a direction, the main runs the figures."""
_CLOSE = 0.02
"""A reduction within two percentage points agrees."""
_CLOSE_SPEEDUP = 0.1
"""A speed-up within a tenth of the paper's agrees."""


class Provenance(Enum):
    """How sure it is that the paper says so."""

    STATED = "stated"
    """In the paper's abstract or in notes made from the paper."""
    RECALLED = "recalled"
    """From memory of the paper, not checked against its text."""


class Figure(Enum):
    """What a claim is about; the values are fields of ``VersusLb``."""

    LATENCY = "latency_reduction"
    MISSES = "miss_reduction"
    SPEEDUP = "speedup"


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """One number of the paper."""

    text: str
    figure: Figure
    value: float
    """A share for reductions, a factor for a speed-up."""
    policy: str | None = None
    """None: the best of all."""
    working_set: int | None = None
    provenance: Provenance = Provenance.STATED
    note: str = ""
    """What about it is not certain."""


_WHICH = "the number of functions is recalled"
CLAIMS = (
    Claim(text="LALB cuts LB's average latency, 15 functions", figure=Figure.LATENCY, value=0.9774, policy="lalb",
          working_set=15, note=_WHICH),
    Claim(text="LALB cuts LB's average latency, 25 functions", figure=Figure.LATENCY, value=0.9333, policy="lalb",
          working_set=25, note=_WHICH),
    Claim(text="LALB cuts LB's average latency, 35 functions", figure=Figure.LATENCY, value=0.7943, policy="lalb",
          working_set=35),
    Claim(text="LALB cuts LB's miss ratio, 35 functions", figure=Figure.MISSES, value=0.6521, policy="lalb",
          working_set=35),
    Claim(text="LALB+O3 cuts LB's average latency, 35 functions", figure=Figure.LATENCY, value=0.9693, policy="lalb_o3",
          working_set=35),
    Claim(text="LALB+O3 cuts LB's miss ratio, 35 functions", figure=Figure.MISSES, value=0.8116, policy="lalb_o3",
          working_set=35),
    Claim(text="Best speed-up over LB", figure=Figure.SPEEDUP, value=48.0),
)  # fmt: skip


class Outcome(Enum):
    """How a claim fared."""

    AGREES = "agrees"
    MORE = "gains more here"
    LESS = "gains less here"


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """A claim beside what came out here."""

    claim: Claim
    ours: float
    policy: str
    working_set: int
    ci95: tuple[float, float] | None
    lowest: float
    """Over single runs, one per seed."""
    highest: float
    outcome: Outcome
    why: str


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was run."""

    source: str
    """Where the main workload comes from, in a few words."""
    traced: bool
    seeds: int
    main: Sequence[RunResult]
    """Three policies on three working sets, by working set."""
    limits: Sequence[RunResult]
    """LALB+O3 with each of ``O3_LIMITS``, by working set."""
    popularity: Sequence[RunResult]
    """Synthetic workloads with each of ``ZIPF_EXPONENTS``."""
    loads: Sequence[RunResult]
    """The main workload's largest working set with each of ``LOAD_SCALES``."""
    choices: Sequence[RunResult]
    """The trace with each of ``CHOICES`` that it can serve; empty without a trace."""


def _nobody(share: float) -> None:
    """Nobody listens to the progress."""


def evaluate(
    seeds: int, trace: Trace | None = None, progress: Callable[[float], None] = _nobody, jobs: int | None = None
) -> Evaluation:
    """Run the paper's evaluation and three what-ifs. ``progress`` hears the share done, 0 to 1.

    Raises what ``replay`` raises when the trace cannot serve the paper's working sets.
    """
    base = PRESETS["paper"]
    sizes, policies = base.working_sets, base.policies
    main = [_main_workload(size, base, trace, WorkingSet()) for size in sizes]
    few = min(seeds, _SENSITIVITY_SEEDS)
    specs = [
        ExperimentSpec(workloads=main, policies=policies, seeds=seeds),
        ExperimentSpec(workloads=main, policies=["lalb_o3"], o3_limits=O3_LIMITS, seeds=few, baseline=False),
        ExperimentSpec(
            workloads=[synthetic(size, base, zipf) for zipf in ZIPF_EXPONENTS for size in sizes],
            policies=policies,
            seeds=few,
        ),
        ExperimentSpec(workloads=main[-1:], policies=policies, load_scales=LOAD_SCALES, seeds=few),
    ]
    if trace is not None:
        specs.append(ExperimentSpec(workloads=_chosen(base, trace), policies=policies, seeds=few))
    results = run_experiments(specs, progress, jobs)
    return Evaluation(
        source=main[0].name if trace is None else f"{trace.path.name} ({trace.format}), its busiest functions",
        traced=trace is not None,
        seeds=seeds,
        main=results[0],
        limits=results[1],
        popularity=results[2],
        loads=results[3],
        choices=results[4] if trace is not None else (),
    )


def _main_workload(size: int, base: Preset, trace: Trace | None, choice: WorkingSet) -> Workload:
    if trace is None:
        return synthetic(size, base)
    return from_trace(trace, TraceUse(choice=choice, minutes=base.minutes, rate_per_minute=base.rate_per_minute), size)


def _chosen(base: Preset, trace: Trace) -> list[Workload]:
    """The trace by each choice that it can serve at every size."""
    workloads: list[Workload] = []
    for name, choice in CHOICES.items():
        try:
            found = [_main_workload(size, base, trace, choice) for size in base.working_sets]
        except ConfigurationError:  # it has no such trigger, or too few functions
            continue
        workloads += [msgspec.structs.replace(workload, name=name) for workload in found]  # type: ignore[type-var]
    return workloads


def find(runs: Iterable[RunResult], policy: str, working_set: int) -> RunResult:
    """The run of a policy and working set."""
    return next(run for run in runs if run.policy == policy and run.working_set == working_set)


def judge(evaluation: Evaluation) -> list[Verdict]:
    """Each of the paper's numbers beside ours."""
    return [_judge(claim, evaluation) for claim in CLAIMS]


def _judge(claim: Claim, evaluation: Evaluation) -> Verdict:
    name = claim.figure.value
    if claim.policy is None or claim.working_set is None:
        run = max(evaluation.main, key=lambda run: _value(run, name))
    else:
        run = find(evaluation.main, claim.policy, claim.working_set)
    ours = _value(run, name)
    singles = [
        _single(one, lb, claim.figure) for one, lb in zip(run.per_seed, _lb(evaluation, run).per_seed, strict=True)
    ]
    lowest, highest = min(singles), max(singles)
    tolerance = _CLOSE_SPEEDUP * claim.value if claim.figure is Figure.SPEEDUP else _CLOSE
    if abs(ours - claim.value) <= tolerance or lowest <= claim.value <= highest:
        outcome = Outcome.AGREES
    else:
        outcome = Outcome.MORE if ours > claim.value else Outcome.LESS
    return Verdict(
        claim=claim,
        ours=ours,
        policy=run.policy,
        working_set=run.working_set,
        ci95=run.vs_lb.ci95[name] if run.vs_lb and run.vs_lb.ci95 else None,
        lowest=lowest,
        highest=highest,
        outcome=outcome,
        why=_why(claim, run, outcome, lowest, highest, evaluation),
    )


def _value(run: RunResult, name: str) -> float:
    return float(getattr(run.vs_lb, name)) if run.vs_lb else 0.0


def _lb(evaluation: Evaluation, run: RunResult) -> RunResult:
    return find(evaluation.main, "lb", run.working_set)


def _single(one: SeedRun, lb: SeedRun, figure: Figure) -> float:
    match figure:
        case Figure.LATENCY:
            return 1 - one.mean_latency_s / lb.mean_latency_s
        case Figure.MISSES:
            return 1 - one.miss_ratio / lb.miss_ratio if lb.miss_ratio else 0.0
        case Figure.SPEEDUP:
            return lb.mean_latency_s / one.mean_latency_s


def _why(claim: Claim, run: RunResult, outcome: Outcome, lowest: float, highest: float, evaluation: Evaluation) -> str:
    """Why a figure agrees or differs, from the what-ifs that were run; nothing here is known beforehand."""
    if outcome is Outcome.AGREES:
        if lowest <= claim.value <= highest:
            return f"The paper's lies among single runs here: {_show(lowest, claim)} to {_show(highest, claim)}."
        return f"Within {_show_gap(claim, _value(run, claim.figure.value))} of the paper's."
    if claim.figure is Figure.SPEEDUP:
        reduction = _value(run, Figure.LATENCY.value)
        return (
            f"A speed-up magnifies small differences: {claim.value:.0f}x is a reduction by "
            f"{1 - 1 / claim.value:.2%}, ours ({run.working_set} functions) one by {reduction:.2%}."
        )
    name = claim.figure.value
    parts = [_range_over("The Zipf exponent", "from 0.5 to 1.2", claim, _values(evaluation.popularity, run, name))]
    choices = _values(evaluation.choices, run, name)
    if choices:
        parts.append(_range_over("The choice of functions", "from the trace", claim, choices))
    loads = _values([each for each in evaluation.loads if each.load_scale >= _PLAUSIBLE_LOADS], run, name)
    if loads:
        parts.append(_range_over("The cost of loads", "from half to twice the profile's", claim, loads))
    return " ".join(parts)


def _values(runs: Iterable[RunResult], like: RunResult, name: str) -> list[float]:
    return [_value(run, name) for run in runs if run.policy == like.policy and run.working_set == like.working_set]


def _range_over(what: str, span: str, claim: Claim, values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    reaches = "which covers the paper's" if low <= claim.value <= high else "which does not reach the paper's"
    return f"{what} ({span}) moves it between {_show(low, claim)} and {_show(high, claim)}, {reaches}."


def _show(value: float, claim: Claim) -> str:
    return f"{value:.1f}x" if claim.figure is Figure.SPEEDUP else f"{value:.1%}"


def _show_gap(claim: Claim, ours: float) -> str:
    gap = abs(ours - claim.value)
    return f"{gap:.1f}x" if claim.figure is Figure.SPEEDUP else f"{gap * 100:.1f} percentage points"
