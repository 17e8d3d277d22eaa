"""The v2 front doors of one server: opened with it, closed with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from hotset.errors import ConfigurationError
from hotset.gateway.app import Application, Headers
from hotset.gateway.bodies import Bodies
from hotset.gateway.control import Control
from hotset.gateway.deployments import Deployments
from hotset.gateway.v2.http import V2Http
from hotset.gateway.v2.repository import DirectoryRepository
from hotset.gateway.v2.service import V2Service

log = logging.getLogger("hotset.gateway")


class V2Config(msgspec.Struct, frozen=True, kw_only=True):
    """How the protocol is served."""

    host: str = "127.0.0.1"
    grpc_port: int | None = None
    """None: no gRPC; 0: any free port."""
    model_repository: Path | None = None
    """A directory of models to serve."""
    data: Path | None = None
    """Where the repository keeps what it makes; needed with ``model_repository``."""


@asynccontextmanager
async def v2_front(
    control: Control,
    deployments: Deployments,
    rest: Application,
    bodies: Bodies,
    config: V2Config,
    *,
    admits: Callable[[str, Headers], bool] | None = None,
) -> AsyncIterator[V2Http]:
    """An application that serves ``/v2`` and leaves the rest to ``rest``; while it is open, gRPC is served too.

    ``admits``: whether who shows these headers may make a request for this path; asked for gRPC, in front of which no
    ASGI application can stand. None: anybody may.

    Raises ``ConfigurationError`` when the gRPC port is taken, its packages are not installed, or the model repository
    is no directory.
    """
    repository = None
    if config.model_repository is not None:
        assert config.data is not None, "a model repository needs a place for what serves it"
        repository = DirectoryRepository(config.model_repository, config.data / "model-repository", deployments)
        await repository.look()
    service = V2Service(control, deployments, repository)
    watching = None if repository is None else asyncio.create_task(repository.watch())
    grpc_server = None
    if config.grpc_port is not None:
        try:
            from hotset.gateway.v2.grpc_service import GrpcServer
        except ModuleNotFoundError as error:
            raise ConfigurationError(f"gRPC needs {error.name}: pip install 'hotset[grpc]'") from None
        grpc_server = GrpcServer(
            service, config.host, config.grpc_port, max_body_bytes=bodies.max_body_bytes, admits=admits
        )
    try:
        if grpc_server is not None:
            await grpc_server.start()
            log.info("gRPC at %s:%s", config.host, grpc_server.port)
        yield V2Http(service, rest, bodies)
    finally:
        if watching is not None:
            watching.cancel()
        if grpc_server is not None:
            await grpc_server.stop()
        service.close()
