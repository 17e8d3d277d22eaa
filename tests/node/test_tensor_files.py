"""Mapped files of tensors are what their own reader says they are, or are left to it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hotset.node.worker.fast_load import fast_load
from hotset.node.worker.tensor_files import MappedFile, Unreadable

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)


def test_every_dtype_and_shape_is_read(tmp_path: Path) -> None:
    tensors = {str(dtype): (torch.arange(24) % 2).to(dtype).view(2, 3, 4) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(7.0), "empty": torch.empty(0, 3)}
    path = tmp_path / "all.safetensors"
    save_file(tensors, path, {"made": "here"})
    file = MappedFile(path)
    assert file.metadata() == {"made": "here"}
    assert set(file.keys()) == set(file.offset_keys()) == tensors.keys()
    for name, tensor in tensors.items():
        read = file.get_tensor(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read, tensor)


def test_pages_are_the_files_and_writing_to_them_changes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"a": torch.zeros(1024)}, path)
    with fast_load():
        tensor = load_file(path)["a"]
    assert str(path) in Path("/proc/self/maps").read_text()
    tensor.fill_(1.0)
    assert not load_file(path)["a"].any()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 9) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": 1} ',
    ],
)
def test_what_is_no_such_file_is_left_to_its_own_reader(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(Unreadable):
        MappedFile(path)
    with pytest.raises(SafetensorError), fast_load():
        load_file(path)


@pytest.mark.parametrize(
    ("dtype", "shape", "offsets"),
    [("F4", [2], [0, 8]), ("F32", [3], [0, 8]), ("F32", [2], [4, 12]), ("F32", [-1, -2], [0, 8]), ("F32", [1], [2, 6])],
)
def test_a_table_that_does_not_fit_its_bytes_is_refused(
    tmp_path: Path, dtype: str, shape: list[int], offsets: list[int]
) -> None:
    table = str({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).replace("'", '"').encode()
    table += b" " * (-len(table) % 8)
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(table)) + table + bytes(8))
    with pytest.raises(Unreadable):
        MappedFile(path)


def test_a_file_that_is_not_there_is_the_functions_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), fast_load():
        load_file(tmp_path / "none.safetensors")
