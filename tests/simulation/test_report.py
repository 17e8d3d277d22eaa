"""Reports: self-contained, complete, escaped, and honest about where the paper's numbers do not come out."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from hotset.errors import ConfigurationError
from hotset.simulation import evaluation as paper
from hotset.simulation import evaluation_report, report
from hotset.simulation.evaluation import CLAIMS, Evaluation, Figure, Outcome, evaluate, find, judge
from hotset.simulation.evaluation_report import write_evaluation
from hotset.simulation.experiment import ClusterSpec, ExperimentSpec, RunResult, run_experiment
from hotset.simulation.hardware import MIB, ModelCost
from hotset.simulation.presets import PRESETS, Preset
from hotset.simulation.report import (
    MEASURES,
    ExperimentReport,
    by_workload,
    measure_plot,
    render,
    variant_label,
    write_report,
)
from hotset.simulation.statistics import confidence_interval
from hotset.simulation.traces import open_trace
from hotset.simulation.workloads import Popularity, Synthetic

CLUSTER = ClusterSpec(gpus=2, models=ModelCost(memory_bytes=2000 * MIB, load_s=3.0, inference_s=1.0))


class Resources(HTMLParser):
    """Everything a page would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.images = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert tag not in {"script", "link", "iframe"}
        if tag == "img":
            assert values["alt"]
            self.images += 1
        for name in ("src", "href"):
            target = values.get(name)
            if target is not None and not target.startswith("data:image/png;base64,"):
                self.fetched.append(target)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves pictures empty, for tests that look at everything else: drawing is most of a report's cost."""
    monkeypatch.setattr(report, "bars", lambda *_: b"")
    monkeypatch.setattr(evaluation_report, "lines", lambda *_, **__: b"")
    monkeypatch.setattr(evaluation_report, "comparison", lambda *_, **__: b"")


@pytest.fixture(scope="module")
def runs() -> Sequence[RunResult]:
    workloads = [
        Synthetic(popularity=Popularity.zipf(size), rate_per_minute=60, minutes=1, name="<b>two & more</b>")
        for size in (5, 8)
    ]
    return run_experiment(
        ExperimentSpec(workloads=workloads, policies=["lb", "lalb_o3"], cluster=CLUSTER, seeds=2, load_scales=(1, 0.1))
    )


def test_an_experiments_report_is_one_page_with_its_pictures_and_tables(
    runs: Sequence[RunResult], tmp_path: Path
) -> None:
    write_report(ExperimentReport(title="A & B", about="two GPUs", runs=runs), tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    page = (folder / "index.html").read_text()

    resources = Resources(page)
    assert resources.fetched == []
    assert resources.images == len(MEASURES)
    assert "<title>A &amp; B</title>" in page
    assert "<b>two" not in page
    for measure in MEASURES:
        name = measure.field.removesuffix("_s")
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width > 1000
        table = rows(folder / f"{name}.csv")
        assert [float(row[measure.field]) for row in table] == [getattr(run, measure.field) for run in runs]
    assert len(rows(folder / "runs.csv")) == len(runs)
    written = msgspec.json.decode((folder / "runs.json").read_bytes())
    assert [run["mean_latency_s"] for run in written["runs"]] == [run.mean_latency_s for run in runs]


def test_runs_are_named_by_what_sets_them_apart(runs: Sequence[RunResult]) -> None:
    group = by_workload(runs)[0]
    assert [variant_label(run, group) for run in group] == [
        "LB load x1",
        "LB load x0.1",
        "LALB+O3 load x1",
        "LALB+O3 load x0.1",
    ]
    assert variant_label(group[0], group[:1]) == "LB"
    other = msgspec.structs.replace(group[0], policy="mine", eviction="mru", o3_limit=3)
    again = msgspec.structs.replace(other, o3_limit=5)
    assert variant_label(other, [other, again, group[0]]) == "mine mru limit 3"


def test_a_picture_is_the_same_every_time(runs: Sequence[RunResult]) -> None:
    assert measure_plot(MEASURES[0], runs).png == measure_plot(MEASURES[0], runs).png


def test_workloads_of_different_names_stay_apart_in_the_table(undrawn: None, runs: Sequence[RunResult]) -> None:
    renamed = [msgspec.structs.replace(run, workload=f"of {run.working_set}", ci95=None) for run in runs]
    plot = measure_plot(MEASURES[1], renamed)

    assert [row[0] for row in plot.rows] == ["of 5"] * 4 + ["of 8"] * 4
    assert {row[4] for row in plot.rows} == {""}


def test_a_missing_package_is_named_with_the_command_that_brings_it(
    runs: Sequence[RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("jinja2", "matplotlib", "scipy.special"):
        monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(ConfigurationError, match=r"Jinja2: pip install 'hotset\[sim\]'"):
        render("experiment.html")
    with pytest.raises(ConfigurationError, match=r"matplotlib: pip install 'hotset\[sim\]'"):
        measure_plot(MEASURES[0], runs)
    with pytest.raises(ConfigurationError, match=r"scipy: pip install 'hotset\[sim\]'"):
        confidence_interval([1.0, 2.0])


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    """The paper's evaluation in small: two minutes, two seeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "_SENSITIVITY_SEEDS", 1)
        patch.setattr(paper, "ZIPF_EXPONENTS", (0.5, 0.9))
        patch.setattr(paper, "LOAD_SCALES", (0.05, 1.0))
        patch.setitem(PRESETS, "paper", Preset(minutes=2.0))  # type: ignore[arg-type]
        shares: list[float] = []
        found = evaluate(2, None, shares.append, jobs=1)
    assert shares[-1] == 1.0
    return found


def test_the_evaluation_has_all_that_the_paper_lists(evaluation: Evaluation) -> None:
    assert [(run.working_set, run.policy) for run in evaluation.main] == [
        (size, policy) for size in (15, 25, 35) for policy in ("lb", "lalb", "lalb_o3")
    ]
    assert [run.o3_limit for run in evaluation.limits] == [*range(0, 50, 5)] * 3
    assert {run.workload for run in evaluation.popularity} == {"Zipf 0.5", "Zipf 0.9"}
    assert {run.working_set for run in evaluation.loads} == {35}
    assert evaluation.choices == ()


def test_every_number_of_the_paper_gets_ours_and_a_verdict_with_a_reason(evaluation: Evaluation) -> None:
    verdicts = judge(evaluation)

    assert [verdict.claim for verdict in verdicts] == list(CLAIMS)
    for verdict in verdicts:
        assert verdict.lowest <= verdict.ours <= verdict.highest or verdict.claim.figure is not Figure.LATENCY
        assert verdict.why.endswith(".")
        if verdict.outcome is Outcome.MORE:
            assert verdict.ours > verdict.claim.value
        elif verdict.outcome is Outcome.LESS:
            assert verdict.ours < verdict.claim.value
    best = verdicts[-1]
    assert best.ours == max(run.vs_lb.speedup for run in evaluation.main if run.vs_lb)


def changed(evaluation: Evaluation, policy: str, size: int, **versus: float) -> Evaluation:
    """The same evaluation with other figures for one run, in each seed and on average."""
    target = find(evaluation.main, policy, size)
    lb = find(evaluation.main, "lb", size)
    per_seed = [
        msgspec.structs.replace(
            one,
            mean_latency_s=other.mean_latency_s * (1 - versus.get("latency_reduction", 0.9)),
            miss_ratio=other.miss_ratio * (1 - versus.get("miss_reduction", 0.9)),
        )
        for one, other in zip(target.per_seed, lb.per_seed, strict=True)
    ]
    result = msgspec.structs.replace(target, per_seed=per_seed, vs_lb=msgspec.structs.replace(target.vs_lb, **versus))
    return msgspec.structs.replace(evaluation, main=[result if run is target else run for run in evaluation.main])


@pytest.mark.parametrize(
    ("ours", "outcome", "reason"),
    [
        (0.81, Outcome.AGREES, "Within 1.6 percentage points"),
        (0.82, Outcome.MORE, "The Zipf exponent"),
        (0.70, Outcome.LESS, "The cost of loads"),
    ],
)
def test_a_verdict_follows_the_numbers(evaluation: Evaluation, ours: float, outcome: Outcome, reason: str) -> None:
    verdict = judge(changed(evaluation, "lalb", 35, latency_reduction=ours))[2]

    assert verdict.claim.value == 0.7943
    assert verdict.ours == ours
    assert verdict.outcome is outcome
    assert reason in verdict.why


def test_single_runs_on_both_sides_of_the_papers_number_agree_with_it(evaluation: Evaluation) -> None:
    wide = changed(evaluation, "lalb", 35, miss_reduction=0.9)
    target = find(wide.main, "lalb", 35)
    low = msgspec.structs.replace(target.per_seed[0], miss_ratio=find(wide.main, "lb", 35).per_seed[0].miss_ratio * 0.9)
    main = [
        msgspec.structs.replace(run, per_seed=[low, *run.per_seed[1:]]) if run is target else run for run in wide.main
    ]
    verdict = judge(msgspec.structs.replace(wide, main=main))[3]

    assert verdict.outcome is Outcome.AGREES
    assert verdict.why.startswith("The paper's lies among single runs here: 10.0% to 90.0%")


def test_the_papers_report_shows_every_figure_beside_the_papers_numbers(evaluation: Evaluation, tmp_path: Path) -> None:
    verdicts = write_evaluation(evaluation, tmp_path)
    page = (tmp_path / "index.html").read_text()

    resources = Resources(page)
    assert resources.fetched == []
    assert resources.images == 12
    text = re.sub(r"\s+", " ", page)
    for number in ("-97.74%", "-93.33%", "-79.43%", "-65.21%", "-96.93%", "-81.16%", "48.0×"):
        assert number in text
    for verdict in verdicts:
        assert f">{verdict.outcome.value}</span>" in text
    assert "They are synthetic" in text
    assert "stated" in text
    assert "recalled" in text

    files = {path.name for path in tmp_path.iterdir()}
    for name in (
        "mean_latency", "miss_ratio", "false_miss_ratio", "gpu_utilisation", "top_model_copies", "latency_variance",
        "o3_limit_mean_latency", "o3_limit_miss_ratio", "o3_limit_latency_variance", "popularity", "load_cost",
        "headline",
    ):  # fmt: skip
        assert {f"{name}.csv", f"{name}.png"} <= files
    table = rows(tmp_path / "verdicts.csv")
    assert [float(row["paper"]) for row in table] == [claim.value for claim in CLAIMS]
    assert [float(row["here"]) for row in table] == [verdict.ours for verdict in verdicts]
    limits = rows(tmp_path / "o3_limit_miss_ratio.csv")
    assert [row["o3_limit"] for row in limits[:10]] == [str(limit) for limit in range(0, 50, 5)]


def test_a_trace_is_used_where_one_is_given_and_in_other_choices_too(
    undrawn: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty functions, none called by http: one of the four choices cannot be served and is left out."""
    trace = tmp_path / "counts.csv"
    lines = ["HashOwner,HashApp,HashFunction,Trigger,1,2"]
    lines += [f"o,a,f{number},queue,{200 // (number + 1)},{100 // (number + 1)}" for number in range(60)]
    trace.write_text("\n".join(lines) + "\n")
    monkeypatch.setitem(PRESETS, "paper", Preset(minutes=1.0))  # type: ignore[arg-type]
    monkeypatch.setattr(paper, "ZIPF_EXPONENTS", (0.9,))
    monkeypatch.setattr(paper, "LOAD_SCALES", (1.0,))
    monkeypatch.setattr(paper, "O3_LIMITS", (0, 25))
    found = evaluate(1, open_trace(trace), jobs=1)

    assert found.traced
    assert {run.workload for run in found.main} == {"azure2019 replayed"}
    assert {run.workload for run in found.choices} == {"the busiest", "without the first", "without the first 5"}
    assert all(run.requests == 325 for run in (*found.main, *found.choices))

    write_evaluation(found, tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "counts.csv" in page
    assert "What if other functions of the trace are replayed?" in page
    assert "without the first 5" in page
