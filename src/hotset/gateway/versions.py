"""What a deployment asks for, checked and made into records: options, fields kept for clients, a version to launch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from hotset.errors import ConfigurationError, FunctionError
from hotset.functions.contract import DEFAULT_TIMEOUT_S, FunctionKind, FunctionOptions
from hotset.functions.description import Description
from hotset.functions.http_envelope import PROCESS_ENTRY
from hotset.functions.units import parse_bytes, parse_duration
from hotset.gateway.functions import VersionSpec
from hotset.gateway.openfaas.labels import go_duration_s, read_copies, read_retrying, read_scaling
from hotset.gateway.openfaas.resources import GpuRequest
from hotset.gateway.openfaas.types import FunctionDeployment, Overrides
from hotset.node.interface import LaunchSpec
from hotset.store.datastore import ClientFields, FunctionRecord, ProfileRecord
from hotset.vocabulary import Model, Profile

HEALTH_PATHS = ("com.openfaas.ready.http.path", "com.openfaas.health.http.path")
"""Annotations that name the path which a server must answer before its first call."""
MAX_BATCH_WAIT = "hotset.max-batch-wait"
"""The annotation that says it where there is no other field for it (a stack file)."""
EXEC_MARGIN_S = 5.0
"""What a process gets beyond its own ``exec_timeout`` before it counts as hung."""

_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,255}")


def check_deployment(wanted: FunctionDeployment) -> None:
    """All that can be refused before anything is installed; raises ``ConfigurationError``."""
    labels, annotations = wanted.labels or {}, wanted.annotations or {}
    read_scaling(labels, annotations)
    read_retrying(labels, annotations)
    for name, value in (wanted.env_vars or {}).items():
        if not _ENVIRONMENT_NAME.fullmatch(name) or "\0" in value:
            raise ConfigurationError(f"envVars: {name[:80]!r} cannot be an environment variable: rename it")
    if "\0" in (wanted.env_process or ""):
        raise ConfigurationError("envProcess: a command has no zero bytes: write it anew")


def client_fields(wanted: FunctionDeployment, request: GpuRequest) -> ClientFields:
    """What its client shall read back as it wrote it."""
    return ClientFields(
        env_process=wanted.env_process or None,
        constraints=wanted.constraints or (),
        secrets=wanted.secrets or (),
        limits=None if wanted.limits is None else msgspec.to_builtins(wanted.limits),
        requests=None if wanted.requests is None else msgspec.to_builtins(wanted.requests),
        read_only_root_filesystem=bool(wanted.read_only_root_filesystem),
        gpu_request=request.source,
    )


def function_options(
    key: str, described: Description, wanted: FunctionDeployment, request: GpuRequest
) -> FunctionOptions:
    """The decorator's options with the deployment's on top."""
    own, overrides = described.options, wanted.hotset
    on_gpu = own.kind is FunctionKind.GPU
    if request.wanted is not None and request.wanted != on_gpu:
        raise ConfigurationError(
            f"{request.source} asks for a GPU, but a plain function runs on the CPU: make it a class with predict"
            if request.wanted
            else f"{request.source} asks for no GPU, but a class with predict needs one: leave it out"
        )
    changes = _changes(overrides, request)
    if overrides.max_batch is not None:
        if (overrides.max_batch > 1) != (own.max_batch > 1):
            raise FunctionError(
                f"max_batch is {own.max_batch} in the code, which decides whether predict takes lists: change it there"
            )
        changes["max_batch"] = overrides.max_batch
    wait = overrides.max_batch_wait
    if wait is None:
        wait = (wanted.annotations or {}).get(MAX_BATCH_WAIT)
    if wait is not None:
        changes["max_batch_wait_s"] = parse_duration(wait, "max_batch_wait")
    if wanted.env_vars:
        changes["env"] = {**own.env, **wanted.env_vars}
    return _checked(msgspec.structs.replace(own, name=key, **changes))


def process_options(key: str, wanted: FunctionDeployment, request: GpuRequest) -> FunctionOptions:
    """The options of a process function, which has no decorator."""
    env = dict(wanted.env_vars or {})
    exec_timeout = env.get("exec_timeout", "")
    exec_timeout_s = float(exec_timeout) if exec_timeout.isdigit() else go_duration_s(exec_timeout)
    if exec_timeout and exec_timeout_s is None:
        raise ConfigurationError(f"exec_timeout is {exec_timeout[:40]!r}: write a duration such as 30s")
    if wanted.hotset.max_batch not in (None, 1) or wanted.hotset.max_batch_wait is not None:
        raise ConfigurationError("max_batch: a process function takes one request at a time: leave it out")
    own = FunctionOptions(
        name=key,
        kind=FunctionKind.GPU if request.wanted else FunctionKind.CPU,
        timeout_s=exec_timeout_s + EXEC_MARGIN_S if exec_timeout_s else DEFAULT_TIMEOUT_S,
        env=env,
    )
    return _checked(msgspec.structs.replace(own, **_changes(wanted.hotset, request)))


def _changes(overrides: Overrides, request: GpuRequest) -> dict[str, object]:
    changes: dict[str, object] = {}
    if request.memory is not None:
        changes["gpu_memory_bytes"] = parse_bytes(request.memory, "gpu_memory")
    if overrides.timeout is not None:
        changes["timeout_s"] = parse_duration(overrides.timeout, "timeout")
    if overrides.load_timeout is not None:
        changes["load_timeout_s"] = parse_duration(overrides.load_timeout, "load_timeout")
    if overrides.retry is not None:
        changes["retry"] = overrides.retry
    return changes


def _checked(options: FunctionOptions) -> FunctionOptions:
    if options.max_batch < 1 or options.timeout_s <= 0 or options.load_timeout_s <= 0:
        raise ConfigurationError("max_batch, timeout and load_timeout must be greater than 0")
    if options.max_batch_wait_s and options.max_batch == 1:
        raise ConfigurationError("max_batch_wait is for functions that join requests: leave it out, or give max_batch")
    return options


def process_environment(record: FunctionRecord) -> dict[str, str]:
    """What a process function's command, and how it is called, is told by."""
    if record.entry != PROCESS_ENTRY:
        return {}
    env = {"fprocess": record.client.env_process or ""}
    for annotation in HEALTH_PATHS:
        if annotation in record.annotations:
            env.setdefault("ready_path", record.annotations[annotation])
    return env


def version_spec(
    record: FunctionRecord,
    path: Path,
    python: str,
    known: list[ProfileRecord],
    undeclared_bytes: int,
    env: Mapping[str, str],
) -> VersionSpec:
    """How a recorded version is launched and scheduled.

    ``known``: measured on earlier runs; its memory is what the scheduler goes by, while what the function declares
    stays what its process may take. ``undeclared_bytes``: both, for a function that declares nothing. ``env``: beside
    the function's own variables.
    """
    options = record.options
    copies = read_copies(record.labels, record.annotations)
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
            env={**options.env, **env},
            memory_bytes=may_take_bytes,
            max_batch=options.max_batch,
            frameworks=record.frameworks,
            timeout_s=options.timeout_s,
            load_timeout_s=options.load_timeout_s,
            fast_load=record.load_check is None or record.load_check.fast,
        ),
        scheduled=Model(
            name=record.model,
            memory_bytes=max(measured, default=may_take_bytes),
            max_batch=options.max_batch,
            max_batch_wait_s=options.max_batch_wait_s,
            retry=options.retry,
            min_copies=copies.minimum,
            max_copies=copies.maximum,
            profile=Profile(
                load_s=next((each.load_s for each in known if each.load_s is not None), None),
                restore_s=next((each.restore_s for each in known if each.restore_s is not None), None),
                reload_s=next((each.reload_s for each in known if each.reload_s is not None), None),
                inference_s=next((each.inference_s for each in known if each.inference_s is not None), None),
                sizes_bytes=max((each.sizes_bytes for each in known), key=len, default=()),
                growth_bytes=max((each.growth_bytes for each in known), default=0),
            ),
        )
        if on_gpu
        else None,
        patience_s=options.timeout_s + (options.load_timeout_s if on_gpu else 0.0),
    )
