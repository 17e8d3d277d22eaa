"""Serves a model repository: what is on disk is in service, and what changes there is put in service anew.

The directory is looked at every few seconds. A model whose files change is described again and replaces the old one,
whose calls end on it; one that cannot be described leaves the old one in service and says why in the index.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from hotset.errors import FunctionError, HotsetError
from hotset.functions.contract import FunctionOptions, options_of
from hotset.functions.inspection import signature_of
from hotset.functions.model_files import FileSettings, source_of
from hotset.functions.model_files.function import make_class
from hotset.functions.v2_types import tensors_of
from hotset.gateway.deployments import Deployments
from hotset.gateway.description import describe
from hotset.gateway.v2.models import READY, UNAVAILABLE, IndexEntry
from hotset.gateway.v2.refusal import Refusal
from hotset.store.datastore import VERSION_DIGITS, FunctionRecord
from hotset.store.repository import ModelFolder, ModelVersion, read_model, scan

LOOK_EVERY_S = 5.0
ENTRY_MODULE = "hotset_model"
ENTRY = f"{ENTRY_MODULE}:Model"

log = logging.getLogger("hotset.gateway")


class _Entry(msgspec.Struct, frozen=True):
    """How one version is put in service."""

    record: FunctionRecord
    path: Path


class _Served(msgspec.Struct):
    """One model of the repository, as far as it is in service."""

    versions: dict[str, str] = msgspec.field(default_factory=dict)
    """Version -> function, the default version first."""
    entries: dict[str, _Entry] = msgspec.field(default_factory=dict)
    """By version."""
    fingerprints: dict[str, str] = msgspec.field(default_factory=dict)
    """Version -> what it was put in service from."""
    problem: str | None = None
    """Why it is not in service as its files are now."""
    unloaded: bool = False


class DirectoryRepository:
    """The models of one directory. ``data``: a folder of its own for the code that serves them; what is in it goes."""

    def __init__(self, directory: Path, data: Path, deployments: Deployments) -> None:
        self._directory = directory.resolve()
        self._data = data.resolve()
        self._deployments = deployments
        self._models: dict[str, _Served] = {}
        self._turn = asyncio.Lock()
        # What an earlier server left here is made again when it is wanted.
        shutil.rmtree(self._data, ignore_errors=True)
        self._describing = asyncio.Semaphore(os.cpu_count() or 1)

    async def watch(self) -> None:
        """Look again and again; never returns."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self.look()
            except HotsetError as error:
                log.error("%s", error)
            except Exception:
                log.exception("the model repository could not be looked at")

    async def look(self) -> None:
        """Put in service what is new or changed, and take out what is gone. Raises ``ConfigurationError``."""
        async with self._turn:
            found = await asyncio.to_thread(scan, self._directory)
            for name in self._models.keys() - {each.name for each in found}:
                self._take_out(name)
                del self._models[name]
                log.info("the model repository no longer has %s", name)
            await asyncio.gather(*map(self._update, found))

    # What the protocol asks for (models.ModelRepository)

    def versions(self, name: str) -> dict[str, str] | None:
        served = self._models.get(name)
        return None if served is None or not served.versions else served.versions

    def index(self) -> list[IndexEntry]:
        entries = []
        for name, served in self._models.items():
            for version, function in served.versions.items():
                ready = function in self._deployments.control.functions.current
                reason = served.problem or self._deployments.unavailable.get(function, "")
                entries.append(
                    IndexEntry(name=name, version=version, state=READY if ready else UNAVAILABLE, reason=reason)
                )
            if not served.versions:
                entries.append(IndexEntry(name=name, state=UNAVAILABLE, reason=served.problem or "unloaded"))
        return entries

    async def load(self, name: str) -> bool:
        """Raises ``Refusal`` (400) when the model is there but cannot be served as its files are."""
        async with self._turn:
            if name not in self._models and name not in {each.name for each in await asyncio.to_thread(self._scan)}:
                return False
            folder = await asyncio.to_thread(read_model, self._directory / name)
            if name in self._models:
                self._models[name].unloaded = False
            await self._update(folder)
            problem = self._models[name].problem
            if problem is not None:
                raise Refusal(400, f"model {name!r} cannot be served: {problem}")
            for entry in self._models[name].entries.values():
                if entry.record.name not in self._deployments.control.functions.current:
                    self._deployments.serve(entry.record, entry.path)
            return True

    def unload(self, name: str) -> bool:
        served = self._models.get(name)
        if served is None:
            return False
        served.unloaded = True
        for function in served.versions.values():
            self._deployments.suspend(function, f"unloaded: POST /v2/repository/models/{name}/load")
        return True

    # Inside

    def _scan(self) -> list[ModelFolder]:
        return scan(self._directory)

    async def _update(self, folder: ModelFolder) -> None:
        name = folder.name
        served = self._models.setdefault(name, _Served())
        if served.unloaded:
            return
        fingerprints = {each.version: each.fingerprint for each in folder.versions}
        if folder.problem is None and served.problem is None and fingerprints == served.fingerprints:
            return
        if folder.problem is not None:
            self._complain(name, served, folder.problem)
            return
        if not served.versions and name in self._deployments.records:
            self._complain(name, served, "a function of this name is deployed: remove it, or rename the model")
            return
        try:
            described = {each.version: await self._describe(name, each) for each in folder.versions}
        except (HotsetError, OSError) as error:
            self._complain(name, served, str(error))
            return
        self._put_in(name, served, described, fingerprints)

    def _complain(self, name: str, served: _Served, problem: str) -> None:
        if served.problem != problem:
            log.warning("model %s of the repository cannot be served: %s", name, problem)
        served.problem = problem

    def _put_in(self, name: str, served: _Served, described: dict[str, _Entry], fingerprints: dict[str, str]) -> None:
        """The first version takes the model's name, the others are called NAME:VERSION."""
        versions: dict[str, str] = {}
        entries: dict[str, _Entry] = {}
        for version, entry in described.items():
            function = f"{name}:{version}" if versions else name
            options = msgspec.structs.replace(entry.record.options, name=function)
            record = msgspec.structs.replace(entry.record, options=options)
            versions[version], entries[version] = function, _Entry(record, entry.path)
            current = self._deployments.records.get(function)
            if current is None or current.version != record.version:
                self._deployments.serve(record, entry.path)
        for function in set(served.versions.values()) - set(versions.values()):
            self._deployments.withdraw(function)
        self._models[name] = _Served(versions=versions, entries=entries, fingerprints=fingerprints)
        log.info("model %s of the repository serves version %s", name, ", ".join(versions))

    def _take_out(self, name: str) -> None:
        for function in self._models[name].versions.values():
            self._deployments.withdraw(function)

    async def _describe(self, name: str, version: ModelVersion) -> _Entry:
        """What serves one version; raises ``HotsetError`` with what is wrong with the file."""
        folder = self._data / f"{name}-{version.version}-{version.fingerprint[:VERSION_DIGITS]}"
        await asyncio.to_thread(_write_entry, folder, version)
        if version.file.suffix == ".onnx":
            # Read by our own reader in no time; the other kinds take their framework, in a process of its own.
            options, schema = await asyncio.to_thread(_describe_here, version.file, version.settings)
            frameworks: tuple[str, ...] = ("onnxruntime", "numpy")
        else:
            source, progress = self._deployments.source, partial(log.info, "%s: %s", name)
            async with self._describing:
                described = await describe(source, sys.executable, folder, ENTRY, {}, progress)
            options, schema, frameworks = described.options, described.schema, described.frameworks
        record = FunctionRecord(
            options=options,
            entry=ENTRY,
            bundle="",
            version=version.fingerprint[:VERSION_DIGITS],
            annotations={"model-repository": str(version.file)},
            schema=schema,
            frameworks=frameworks,
            created_at_s=time.time(),
        )
        return _Entry(record, folder)


def _write_entry(folder: Path, version: ModelVersion) -> None:
    """The file whose import serves the model: written whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{ENTRY_MODULE}.{os.getpid()}"
    unfinished.write_text(source_of(str(version.file), version.settings), encoding="utf-8")
    unfinished.rename(folder / f"{ENTRY_MODULE}.py")


def _describe_here(file: Path, settings: FileSettings) -> tuple[FunctionOptions, dict[str, Any]]:
    target = make_class(file, settings, module=ENTRY_MODULE)
    options = options_of(target)
    if options is None:
        raise FunctionError(f"{file.name} makes no function")
    signature = signature_of(target, options)
    return options, signature.schema() | {"tensors": msgspec.to_builtins(tensors_of(signature))}
