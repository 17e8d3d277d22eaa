"""How often each model is asked for, learned from arrivals alone."""

from __future__ import annotations

from math import exp, inf

MEMORY_S = 300.0
"""An arrival counts e times less after this long: long enough to tell a model called once a minute from an idle one,
short enough to follow a change of fashion within minutes."""
LEAST_HISTORY_S = 20.0
"""The first arrivals are taken to be that far apart in all, lest the first of all looks like a flood."""


class _Count:
    __slots__ = ("at_s", "weight")

    def __init__(self, at_s: float) -> None:
        self.at_s = at_s
        self.weight = 1.0


class ArrivalRates:
    """Exponentially forgetting counts of arrivals per model. Constant time and memory per model."""

    def __init__(self) -> None:
        self._counts: dict[str, _Count] = {}
        self._since_s: float | None = None
        self._asked_s, self._history_s = -inf, LEAST_HISTORY_S
        """The last answer of ``history_s``, and when: one decision asks for it many times."""

    def arrived(self, model: str, now_s: float) -> None:
        if self._since_s is None:
            self._since_s, self._asked_s = now_s, -inf
        count = self._counts.get(model)
        if count is None:
            self._counts[model] = _Count(now_s)
        else:
            count.weight = count.weight * exp((count.at_s - now_s) / MEMORY_S) + 1.0
            count.at_s = now_s

    def forget(self, model: str) -> None:
        self._counts.pop(model, None)

    def history_s(self, now_s: float) -> float:
        """Seconds of arrivals that the rates rest on."""
        if now_s != self._asked_s and self._since_s is not None:
            self._asked_s = now_s
            self._history_s = max(MEMORY_S * (1.0 - exp((self._since_s - now_s) / MEMORY_S)), LEAST_HISTORY_S)
        return self._history_s

    def per_s(self, model: str, now_s: float) -> float:
        """Expected requests per second; 0 for a model never asked for."""
        count = self._counts.get(model)
        if count is None:
            return 0.0
        # The counts' weights add up to rate x memory once history is long, to rate x history while it is short.
        history_s = self._history_s if now_s == self._asked_s else self.history_s(now_s)
        return count.weight * exp((count.at_s - now_s) / MEMORY_S) / history_s

    def last_s(self, model: str) -> float | None:
        """When the model was last asked for; None: never."""
        count = self._counts.get(model)
        return count.at_s if count is not None else None
