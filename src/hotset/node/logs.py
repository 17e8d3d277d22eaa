"""What a GPU process prints, line by line, at a pace the node can bear."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

LINE_BYTES = 8 * 1024
"""A longer line is folded."""
LINES_PER_S = 500
"""More are left out, and counted."""
BYTES_PER_S = 2 * 1024 * 1024
"""After more, nothing is read until the second is over: a process that prints without end waits for its own output."""
_READ_BYTES = 64 * 1024


class LogReader:
    """Reads the log pipe of one process and owns its descriptor (non-blocking). ``last_line``: the latest that was not
    blank."""

    def __init__(self, fd: int, on_line: Callable[[str], None]) -> None:
        self.last_line = ""
        self._fd = fd
        self._on_line = on_line
        self._loop = asyncio.get_running_loop()
        self._rest = b""
        self._window_ends_s = 0.0
        self._window_lines = 0
        self._window_bytes = 0
        self._left_out = 0
        self._resume: asyncio.TimerHandle | None = None
        self._loop.add_reader(fd, self._readable)

    def close(self) -> None:
        """Take in what is still in the pipe, then close it. The pipe's own size bounds that."""
        if self._resume is not None:
            self._resume.cancel()
        self._loop.remove_reader(self._fd)
        for _ in range(BYTES_PER_S // _READ_BYTES):
            if not self._read():
                break
        if self._rest:
            self._line(self._rest)
        self._report_left_out()
        os.close(self._fd)

    def _readable(self) -> None:
        if not self._read():
            self._loop.remove_reader(self._fd)
        elif self._window_bytes > BYTES_PER_S:
            self._loop.remove_reader(self._fd)
            self._resume = self._loop.call_at(self._window_ends_s, self._start_again)

    def _start_again(self) -> None:
        self._resume = None
        self._loop.add_reader(self._fd, self._readable)

    def _read(self) -> bool:
        """One read; False at the end of the pipe, or when ``close`` has emptied it."""
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return False
        now_s = self._loop.time()
        if now_s >= self._window_ends_s:
            self._report_left_out()
            self._window_ends_s = now_s + 1.0
            self._window_lines = self._window_bytes = 0
        self._window_bytes += len(data)
        *lines, rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line)
        while len(rest) > LINE_BYTES:
            self._line(rest[:LINE_BYTES])
            rest = rest[LINE_BYTES:]
        self._rest = rest
        return bool(data)

    def _line(self, raw: bytes) -> None:
        line = raw.rstrip(b"\r")[:LINE_BYTES].decode("utf-8", "replace")
        if line.strip():
            self.last_line = line
        if self._window_lines < LINES_PER_S:
            self._window_lines += 1
            self._on_line(line)
        else:
            self._left_out += 1

    def _report_left_out(self) -> None:
        if self._left_out:
            self._on_line(f"... {self._left_out} lines left out: more than {LINES_PER_S} in one second")
            self._left_out = 0
