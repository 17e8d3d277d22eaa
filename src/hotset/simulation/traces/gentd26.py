"""Alibaba GenTD26: requests to a production stable-diffusion service (Lin et al., SoCC 2025; alibaba/clusterdata,
``cluster-trace-v2026-GenAI/lora_request_trace.csv``).

Each row names its base model, its user and its run time on the GPU. Times are whole seconds on a shifted clock, rows
are in order of arrival.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import ClassVar

from hotset.simulation.traces.reading import Table, Timestamps, shorten
from hotset.simulation.traces.trace import InvocationTrace
from hotset.simulation.workloads import Arrival

UNNAMED_MODEL = "unnamed"
"""What the requests ask for whose model id is empty."""


class Rows(Enum):
    """Which requests count, by how they ended."""

    ALL = "all"
    """All of them: a request that failed, or was still pending at the trace's end, arrived nevertheless."""
    SUCCEEDED = "succeeded"
    """Only those with an image as their result."""


class GenTD26(InvocationTrace):
    """Per request: the model is the function, its ``groupId`` the caller, ``exec_time_seconds`` the run time.

    A request that did not succeed has no run time here (its own says when it gave up): the hardware profile's is used.
    """

    format: ClassVar[str] = "gentd26"
    columns: ClassVar[tuple[str, ...]] = (
        "gmt_create",
        "predict_status",
        "exec_time_seconds",
        "groupId",
        "checkpoint_model_version_id",
    )

    def __init__(self, path: Path, rows: Rows = Rows.ALL) -> None:
        super().__init__(path)
        self.included = rows

    def rows(self) -> Iterator[Arrival]:
        """The requests, in seconds after the file's first."""
        table = Table(self.path, self.columns)
        clock = Timestamps(table, "gmt_create")
        for created, status, exec_time, user, model in table.rows(self.columns):
            if not status.isupper():
                raise table.error(
                    f"expected a status such as SUCCEED in column predict_status, found {shorten(status)}"
                )
            time_s = clock.seconds(created)
            inference_s = table.number(exec_time, "exec_time_seconds") if exec_time else None
            if status == "SUCCEED":
                yield Arrival(time_s, model or UNNAMED_MODEL, inference_s, user)
            elif self.included is Rows.ALL:
                yield Arrival(time_s, model or UNNAMED_MODEL, None, user)
