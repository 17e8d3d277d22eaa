"""Every benchmark says what it measures and what it takes, in place of running, when it is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parents[2] / "benchmarks").glob("bench_*.py"))


def said(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda script: script.stem)
def test_help_is_given(script: Path) -> None:
    result = said(script, "--help")

    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: {script.name}")


def test_an_unknown_policy_is_answered_with_the_known_ones() -> None:
    (script,) = (each for each in BENCHMARKS if each.stem == "bench_decision_cost")
    result = said(script, "lalb", "nonsense")

    assert (result.returncode, result.stdout) == (2, "")
    assert "'nonsense': choose from lb, lalb, " in result.stderr
