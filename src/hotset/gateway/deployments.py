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

from hotset.errors import BundleError, ConfigurationError, HotsetError
from hotset.functions.contract import LoadCheck
from hotset.functions.http_envelope import PROCESS_ENTRY, SECRETS_VARIABLE
from hotset.gateway.control import Control
from hotset.gateway.description import describe, guess_module
from hotset.gateway.load_checks import LoadChecks
from hotset.gateway.openfaas.images import Images
from hotset.gateway.openfaas.naming import DEFAULT_NAMESPACE, Name, check_secret_name, name_of
from hotset.gateway.openfaas.resources import GpuProfile, GpuRequest, read_gpu_request
from hotset.gateway.openfaas.types import FunctionDeployment
from hotset.gateway.readings import learned, smallest_gpu_bytes
from hotset.gateway.versions import (
    check_deployment,
    client_fields,
    function_options,
    process_environment,
    process_options,
    version_spec,
)
from hotset.node.spawner import ProcessSource, Spawner
from hotset.store.bundles import Bundles
from hotset.store.datastore import BundleRecord, Datastore, FunctionRecord, ProfileRecord, version_of
from hotset.store.environments import Environments
from hotset.store.requirements import Requirements, read_requirements
from hotset.store.secrets import Secrets

Progress = Callable[[str], None]

log = logging.getLogger("hotset.gateway")


class Deployments:
    """Deploys, removes and restores. Slow steps run in threads; deploys of one function take turns."""

    def __init__(
        self,
        control: Control,
        store: Datastore,
        bundles: Bundles,
        environments: Environments,
        *,
        secrets: Secrets | None = None,
        profiles: Mapping[str, GpuProfile] | None = None,
        allow_local_images: bool = False,
        source: ProcessSource | None = None,
    ) -> None:
        """``profiles``: what deployments may name as ``com.openfaas.profile``.

        ``source``: of the processes that import a function to see what it is; None: each is a fresh interpreter.
        """
        self.control = control
        self.bundles = bundles
        self.records: dict[str, FunctionRecord] = {}
        """Every function that is deployed, in service or still being restored."""
        self.unavailable: dict[str, str] = {}
        """Function -> why it could not be restored."""
        self.store = store
        self.source = source or Spawner()
        self._environments = environments
        self._secrets = secrets
        self._profiles = profiles or {}
        self._uploaded: dict[str, BundleRecord] = {}
        self.images = Images(store, bundles, self._uploaded, allow_local=allow_local_images)
        self._learned: dict[str, list[ProfileRecord]] = defaultdict(list)
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._restoring: set[asyncio.Task[None]] = set()
        self.load_checks = LoadChecks()

    # At start and stop

    async def restore(self) -> None:
        """Bring back what the datastore knows. Environments that must be installed anew follow in the background."""
        functions = await asyncio.to_thread(self._remove_unused)
        for profile in await asyncio.to_thread(self.store.profiles):
            self._learned[profile.model].append(profile)
        for bundle in await asyncio.to_thread(self.store.bundles):
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
        functions = self.store.functions()
        self.bundles.remove_unused(self.store.forget_unused_bundles())
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
                self._check_load(record, path, environment.python)

    async def close(self) -> None:
        """Stop what is being installed; what was learned is written down."""
        await self.load_checks.close()
        await asyncio.to_thread(self._environments.close)
        for task in list(self._restoring):
            task.cancel()
        if self._restoring:
            await asyncio.wait(self._restoring)
        self.source.close()
        await self.save_profiles()
        await asyncio.to_thread(self.store.close)

    async def save_profiles(self) -> None:
        """Write down what was learned of every model, so that the next start knows it."""
        await asyncio.to_thread(self.store.save_profiles, learned(self.control))

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

    async def deploy(self, wanted: FunctionDeployment, progress: Progress) -> FunctionRecord:
        """Install and put in service; returns when new calls go to it. Raises ``HotsetError`` with what to do."""
        name = Name(wanted.service, wanted.namespace or DEFAULT_NAMESPACE)
        check_deployment(wanted)
        self._check_secrets(wanted, name)
        kinds = {gpu.kind for gpu in self.control.scheduler.cluster.gpus.values()}
        request = read_gpu_request(wanted, self._profiles, kinds)
        bundle = self.bundle(await asyncio.to_thread(self.images.digest, wanted.image))
        path = self.bundles.path(bundle.digest)
        async with self._turns[name.key]:
            prepare = self._prepare_process if wanted.env_process else self._prepare
            record, python = await prepare(name.key, wanted, request, bundle, path, progress)
            await asyncio.to_thread(self.store.deploy, record, bundle)
            self.records[record.name] = record
            self.unavailable.pop(record.name, None)
            self._put_in_service(record, path, python)
            self._check_load(record, path, python)
        return record

    def _check_load(self, record: FunctionRecord, path: Path, python: str) -> None:
        """In the background: are fast loads of this version right?"""

        async def checked(check: LoadCheck) -> None:
            async with self._turns[record.name]:
                if self.records.get(record.name) is not record:
                    return  # another version has taken its place
                known = msgspec.structs.replace(record, load_check=check)
                await asyncio.to_thread(self.store.deploy, known, self.bundle(record.bundle))
                self.records[record.name] = known
                log.info("%s: fast loads: %s", record.model, check.text)
                if not check.fast and record.name in self.control.functions.current:
                    self._put_in_service(known, path, python)

        self.load_checks.start(record, path, python, checked)

    def bundle(self, digest: str) -> BundleRecord:
        """The bundle of this digest; raises ``BundleError`` when it is not on this server."""
        self.bundles.path(digest)
        bundle = self._uploaded.get(digest)
        if bundle is None:
            raise BundleError(f"the bundle {digest} was not uploaded to this server: deploy the function again")
        return bundle

    def _check_secrets(self, wanted: FunctionDeployment, name: Name) -> None:
        names = [check_secret_name(each) for each in wanted.secrets or ()]
        missing = names if self._secrets is None else self._secrets.missing(name.namespace, names)
        if missing:
            raise ConfigurationError(f"secrets: there is no secret {missing[0]!r} in {name.namespace}: make it first")

    async def _prepare(
        self,
        key: str,
        wanted: FunctionDeployment,
        request: GpuRequest,
        bundle: BundleRecord,
        path: Path,
        progress: Progress,
    ) -> tuple[FunctionRecord, str]:
        entry = wanted.hotset.entry or guess_module(path)
        module = entry.partition(":")[0]
        requirements = await asyncio.to_thread(read_requirements, path, f"{module.replace('.', '/')}.py")
        python = await self._install(requirements, progress)
        progress(f"importing {entry}")
        described = await describe(self.source, python, path, entry, wanted.env_vars or {}, progress)
        options = function_options(key, described, wanted, request)
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
                client=client_fields(wanted, request),
                created_at_s=time.time(),
            ),
            python,
        )

    async def _prepare_process(
        self,
        key: str,
        wanted: FunctionDeployment,
        request: GpuRequest,
        bundle: BundleRecord,
        path: Path,
        progress: Progress,
    ) -> tuple[FunctionRecord, str]:
        """A command instead of Python code: nothing is imported, but its requirements are installed all the same."""
        options = process_options(key, wanted, request)
        requirements = await asyncio.to_thread(read_requirements, path)
        python = await self._install(requirements, progress)
        called = f"{PROCESS_ENTRY}{wanted.env_process}"
        return (
            FunctionRecord(
                options=options,
                entry=PROCESS_ENTRY,
                bundle=bundle.digest,
                requirements=requirements.lines,
                version=version_of(options, called, bundle.digest, requirements.lines),
                labels=wanted.labels or {},
                annotations=wanted.annotations or {},
                image=wanted.image,
                client=client_fields(wanted, request),
                created_at_s=time.time(),
            ),
            python,
        )

    async def _install(self, requirements: Requirements, progress: Progress) -> str:
        """The interpreter that has them."""
        loop = asyncio.get_running_loop()

        def relay(line: str) -> None:
            loop.call_soon_threadsafe(progress, line)

        if requirements.lines:
            progress(f"installing {len(requirements.lines)} requirements")
        environment = await asyncio.to_thread(self._environments.ensure, requirements, relay)
        return environment.python

    async def remove(self, name: str) -> bool:
        """Take it out of service and forget it; False: there is none of that name."""
        if name not in self.records:
            return False
        async with self._turns[name]:
            if self.records.pop(name, None) is None:
                return False
            await asyncio.to_thread(self.store.remove_function, name)
            self.unavailable.pop(name, None)
            self.control.remove(name)
            self.control.logbook.forget(name)
            if self._secrets is not None:
                await asyncio.to_thread(self._secrets.unmount, name)
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
        env = process_environment(record)
        if record.client.secrets and self._secrets is not None:
            namespace = name_of(record.name).namespace
            env[SECRETS_VARIABLE] = str(self._secrets.mount(record.name, namespace, record.client.secrets))
        known = self._learned.get(record.model, [])
        self.control.deploy(version_spec(record, path, python, known, smallest_gpu_bytes(self.control), env))
