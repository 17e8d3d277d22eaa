"""How commands speak: tables for people, JSON for programs, a progress bar while something takes long."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec

from hotset.simulation.metrics import RunMetrics

STDOUT = "-"


class Table(msgspec.Struct, kw_only=True):
    """What to print; every cell is text already."""

    columns: Sequence[str]
    rows: list[Sequence[str]]
    title: str = ""
    breaks: Sequence[int] = ()
    """Row numbers before which a new section begins."""
    left: int = 1
    """How many columns, from the left, hold names; the others hold figures and are flush right."""


def show_table(table: Table) -> None:
    """Print a table: drawn and coloured on a terminal, else plain columns two spaces apart, as wide as they need."""
    if sys.stdout.isatty():
        _draw(table)
        return
    if table.title:
        click.echo(table.title)
    lines = [table.columns, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]
    for number, line in enumerate(lines):
        if number - 1 in table.breaks and number > 1:
            click.echo()
        cells = (
            cell.ljust(width) if column < table.left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        click.echo("  ".join(cells).rstrip())


def _draw(table: Table) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    drawn = RichTable(
        title=table.title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column, name in enumerate(table.columns):
        drawn.add_column(
            name,
            justify="left" if column < table.left else "right",
            style="bold" if column == 0 else "",
            no_wrap=column >= table.left or column == 0,
        )
    for number, row in enumerate(table.rows):
        if number in table.breaks and number:
            drawn.add_section()
        drawn.add_row(*(Text(cell) for cell in row))
    unbounded = console.options.update(max_width=10_000)
    if console.measure(drawn, options=unbounded).maximum > console.width:
        drawn.padding = 0
    console.print(drawn)


def milliseconds(seconds: float) -> str:
    """A duration as a person reads it beside others."""
    return f"{seconds * 1e3:.1f} ms"


def miss_ratio_text(metrics: RunMetrics) -> str:
    """``36.0%``, and how much of that only had to come back from host memory, where models are parked."""
    warm = f" ({metrics.restores / metrics.requests:.1%} warm)" if metrics.restores else ""
    return f"{metrics.miss_ratio:.1%}{warm}"


def function_of(model: str) -> str:
    """The function that a model, ``NAME@VERSION``, belongs to."""
    return model.rpartition("@")[0] or model


def write_json(value: object, destination: str | Path = STDOUT) -> None:
    """Write a value as indented JSON with sorted keys to a file, or to stdout for ``-``; equal values, equal bytes."""
    text = msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=2) + b"\n"
    if str(destination) == STDOUT:
        click.echo(text, nl=False)
    else:
        Path(destination).write_bytes(text)


@contextmanager
def progress(description: str, *, quiet: bool = False) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr; call what it gives with the share done, 0 to 1. Silent where nobody watches."""
    if quiet or not (sys.stderr.isatty() and sys.stdout.isatty()):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [
        TextColumn("{task.description}"),
        BarColumn(),
        "{task.percentage:>3.0f}%",
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=1.0)
        yield lambda share: bar.update(task, completed=share)
