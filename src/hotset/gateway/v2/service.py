"""What both v2 front doors answer from: the server's description, models, inference, regions and statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

import hotset
from hotset.gateway import readings
from hotset.gateway.callers import Caller, CallerError
from hotset.gateway.control import Control
from hotset.gateway.deployments import Deployments
from hotset.gateway.v2.inference import Inference
from hotset.gateway.v2.models import ModelRepository, Models
from hotset.gateway.v2.refusal import Refusal
from hotset.gateway.v2.shared_memory import Regions
from hotset.gateway.v2.statistics import Statistics

NO_CUDA_REGIONS = "CUDA shared memory is not supported here: use system shared memory, or send binary tensors"

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "statistics",
    "system_shared_memory",
    "trace",
)

TRACE_SETTINGS = {
    "trace_level": ["OFF"],
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_file": "",
    "trace_mode": "triton",
}
"""What the trace extension says: it is off, and stays off (``hotset explain`` and ``/system/trace`` tell more)."""


class V2Service:
    """The parts of the protocol, put together once and shared by HTTP and gRPC."""

    def __init__(self, control: Control, deployments: Deployments, repository: ModelRepository | None = None) -> None:
        self.control = control
        self.models = Models(control, deployments, repository)
        self.regions = Regions()
        self.statistics = Statistics()
        self.inference = Inference(control, self.models, self.regions, self.statistics)

    def caller(self, headers: Mapping[bytes, bytes]) -> Caller:
        """Who makes a request with these headers, or metadata; raises ``Refusal``."""
        try:
            return self.control.callers.of(headers)
        except CallerError as error:
            raise Refusal(400, str(error)) from None

    def close(self) -> None:
        self.regions.close()

    def server_metadata(self) -> dict[str, Any]:
        return {"name": "hotset", "version": hotset.__version__, "extensions": list(EXTENSIONS)}

    def problem(self) -> str | None:
        """Why the server is not ready; None: it is."""
        return readings.problem(self.control)

    def is_ready(self) -> bool:
        return self.problem() is None

    def index(self, ready_only: bool) -> list[dict[str, str]]:
        listed: list[dict[str, str]] = msgspec.to_builtins(self.models.index(ready_only))
        return listed

    def model_statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Of one model, or of all that take calls; raises ``Refusal``."""
        if name:
            versions = [version] if version else self.models.versions(name)
            chosen = [self.models.find(name, each) for each in versions] or [self.models.find(name)]
        else:
            chosen = [self.models.find(entry.name, entry.version) for entry in self.models.index(ready_only=True)]
        return {"model_stats": [self.statistics.of(served.name, served.version) for served in chosen]}

    def trace_settings(self, wanted: dict[str, Any], model: str = "") -> dict[str, Any]:
        """The settings; raises ``Refusal`` for an update that would turn tracing on, or for an unknown model."""
        if model:
            self.models.find(model)
        for name, value in wanted.items():
            level_off = name == "trace_level" and value in (None, ["OFF"], "OFF")
            if not level_off and value not in (None, TRACE_SETTINGS.get(name)):
                raise Refusal(400, f"{name[:80]} cannot be set: tracing is off; see `hotset explain` and /system/trace")
        return dict(TRACE_SETTINGS)
