"""How much memory a loaded model takes, measured from inside its process.

On a virtual GPU a model's memory is what its weights take: the parameters and buffers of the ``torch.nn.Module``
objects and the tensors and arrays found in the function object. Models that live in a library's own memory (an ONNX
Runtime session, a tokenizer in Rust) cannot be found that way; for them the growth of the process's private memory
during ``load`` counts.
"""

from __future__ import annotations

import contextlib
import os
import sys
from types import ModuleType
from typing import Any

_DEPTH = 6
_OBJECTS = 200_000
_PLAIN = (str, bytes, bytearray, int, float, complex, bool, type(None), type, ModuleType)


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


def measure(function: object, growth_bytes: int) -> int:
    """Bytes the model in ``function`` takes, given how much the private memory of the process grew while it loaded.

    Tensors are what counts as soon as there is one: growth then includes the framework itself. Without any, arrays
    count if they explain at least half of the growth, else the growth does.
    """
    tensors, arrays = found_bytes(function)
    if tensors:
        return tensors + arrays
    return arrays if 2 * arrays >= growth_bytes else growth_bytes


def cuda_bytes() -> int | None:
    """What torch has reserved on its GPU, contexts aside; None where torch is not in use. NVML knows better, if it is
    allowed to look into this process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.memory_reserved())


def found_bytes(root: object) -> tuple[int, int]:
    """Bytes of distinct torch storages, and of distinct numpy buffers, reachable from ``root``'s attributes.

    The walk follows attributes and plain containers, ``_DEPTH`` levels down; it never imports a framework: what is not
    imported cannot be held.
    """
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    storages: dict[int, int] = {}
    buffers: dict[int, int] = {}
    seen: set[int] = set()
    level: list[Any] = [root]
    for _ in range(_DEPTH):
        following: list[Any] = []
        for item in level:
            if isinstance(item, _PLAIN) or id(item) in seen or len(seen) >= _OBJECTS:
                continue
            seen.add(id(item))
            if torch is not None and isinstance(item, torch.Tensor):
                storage = item.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            elif torch is not None and isinstance(item, torch.nn.Module):
                following += item.parameters()
                following += item.buffers()
            elif numpy is not None and isinstance(item, numpy.ndarray):
                while isinstance(item.base, numpy.ndarray):
                    item = item.base
                buffers[item.__array_interface__["data"][0]] = item.nbytes
            elif isinstance(item, dict):
                following += item.values()
            elif isinstance(item, (list, tuple, set, frozenset)):
                following += item
            else:
                following += getattr(item, "__dict__", {}).values()
        level = following
    return sum(storages.values()), sum(buffers.values())
