"""How a v2 request is refused before it is a call."""

from __future__ import annotations

from collections.abc import Collection


class Refusal(Exception):
    """A request that is answered with an error; the message is one sentence for the caller, ``status`` HTTP's."""

    def __init__(
        self, status: int, message: str, *, retry_after_s: float | None = None, allow: Collection[str] = ()
    ) -> None:
        """``allow``: the methods that would not be refused, of a 405."""
        super().__init__(message)
        self.allow = allow
        self.status = status
        self.retry_after_s = retry_after_s
