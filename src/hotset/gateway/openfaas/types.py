"""OpenFaaS's JSON documents as records. Field names on the wire are camelCase; what is optional there may be absent.

Unknown fields are ignored (old clients send ``network`` and ``registryAuth``); a null is read as "not given".
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
Strings = Mapping[str, str]
# The patterns are described here and checked in naming.py, whose errors say what to do.
Label = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"})]
SecretKey = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": "^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"})]
_BASE64 = "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
Given = Annotated[str, msgspec.Meta(extra_json_schema={"minLength": 1})]


class Resources(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """FunctionResources: strings, kept and returned exactly as they were given."""

    memory: str | None = None
    cpu: str | None = None
    nvidia_gpu: str | None = msgspec.field(default=None, name="nvidia.com/gpu")
    amd_gpu: str | None = msgspec.field(default=None, name="amd.com/gpu")
    intel_gpu: str | None = msgspec.field(default=None, name="intel.com/gpu")

    @property
    def empty(self) -> bool:
        return self == Resources()


class Overrides(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """hotset's own part of a deployment; None: what the function's decorator says."""

    entry: str | None = None
    """``module:Name``, or ``module`` when it holds one function; None: the bundle's only, or usual, file."""
    gpu_memory: str | int | None = None
    max_batch: int | None = None
    max_batch_wait: str | float | None = None
    timeout: str | float | None = None
    load_timeout: str | float | None = None
    retry: bool | None = None


class FunctionDeployment(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What ``POST`` and ``PUT /system/functions`` take."""

    service: Label
    image: Given = ""
    namespace: str | None = None
    env_process: str | None = None
    env_vars: Strings | None = None
    constraints: tuple[str, ...] | None = None
    secrets: tuple[str, ...] | None = None
    labels: Strings | None = None
    annotations: Strings | None = None
    limits: Resources | None = None
    requests: Resources | None = None
    read_only_root_filesystem: bool | None = None
    hotset: Overrides = Overrides()


class Usage(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Host memory and processor time of a function's processes, all together."""

    cpu: float
    """Thousandths of a processor, since the last look."""
    total_memory_bytes: float


class FunctionDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What OpenFaaS has no field for."""

    model: str
    """``name@version``."""
    entry: str
    kind: str
    bundle: str
    requirements: tuple[str, ...]
    gpu_memory_bytes: int | None
    """As declared."""
    measured_memory_bytes: int | None
    """GPU memory that its last load took."""
    memory_margin_bytes: int | None
    """Kept free beside that for its next load: learned from how much its loads differ."""
    max_batch: int
    max_batch_wait_s: float
    timeout_s: float
    load_timeout_s: float
    retry: bool
    fast_load: str | None = None
    """What came of comparing its fast load with its ordinary one, or that there is nothing to compare; None: not
    compared yet, or out of service."""
    gpus: list[str]
    """Where it is resident now."""
    waiting: int
    problem: str | None
    """Why it takes no calls; None: it does."""
    schema: Mapping[str, Any]


class FunctionStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """One function, as ``GET /system/functions`` and ``/system/function/NAME`` show it."""

    name: str
    image: str
    namespace: str
    env_process: str | None = None
    env_vars: Strings | None = None
    constraints: tuple[str, ...] | None = None
    secrets: tuple[str, ...] | None = None
    labels: Strings
    annotations: Strings
    limits: Resources | None = None
    requests: Resources | None = None
    read_only_root_filesystem: bool = False
    invocation_count: Count
    replicas: Count
    """Wanted."""
    available_replicas: Count
    """Ready: those wanted, as soon as the function takes calls; a process is started when a call comes."""
    created_at: str
    """RFC 3339."""
    usage: Usage | None = None
    hotset: FunctionDetails


class DeleteFunctionRequest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    function_name: Given
    namespace: str | None = None


class ScaleServiceRequest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    service_name: str | None = None
    replicas: Count
    namespace: str | None = None


class Version(msgspec.Struct, frozen=True, kw_only=True):
    sha: str
    release: str
    commit_message: str = ""


class ProviderInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Who runs the functions."""

    provider: str
    orchestration: str
    version: Version


class GatewayInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway says of itself, and of the provider behind it."""

    provider: ProviderInfo
    version: Version
    arch: str


class Secret(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a client sends. ``raw_value`` wins: ``value`` may have been trimmed, and cannot hold binary."""

    name: SecretKey
    namespace: str | None = None
    value: str | None = None
    raw_value: Annotated[bytes, msgspec.Meta(extra_json_schema={"pattern": _BASE64})] | None = None


class SecretName(msgspec.Struct, frozen=True, kw_only=True):
    """What a client gets to see of a secret: never its value."""

    name: str
    namespace: str


class FunctionNamespace(msgspec.Struct, frozen=True, kw_only=True):
    name: str = ""
    annotations: Strings | None = None
    labels: Strings | None = None


class NewNamespace(FunctionNamespace, frozen=True, kw_only=True):
    """One to be made, which has to have a name."""

    name: Label


class AlertStatus(Enum):
    FIRING = "firing"
    RESOLVED = "resolved"


class AlertLabels(msgspec.Struct, frozen=True, kw_only=True):
    function_name: str
    """``NAME.NAMESPACE`` or ``NAME``."""
    alertname: str = ""


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    status: AlertStatus
    labels: AlertLabels


class AlertNotification(msgspec.Struct, frozen=True, kw_only=True):
    """What AlertManager sends to ``/system/alert``."""

    alerts: tuple[Alert, ...]
    status: str = ""
    receiver: str = ""


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``/system/logs``."""

    name: str
    namespace: str
    instance: str
    timestamp: str
    text: str
