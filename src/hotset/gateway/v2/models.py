"""The functions in service as v2 sees them: models with versions, metadata, and a state."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from hotset.errors import ConfigurationError
from hotset.functions.contract import FunctionKind
from hotset.functions.media import V2
from hotset.functions.v2 import WARM
from hotset.functions.v2_types import Tensors
from hotset.gateway.control import Control
from hotset.gateway.deployments import Deployments
from hotset.gateway.v2.refusal import Refusal
from hotset.store.datastore import FunctionRecord

READY = "READY"
UNAVAILABLE = "UNAVAILABLE"


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """One version of one model, as an inference request finds it."""

    name: str
    version: str
    function: str
    """What the control loop calls it."""
    model: str
    """The version of the function, ``function@digest``: another one under the same name is another model."""
    content_type: str
    """What tells the worker which model and version it answers for."""


class IndexEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the repository index."""

    name: str
    version: str = ""
    state: str
    reason: str = ""


class ModelRepository(Protocol):
    """A directory of models (repository.py), as far as this table must know of it."""

    def versions(self, name: str) -> dict[str, str] | None:
        """Version -> function of a model of the directory, the default version first; None: it has no such model."""
        ...

    def index(self) -> list[IndexEntry]: ...

    async def load(self, name: str) -> bool:
        """Put the model in service as it is on disk; False: the directory has none of that name."""
        ...

    def unload(self, name: str) -> bool: ...


class Models:
    """Finds models, describes them, and loads and unloads them on request."""

    def __init__(self, control: Control, deployments: Deployments, repository: ModelRepository | None = None) -> None:
        self._control = control
        self._deployments = deployments
        self._repository = repository
        self._found: dict[tuple[str, str], Served] = {}

    def find(self, name: str, version: str = "") -> Served:
        """The model that takes calls under this name; raises ``Refusal``: 404 unknown, 400 unloaded."""
        served = self._found.get((name, version))
        if served is not None and self._is_current(served):
            return served
        served = self._look_up(name, version)
        if len(self._found) >= 4096:
            self._found.clear()
        self._found[name, version] = served
        return served

    def versions(self, name: str) -> list[str]:
        """The versions that take calls, oldest first."""
        listed = self._versions(name)
        return [each for each in reversed(listed) if listed[each] in self._control.functions.current]

    def record(self, served: Served) -> FunctionRecord:
        return self._deployments.records[served.function]

    def tensors(self, served: Served) -> Tensors:
        """Inputs and outputs, as the function's signature or model file says."""
        found = self.record(served).schema.get("tensors")
        return msgspec.convert(found, Tensors) if found is not None else Tensors(inputs=[], outputs=[])

    def metadata(self, name: str, version: str) -> dict[str, Any]:
        served = self.find(name, version)
        tensors = self.tensors(served)
        return {
            "name": name,
            "versions": self.versions(name),
            "platform": tensors.platform,
            "inputs": msgspec.to_builtins(tensors.inputs),
            "outputs": msgspec.to_builtins(tensors.outputs),
        }

    def configuration(self, name: str, version: str) -> dict[str, Any]:
        """The model as Triton's model configuration would say it, as far as that means something here."""
        served = self.find(name, version)
        tensors, options = self.tensors(served), self.record(served).options
        return {
            "name": name,
            "platform": tensors.platform,
            "backend": "hotset",
            "max_batch_size": 0,
            "input": [
                {
                    "name": each.name,
                    "data_type": config_datatype(each.datatype),
                    "dims": list(each.shape),
                    "optional": each.name in tensors.optional,
                }
                for each in tensors.inputs
            ],
            "output": [
                {"name": each.name, "data_type": config_datatype(each.datatype), "dims": list(each.shape)}
                for each in tensors.outputs
            ],
            "instance_group": [{"kind": "KIND_GPU" if options.kind is FunctionKind.GPU else "KIND_CPU", "count": 1}],
        }

    def is_ready(self, name: str, version: str = "") -> bool:
        try:
            self.find(name, version)
        except Refusal:
            return False
        return True

    def index(self, ready_only: bool = False) -> list[IndexEntry]:
        """Every model there is, whether it takes calls or not."""
        entries = [] if self._repository is None else list(self._repository.index())
        of_repository = {entry.name for entry in entries}
        for name, record in self._deployments.records.items():
            if name.partition(":")[0] in of_repository:
                continue
            if name in self._control.functions.current:
                entries.append(IndexEntry(name=name, version=record.version, state=READY))
            else:
                reason = self._deployments.unavailable.get(name, "it is being restored")
                entries.append(IndexEntry(name=name, version=record.version, state=UNAVAILABLE, reason=reason))
        return [entry for entry in entries if entry.state == READY or not ready_only]

    async def load(self, name: str, parameters: dict[str, Any]) -> None:
        """Put the model in service, load it and keep it hot until ``unload``; raises ``Refusal`` when that cannot be.

        ``{"warm": false}`` among the parameters leaves the loading to calls, and the model to eviction.
        """
        warm = parameters.pop("warm", True)
        if parameters:
            raise Refusal(
                400, f"load takes no {', '.join(sorted(parameters))[:200]}: change the files of the model instead"
            )
        found = self._repository is not None and await self._repository.load(name)
        if not found and not await self._deployments.resume(name):
            raise unknown(name)
        for function in self._versions(name).values():
            if function not in self._control.functions.current:
                reason = self._deployments.unavailable.get(function, "it is being restored: try again")
                raise Refusal(503, f"{function} cannot be loaded: {reason}")
            if warm:
                await self._pin(function)

    async def _pin(self, function: str) -> None:
        """Keep a copy of a function's model hot; returns when it is. Raises ``Refusal`` when it does not load."""
        before = self._control.pinning.copies(function)
        try:
            self._control.pinning.pin(function, max(before, 1))
        except ConfigurationError as error:
            raise Refusal(400, str(error)) from None
        result = await self._control.call(function, b"", WARM)
        if result.record.status != 200:
            if function in self._control.functions.current:
                self._control.pinning.pin(function, before)
            raise Refusal(result.record.status, error_text(result.body), retry_after_s=result.retry_after_s)

    def unload(self, name: str) -> None:
        """Evict the model as soon as its calls have ended and refuse others until ``load``; raises ``Refusal``."""
        found = self._repository is not None and self._repository.unload(name)
        if not found and not self._deployments.suspend(name, f"unloaded: POST /v2/repository/models/{name}/load"):
            raise unknown(name)

    def _look_up(self, name: str, version: str) -> Served:
        versions = self._versions(name)
        if version and version not in versions:
            raise Refusal(404, f"model {name!r} has no version {version[:80]!r}: it has {', '.join(versions)}")
        chosen = version or next(iter(versions))
        function = versions[chosen]
        if function not in self._control.functions.current:
            reason = self._deployments.unavailable.get(function, "it is being restored")
            raise Refusal(400, f"model {name!r} takes no requests: {reason}")
        return Served(
            name=name,
            version=chosen,
            function=function,
            model=self._control.functions.current[function].model,
            content_type=f"{V2}; model={name}; version={chosen}",
        )

    def _versions(self, name: str) -> dict[str, str]:
        """Version -> function, the default version first; raises ``Refusal`` (404)."""
        if self._repository is not None and (versions := self._repository.versions(name)):
            return versions
        record = self._deployments.records.get(name)
        if record is None or ":" in name:
            raise unknown(name)
        return {record.version: name}

    def _is_current(self, served: Served) -> bool:
        """Whether a remembered answer still holds: the function was neither unloaded, removed nor deployed anew."""
        current = self._control.functions.current.get(served.function)
        return current is not None and current.model == served.model


def unknown(name: str) -> Refusal:
    return Refusal(404, f"there is no model {name[:80]!r}: list them with POST /v2/repository/index")


def error_text(body: bytes | bytearray | memoryview) -> str:
    """The sentence in an error answer's JSON."""
    try:
        return str(msgspec.json.decode(body)["error"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return "the call failed: see the server's log"


def config_datatype(datatype: str) -> str:
    """``FP32`` -> ``TYPE_FP32``, as model configurations write it."""
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
