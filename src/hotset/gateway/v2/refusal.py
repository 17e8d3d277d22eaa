"""How a v2 request is refused before it is a call."""

from __future__ import annotations


class Refusal(Exception):
    """A request that is answered with an error; the message is one sentence for the caller, ``status`` HTTP's."""

    def __init__(self, status: int, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
