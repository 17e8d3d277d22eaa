"""What processes print: whole lines, at a bearable pace, to the last word."""

from __future__ import annotations

import asyncio
import os

import pytest
from recording import story

from hotset.node import logs
from hotset.node.logs import LINE_BYTES, LINES_PER_S, LogReader


class Printed:
    """A pipe, its reader, and what came out."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        read_fd, self.fd = os.pipe()
        os.set_blocking(read_fd, False)
        self.reader = LogReader(read_fd, self.lines.append)

    async def until(self, count: int) -> None:
        while len(self.lines) < count:
            await asyncio.sleep(0.001)


@story
async def test_lines_come_whole_and_the_last_words_too() -> None:
    printed = Printed()
    os.write(printed.fd, b"first\r\nsec")
    await printed.until(1)
    os.write(printed.fd, b"ond\n\n\xff\nlast words")
    printed.reader.close()
    os.close(printed.fd)
    assert printed.lines == ["first", "second", "", "\ufffd", "last words"]
    assert printed.reader.last_line == "last words"


@story
async def test_a_line_without_end_is_folded() -> None:
    printed = Printed()
    os.write(printed.fd, b"x" * (2 * LINE_BYTES + 10))
    await printed.until(2)
    os.close(printed.fd)
    await asyncio.sleep(0)
    printed.reader.close()
    assert [len(line) for line in printed.lines] == [LINE_BYTES, LINE_BYTES, 10]


@story
async def test_too_many_lines_are_counted_and_too_many_bytes_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "BYTES_PER_S", 1000)
    loop = asyncio.get_running_loop()
    printed = Printed()
    os.write(printed.fd, b"x\n" * (LINES_PER_S + 100))
    await printed.until(LINES_PER_S)
    assert len(printed.lines) == LINES_PER_S
    assert printed.reader._resume is not None  # more than 1000 bytes: nothing is read for the rest of the second
    os.write(printed.fd, b"later\n")
    printed.reader._resume.cancel()
    printed.reader._window_ends_s = loop.time()
    printed.reader._start_again()  # the second is over
    await printed.until(LINES_PER_S + 2)
    assert printed.lines[-2:] == ["... 100 lines left out: more than 500 in one second", "later"]
    os.close(printed.fd)
    printed.reader.close()
