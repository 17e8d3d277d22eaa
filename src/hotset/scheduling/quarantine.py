"""Quarantine: a model whose process keeps dying is left alone for a while, longer each time."""

from __future__ import annotations

import msgspec


class QuarantineSettings(msgspec.Struct, frozen=True, kw_only=True):
    after: int = 3
    """Failures in a row that start it."""
    first_s: float = 1.0
    longest_s: float = 60.0


class _Record(msgspec.Struct):
    failures: int = 0
    until_s: float = 0.0
    reason: str = ""


class Quarantine:
    """Failures in a row per model. Each one beyond the limit doubles the pause; a success ends it."""

    def __init__(self, settings: QuarantineSettings) -> None:
        self._settings = settings
        self._records: dict[str, _Record] = {}

    def failed(self, model: str, now_s: float, reason: str) -> bool:
        """Count a failure; True if the model is in quarantine now."""
        record = self._records.setdefault(model, _Record())
        record.failures += 1
        record.reason = reason
        beyond = record.failures - self._settings.after
        if beyond < 0:
            return False
        record.until_s = now_s + min(self._settings.first_s * 2.0**beyond, self._settings.longest_s)
        return True

    def succeeded(self, model: str) -> None:
        if self._records:
            self._records.pop(model, None)

    def remaining_s(self, model: str, now_s: float) -> float:
        """Seconds until the model may be tried again; 0: now."""
        record = self._records.get(model) if self._records else None
        return max(record.until_s - now_s, 0.0) if record is not None else 0.0

    def reason(self, model: str) -> str:
        """The newest failure of a model; empty if it has none in a row."""
        record = self._records.get(model)
        return record.reason if record is not None else ""
