"""Whether fast loads of a function (``fast_load.py``) give what its own ``load`` gives.

``python -m hotset.node.worker.check CODE ENTRY MOST_BYTES``, run once for each deployed version, in the background and
on the CPU: files of tensors and ONNX files are converted (``converted.py``, ``converted_sessions.py``), then the
function is loaded both ways, and every tensor that the two objects hold, and what their ONNX sessions answer, is
compared, bit by bit.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sys
from contextlib import AbstractContextManager
from typing import Any

import msgspec

from hotset.functions.contract import LoadCheck
from hotset.functions.loading import load_entry
from hotset.functions.runtime import Runtime
from hotset.functions.units import format_bytes
from hotset.node.worker.converted import convert_all, folder_of
from hotset.node.worker.converted_sessions import (
    UNCHECKED,
    Made,
    accept,
    convert_sessions,
    sessions_difference,
    watched_sessions,
)
from hotset.node.worker.fast_load import Incomplete, fast_load
from hotset.node.worker.faults import describe
from hotset.node.worker.memory import found_bytes, reachable


class Compared(msgspec.Struct, frozen=True):
    check: LoadCheck
    sessions: tuple[str, ...] = ()
    """ONNX files of the bundle of which sessions were compared and found equal."""


def convert_and_check(code_path: str, entry: str, most_bytes: int) -> LoadCheck:
    """Convert the bundle's files first, so that what is checked is what will be loaded."""
    names: list[str] = []
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401 - what converts needs it

        names = convert_all(code_path, most_bytes)
    sessions = convert_sessions(code_path, most_bytes)
    compared = compare(code_path, entry, most_bytes)
    accept(code_path, sessions, compared.sessions)
    if not compared.check.fast:
        shutil.rmtree(folder_of(code_path), ignore_errors=True)
        return compared.check
    said = [compared.check.text]
    for how, files in {
        "mapped as safetensors": names,
        "ONNX mapped as packed": [name for name in sessions if name in compared.sessions],
        "ONNX read as it is": [name for name in sessions if name not in compared.sessions],
    }.items():
        if files:
            said.append(f"{how}: {', '.join(files)}")
    return msgspec.structs.replace(compared.check, text="; ".join(said))


def compare(code_path: str, entry: str, most_bytes: int) -> Compared:
    """``most_bytes``: what an ordinary load may take of this machine's memory."""
    try:
        fast, ours = _loaded(code_path, entry, fast_load(code_path, UNCHECKED))
    except Incomplete as reason:
        return _found(False, f"not used: {reason}")
    except Exception as error:  # noqa: BLE001 - whatever a user's load raises, here where it was not written for
        return _found(True, f"not checked: load does not run on this machine's CPU ({describe(error)})")
    size_bytes = sum(found_bytes(fast)) + sum(each.mapped_bytes for each in ours)
    if not size_bytes:
        return _found(True, "not checked: the object holds no tensors")
    if size_bytes > most_bytes:
        sizes = f"{format_bytes(size_bytes)}, where {format_bytes(most_bytes)} may be used"
        return _found(True, f"not checked: an ordinary load beside it would take {sizes}")
    ordinary, theirs = _loaded(code_path, entry, watched_sessions(""))
    try:
        difference = _difference(fast, ordinary) or sessions_difference(ours, theirs)
    except Exception as error:  # noqa: BLE001 - inputs that were made up may be bad ones of a model
        return _found(True, f"not checked: the ONNX model refuses made-up inputs ({describe(error)})")
    if difference is not None:
        return _found(False, f"not used: {difference}")
    sessions = tuple(os.path.relpath(each.path, code_path) for each in ours if each.mapped_bytes)
    return Compared(LoadCheck(fast=True, text="equal to the ordinary load, bit by bit"), sessions)


def _found(fast: bool, text: str) -> Compared:
    return Compared(LoadCheck(fast=fast, text=text))


def _loaded(code_path: str, entry: str, way: AbstractContextManager[list[Made]]) -> tuple[Any, list[Made]]:
    """The loaded object, its module imported anew: what a load keeps in there must not serve the next one; and the ONNX
    sessions it made."""
    runtime = Runtime(load_entry(code_path, entry, reload=True), "cpu")
    random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)
    with way as made:
        runtime.load()
    return runtime.instance, made


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
