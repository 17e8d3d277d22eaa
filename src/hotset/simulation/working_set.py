"""Which functions of a trace take part in an experiment, and how many requests of each.

The paper replays the busiest 15, 25 or 35 functions of a trace at 325 requests a minute. On real traces one function
alone may make two thirds of all calls, which flatters every cache; leaving the first few out, or taking the functions
of one trigger, gives working sets that are harder and closer to interactive use (docs/traces.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from hotset.errors import ConfigurationError


class FunctionUse(msgspec.Struct, frozen=True, kw_only=True):
    """How much one function of a trace is used."""

    name: str
    requests: int
    """In the window that is replayed."""
    total_requests: int
    """In the whole trace."""
    trigger: str = ""
    """What calls it (``http``, ``queue``, ``timer``, ...); empty where the format does not say."""


class WorkingSet(msgspec.Struct, frozen=True, kw_only=True):
    """A choice among a trace's functions."""

    size: int | None = None
    """The ``size`` busiest functions of the window; None: all of them."""
    skip: int = 0
    """Leave out the functions that dominate the trace: the first ``skip`` by requests in the *whole* trace."""
    trigger: str = ""
    """Only functions with this trigger; empty: any."""

    def __post_init__(self) -> None:
        if self.skip < 0 or (self.size is not None and self.size < 1):
            raise ConfigurationError("a working set needs a size of at least 1 and a skip of at least 0")

    def choose(self, functions: Sequence[FunctionUse]) -> list[FunctionUse]:
        """The chosen functions, busiest first; ties keep the order in which the trace first names them.

        Raises ``ConfigurationError`` when the window has fewer active functions than asked for.
        """
        matching = [use for use in functions if not self.trigger or use.trigger == self.trigger]
        if self.trigger and not matching:
            known = ", ".join(sorted({use.trigger for use in functions if use.trigger}))
            raise ConfigurationError(
                f"no function of the trace has the trigger {self.trigger!r}; "
                + (f"use one of {known}" if known else "its format names no triggers")
            )
        dominant = sorted(matching, key=lambda use: -use.total_requests)[: self.skip]
        left_out = {use.name for use in dominant}
        active = [use for use in matching if use.requests and use.name not in left_out]
        active.sort(key=lambda use: -use.requests)
        if len(active) < (self.size or 1):
            raise ConfigurationError(
                f"this part of the trace calls only {len(active)} matching functions; ask for a smaller working set "
                "or a longer part"
            )
        return active[: self.size]


def apportion(weights: Sequence[int], total: int) -> list[int]:
    """Split ``total`` requests in proportion to ``weights``: whole numbers that add up to it exactly.

    Largest remainder (Hamilton): each gets the whole part of its quota, what is left goes to the largest fractions,
    the earlier one first among equals.
    """
    all_weights = sum(weights)
    if all_weights <= 0:
        raise ConfigurationError("nothing to scale: the chosen functions have no requests")
    shares = [weight * total // all_weights for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda index: -(weights[index] * total % all_weights))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


class Scaling:
    """Turns a trace's stream of calls into one with a given number of calls of each function, on the fly.

    Of a function's C calls in the trace, T are wanted. After its k-th call (k * T + phase) // C have been let through,
    with a phase in [0, C): T in total, spread over time like the original ones, in integers and with one number of
    state per function. T > C repeats calls.
    """

    def __init__(self, recorded: Sequence[int], wanted: Sequence[int], phases: Sequence[float]) -> None:
        """``phases``: one number in [0, 1) per function; which calls are let through depends on it."""
        self._recorded = recorded
        self._wanted = wanted
        self._state = [int(phase * count) for phase, count in zip(phases, recorded, strict=True)]

    def take(self, index: int, calls: int) -> int:
        """How many calls to let through now that the trace has ``calls`` more of function ``index``."""
        through, self._state[index] = divmod(self._state[index] + calls * self._wanted[index], self._recorded[index])
        return through
