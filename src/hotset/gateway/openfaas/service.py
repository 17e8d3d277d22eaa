"""The small routes and what works behind them, started and stopped as one: secrets, the asynchronous queue, scaling."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import msgspec

from hotset.errors import ConfigurationError
from hotset.gateway.app import Application
from hotset.gateway.auth import ApiKeys, Credentials
from hotset.gateway.bodies import DEFAULT_MAX_BODY_BYTES
from hotset.gateway.control import Control
from hotset.gateway.deployments import Deployments
from hotset.gateway.openfaas.asynchronous import AsyncApi
from hotset.gateway.openfaas.callbacks import CallbackPolicy, Callbacks
from hotset.gateway.openfaas.info import Role
from hotset.gateway.openfaas.queue import AsyncQueue
from hotset.gateway.openfaas.resources import GpuProfile
from hotset.gateway.openfaas.scaling import TICK_S, Replicas
from hotset.gateway.operations import Operation
from hotset.gateway.system import SystemApi
from hotset.store.async_calls import AsyncCalls
from hotset.store.datastore import ApiKeyRecord
from hotset.store.secrets import Secrets


class AccessConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Who may do what, and what deployments and callers may reach."""

    credentials: Credentials | None = None
    """For everything under ``/system``; None: it is open."""
    insecure: bool = False
    """Listen beyond this machine all the same."""
    allow_local_images: bool = False
    """An image may be an absolute path on the server."""
    allow_callbacks: Sequence[str] = ()
    """Hosts and networks that callbacks may go to; none: anywhere but this machine (``CallbackPolicy``)."""
    secrets_path: Path | None = None
    """One folder that shows all functions' secrets, such as ``/var/openfaas/secrets``; None: one for each function."""
    profiles: Mapping[str, GpuProfile] = msgspec.field(default_factory=dict)
    role: Role = Role.AUTO
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES

    def check_address(self, address: str) -> None:
        """Raises ``ConfigurationError`` for an address that others reach while nobody is asked who he is."""
        if self.insecure or ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            return
        if self.credentials is None:
            raise ConfigurationError(
                f"{address} can be reached by others, who could all deploy code here: give --auth FILE, or --insecure "
                "where something in front asks who they are"
            )


class Front(msgspec.Struct, frozen=True, kw_only=True):
    """What was started."""

    application: Application
    queue: AsyncQueue
    replicas: Replicas


@asynccontextmanager
async def system_front(
    control: Control,
    deployments: Deployments,
    secrets: Secrets,
    keys: ApiKeys,
    config: AccessConfig,
    data: Path,
    transport: httpx.AsyncBaseTransport | None = None,
    described: Sequence[Operation] = (),
) -> AsyncIterator[Front]:
    """The application for everything but calls and the v2 protocol, with its queue and scaling at work.

    ``transport``: what carries callbacks, instead of the network. ``described``: operations that are served elsewhere
    and belong in the OpenAPI document too.
    """
    policy = CallbackPolicy(config.allow_callbacks)
    queue = AsyncQueue(control, AsyncCalls(data), Callbacks(policy, transport), deployments.records)
    await queue.start()
    for record in await asyncio.to_thread(deployments.store.named, ApiKeyRecord):
        keys.add(record)
    api = SystemApi(
        control,
        deployments,
        secrets=secrets,
        asynchronous=AsyncApi(control, queue, policy, max_body_bytes=config.max_body_bytes),
        keys=keys,
        role=config.role,
        described=described,
    )
    scaling = asyncio.create_task(_scale(api.replicas))
    try:
        yield Front(application=api.application(), queue=queue, replicas=api.replicas)
    finally:
        scaling.cancel()
        await queue.stop()


async def _scale(replicas: Replicas) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        replicas.tick()
