"""How busy a device is, for devices that cannot tell themselves."""

from __future__ import annotations

from collections import deque
from time import monotonic

WINDOW_S = 1.0


class BusyMeter:
    """Counts the time between ``begin`` and ``end``; reading it is what costs, not counting."""

    def __init__(self) -> None:
        now_s = monotonic()
        self._busy_s = 0.0
        self._since_s: float | None = None
        self._samples = deque([(now_s, 0.0)])

    def begin(self) -> None:
        self._since_s = monotonic()

    def end(self) -> None:
        if self._since_s is not None:
            self._busy_s += monotonic() - self._since_s
            self._since_s = None

    def share(self) -> float:
        """Share of the time it was busy, 0 to 1, over the last ``WINDOW_S``, or since it was last asked before that."""
        now_s = monotonic()
        busy_s = self._busy_s + (now_s - self._since_s if self._since_s is not None else 0.0)
        self._samples.append((now_s, busy_s))
        while len(self._samples) > 2 and self._samples[1][0] <= now_s - WINDOW_S:
            self._samples.popleft()
        then_s, before_s = self._samples[0]
        return min(1.0, (busy_s - before_s) / (now_s - then_s)) if now_s > then_s else 0.0
