"""How much memory a loaded model takes, measured from inside its process.

On a virtual GPU a model's memory is what its weights take: the parameters and buffers of the ``torch.nn.Module``
objects and the tensors and arrays found in the function object. Models that live in a library's own memory (an ONNX
Runtime session, a tokenizer in Rust) cannot be found that way; for them the growth of the process's private memory
during ``load`` counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections import OrderedDict
from types import ModuleType
from typing import Any, NamedTuple

_DEPTH = 6
_OBJECTS = 200_000
_OF_MODULES = frozenset(("_parameters", "_buffers", "_modules"))
"""Where a module keeps what its own iterators list."""
_PLAIN = (str, bytes, bytearray, int, float, complex, bool, type(None), type, ModuleType)
_PLAIN_TYPES = frozenset(_PLAIN)
_TABLES = frozenset((dict, OrderedDict, list, tuple, set))


def private_bytes() -> int:
    """Anonymous memory of this process: what it has allocated, files it has mapped apart."""
    return _anonymous_bytes("self")


def _anonymous_bytes(pid: int | str) -> int:
    with open(f"/proc/{pid}/status", "rb") as status:
        for line in status:
            if line.startswith(b"RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0  # a kernel without RssAnon (before 4.5)


def children_bytes() -> int:
    """Anonymous memory of everything this process started, and of what that started."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as stat:
                parents[int(entry)] = int(stat.read().rpartition(b")")[2].split()[1])
    family, total = {os.getpid()}, 0
    for pid in sorted(parents):  # a child's number is larger than its parent's, but for a wrap-around
        if parents[pid] in family:
            family.add(pid)
            with contextlib.suppress(OSError):
                total += _anonymous_bytes(pid)
    return total


def trim_heap() -> None:
    """Give freed heap memory back to the system; glibc keeps it otherwise, weights included."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def measure(function: object, growth_bytes: int) -> int:
    """Bytes the model in ``function`` takes, given how much the private memory of the process grew while it loaded.

    Tensors are what counts as soon as there is one: growth then includes the framework itself. Without any, arrays
    count if they explain at least half of the growth, else the growth does.
    """
    tensors, arrays = found_bytes(function)
    if tensors:
        return tensors + arrays
    return arrays if 2 * arrays >= growth_bytes else growth_bytes


def cuda_bytes(*, emptied: bool = False) -> int | None:
    """What torch has reserved on its GPU, contexts aside; None where torch is not in use. NVML knows better, if it is
    allowed to look into this process. ``emptied``: what torch keeps for later is given back first."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    if emptied:
        torch.cuda.empty_cache()
    return int(torch.cuda.memory_reserved())


class Found(NamedTuple):
    """What a function object holds, each object once."""

    tensors: list[Any]
    """torch tensors; several may share one storage."""
    arrays: list[Any]
    """numpy arrays, each the owner of its buffer."""


def found_bytes(root: object) -> tuple[int, int]:
    """Bytes of distinct torch storages, and of distinct numpy buffers, reachable from ``root``'s attributes."""
    found = reachable(root)
    storages: dict[int, int] = {}
    for tensor in found.tensors:
        if tensor.is_meta:
            continue
        try:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        except (NotImplementedError, RuntimeError):  # sparse ones, and others that have no memory of that kind
            storages[-id(tensor)] = tensor.numel() * tensor.element_size()
    buffers = {array.__array_interface__["data"][0]: array.nbytes for array in found.arrays}
    return sum(storages.values()), sum(buffers.values())


def reachable(root: object) -> Found:
    """The tensors and arrays in ``root``'s attributes.

    The walk follows attributes and plain containers, ``_DEPTH`` levels down, and all of a ``torch.nn.Module``'s
    parameters and buffers; it never imports a framework: what is not imported cannot be held.
    """
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    found = Found([], [])
    seen: set[int] = set()
    level: list[Any] = [root]
    for _ in range(_DEPTH):
        following: list[Any] = []
        for item in level:
            if isinstance(item, _PLAIN) or id(item) in seen or len(seen) >= _OBJECTS:
                continue
            if torch is not None and isinstance(item, torch.nn.Module):
                following += _in_module(item, seen, found.tensors)
                continue
            seen.add(id(item))
            if torch is not None and isinstance(item, torch.Tensor):
                found.tensors.append(item)
            elif numpy is not None and isinstance(item, numpy.ndarray):
                while isinstance(item.base, numpy.ndarray):
                    item = item.base
                found.arrays.append(item)
            elif isinstance(item, dict):
                following += item.values()
            elif isinstance(item, (list, tuple, set, frozenset)):
                following += item
            else:
                following += getattr(item, "__dict__", {}).values()
        level = following
    return found


def _in_module(module: Any, seen: set[int], tensors: list[Any]) -> list[Any]:
    """Add all of a module's parameters and buffers to ``tensors``; what else it and its parts hold."""
    others: list[Any] = []
    parts = [module]
    while parts:
        part = parts.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        held = vars(part)
        for table in (held["_parameters"], held["_buffers"]):
            for tensor in table.values():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    tensors.append(tensor)
        parts += held["_modules"].values()
        # Most of what a module has are flags and empty tables of hooks.
        others += [
            value
            for name, value in held.items()
            if (kind := type(value)) not in _PLAIN_TYPES and (kind not in _TABLES or value) and name not in _OF_MODULES
        ]
    return others
