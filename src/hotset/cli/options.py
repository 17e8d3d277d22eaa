"""Options and output that the commands of a running server share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from hotset.cli.output import Table, show_table
from hotset.functions.units import parse_duration

if TYPE_CHECKING:
    from hotset.scheduling.policies.interface import PolicySettings

DEFAULT_GATEWAY = "http://127.0.0.1:8080"

F = TypeVar("F", bound=Callable[..., Any])


def gateway_option(command: F) -> F:
    """``--gateway``: which server a command talks to."""
    return click.option(
        "--gateway",
        "-g",
        envvar=["HOTSET_GATEWAY", "OPENFAAS_URL"],
        default=DEFAULT_GATEWAY,
        show_default=True,
        metavar="URL",
        help="The server to talk to [env: HOTSET_GATEWAY, OPENFAAS_URL].",
    )(command)


def json_option(command: F) -> F:
    """``--json``: the answer as JSON on standard output, for programs."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def policy_settings(
    settings: PolicySettings, *, max_skips: int | None, max_wait: str | None, overrun: str | None
) -> PolicySettings:
    """With what was given of ``--max-skips``, ``--max-wait`` and ``--overrun``."""
    changed: dict[str, Any] = {}
    if max_skips is not None:
        changed["max_skips"] = max_skips
    if max_wait is not None:
        changed["max_wait_s"] = parse_duration(max_wait, "--max-wait")
    if overrun is not None:
        changed["overrun_s"] = parse_duration(overrun, "--overrun")
    return msgspec.structs.replace(settings, **changed)


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str = "", left: int = 0) -> None:
    """A table of text; ``empty`` instead of one without rows. ``left``: columns of names; 0: all of them."""
    if rows or not empty:
        show_table(Table(columns=columns, rows=list(rows), left=left or len(columns)))
    else:
        click.echo(empty)


def _silent(_: str) -> None:
    pass


@contextmanager
def status_line(first: str, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Say what is going on: one changing line on a terminal, plain lines on another stderr, nothing if ``quiet``."""
    if quiet:
        yield _silent
    elif sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status(first) as status:
            yield lambda text: status.update(text)
    else:
        click.echo(first, err=True)
        yield lambda text: click.echo(text, err=True)
