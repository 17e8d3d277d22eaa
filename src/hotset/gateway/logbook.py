"""What functions print: the last lines of each, and a way to follow them as they come."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

import msgspec

LINES_PER_FUNCTION = 2_000
FOLLOW_S = 30.0
"""How long followers are served: what faas-cli tells its users, and well before an OpenFaaS gateway cuts them off."""


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line that a function printed, in OpenFaaS's shape but for the timestamp's."""

    name: str
    instance: str
    """The version that printed it: ``function@digest``."""
    timestamp_s: float
    """Unix time."""
    text: str


class Logbook:
    """Bounded: a function that prints without end loses its oldest lines, a slow follower its newest."""

    def __init__(self, lines_per_function: int = LINES_PER_FUNCTION) -> None:
        self._most = lines_per_function
        self._lines: dict[str, deque[LogLine]] = {}
        self._followers: dict[asyncio.Queue[LogLine | None], str] = {}
        self._closed = False

    def write(self, line: LogLine) -> None:
        self._lines.setdefault(line.name, deque(maxlen=self._most)).append(line)
        for queue, name in self._followers.items():
            if name == line.name and not queue.full():
                queue.put_nowait(line)

    def tail(self, name: str, most: int | None = None, since_s: float = 0.0) -> list[LogLine]:
        """The last ``most`` lines (None: all that are kept) that are not older than ``since_s``, oldest first."""
        lines = [line for line in self._lines.get(name, ()) if line.timestamp_s >= since_s]
        return lines if most is None else lines[max(0, len(lines) - most) :]

    async def follow(
        self, name: str, most: int | None = None, since_s: float = 0.0, *, for_s: float = FOLLOW_S
    ) -> AsyncIterator[LogLine]:
        """The same lines, then each new one, for ``for_s`` seconds or until the logbook is closed."""
        queue: asyncio.Queue[LogLine | None] = asyncio.Queue(self._most + 1)
        self._followers[queue] = name
        time_s = asyncio.get_running_loop().time
        until_s = time_s() + for_s
        try:
            for line in self.tail(name, most, since_s):
                yield line
            while not self._closed:
                line_or_end = await asyncio.wait_for(queue.get(), until_s - time_s())
                if line_or_end is None:
                    return
                yield line_or_end
        except TimeoutError:
            return
        finally:
            del self._followers[queue]

    def forget(self, name: str) -> None:
        """Drop the lines of a function that is gone."""
        self._lines.pop(name, None)

    def close(self) -> None:
        """Send every follower home."""
        self._closed = True
        for queue in self._followers:
            if not queue.full():
                queue.put_nowait(None)
