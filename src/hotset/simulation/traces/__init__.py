"""Traces: one file per format; ``open_trace`` tells which by the file's header (docs/traces.md)."""

from __future__ import annotations

import csv
from pathlib import Path

from hotset.errors import TraceError, UnknownNameError
from hotset.simulation.traces.azure2019 import Azure2019
from hotset.simulation.traces.azure2021 import Azure2021
from hotset.simulation.traces.azure_llm import AzureLLM
from hotset.simulation.traces.gentd26 import GenTD26
from hotset.simulation.traces.hotset_trace import CSV_VERSION_LINE, HotsetTrace, is_ndjson_version_1
from hotset.simulation.traces.reading import first_line
from hotset.simulation.traces.trace import Trace

FORMATS: dict[str, type[Trace]] = {
    trace.format: trace for trace in (HotsetTrace, Azure2019, Azure2021, GenTD26, AzureLLM)
}
"""The formats by name."""


def open_trace(path: Path, format_name: str | None = None) -> Trace:
    """The trace in a file, plain or gzip, with its format's default choices (make the class yourself for others).

    Without a name the format is the one with most of its columns in the file's header, so that a trace that lacks one
    is still told what it lacks. Raises ``TraceError`` when no format has any, ``UnknownNameError`` for an unknown name
    and ``ConfigurationError`` for a file that cannot be opened. Rows are not looked at before they are read.
    """
    if format_name is None:
        format_name = detect_format(path)
    if format_name not in FORMATS:
        raise UnknownNameError("trace format", format_name, tuple(FORMATS))
    return FORMATS[format_name](path)


def detect_format(path: Path) -> str:
    """The name of the format that a file's header shows."""
    header = first_line(path)
    if header.startswith(CSV_VERSION_LINE.rpartition(" ")[0]) or is_ndjson_version_1(header):
        return HotsetTrace.format
    found = set(next(csv.reader([header]), []))
    best = max(FORMATS.values(), key=lambda trace: len(found.intersection(trace.columns)))
    if not found.intersection(best.columns):
        known = "; ".join(f"{name}: {', '.join(trace.columns)}" for name, trace in FORMATS.items())
        raise TraceError(str(path), 1, f"expected the header of a known trace format ({known})")
    return best.format
