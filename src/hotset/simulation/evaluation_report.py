"""The evaluation as files: CSV, PNG and one HTML page, each figure beside the paper's own where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hotset.simulation.evaluation import (
    O3_LIMIT,
    Evaluation,
    Outcome,
    Verdict,
    find,
    judge,
)
from hotset.simulation.experiment import RunResult
from hotset.simulation.plots import Chart, Comparison, Series, comparison, lines
from hotset.simulation.report import (
    LABELS,
    MEASURES,
    Plot,
    by_workload,
    intervals,
    measure_plot,
    render,
    write_csv,
    write_files,
)


def write_evaluation(evaluation: Evaluation, folder: Path) -> list[Verdict]:
    """Write the report into a folder and return its verdicts."""
    verdicts = judge(evaluation)
    figures = [measure_plot(measure, evaluation.main, _caption(measure.field, evaluation)) for measure in MEASURES]
    headline = _headline(verdicts)
    sweeps = [
        _limits(evaluation, "mean_latency_s", "Average latency against the O3 limit", "seconds", percent=False),
        _limits(evaluation, "miss_ratio", "Miss ratio against the O3 limit", "loads per request", percent=True),
        _limits(evaluation, "latency_variance", "Variance of latency against the O3 limit", "s²", percent=False),
    ]
    what_ifs = [_popularity(evaluation), _loads(evaluation)]
    everything = [*evaluation.main, *evaluation.limits, *evaluation.popularity, *evaluation.loads, *evaluation.choices]
    page = render(
        "paper.html",
        evaluation=evaluation,
        verdicts=verdicts,
        counts={outcome.name: sum(verdict.outcome is outcome for verdict in verdicts) for outcome in Outcome},
        best=max((run for run in evaluation.main if run.vs_lb), key=lambda run: run.vs_lb.speedup if run.vs_lb else 0),
        hardest=find(evaluation.main, "lalb_o3", max(run.working_set for run in evaluation.main)),
        headline=headline,
        figures=figures,
        sweeps=sweeps,
        what_ifs=what_ifs,
        main=by_workload(evaluation.main),
        choices=by_workload(evaluation.choices),
        labels=LABELS,
    )
    write_files(folder, page, [headline, *figures, *sweeps, *what_ifs], everything)
    write_csv(
        folder / "verdicts.csv",
        (
            "claim",
            "paper",
            "provenance",
            "here",
            "ci95_low",
            "ci95_high",
            "lowest_run",
            "highest_run",
            "outcome",
            "why",
        ),
        [
            (
                verdict.claim.text,
                verdict.claim.value,
                verdict.claim.provenance.value,
                verdict.ours,
                *(verdict.ci95 or ("", "")),
                verdict.lowest,
                verdict.highest,
                verdict.outcome.value,
                verdict.why,
            )
            for verdict in verdicts
        ],
    )
    return verdicts


def _headline(verdicts: Sequence[Verdict]) -> Plot:
    reductions = [verdict for verdict in verdicts if verdict.claim.value < 1]
    png = comparison(
        "Reductions against LB: here and in the paper",
        [
            Comparison(
                label=verdict.claim.text.replace(" cuts LB's average", ":").replace(" cuts LB's", ":"),
                key=verdict.policy,
                value=verdict.ours,
                lowest=verdict.lowest,
                highest=verdict.highest,
                reference=verdict.claim.value,
            )
            for verdict in reductions
        ],
        value_label="here: mean, and range of single runs",
        reference_label="the paper",
    )
    return Plot(
        name="headline",
        title="Reductions against LB: here and in the paper",
        png=png,
        text=(
            "How much LALB and LALB+O3 take off LB's average latency and miss ratio. A dot is the mean over seeds, its "
            "line goes from the lowest to the highest single run; a diamond is the paper's number.",
        ),
        header=("claim", "paper", "here", "lowest_run", "highest_run"),
        rows=[(each.claim.text, each.claim.value, each.ours, each.lowest, each.highest) for each in reductions],
    )


def _caption(field: str, evaluation: Evaluation) -> list[str]:
    """What there is to see, said with this evaluation's own numbers, and what is known of the paper's."""
    size = max(run.working_set for run in evaluation.main)
    lb, lalb, o3 = (find(evaluation.main, policy, size) for policy in ("lb", "lalb", "lalb_o3"))
    unknown = "The paper reports this figure; its numbers are not at hand."
    captions = {
        "mean_latency_s": (
            f"With {size} functions LB spends {lb.gpu_busy - lb.gpu_utilisation:.0%} of its GPU time on loads and "
            f"falls behind: a request waits for {lb.mean_queueing_s:.0f} s. LALB and LALB+O3 take "
            f"{lalb.mean_latency_s:.1f} s and {o3.mean_latency_s:.1f} s; without any loads it would be "
            f"{o3.ideal_mean_latency_s:.2f} s.",
            "The paper's reductions are in the table of verdicts; its seconds are not at hand.",
        ),
        "miss_ratio": (
            f"A request's model is on the chosen GPU or must be loaded. With {size} functions {lb.miss_ratio:.0%} of "
            f"LB's requests load and {o3.miss_ratio:.0%} of LALB+O3's; one cache with perfect foresight would load for "
            f"{o3.clairvoyant_miss_ratio:.1%}.",
            f"The paper's reductions with {size} functions are in the table of verdicts.",
        ),
        "false_miss_ratio": (
            f"A false miss loads a model while another GPU holds it. With {size} functions {_part_false(lb):.0%} of "
            f"LB's misses are false and {_part_false(lalb):.0%} of LALB's: LALB makes another copy only where waiting "
            "for one would take longer than a load.",
            unknown,
        ),
        "gpu_utilisation": (
            f"The share of GPU time spent on inference, here {lb.gpu_utilisation:.0%} for LB and "
            f"{o3.gpu_utilisation:.0%} for LALB+O3 with {size} functions. The rest is loads, for "
            f"which LB's GPUs are {lb.gpu_busy:.0%} busy and LALB+O3's {o3.gpu_busy:.0%}, and waiting for work.",
            "The paper reports SM utilisation as the device counts it, another scale; its numbers are not at hand.",
        ),
        "top_model_copies": (
            f"With {size} functions LB spreads the most popular model over {lb.top_model_copies:.1f} GPUs on average, "
            f"where it takes the room of others; LALB+O3 keeps {o3.top_model_copies:.1f} copies.",
            unknown,
        ),
        "latency_variance": (
            "A queue that grows makes latency not just long but unpredictable: with "
            f"{size} functions LB's varies by {lb.latency_variance:.0f} s², LALB+O3's by {o3.latency_variance:.1f} s².",
            unknown,
        ),
    }
    return list(captions[field])


def _part_false(run: RunResult) -> float:
    return run.false_miss_ratio / run.miss_ratio if run.miss_ratio else 0.0


def _limits(evaluation: Evaluation, field: str, title: str, unit: str, *, percent: bool) -> Plot:
    groups = by_workload(evaluation.limits)
    chart = Chart(
        title=title,
        x_label="O3 limit: most times a request may be overtaken (0 is LALB)",
        y_label=unit,
        percent=percent,
        series=[
            Series(
                key=f"{group[0].working_set}",
                label=f"{group[0].working_set} functions",
                values=[getattr(run, field) for run in group],
                intervals=intervals(group, field),
            )
            for group in groups
        ],
    )
    hardest = groups[-1]
    first, last = getattr(hardest[0], field), getattr(hardest[-1], field)
    at_limit = next(getattr(run, field) for run in hardest if run.o3_limit == O3_LIMIT)

    def show(value: float) -> str:
        return f"{value:.1%}" if percent else f"{value:.2f} {unit}"

    return Plot(
        name=f"o3_limit_{field.removesuffix('_s')}",
        title=title,
        png=lines(chart, [run.o3_limit or 0 for run in hardest]),
        text=(
            f"With {hardest[0].working_set} functions: {show(first)} when nobody may be overtaken, {show(at_limit)} at "
            f"the evaluation's limit of {O3_LIMIT}, {show(last)} at {hardest[-1].o3_limit}.",
            "The paper varies the limit from 0 to 45 (recalled); its numbers are not at hand.",
        ),
        header=("working_set", "o3_limit", field, "ci95_low", "ci95_high"),
        rows=[
            (run.working_set, run.o3_limit, getattr(run, field), *((run.ci95 or {}).get(field) or ("", "")))
            for group in groups
            for run in group
        ],
    )


def _popularity(evaluation: Evaluation) -> Plot:
    sizes = sorted({run.working_set for run in evaluation.popularity})
    columns = [
        (policy, size) for policy in ("lalb", "lalb_o3") for size in sizes if policy == "lalb" or size == sizes[-1]
    ]
    chart = Chart(
        title="Latency reduction against LB, by popularity",
        x_label="Zipf exponent (higher: fewer functions get most requests)",
        y_label="reduction of average latency",
        percent=True,
        zoom=True,
        series=[
            Series(
                key=f"{policy} {size}",
                label=f"{LABELS[policy]}, {size}",
                values=[run.vs_lb.latency_reduction for run in _of(evaluation.popularity, policy, size) if run.vs_lb],
            )
            for policy, size in columns
        ],
    )
    return Plot(
        name="popularity",
        title="Latency reduction against LB, by popularity",
        heading="What if other functions were popular?",
        png=lines(chart, [_exponent(run) for run in _of(evaluation.popularity, "lalb", sizes[-1])]),
        text=(
            "The paper replays a window of a trace that is not at hand. How much a policy gains depends on how even "
            "the popularity of functions is: most of all for LALB on the largest working set, where it loads so often "
            "that its GPUs have little time left.",
        ),
        header=("zipf", "working_set", "policy", "latency_reduction", "miss_reduction", "speedup"),
        rows=[(_exponent(run), run.working_set, run.policy, *_versus(run)) for run in evaluation.popularity],
    )


def _loads(evaluation: Evaluation) -> Plot:
    size = evaluation.loads[0].working_set
    lb = _of(evaluation.loads, "lb", size)
    chart = Chart(
        title=f"Average latency by the cost of a load, {size} functions",
        x_label="load time, times the profile's (logarithmic)",
        y_label="seconds, logarithmic",
        log=True,
        bound=[run.ideal_mean_latency_s for run in lb],
        bound_label="no loads at all",
        series=[
            Series(
                key=policy,
                label=LABELS[policy],
                values=[run.mean_latency_s for run in _of(evaluation.loads, policy, size)],
                intervals=intervals(_of(evaluation.loads, policy, size), "mean_latency_s"),
            )
            for policy in ("lb", "lalb", "lalb_o3")
        ],
    )
    cheapest = lb[0]
    return Plot(
        name="load_cost",
        title="Average latency by the cost of a load",
        heading="What if loads were cheaper?",
        png=lines(chart, [run.load_scale for run in lb], log_x=True),
        text=(
            f"Everything hangs on what a miss costs. At {cheapest.load_scale:g} of the profile's load times even LB is "
            f"within {cheapest.mean_latency_s / cheapest.ideal_mean_latency_s - 1:.0%} of the ideal: a system that "
            "starts processes ahead of time and copies weights fast needs no clever placement; one that does not lives "
            "by it.",
        ),
        header=("load_scale", "working_set", "policy", "mean_latency_s", "miss_ratio", "latency_reduction"),
        rows=[
            (run.load_scale, run.working_set, run.policy, run.mean_latency_s, run.miss_ratio, _versus(run)[0])
            for run in evaluation.loads
        ],
    )


def _exponent(run: RunResult) -> float:
    return float(run.workload.removeprefix("Zipf "))


def _of(runs: Sequence[RunResult], policy: str, size: int) -> list[RunResult]:
    return [run for run in runs if run.policy == policy and run.working_set == size]


def _versus(run: RunResult) -> tuple[float, float, float]:
    versus = run.vs_lb
    return (versus.latency_reduction, versus.miss_reduction, versus.speedup) if versus else (0.0, 0.0, 1.0)
