"""What ``torch.save`` wrote, kept a second time as safetensors: a file that is mapped, whatever format it had.

Reading a ``.pt`` unpickles its table and, in the format before PyTorch 1.6, copies every byte into memory of the
process's own. After a deploy, each such file of a bundle that holds nothing but tensors, plain containers and plain
values, as PyTorch's ``weights_only`` reader finds it (nothing in it is run), is written once more, in a folder beside
the bundle's, which is named by its content. The original stays where it is, for whoever reads it in another way.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

from hotset.node.worker.tensor_files import MappedFile, Unreadable, is_zip, write_tensors

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
MOST_FILES = 64
"""Of a bundle."""
LEAST_BYTES = 64 << 10
"""Smaller files are read in no time."""
_CONTAINERS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict, "list": list, "tuple": tuple}
_VALUES = (str, int, float, bool, type(None))


class NotPlain(Exception):
    """It holds what safetensors cannot."""


def folder_of(code_path: str) -> str:
    """Where what was converted of this bundle is."""
    return f"{os.path.abspath(code_path)}.tensors"


def twin_of(path: str | os.PathLike[str], code_path: str) -> str | None:
    """Where the converted file of a bundle's file would be; None: that is no such file."""
    if not code_path or not os.fspath(path).endswith(SUFFIXES):
        return None
    inside = os.path.relpath(path, code_path)
    return None if inside.startswith("..") else os.path.join(folder_of(code_path), f"{inside}.safetensors")


def read_twin(path: Any, code_path: str, *, anywhere: bool, device: Any = "cpu") -> Any:
    """What ``torch.load`` of a bundle's file returns on ``device``, mapped from its converted file.

    ``anywhere``: also of tensors that were on another device when they were saved. Raises ``Unreadable`` where no
    converted file can take the file's place.
    """
    twin = twin_of(path, code_path) if isinstance(path, str | os.PathLike) else None
    try:
        if twin is None or not os.path.exists(twin):
            raise Unreadable("it was not converted")
        file = MappedFile(twin, device)
        known = file.metadata()
        if not known.items() >= origin_of(path).items() or not (anywhere or known["on_cpu"]):
            raise Unreadable("it was changed since, or its tensors go to another device")
        return _unpacked(json.loads(known["content"]), file.get_tensors())
    except (OSError, LookupError, ValueError, TypeError) as error:
        raise Unreadable(f"{twin}: {error}") from None


def convert_all(code_path: str, most_bytes: int) -> list[str]:
    """Convert what can be, of the bundle in this folder, and name it; any other file is left as it is.

    ``most_bytes``: memory that may be used for a file that has to be read whole. A converted file takes at most half of
    what the disk has free. Needs torch; one process at a time may do it for a bundle.
    """
    done: list[str] = []
    for path in sorted(Path(code_path).rglob("*")):
        if path.suffix not in SUFFIXES or not path.is_file() or len(done) == MOST_FILES:
            continue
        size, twin = path.stat().st_size, twin_of(path, code_path)
        small_enough = size <= shutil.disk_usage(path).free // 2 and (is_zip(path) or size <= most_bytes)
        if twin is not None and size >= LEAST_BYTES and small_enough:
            with contextlib.suppress(Exception):  # another format, or broken: the function's own load says what it is
                _convert(path, Path(twin))
                done.append(os.path.relpath(path, code_path))
    return done


def _convert(path: Path, twin: Path) -> None:
    """Written under another name first: it is there whole, or not at all."""
    torch = sys.modules["torch"]
    places: set[str] = set()

    def place(storage: Any, location: str) -> Any:
        places.add(location)
        return storage

    origin = origin_of(path)
    loaded = torch.load(path, map_location=place, weights_only=True, mmap=is_zip(path))
    packer = _Packer()
    content = json.dumps(packer.pack(loaded))
    storages = [tensor.untyped_storage().data_ptr() for tensor in packer.tensors.values() if tensor.numel()]
    if len(set(storages)) < len(storages):
        raise NotPlain("some tensors are parts of others")
    twin.parent.mkdir(parents=True, exist_ok=True)
    partial = twin.with_name(f"{twin.name}.part")
    try:
        on_cpu = "yes" if places <= {"cpu"} else ""
        write_tensors(partial, packer.tensors, {**origin, "on_cpu": on_cpu, "content": content})
        partial.replace(twin)
    finally:
        partial.unlink(missing_ok=True)


def origin_of(path: str | os.PathLike[str]) -> dict[str, str]:
    """What tells whether a file is the one that was converted."""
    now = os.stat(path)
    return {"size": str(now.st_size), "modified_ns": str(now.st_mtime_ns)}


class _Packer:
    """Takes what was loaded apart, into tensors by name and a JSON value: a plain value is ``[value]``, a tensor its
    name, a container its type's name, its items and its attributes (in which a ``state_dict`` keeps versions)."""

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}
        self._names: dict[tuple[int, Any, Any], str] = {}

    def pack(self, value: Any, name: str = "") -> Any:
        """Raises ``NotPlain``."""
        kind = type(value)
        if kind in _VALUES:
            return [value]
        if kind not in _CONTAINERS.values():
            return self._name(value, name)
        items = value.items() if isinstance(value, dict) else enumerate(value)
        pairs = [[self.pack(key), self.pack(each, f"{name}.{key}" if name else str(key))] for key, each in items]
        own = getattr(value, "__dict__", None)
        return [kind.__name__, pairs, self.pack(own, f"{name}.__dict__") if own else None]

    def _name(self, value: Any, name: str) -> str:
        torch = sys.modules["torch"]
        if type(value) is not torch.Tensor or value.requires_grad or value.layout is not torch.strided:
            raise NotPlain(f"{name} is of {type(value)}")
        if not value.is_contiguous() or value.is_conj() or value.is_neg():
            raise NotPlain(f"{name} is a view")
        where = (value.data_ptr(), value.shape, value.dtype)
        if where in self._names:
            return self._names[where]  # tied weights are one
        while name in self.tensors:
            name += "'"
        self.tensors[name], self._names[where] = value, name
        return name


def _unpacked(content: Any, tensors: dict[str, Any]) -> Any:
    if isinstance(content, str):
        return tensors[content].detach()
    if len(content) == 1:
        return content[0]
    kind, pairs, own = content
    items = [(_unpacked(key, tensors), _unpacked(value, tensors)) for key, value in pairs]
    made = _CONTAINERS[kind](items if kind in ("dict", "OrderedDict") else [value for _, value in items])
    if own is not None:
        vars(made).update(_unpacked(own, tensors))
    return made
