"""Runs a command of ``hotset`` in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from hotset.cli.main import main


def hotset(*arguments: str, stdin: str | None = None) -> Result:
    """What the command printed, and its exit code."""
    return CliRunner().invoke(main, list(arguments), input=stdin, catch_exceptions=False)
