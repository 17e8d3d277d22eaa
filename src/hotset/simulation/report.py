"""What an experiment leaves behind: one HTML file that needs nothing else, plots, CSV and JSON."""

from __future__ import annotations

import base64
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from hotset.errors import ConfigurationError
from hotset.simulation.experiment import FIGURES, RunResult
from hotset.simulation.plots import Chart, Series, bars

LABELS = {"lb": "LB", "lalb": "LALB", "lalb_o3": "LALB+O3"}
"""How policies are written in reports; others go by their own name."""
INDEX = "index.html"

_VARIANT_FIELDS = ("workload", "working_set", "policy", "eviction", "o3_limit", "load_scale", "seeds", "first_seed")


class Plot(msgspec.Struct, frozen=True, kw_only=True):
    """A picture with what it says and the numbers behind it."""

    name: str
    """Of its files, without suffix."""
    title: str
    heading: str = ""
    """Above it on the page, if that is to say more than the title in the picture."""
    png: bytes
    text: Sequence[str]
    """Paragraphs."""
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    """Of its CSV file."""

    @property
    def data_uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


class ExperimentReport(msgspec.Struct, frozen=True, kw_only=True):
    """An experiment's results with a title and one line on what was run."""

    title: str
    about: str
    runs: Sequence[RunResult]


class Measure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of ``RunResult`` and how to show it."""

    field: str
    title: str
    unit: str
    log: bool = False
    percent: bool = False
    bound: str = ""
    bound_label: str = ""


MEASURES = (
    Measure(
        field="mean_latency_s",
        title="Average latency",
        unit="seconds, logarithmic",
        log=True,
        bound="ideal_mean_latency_s",
        bound_label="no loads at all",
    ),
    Measure(
        field="miss_ratio",
        title="Cache miss ratio",
        unit="loads per request",
        percent=True,
        bound="clairvoyant_miss_ratio",
        bound_label="clairvoyant bound",
    ),
    Measure(field="false_miss_ratio", title="False-miss ratio", unit="loads of a model another GPU held", percent=True),
    Measure(field="gpu_utilisation", title="GPU utilisation", unit="GPU time spent on inference", percent=True),
    Measure(field="top_model_copies", title="Copies of the most popular model", unit="GPUs, mean over time"),
    Measure(field="latency_variance", title="Variance of latency", unit="s², logarithmic", log=True),
)
"""The six figures of the paper's evaluation, in its order."""


def variant_label(run: RunResult, group: Sequence[RunResult]) -> str:
    """A run's name among others of its workload: the policy, and whatever else differs within the group."""
    label = LABELS.get(run.policy, run.policy)
    if any(other.eviction != run.eviction for other in group):
        label += f" {run.eviction}"
    if any(other.policy == run.policy and other.o3_limit != run.o3_limit for other in group):
        label += f" limit {run.o3_limit}"
    if any(other.load_scale != run.load_scale for other in group):
        label += f" load x{run.load_scale:g}"
    return label


def by_workload(runs: Iterable[RunResult]) -> list[list[RunResult]]:
    """Runs of the same workload together, in their order."""
    groups: dict[tuple[str, int], list[RunResult]] = {}
    for run in runs:
        groups.setdefault((run.workload, run.working_set), []).append(run)
    return list(groups.values())


def intervals(runs: Iterable[RunResult], field: str) -> list[tuple[float, float] | None]:
    """Each run's confidence interval of one figure."""
    return [run.ci95[field] if run.ci95 else None for run in runs]


def measure_plot(measure: Measure, runs: Sequence[RunResult], text: Sequence[str] = ()) -> Plot:
    """Bars of one figure: a group for each workload, a bar for each variant."""
    groups = by_workload(runs)
    several = len({group[0].workload for group in groups}) > 1
    names = [f"{group[0].working_set}" + (f"\n{group[0].workload}" if several else "") for group in groups]
    series = [
        Series(
            key=column[0].policy,
            label=variant_label(column[0], groups[0]),
            values=[getattr(run, measure.field) for run in column],
            intervals=intervals(column, measure.field),
        )
        for column in zip(*groups, strict=True)
    ]
    chart = Chart(
        title=measure.title,
        x_label="working set (functions)",
        y_label=measure.unit,
        series=series,
        log=measure.log,
        percent=measure.percent,
        bound=[getattr(group[0], measure.bound) for group in groups] if measure.bound else (),
        bound_label=measure.bound_label,
    )
    return Plot(
        name=measure.field.removesuffix("_s"),
        title=measure.title,
        png=bars(chart, names),
        text=text,
        header=("workload", "working_set", "policy", measure.field, "ci95_low", "ci95_high", measure.bound or "bound"),
        rows=[
            (
                run.workload,
                run.working_set,
                variant_label(run, group),
                getattr(run, measure.field),
                *((run.ci95 or {}).get(measure.field) or ("", "")),
                getattr(run, measure.bound) if measure.bound else "",
            )
            for group in groups
            for run in group
        ],
    )


def write_report(report: ExperimentReport, folder: Path) -> None:
    """Write ``index.html``, ``runs.csv``, ``runs.json`` and a PNG and a CSV file for each figure into a folder."""
    plots = [measure_plot(measure, report.runs) for measure in MEASURES]
    page = render("experiment.html", report=report, plots=plots, groups=by_workload(report.runs))
    write_files(folder, page, plots, report.runs)


def write_files(folder: Path, page: str, plots: Sequence[Plot], runs: Sequence[RunResult]) -> None:
    """Put a report's files into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        (folder / f"{plot.name}.png").write_bytes(plot.png)
        write_csv(folder / f"{plot.name}.csv", plot.header, plot.rows)
    write_csv(folder / "runs.csv", *_wide(runs))
    body = msgspec.json.format(msgspec.json.encode({"runs": runs}, order="sorted"), indent=1)
    (folder / "runs.json").write_bytes(body + b"\n")
    (folder / INDEX).write_text(page, encoding="utf-8")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A CSV file with full precision."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)


def _wide(runs: Sequence[RunResult]) -> tuple[list[str], list[list[object]]]:
    reductions = ("latency_reduction", "miss_reduction", "speedup")
    header = [*_VARIANT_FIELDS, *FIGURES, *(f"vs_lb_{name}" for name in reductions)]
    rows = [
        [
            *(getattr(run, name) for name in (*_VARIANT_FIELDS, *FIGURES)),
            *(getattr(run.vs_lb, name) if run.vs_lb else "" for name in reductions),
        ]
        for run in runs
    ]
    return header, rows


def render(template: str, **values: Any) -> str:
    """Fill one of this package's templates; everything is escaped."""
    try:
        import jinja2
    except ImportError:
        raise ConfigurationError("reports need Jinja2: pip install 'hotset[sim]'") from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hotset.simulation", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda value, digits=1: f"{value:.{digits}%}"
    environment.globals["label"] = variant_label
    return environment.get_template(template).render(**values)
