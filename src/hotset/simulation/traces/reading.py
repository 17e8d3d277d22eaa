"""Reading a trace file line by line: plain or gzip, told by its content; every complaint names file and line."""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import IO

from hotset.errors import ConfigurationError, TraceError

MAX_LINE_BYTES = 1 << 20
"""A line longer than this is no trace: stop before a file without line ends fills the memory."""

_GZIP_MAGIC = b"\x1f\x8b"


class Lines:
    """The lines of one file, as text; one pass. ``line`` is the number of the last one read, counted from 1."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 0

    def __iter__(self) -> Iterator[str]:
        """Raises ``TraceError`` for bytes that are not UTF-8, damaged gzip or an endless line, and
        ``ConfigurationError`` when the file cannot be read."""
        try:
            with _open(self.path) as stream:
                while raw := stream.readline(MAX_LINE_BYTES):
                    self.line += 1
                    if len(raw) == MAX_LINE_BYTES:
                        raise self.error(f"expected lines of less than {MAX_LINE_BYTES} bytes")
                    yield raw.decode("utf-8-sig" if self.line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"expected UTF-8 text (byte {error.start + 1} of the line is not)") from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self.line += 1
            raise self.error("expected a complete gzip file, but it is cut off or damaged here") from error
        except OSError as error:
            raise ConfigurationError(f"cannot read the trace {self.path}: {error.strerror}") from error

    def error(self, expected: str) -> TraceError:
        """The error to raise about the last line read."""
        return TraceError(str(self.path), max(self.line, 1), expected)


def first_line(path: Path) -> str:
    """The first line, without its end. Raises ``TraceError`` for an empty file."""
    lines = Lines(path)
    for line in lines:
        return line.rstrip("\r\n")
    raise lines.error("expected a header line, but the file is empty")


class Table:
    """A CSV file with a header line; one pass.

    ``required`` columns must be there, in any order; others are ignored. ``version_line`` is a line to be found before
    the header. Raises ``TraceError`` when they are not.
    """

    def __init__(self, path: Path, required: Sequence[str], version_line: str = "") -> None:
        self._lines = Lines(path)
        stream = iter(self._lines)
        if version_line and next(stream, "").rstrip("\r\n") != version_line:
            raise self.error(f"expected {version_line!r}")
        self._reader = csv.reader(stream, strict=True)
        self.columns = next(self._records(), [])
        if not self.columns:
            raise self.error("expected a header line with the columns " + ", ".join(required))
        missing = [column for column in required if column not in self.columns]
        if missing:
            raise self.error(f"expected the column{'s' * (len(missing) > 1)} {', '.join(missing)} in the header")
        if len(set(self.columns)) < len(self.columns):
            raise self.error("expected each column once in the header")

    def rows(self, columns: Sequence[str]) -> Iterator[Sequence[str]]:
        """The values of ``columns`` (two or more) of each row; ``TraceError`` for a row of another width, or no row."""
        pick, width = itemgetter(*map(self.columns.index, columns)), len(self.columns)
        empty = True
        for row in self._records():
            if len(row) != width:
                raise self.error(f"expected {width} columns as in the header, found {len(row)}")
            yield pick(row)
            empty = False
        if empty:
            raise self.error("expected at least one row after the header")

    def error(self, expected: str) -> TraceError:
        """The error to raise about the row last read."""
        return self._lines.error(expected)

    def number(self, text: str, column: str) -> float:
        """A finite number that is not negative, or the ``TraceError`` that says which column lacks one."""
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise self.error(f"expected a number of at least 0 in column {column}, found {shorten(text)}")
        return value

    def _records(self) -> Iterator[list[str]]:
        try:
            yield from filter(None, self._reader)
        except csv.Error as error:
            raise self.error(f"expected comma-separated values ({error})") from error


class Timestamps:
    """Reads a column of ISO 8601 dates and times, whose rows have to be in order, as seconds after the first one."""

    def __init__(self, table: Table, column: str) -> None:
        self._table = table
        self._column = column
        self._first: datetime | None = None
        self._last_s = 0.0

    def seconds(self, text: str) -> float:
        """Raises ``TraceError`` for what is no date and time, or lies before the row above."""
        try:
            moment = datetime.fromisoformat(text)
            self._first = self._first or moment
            seconds = (moment - self._first).total_seconds()
        except (ValueError, TypeError):  # TypeError: only one of the two names its time zone
            raise self._table.error(
                f"expected a date and time such as 2023-11-16 18:17:03 in column {self._column}, found {shorten(text)}"
            ) from None
        if seconds < self._last_s:
            raise self._table.error(
                f"expected rows in order of time, but {self._column} {text} is before the row above"
            )
        self._last_s = seconds
        return seconds


def shorten(text: str) -> str:
    """``text`` quoted for an error message, however long it is."""
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _open(path: Path) -> IO[bytes]:
    if not path.is_file():
        raise ConfigurationError(f"cannot read the trace {path}: give a regular file (a trace is read more than once)")
    with path.open("rb") as plain:
        magic = plain.read(len(_GZIP_MAGIC))
    # gzip's own readline is Python code; the buffer in front of it makes lines several times faster.
    return io.BufferedReader(gzip.open(path)) if magic == _GZIP_MAGIC else path.open("rb")
