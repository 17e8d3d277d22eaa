"""hotset's own trace format, version 1: what a live server records and ``hotset replay`` reads (docs/traces.md).

CSV, or NDJSON with the same fields; plain or gzip. Both begin with a line that names the format and its version.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import msgspec

from hotset.errors import ConfigurationError, TraceError
from hotset.simulation.traces.reading import Lines, Table, first_line
from hotset.simulation.traces.trace import InvocationTrace
from hotset.simulation.workloads import Arrival

CSV_VERSION_LINE = "# hotset-trace 1"
NDJSON_VERSION_LINE = '{"hotset_trace":1}'

_FIELDS = ("arrival_s", "function", "inference_s", "caller")
_OPTIONAL = ("inference_s", "caller")


class _Record(msgspec.Struct):
    """One line of NDJSON; fields it does not know are skipped."""

    arrival_s: float
    function: str
    inference_s: float | None = None
    caller: str = ""


class HotsetTrace(InvocationTrace):
    """Per request, in order of arrival; times count from the start of the recording."""

    format: ClassVar[str] = "hotset"
    columns: ClassVar[tuple[str, ...]] = ("arrival_s", "function")
    starts_at_first_arrival: ClassVar[bool] = False

    def rows(self) -> Iterator[Arrival]:
        """The requests, in seconds after the recording's start."""
        last_s = 0.0
        lines = self._ndjson() if first_line(self.path).startswith("{") else self._csv()
        for arrival, source in lines:
            if arrival.time_s < last_s:
                raise source.error(f"expected rows in order of time, but {arrival.time_s} s is before the row above")
            last_s = arrival.time_s
            yield arrival

    def _csv(self) -> Iterator[tuple[Arrival, Table]]:
        table = Table(self.path, self.columns, version_line=CSV_VERSION_LINE)
        optional = [column for column in _OPTIONAL if column in table.columns]
        for time, function, *others in table.rows((*self.columns, *optional)):
            if not function:
                raise table.error("expected a function's name in column function")
            given = dict(zip(optional, others, strict=True))
            inference = given.get("inference_s")
            inference_s = table.number(inference, "inference_s") if inference else None
            yield Arrival(table.number(time, "arrival_s"), function, inference_s, given.get("caller", "")), table

    def _ndjson(self) -> Iterator[tuple[Arrival, Lines]]:
        lines = Lines(self.path)
        stream = iter(lines)
        if not is_ndjson_version_1(next(stream, "")):
            raise lines.error(f"expected {NDJSON_VERSION_LINE}")
        decoder = msgspec.json.Decoder(_Record)
        for line in stream:
            if line.isspace():
                continue
            try:
                record = decoder.decode(line)
            except msgspec.DecodeError as error:
                raise lines.error(f"expected a JSON object with arrival_s and function ({error})") from error
            if not record.function or record.arrival_s < 0 or (record.inference_s or 0) < 0:
                raise lines.error("expected a function's name, and times of at least 0")
            yield Arrival(record.arrival_s, record.function, record.inference_s, record.caller), lines
        if lines.line == 1:
            raise lines.error("expected at least one row after the header")


class TraceWriter:
    """Writes the format: NDJSON when the name ends in ``.ndjson`` or ``.jsonl``, else CSV; gzip if followed by ``.gz``.

    A context manager; the file appears, or is overwritten, when the writer is made.
    """

    def __init__(self, path: Path) -> None:
        """Raises ``ConfigurationError`` when the file cannot be written."""
        self.path = path
        self._last_s = 0.0
        self._line = 1
        stem = path.name.removesuffix(".gz")
        ndjson = stem.endswith((".ndjson", ".jsonl"))
        try:
            binary = gzip.open(path, "wb") if stem != path.name else path.open("wb")  # noqa: SIM115 (close() does)
        except OSError as error:
            raise ConfigurationError(f"cannot write the trace {path}: {error.strerror}") from error
        self._stream = io.TextIOWrapper(binary, encoding="utf-8", newline="")
        self._table = None if ndjson else csv.writer(self._stream, lineterminator="\n")
        if self._table is None:
            self._stream.write(NDJSON_VERSION_LINE + "\n")
        else:
            self._stream.write(CSV_VERSION_LINE + "\n")
            self._table.writerow(_FIELDS)

    def write(self, arrival: Arrival) -> None:
        """Append one request. Raises ``TraceError`` when it lies before the last one or could not be read back,
        and ``OSError`` when the disk does not take it."""
        if not self._last_s <= arrival.time_s < math.inf or not arrival.function:
            raise TraceError(
                str(self.path),
                self._line + 1,
                f"expected a function's name and a time of {self._last_s} s or later to write, "
                f"got {arrival.function!r} at {arrival.time_s} s",
            )
        self._last_s = arrival.time_s
        self._line += 1
        record = _Record(arrival.time_s, arrival.function, arrival.inference_s, arrival.caller)
        if self._table is None:
            self._stream.write(msgspec.json.encode(record).decode() + "\n")
        else:
            self._table.writerow(msgspec.structs.astuple(record))

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self._stream.flush()

    def close(self) -> None:
        """Complete the file; only then is a gzip one readable to its end."""
        self._stream.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class TraceRecorder:
    """Records a live server: requests are written in order of arrival, each once it and all before it have ended.

    Memory grows with the requests that came since the oldest one still in the system, not with all that ever did.
    """

    def __init__(self, writer: TraceWriter) -> None:
        self._writer = writer
        self._open: dict[int, Arrival] = {}
        self._ended: dict[int, float | None] = {}

    def arrived(self, request_id: int, arrival: Arrival) -> None:
        """A request came; call it in order of time."""
        self._open[request_id] = arrival

    def ended(self, request_id: int, inference_s: float | None) -> None:
        """A request ended after a run of this length; None: without a run (rejected, cancelled, failed)."""
        if request_id not in self._open:  # it arrived before the recording began
            return
        self._ended[request_id] = inference_s
        while self._open and (head := next(iter(self._open))) in self._ended:
            self._write(head)

    def close(self) -> None:
        """Write what has not ended, without a run time, and complete the file."""
        for request_id in list(self._open):
            self._write(request_id)
        self._writer.close()

    def _write(self, request_id: int) -> None:
        inference_s = self._ended.pop(request_id, None)
        self._writer.write(msgspec.structs.replace(self._open.pop(request_id), inference_s=inference_s))


def is_ndjson_version_1(line: str) -> bool:
    """Whether a file that begins with this line is NDJSON of this format; more keys beside the version are allowed."""
    try:
        header = msgspec.json.decode(line)
    except msgspec.DecodeError:
        return False
    return isinstance(header, dict) and header.get("hotset_trace") == 1
