"""From a deployment request to a version that takes calls, and from the datastore to all of them after a restart.

The order is what makes a deploy atomic: bundle on disk, environment installed, function imported once, record written,
and only then the control loop told. A crash or an error before the record leaves the old version in service.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import msgspec

from hotset.errors import BundleError, ConfigurationError, FunctionError, HotsetError
from hotset.functions.contract import FunctionKind, FunctionOptions
from hotset.functions.units import parse_bytes, parse_duration
from hotset.gateway.control import Control
from hotset.gateway.description import Description, describe, guess_module
from hotset.gateway.functions import VersionSpec
from hotset.gateway.readings import learned, smallest_gpu_bytes
from hotset.node.interface import LaunchSpec
from hotset.node.spawner import child_environment
from hotset.store.bundles import Bundles
from hotset.store.datastore import BundleRecord, Datastore, FunctionRecord, ProfileRecord, version_of
from hotset.store.environments import Environments
from hotset.store.requirements import Requirements, read_requirements
from hotset.vocabulary import Model, Profile

Progress = Callable[[str], None]

log = logging.getLogger("hotset.gateway")


class Overrides(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a deployment says over the function's own decorator; None: what the decorator says."""

    entry: str | None = None
    """``module:Name``, or ``module`` when it holds one function; None: the bundle's only, or usual, file."""
    gpu_memory: str | int | None = None
    max_batch: int | None = None
    timeout: str | float | None = None
    load_timeout: str | float | None = None
    retry: bool | None = None


class Deployment(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """OpenFaaS's FunctionDeployment, as far as it means something here, with hotset's own part beside it."""

    service: str
    image: str = ""
    """The bundle: ``sha256:DIGEST``."""
    namespace: str = ""
    env_vars: Mapping[str, str] | None = None
    labels: Mapping[str, str] | None = None
    annotations: Mapping[str, str] | None = None
    hotset: Overrides = Overrides()


class Deployments:
    """Deploys, removes and restores. Slow steps run in threads; deploys of one function take turns."""

    def __init__(self, control: Control, store: Datastore, bundles: Bundles, environments: Environments) -> None:
        self.control = control
        self.bundles = bundles
        self.records: dict[str, FunctionRecord] = {}
        """Every function that is deployed, in service or still being restored."""
        self.unavailable: dict[str, str] = {}
        """Function -> why it could not be restored."""
        self._store = store
        self._environments = environments
        self._uploaded: dict[str, BundleRecord] = {}
        self._learned: dict[str, list[ProfileRecord]] = defaultdict(list)
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._restoring: set[asyncio.Task[None]] = set()

    # At start and stop

    async def restore(self) -> None:
        """Bring back what the datastore knows. Environments that must be installed anew follow in the background."""
        functions = await asyncio.to_thread(self._remove_unused)
        for profile in await asyncio.to_thread(self._store.profiles):
            self._learned[profile.model].append(profile)
        for bundle in await asyncio.to_thread(self._store.bundles):
            self._uploaded[bundle.digest] = bundle
        for record in functions:
            self.records[record.name] = record
            task = asyncio.create_task(self._restore(record))
            self._restoring.add(task)
            task.add_done_callback(self._restoring.discard)
        if self._restoring:
            await asyncio.wait(self._restoring, timeout=0.5)

    def _remove_unused(self) -> list[FunctionRecord]:
        """Drop what older versions left on the disk; returns the functions that remain."""
        functions = self._store.functions()
        self.bundles.remove_unused(self._store.forget_unused_bundles())
        self._environments.remove_unused({Requirements(each.requirements).digest for each in functions})
        return functions

    async def _restore(self, record: FunctionRecord) -> None:
        async with self._turns[record.name]:
            try:
                path = self.bundles.path(record.bundle)
                requirements = Requirements(record.requirements)
                environment = await asyncio.to_thread(self._environments.ensure, requirements)
            except HotsetError as error:
                log.error("%s cannot be restored: %s", record.name, error)
                self.unavailable[record.name] = str(error)
                return
            if self.records.get(record.name) is record:
                self._put_in_service(record, path, environment.python)

    async def close(self) -> None:
        """Stop what is being installed; what was learned is written down."""
        await asyncio.to_thread(self._environments.close)
        for task in list(self._restoring):
            task.cancel()
        if self._restoring:
            await asyncio.wait(self._restoring)
        await self.save_profiles()
        await asyncio.to_thread(self._store.close)

    async def save_profiles(self) -> None:
        """Write down what was learned of every model, so that the next start knows it."""
        await asyncio.to_thread(self._store.save_profiles, learned(self.control))

    # Bundles

    async def receive(self, digest: str, pieces: AsyncIterator[bytes]) -> BundleRecord:
        """Take an archive as it comes; raises ``BundleError`` when it is unsound, too large or not as announced."""
        known = self._uploaded.get(digest)
        if known is not None and digest in self.bundles:
            return known
        upload = await asyncio.to_thread(self.bundles.upload)
        with upload:
            async for piece in pieces:
                if piece:
                    await asyncio.to_thread(upload.write, piece)
            record = await asyncio.to_thread(upload.finish)
        if record.digest != digest:
            raise BundleError(f"the bundle's content is {record.digest}, not {digest}: send it again")
        self._uploaded[digest] = record
        return record

    # Functions

    async def deploy(self, wanted: Deployment, progress: Progress) -> FunctionRecord:
        """Install and put in service; returns when new calls go to it. Raises ``HotsetError`` with what to do."""
        digest = wanted.image.removeprefix("sha256:")
        path = self.bundles.path(digest)
        bundle = self._uploaded.get(digest)
        if bundle is None:
            raise BundleError(f"the bundle {digest} was not uploaded to this server: deploy the function again")
        async with self._turns[wanted.service]:
            record, python = await self._prepare(wanted, bundle, path, progress)
            await asyncio.to_thread(self._store.deploy, record, bundle)
            self.records[record.name] = record
            self.unavailable.pop(record.name, None)
            self._put_in_service(record, path, python)
        return record

    async def _prepare(
        self, wanted: Deployment, bundle: BundleRecord, path: Path, progress: Progress
    ) -> tuple[FunctionRecord, str]:
        entry = wanted.hotset.entry or guess_module(path)
        module = entry.partition(":")[0]
        requirements = await asyncio.to_thread(read_requirements, path, f"{module.replace('.', '/')}.py")
        loop = asyncio.get_running_loop()

        def relay(line: str) -> None:
            loop.call_soon_threadsafe(progress, line)

        if requirements.lines:
            progress(f"installing {len(requirements.lines)} requirements")
        environment = await asyncio.to_thread(self._environments.ensure, requirements, relay)
        progress(f"importing {entry}")
        env = child_environment(wanted.env_vars or {})
        described = await describe(environment.python, path, entry, env, progress)
        options = _options(described, wanted)
        return (
            FunctionRecord(
                options=options,
                entry=described.entry,
                bundle=bundle.digest,
                requirements=requirements.lines,
                frameworks=described.frameworks,
                version=version_of(options, described.entry, bundle.digest, requirements.lines),
                labels=wanted.labels or {},
                annotations=wanted.annotations or {},
                image=wanted.image,
                schema=described.schema,
                created_at_s=time.time(),
            ),
            environment.python,
        )

    async def remove(self, name: str) -> bool:
        """Take it out of service and forget it; False: there is none of that name."""
        if name not in self.records:
            return False
        async with self._turns[name]:
            if self.records.pop(name, None) is None:
                return False
            await asyncio.to_thread(self._store.remove_function, name)
            self.unavailable.pop(name, None)
            self.control.remove(name)
            self.control.logbook.forget(name)
            return True

    def suspend(self, name: str, reason: str) -> bool:
        """Evict it and refuse its calls for this ``reason``, until ``resume`` or a deploy; False: there is none."""
        if name not in self.records:
            return False
        self.unavailable[name] = reason
        self.control.remove(name)
        return True

    async def resume(self, name: str) -> bool:
        """Put a function that was suspended, or could not be restored, in service again; False: there is none."""
        record = self.records.get(name)
        if record is None:
            return False
        if name not in self.control.functions.current:
            self.unavailable.pop(name, None)
            await self._restore(record)
        return True

    def serve(self, record: FunctionRecord, path: Path) -> None:
        """Put in service what another part of the server keeps (a model repository), on the server's interpreter."""
        self.records[record.name] = record
        self.unavailable.pop(record.name, None)
        self._put_in_service(record, path, sys.executable)

    def withdraw(self, name: str) -> None:
        """Undo ``serve``."""
        self.records.pop(name, None)
        self.unavailable.pop(name, None)
        self.control.remove(name)

    def _put_in_service(self, record: FunctionRecord, path: Path, python: str) -> None:
        known = self._learned.get(record.model, [])
        self.control.deploy(version_spec(record, path, python, known, smallest_gpu_bytes(self.control)))


def version_spec(
    record: FunctionRecord, path: Path, python: str, known: list[ProfileRecord], undeclared_bytes: int
) -> VersionSpec:
    """How a recorded version is launched and scheduled.

    ``known``: measured on earlier runs; its memory is what the scheduler reserves, while what the function declares
    stays what its process may take. ``undeclared_bytes``: both, for a function that declares nothing.
    """
    options = record.options
    measured = [each.memory_bytes for each in known if each.memory_bytes is not None]
    may_take_bytes = options.gpu_memory_bytes or undeclared_bytes
    on_gpu = options.kind is FunctionKind.GPU
    return VersionSpec(
        function=record.name,
        launch=LaunchSpec(
            model=record.model,
            entry=record.entry,
            code_path=str(path),
            python=python,
            env=options.env,
            memory_bytes=may_take_bytes,
            max_batch=options.max_batch,
            frameworks=record.frameworks,
            timeout_s=options.timeout_s,
            load_timeout_s=options.load_timeout_s,
        ),
        scheduled=Model(
            name=record.model,
            memory_bytes=max(measured, default=may_take_bytes),
            max_batch=options.max_batch,
            retry=options.retry,
            profile=Profile(
                load_s=next((each.load_s for each in known if each.load_s is not None), None),
                inference_s=next((each.inference_s for each in known if each.inference_s is not None), None),
            ),
        )
        if on_gpu
        else None,
        patience_s=options.timeout_s + (options.load_timeout_s if on_gpu else 0.0),
    )


def _options(described: Description, wanted: Deployment) -> FunctionOptions:
    """The decorator's options with the deployment's on top."""
    own, overrides = described.options, wanted.hotset
    changes: dict[str, object] = {"name": wanted.service}
    if overrides.gpu_memory is not None:
        changes["gpu_memory_bytes"] = parse_bytes(overrides.gpu_memory, "gpu_memory")
    if overrides.timeout is not None:
        changes["timeout_s"] = parse_duration(overrides.timeout, "timeout")
    if overrides.load_timeout is not None:
        changes["load_timeout_s"] = parse_duration(overrides.load_timeout, "load_timeout")
    if overrides.max_batch is not None:
        if (overrides.max_batch > 1) != (own.max_batch > 1):
            raise FunctionError(
                f"max_batch is {own.max_batch} in the code, which decides whether predict takes lists: change it there"
            )
        changes["max_batch"] = overrides.max_batch
    if overrides.retry is not None:
        changes["retry"] = overrides.retry
    if wanted.env_vars:
        changes["env"] = {**own.env, **wanted.env_vars}
    options = msgspec.structs.replace(own, **changes)
    if options.max_batch < 1 or options.timeout_s <= 0 or options.load_timeout_s <= 0:
        raise ConfigurationError("max_batch, timeout and load_timeout must be greater than 0")
    return options
