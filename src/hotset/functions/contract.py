"""``@hotset.function``: marks a class or a plain function as deployable and records how it wants to be run.

A class with ``predict`` is a GPU function; its optional ``load(self, device)`` runs once per residency and its optional
``unload(self)`` before it leaves the GPU. A plain function is a CPU function. The decorated object itself is returned,
so it stays usable and testable as ordinary Python.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, TypeVar, overload

import msgspec

from hotset.errors import ConfigurationError, FunctionError
from hotset.functions.units import parse_bytes, parse_duration

OPTIONS_ATTRIBUTE = "__hotset__"
DEFAULT_TIMEOUT_S = 60.0
DEFAULT_LOAD_TIMEOUT_S = 300.0
MAX_BATCH = 4096

# OpenFaaS names become DNS labels and URL parts.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

Target = TypeVar("Target", bound=Callable[..., Any])


class FunctionKind(Enum):
    """Where a function runs."""

    GPU = "gpu"
    """A class: holds a model in GPU memory."""
    CPU = "cpu"
    """A plain function: needs no GPU."""


class LoadCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What came of comparing a version's fast load with its ordinary one (node/worker/check.py)."""

    fast: bool
    """Its loads may be fast."""
    text: str
    """For people."""


class FunctionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a function wants to be run, as its decorator says; ``hotset deploy`` flags override it."""

    name: str
    """Its name in URLs: lower case letters, digits and dashes."""
    kind: FunctionKind
    gpu_memory_bytes: int | None = None
    """GPU memory it takes while resident; None: not declared, to be given at deployment or learned."""
    max_batch: int = 1
    """Most requests that one ``predict`` may join; above 1, ``predict`` takes and returns lists."""
    max_batch_wait_s: float = 0.0
    """How long requests for a resident model may be held back to fill a batch; 0: not at all."""
    timeout_s: float = DEFAULT_TIMEOUT_S
    """Longest one ``predict`` may take before its process counts as hung."""
    load_timeout_s: float = DEFAULT_LOAD_TIMEOUT_S
    """Longest ``load`` may take."""
    retry: bool = True
    """Whether a request may run once more when its process died."""
    env: Mapping[str, str] = msgspec.field(default_factory=dict)
    """Environment variables of its process."""


@overload
def function(target: Target, /) -> Target: ...


@overload
def function(
    *,
    name: str | None = None,
    gpu_memory: str | int | None = None,
    max_batch: int = 1,
    max_batch_wait: str | float = 0.0,
    timeout: str | float = DEFAULT_TIMEOUT_S,
    load_timeout: str | float = DEFAULT_LOAD_TIMEOUT_S,
    retry: bool = True,
    env: Mapping[str, str] | None = None,
) -> Callable[[Target], Target]: ...


def function(
    target: Target | None = None,
    /,
    *,
    name: str | None = None,
    gpu_memory: str | int | None = None,
    max_batch: int = 1,
    max_batch_wait: str | float = 0.0,
    timeout: str | float = DEFAULT_TIMEOUT_S,
    load_timeout: str | float = DEFAULT_LOAD_TIMEOUT_S,
    retry: bool = True,
    env: Mapping[str, str] | None = None,
) -> Any:
    """Mark a class (GPU function) or a plain function (CPU function) as deployable.

    ``name``: its name in URLs; from the object's own name when not given (``ImageClasses`` -> ``image-classes``).
    ``gpu_memory``: GPU memory while resident, ``"600MiB"``, ``"2GB"`` or bytes.
    ``max_batch``: most requests that one ``predict`` may join; above 1, ``predict`` takes and returns lists.
    ``max_batch_wait``: how long a request may be held back for others to join it, ``"5ms"`` or seconds.
    ``timeout``, ``load_timeout``: longest run and load, ``"30s"``, ``"5min"`` or seconds.
    ``retry``: whether a request may run once more when its process died under it.
    ``env``: environment variables of the function's process.

    Raises ``FunctionError`` when the object breaks the contract (docs/functions.md).
    """

    def mark(marked: Target) -> Target:
        options = _options(marked, name, gpu_memory, max_batch, max_batch_wait, timeout, load_timeout, retry, env or {})
        _check(marked, options)
        setattr(marked, OPTIONS_ATTRIBUTE, options)
        return marked

    return mark if target is None else mark(target)


def options_of(target: object) -> FunctionOptions | None:
    """The options ``@hotset.function`` attached to this very object (not to a class it inherits from), else None."""
    options = getattr(target, "__dict__", {}).get(OPTIONS_ATTRIBUTE)
    return options if isinstance(options, FunctionOptions) else None


def function_name(name: str) -> str:
    """A Python name as a function name: ``ImageClasses`` and ``image_classes`` -> ``image-classes``."""
    dashed = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).replace("_", "-")
    return re.sub(r"-{2,}", "-", dashed).strip("-").lower()


def _options(
    target: Callable[..., Any],
    name: str | None,
    gpu_memory: str | int | None,
    max_batch: int,
    max_batch_wait: str | float,
    timeout: str | float,
    load_timeout: str | float,
    retry: bool,
    env: Mapping[str, str],
) -> FunctionOptions:
    own_name = getattr(target, "__name__", "function")
    kind = FunctionKind.GPU if inspect.isclass(target) else FunctionKind.CPU
    final_name = function_name(own_name) if name is None else name
    if not _NAME.fullmatch(final_name):
        raise FunctionError(
            f"{own_name}: the name {final_name!r} cannot be part of a URL; use up to 63 lower-case letters, digits and "
            f"dashes in @hotset.function(name=...)"
        )
    if isinstance(max_batch, bool) or not isinstance(max_batch, int) or not 1 <= max_batch <= MAX_BATCH:
        raise FunctionError(f"{own_name}: max_batch is {max_batch!r}; give a whole number from 1 to {MAX_BATCH}")
    for key, value in env.items():
        if not isinstance(key, str) or not _ENVIRONMENT_NAME.fullmatch(key) or not isinstance(value, str):
            raise FunctionError(f"{own_name}: env has {key!r}={value!r}; give text names and text values")
    try:
        memory_bytes = None if gpu_memory is None else parse_bytes(gpu_memory, "gpu_memory")
        timeout_s, load_timeout_s = parse_duration(timeout, "timeout"), parse_duration(load_timeout, "load_timeout")
        max_batch_wait_s = parse_duration(max_batch_wait, "max_batch_wait")
    except ConfigurationError as error:
        raise FunctionError(f"{own_name}: {error}") from None
    if timeout_s <= 0 or load_timeout_s <= 0:
        raise FunctionError(f"{own_name}: timeout and load_timeout must be more than 0 seconds")
    if max_batch_wait_s and max_batch == 1:
        raise FunctionError(f"{own_name}: max_batch_wait is for filling batches: give max_batch too, above 1")
    if memory_bytes is not None and (kind is FunctionKind.CPU or memory_bytes == 0):
        raise FunctionError(
            f"{own_name}: gpu_memory must be more than 0 and belongs to a class with predict; leave it out of a plain "
            f"function, which runs on the CPU"
        )
    return FunctionOptions(
        name=final_name,
        kind=kind,
        gpu_memory_bytes=memory_bytes,
        max_batch=max_batch,
        max_batch_wait_s=max_batch_wait_s,
        timeout_s=timeout_s,
        load_timeout_s=load_timeout_s,
        retry=bool(retry),
        env=dict(env),
    )


def _check(target: Callable[..., Any], options: FunctionOptions) -> None:
    """Contract breaks are told where the class is written, not at the first call."""
    # Imported here because inspection reads this module's records.
    from hotset.functions.inspection import UnresolvedError, signature_of

    # A type that the module defines further down is looked up when the function is loaded.
    with contextlib.suppress(UnresolvedError):
        signature_of(target, options)
