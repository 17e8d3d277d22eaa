"""``hotset serve``: everything put together, from a configuration to a stop that answers everybody."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import psutil  # type: ignore[import-untyped]
import uvloop

from hotset.errors import StoreError
from hotset.gateway.app import PREFIX, Gateway
from hotset.gateway.auth import ApiKeys, Guard
from hotset.gateway.bodies import DEFAULT_MAX_BODY_BYTES, DEFAULT_MAX_OPEN_BYTES, Bodies
from hotset.gateway.callers import Callers
from hotset.gateway.control import Control, ControlConfig
from hotset.gateway.deployments import Deployments
from hotset.gateway.direct import DirectProtocol
from hotset.gateway.fronts import DirectFront
from hotset.gateway.listener import Listener, bind
from hotset.gateway.openfaas.service import AccessConfig, system_front
from hotset.gateway.thrash_log import log_thrashing
from hotset.gateway.v2.front import V2Config, v2_front
from hotset.gateway.v2.http import INFER_PREFIX
from hotset.gateway.v2_operations import V2_OPERATIONS
from hotset.node.cpu import CpuPool
from hotset.node.interface import Node
from hotset.node.manager import LocalNode
from hotset.node.zygote import ZygoteSource
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.policies.interface import PolicySettings
from hotset.scheduling.scheduler import Scheduler
from hotset.store.bundles import Bundles
from hotset.store.environments import Environments
from hotset.store.secrets import Secrets
from hotset.store.sqlite import SqliteDatastore

PROFILES_EVERY_S = 30.0
"""How often what was learned is written down; a crash forgets no more than that."""

log = logging.getLogger("hotset.gateway")


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``hotset serve`` takes from flags, environment variables and its configuration file."""

    host: str = "127.0.0.1"
    port: int = 8080
    """0: any free one."""
    data: Path
    """Directory of the datastore, bundles and environments; made when missing."""
    policy: str = "hotset"
    o3_limit: int = 25
    max_skips: int = 10_000
    max_wait_s: float = 60.0
    overrun_s: float = 10.0
    eviction: str = "hotset"
    virtual_gpus: int = 0
    """0: this machine's CUDA GPUs."""
    gpu_memory_bytes: int | None = None
    """What models may use of each GPU; None: what is free (virtual GPUs have no such figure)."""
    copy_bandwidth: float | None = None
    """Bytes a second of each virtual GPU's modelled bus; None: copies there take no time."""
    host_memory_bytes: int | None = 0
    """What models that left a GPU may take of each node's memory while they wait to come back; None: half of what is
    free at the start; 0: they are unloaded."""
    overlap: bool = False
    prefetch_recurring: bool = False
    """Whether models are loaded while their GPU computes."""
    max_queue: int = 10_000
    """Most calls that wait; one more gets a 429."""
    max_queue_per_function: int | None = None
    caller_header: str = ""
    """Names the caller of a call that shows no key; empty: none is trusted."""
    pool_contexts: int = 1
    """How many processes wait for a model with the context of a GPU open, on each CUDA GPU."""
    burst_s: float = 0.002
    """Waiting calls of one model share a run while it is expected to stay shorter than this."""
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    max_open_bytes: int = DEFAULT_MAX_OPEN_BYTES
    """The bodies of all calls that are being read, wait or run; one more gets a 429."""
    drain_s: float = 30.0
    """What calls in flight get to end when the server is told to stop."""
    recorded_calls: int = 100_000
    """Finished calls kept for ``/system/trace``."""
    explained_calls: int = 10_000
    """Calls whose decisions are kept for ``/system/explain``."""
    pip_options: tuple[str, ...] = ()
    """Passed to the installer of functions' requirements."""
    grpc_port: int | None = None
    """Where the Open Inference Protocol is served over gRPC; None: only over HTTP; 0: any free port."""
    model_repository: Path | None = None
    """A directory of models to serve as they stand there."""
    access: AccessConfig = AccessConfig()


def serve(config: ServerConfig, *, ready: Callable[[str], None] = log.info) -> None:
    """Serve until SIGTERM or SIGINT. ``ready`` gets the server's URL once it answers.

    Raises ``HotsetError`` with what to do when it cannot start.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(config, ready=ready))


async def run(
    config: ServerConfig, *, nodes: Sequence[Node] | None = None, ready: Callable[[str], None] = log.info
) -> None:
    """``serve`` on the running loop; ``nodes`` instead of this machine's GPUs."""
    settings = PolicySettings(
        o3_limit=config.o3_limit,
        max_skips=config.max_skips,
        max_wait_s=config.max_wait_s,
        overrun_s=config.overrun_s,
    )
    scheduler = Scheduler(
        make_policy(config.policy, settings),
        make_eviction(config.eviction),
        SchedulerConfig(
            max_queue=config.max_queue,
            max_queue_per_model=config.max_queue_per_function,
            burst_s=config.burst_s,
            journal_capacity=config.explained_calls,
            host_memory_bytes=_host_memory_bytes(config),
            overlap=config.overlap,
            prefetch_recurring=config.prefetch_recurring,
            settings=settings,
        ),
    )
    source = ZygoteSource()
    nodes = nodes or [
        LocalNode(
            virtual_gpus=config.virtual_gpus,
            memory_bytes=config.gpu_memory_bytes,
            cuda=config.virtual_gpus == 0,
            copy_bandwidth=config.copy_bandwidth,
            source=source,
            pool_contexts=config.pool_contexts,
        )
    ]
    control = Control(scheduler, nodes, cpu=CpuPool(), config=ControlConfig(recorded_calls=config.recorded_calls))
    bodies = Bodies(control, max_body_bytes=config.max_body_bytes, max_open_bytes=config.max_open_bytes)
    access = msgspec.structs.replace(config.access, max_body_bytes=config.max_body_bytes)
    with contextlib.closing(bind(config.host, config.port)) as listening:
        access.check_address(listening.getsockname()[0])
        store = SqliteDatastore(config.data)
        secrets = Secrets(config.data / "secrets", access.secrets_path)
        deployments = Deployments(
            control,
            store,
            Bundles(config.data / "bundles"),
            Environments(config.data / "environments", pip_options=config.pip_options),
            secrets=secrets,
            profiles=access.profiles,
            allow_local_images=access.allow_local_images,
            source=source,
        )
        keys = ApiKeys()
        try:
            control.callers = Callers(keys, config.caller_header)
            await control.start()
            await deployments.restore()
            v2_config = V2Config(
                host=config.host,
                grpc_port=config.grpc_port,
                model_repository=config.model_repository,
                data=config.data,
            )
            async with (
                system_front(
                    control, deployments, secrets, keys, access, config.data, described=V2_OPERATIONS
                ) as front,
                v2_front(
                    control,
                    deployments,
                    front.application,
                    bodies,
                    v2_config,
                    admits=Guard(front.application, access.credentials, keys).admits,
                ) as v2,
            ):
                gateway = Gateway(control, v2, bodies)
                guard = Guard(gateway, access.credentials, keys)
                fronts: dict[bytes, DirectFront] = {PREFIX.encode(): gateway, INFER_PREFIX.encode(): v2}
                connect = partial(DirectProtocol, control, bodies, fronts, guard.admits)
                listener = Listener(guard, control, connect, drain_s=config.drain_s)
                listener.when_started(lambda: ready(f"http://{config.host}:{listening.getsockname()[1]}"))
                gc.collect()
                gc.freeze()  # what is here now stays: no collection need look at it again
                besides = [asyncio.create_task(task) for task in (_save_profiles(deployments), log_thrashing(control))]
                try:
                    await listener.serve([listening])
                finally:
                    for task in besides:
                        task.cancel()
        finally:
            await control.stop()
            await deployments.close()


def _host_memory_bytes(config: ServerConfig) -> int:
    """What parked models may take. The memory of virtual GPUs is the machine's own, and is not free."""
    if config.host_memory_bytes is not None:
        return config.host_memory_bytes
    free_bytes = int(psutil.virtual_memory().available) - config.virtual_gpus * (config.gpu_memory_bytes or 0)
    return max(0, free_bytes // 2)


async def _save_profiles(deployments: Deployments) -> None:
    while True:
        await asyncio.sleep(PROFILES_EVERY_S)
        try:
            await deployments.save_profiles()
        except StoreError as error:
            log.error("what was learned could not be written down: %s", error)
