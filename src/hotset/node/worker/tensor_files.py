"""Files of tensors, mapped: their pages are the machine's page cache, shared by all processes, and private to none.

The safetensors format is a u64 length, a JSON table of that many bytes (name -> dtype, shape, offsets), and the bytes
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import struct
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

_LENGTH = struct.Struct("<Q")
MOST_HEADER_BYTES = 100 << 20
"""As the format's own reader has it."""
_ALIGNMENT = 64
"""Of the first tensor, as the kernels of a CPU like it."""
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class Unreadable(Exception):
    """Not a file that can be mapped as it is; its own reader may know better, or say what is wrong."""


class _Entry(msgspec.Struct, frozen=True, gc=False):
    dtype: str = ""
    shape: tuple[int, ...] = ()
    data_offsets: tuple[int, int] = (0, 0)


class _Header(msgspec.Struct, frozen=True):
    metadata: dict[str, str] = msgspec.field(default_factory=dict, name="__metadata__")


_TABLE = msgspec.json.Decoder(dict[str, _Entry])
_HEADER = msgspec.json.Decoder(_Header)


class MappedFile:
    """A safetensors file as tensors on the CPU that are views of its pages, or as copies of them on another ``device``.
    Writing to one changes no file.

    Has the methods of ``safetensors.safe_open`` that ``safetensors.torch.load_file`` needs. Raises ``Unreadable``.
    """

    def __init__(self, path: str | os.PathLike[str], device: str | int = "cpu") -> None:
        torch = sys.modules["torch"]
        self.device = device
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= _LENGTH.size:
                raise Unreadable("it is too short")
            self._map = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        (length,) = _LENGTH.unpack_from(self._map)
        self._begin = _LENGTH.size + length
        if length > min(MOST_HEADER_BYTES, size - _LENGTH.size):
            raise Unreadable("its header is longer than it")
        # In large pages, where the file system has them: what is read from the disk from here on takes a page fault for
        # 2 MiB in place of 64 KiB, for this process and for all that map it later.
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._map.madvise(mmap.MADV_WILLNEED)
        try:
            header = self._map[_LENGTH.size : self._begin]
            self._metadata = _HEADER.decode(header).metadata
            entries = _TABLE.decode(header)
            entries.pop("__metadata__", None)  # all of an entry has a default, so it was taken for one
        except msgspec.DecodeError as error:
            raise Unreadable(str(error)) from None
        self.tensors: dict[str, Any] = {}
        """All of them, in the order they have in the file, on the CPU."""
        for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
            self.tensors[name] = self._view(torch, entry, size)

    def _view(self, torch: Any, entry: _Entry, size: int) -> Any:
        dtype = getattr(torch, _DTYPES.get(entry.dtype, ""), None)
        if dtype is None:
            raise Unreadable(f"{entry.dtype} is not known here")
        first, last = entry.data_offsets
        count = math.prod(entry.shape)
        fits = 0 <= first <= last <= size - self._begin and count * dtype.itemsize == last - first
        if not fits or min(entry.shape, default=0) < 0:
            raise Unreadable("its table does not fit its bytes")
        if not count:
            return torch.empty(entry.shape, dtype=dtype)
        if (self._begin + first) % dtype.itemsize:
            raise Unreadable("its tensors are not aligned")
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._begin + first)
        return flat if len(entry.shape) == 1 else flat.view(entry.shape)

    def keys(self) -> Iterable[str]:
        return self.tensors.keys()

    offset_keys = keys

    def metadata(self) -> dict[str, str]:
        return self._metadata

    def get_tensor(self, name: str) -> Any:
        return self._there(self.tensors[name])

    def get_tensors(self) -> dict[str, Any]:
        """All of them, in the order they have in the file."""
        return {name: self._there(tensor) for name, tensor in self.tensors.items()}

    def _there(self, tensor: Any) -> Any:
        return tensor if self.device == "cpu" else tensor.to(self.device)

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(self, *_: object) -> None:
        """The pages stay mapped as long as a tensor is there."""


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """A safetensors file of contiguous tensors on the CPU, on the disk when this returns. Raises ``KeyError`` for a
    dtype that the format does not have."""
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    table: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    in_order = sorted(tensors.items(), key=lambda item: -item[1].itemsize)  # so that each is aligned, without a gap
    for name, tensor in in_order:
        begin, end = end, end + tensor.nbytes
        code = codes[str(tensor.dtype).removeprefix("torch.")]
        table[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = msgspec.json.encode(table)
    header += b" " * (-(_LENGTH.size + len(header)) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(_LENGTH.pack(len(header)) + header)
        for _, tensor in in_order:
            if tensor.nbytes:
                file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
        file.flush()
        os.fsync(file.fileno())


def is_zip(path: Any) -> bool:
    """Whether a ``torch.save`` file has the format that can be mapped."""
    if not isinstance(path, str | Path):
        return False
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:
        return False
