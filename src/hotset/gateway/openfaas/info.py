"""``/system/info``: what a gateway says of itself, or a provider, whichever role a request speaks to."""

from __future__ import annotations

import platform
import re
from enum import Enum

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


class InfoApi:
    def __init__(self, role: Role = Role.AUTO) -> None:
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
            )
        ]

    async def info(self, request: Request) -> Response:
        role = self._role
        if role is Role.AUTO:
            forwarded_for = request.headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
            behind = "x-forwarded-host" in request.headers and _FORWARDED.fullmatch(forwarded_for)
            role = Role.PROVIDER if behind else Role.GATEWAY
        return json_response(PROVIDER if role is Role.PROVIDER else GATEWAY)
