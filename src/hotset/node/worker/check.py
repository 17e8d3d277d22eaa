"""Whether fast loads of a function (``fast_load.py``) give what its own ``load`` gives.

``python -m hotset.node.worker.check CODE ENTRY MOST_BYTES``, run once for each deployed version, in the background and
on the CPU: files of tensors are converted (``converted.py``), then the function is loaded both ways, and every tensor
that the two objects hold is compared, bit by bit.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import msgspec

from hotset.functions.contract import LoadCheck
from hotset.functions.loading import load_entry
from hotset.functions.runtime import Runtime
from hotset.functions.units import format_bytes
from hotset.node.worker.converted import convert_all, folder_of
from hotset.node.worker.fast_load import Incomplete, fast_load
from hotset.node.worker.faults import describe
from hotset.node.worker.memory import found_bytes, reachable


def convert_and_check(code_path: str, entry: str, most_bytes: int) -> LoadCheck:
    """Convert the bundle's files of tensors first, so that what is checked is what will be loaded."""
    names: list[str] = []
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401 - what converts needs it

        names = convert_all(code_path, most_bytes)
    checked = check(code_path, entry, most_bytes)
    if not names:
        return checked
    if not checked.fast:
        shutil.rmtree(folder_of(code_path), ignore_errors=True)
        return checked
    return msgspec.structs.replace(checked, text=f"{checked.text}; mapped as safetensors: {', '.join(names)}")


def check(code_path: str, entry: str, most_bytes: int) -> LoadCheck:
    """``most_bytes``: what an ordinary load may take of this machine's memory."""
    try:
        fast = _loaded(code_path, entry, lambda: fast_load(code_path))
    except Incomplete as reason:
        return LoadCheck(fast=False, text=f"not used: {reason}")
    except Exception as error:  # noqa: BLE001 - whatever a user's load raises, here where it was not written for
        return LoadCheck(fast=True, text=f"not checked: load does not run on this machine's CPU ({describe(error)})")
    tensors_bytes = sum(found_bytes(fast))
    if not tensors_bytes:
        return LoadCheck(fast=True, text="not checked: the object holds no tensors")
    if tensors_bytes > most_bytes:
        sizes = f"{format_bytes(tensors_bytes)}, where {format_bytes(most_bytes)} may be used"
        return LoadCheck(fast=True, text=f"not checked: an ordinary load beside it would take {sizes}")
    difference = _difference(fast, _loaded(code_path, entry, contextlib.nullcontext))
    if difference is not None:
        return LoadCheck(fast=False, text=f"not used: {difference}")
    return LoadCheck(fast=True, text="equal to the ordinary load, bit by bit")


def _loaded(code_path: str, entry: str, way: Callable[[], AbstractContextManager[None]]) -> Any:
    """The loaded object, its module imported anew: what a load keeps in there must not serve the next one."""
    runtime = Runtime(load_entry(code_path, entry, reload=True), "cpu")
    random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)
    with way():
        runtime.load()
    return runtime.instance


def _difference(fast: Any, ordinary: Any) -> str | None:
    """What an ordinary load gives and a fast one does not; None: nothing."""
    torch = sys.modules.get("torch")
    ours, theirs = reachable(fast).tensors, reachable(ordinary).tensors
    if len(ours) != len(theirs):
        return f"it gives {len(ours)} tensors, the ordinary load {len(theirs)}"
    if torch is None:
        return None
    for one, other in zip(ours, theirs, strict=True):
        if (one.dtype, one.shape) != (other.dtype, other.shape) or not torch.equal(_bytes(one), _bytes(other)):
            return f"a tensor of {tuple(one.shape)} differs from the ordinary load's"
    return None


def _bytes(tensor: Any) -> Any:
    """Not numbers are equal where their bits are."""
    torch = sys.modules["torch"]
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1)


if __name__ == "__main__":
    # What the user's code prints must not mix with the answer; nobody waits for it.
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    os.nice(10)
    os.chdir(sys.argv[1])  # as where it is served
    with os.fdopen(answer_fd, "wb") as out:
        out.write(msgspec.json.encode(convert_and_check(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
