"""When a request is tried again, and after how long."""

from __future__ import annotations

import msgspec

from hotset.client.messages import InferenceError

RETRIED = frozenset({429, 503})
"""The server did not begin, and says so: it is full, or a GPU is not there yet."""


class Retries(msgspec.Struct, frozen=True, kw_only=True):
    """How patient a client is."""

    attempts: int = 5
    """1: never again."""
    first_wait_s: float = 0.25
    """Where the server names no time; it doubles with every attempt."""
    longest_wait_s: float = 10.0
    """Upper bound of one wait, whatever the server says."""

    def wait_s(self, attempt: int, error: InferenceError, retry_after: str | None) -> float | None:
        """How long to wait before the next attempt, ``attempt`` (from 1) having failed; None: give up."""
        if error.status not in RETRIED or attempt >= self.attempts:
            return None
        try:
            wait_s = float(retry_after) if retry_after is not None else self.first_wait_s * 2 ** (attempt - 1)
        except ValueError:  # a date, which no server of ours sends
            wait_s = self.longest_wait_s
        return min(max(wait_s, 0.0), self.longest_wait_s)
