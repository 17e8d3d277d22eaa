"""What a check finds: outcome, figures, and why it is not a PASS."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Any

import msgspec


class Outcome(Enum):
    PASS = "PASS"
    FAIL = "FAIL"
    SKIP = "SKIP"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One check that was run, or could not be."""

    name: str
    outcome: Outcome
    figures: dict[str, float | str]
    """Their units are in their names."""
    why: str
    """What failed, or kept the check from running; else what a reader must know of the figures, or nothing."""
    seconds: float


class Unavailable(Exception):
    """The check cannot run here; the message says what it needs."""


class Findings:
    """What a check fills in while it runs, so that figures survive its failure."""

    def __init__(self) -> None:
        self.figures: dict[str, float | str] = {}
        self.problems: list[str] = []
        self.note = ""

    def expect(self, holds: bool, otherwise: str) -> None:
        """``otherwise``: one clause that says what was found instead."""
        if not holds:
            self.problems.append(otherwise)


Check = Callable[[Any, Findings], Coroutine[Any, Any, None]]
"""Takes a ``Setup`` and what to fill in. Raises ``Unavailable`` where it cannot run."""
