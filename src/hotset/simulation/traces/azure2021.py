"""Azure Functions Invocation Trace 2021: one row per invocation (Zhang et al., "Faster and Cheaper Serverless Computing
on Harvested Resources", SOSP 2021; Azure/AzurePublicDataset).

Columns ``app, func, end_timestamp, duration``, in seconds; an invocation arrived at end - duration. Rows come as the
invocations ended or as they started, so they are put in order of arrival here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from hotset.simulation.traces.reading import Table
from hotset.simulation.traces.trace import InvocationTrace
from hotset.simulation.workloads import Arrival


class Azure2021(InvocationTrace):
    """Per invocation. The app is the caller, the recorded duration the run time (of a CPU function)."""

    format: ClassVar[str] = "azure2021"
    columns: ClassVar[tuple[str, ...]] = ("app", "func", "end_timestamp", "duration")

    def rows(self) -> Iterator[Arrival]:
        """The invocations in the file's order, on its clock."""
        table = Table(self.path, self.columns)
        for app, function, end, duration in table.rows(self.columns):
            if not function:
                raise table.error("expected a function's name in column func")
            duration_s = table.number(duration, "duration")
            yield Arrival(table.number(end, "end_timestamp") - duration_s, function, duration_s, app)
