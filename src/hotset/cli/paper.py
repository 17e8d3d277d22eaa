"""``hotset paper``: the paper's evaluation as a whole, and whether it comes out again."""

from __future__ import annotations

from pathlib import Path

import click

from hotset.cli.options import json_option
from hotset.cli.output import Table, progress, show_table, write_json
from hotset.simulation.evaluation import Figure, evaluate
from hotset.simulation.evaluation_report import write_evaluation
from hotset.simulation.report import INDEX
from hotset.simulation.traces import open_trace


@click.command()
@click.option(
    "--out",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("paper-report"),
    show_default=True,
    help="Folder for the report, the plots and the tables.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=10, show_default=True, help="Runs of each kind.")
@click.option(
    "--trace",
    "trace_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Use the requests of this trace, such as the Azure Functions trace of 2019, instead of synthetic ones.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Most processes; default: one per core.")
@json_option
def paper(folder: Path, seeds: int, trace_path: Path | None, jobs: int | None, as_json: bool) -> None:
    """Reproduce the paper's evaluation: tables, plots and one HTML report.

    Every table and figure for LB, LALB and LALB+O3 with 15, 25 and 35 functions, beside the paper's own numbers where
    they are known, and how much the results depend on what is not known.
    """
    trace = None if trace_path is None else open_trace(trace_path)
    folder.mkdir(parents=True, exist_ok=True)
    with progress("the paper's evaluation") as heard:
        evaluation = evaluate(seeds, trace, heard, jobs)
    with progress("writing the report"):
        verdicts = write_evaluation(evaluation, folder)
    if as_json:
        write_json({"report": str(folder / INDEX), "verdicts": verdicts})
        return
    rows = [
        (
            verdict.claim.text,
            _show(verdict.claim.value, verdict.claim.figure),
            _show(verdict.ours, verdict.claim.figure),
            verdict.outcome.value,
        )
        for verdict in verdicts
    ]
    show_table(Table(columns=("claim", "paper", "here", "verdict"), rows=list(rows)))
    click.echo(f"\nThe report: {folder / INDEX}")


def _show(value: float, figure: Figure) -> str:
    return f"{value:.1f}x" if figure is Figure.SPEEDUP else f"{-value:.2%}"
