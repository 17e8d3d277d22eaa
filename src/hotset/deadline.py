"""A timer for what is put off at every call: moving it later costs nothing, as it looks at the clock when it fires."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadline:
    """Calls ``expired`` once the time set last is over, on the running loop."""

    def __init__(self, expired: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._expired = expired
        self._due_s: float | None = None
        self._handle: asyncio.TimerHandle | None = None

    def set(self, seconds: float) -> None:
        """Expire ``seconds`` from now, whatever was set before."""
        self._due_s = due_s = self._loop.time() + seconds
        if self._handle is None or self._handle.when() > due_s:
            self.cancel()
            self._due_s = due_s
            self._handle = self._loop.call_at(due_s, self._fire)

    def clear(self) -> None:
        """Do not expire."""
        self._due_s = None

    def cancel(self) -> None:
        """Do not expire, and leave nothing with the loop."""
        self._due_s = None
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fire(self) -> None:
        self._handle = None
        if self._due_s is None:
            return
        left_s = self._due_s - self._loop.time()
        if left_s > 0:
            self._handle = self._loop.call_later(left_s, self._fire)
        else:
            self._due_s = None
            self._expired()
