"""``/system/info``: what a gateway says of itself, or a provider, whichever role a request speaks to."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from enum import Enum

import msgspec
from starlette.requests import Request
from starlette.responses import Response

import hotset
from hotset.gateway.openfaas.types import GatewayInfo, ProviderInfo, Version
from hotset.gateway.operations import Answer, Operation
from hotset.gateway.web import json_response

VERSION = Version(release=hotset.__version__, sha=f"v{hotset.__version__}")
"""``sha`` must not be empty; a release's tag names its commit."""
PROVIDER = ProviderInfo(provider="hotset", orchestration="hotset", version=VERSION)
GATEWAY = GatewayInfo(provider=PROVIDER, version=VERSION, arch=platform.machine())

_FORWARDED = re.compile(r"(?:[0-9.]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5}")


class Role(Enum):
    """What the server is to whoever asks."""

    GATEWAY = "gateway"
    """faas-cli and people speak to it."""
    PROVIDER = "provider"
    """An OpenFaaS gateway stands in front."""
    AUTO = "auto"
    """Provider to requests that an OpenFaaS gateway forwarded: it alone adds the client's port to X-Forwarded-For."""


class Telemetry(msgspec.Struct, frozen=True, kw_only=True):
    """The server in numbers, without any names. Nothing of it is sent anywhere by itself."""

    provider: str = PROVIDER.provider
    version: str = VERSION.release
    uptime_s: float
    functions: int
    """Deployed."""
    invocations: int
    """Calls that ended since the start."""
    gpus: int
    gpu_memory_bytes: int
    """What models may use, all GPUs together."""
    hot_models: int
    """Copies in GPU memory."""


class InfoApi:
    def __init__(self, telemetry: Callable[[], Telemetry], role: Role = Role.AUTO) -> None:
        self._telemetry = telemetry
        self._role = role

    def operations(self) -> list[Operation]:
        return [
            Operation(
                method="GET",
                path="/system/info",
                handler=self.info,
                summary="Who serves: the gateway, or behind an OpenFaaS gateway the provider",
                tag="server",
                answers={200: Answer(text="Names and versions.", kind=(GatewayInfo, ProviderInfo))},
            ),
            Operation(
                method="GET",
                path="/system/telemetry",
                handler=self.telemetry,
                summary="The server in numbers",
                tag="server",
                answers={200: Answer(text="As of now.", kind=Telemetry)},
            ),
        ]

    async def telemetry(self, request: Request) -> Response:
        return json_response(self._telemetry())

    async def info(self, request: Request) -> Response:
        role = self._role
        if role is Role.AUTO:
            forwarded_for = request.headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
            behind = "x-forwarded-host" in request.headers and _FORWARDED.fullmatch(forwarded_for)
            role = Role.PROVIDER if behind else Role.GATEWAY
        return json_response(PROVIDER if role is Role.PROVIDER else GATEWAY)
