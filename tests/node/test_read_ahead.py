"""Cold files are read while their request waits, once, and none that are in the page cache."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import pytest
from recording import GPU, Recorder, launch, running, story

from hotset.node import read_ahead
from hotset.node.read_ahead import ReadAhead, large_files, mapped_files, read_cold

SIZE = 2 << 20


def evicted(path: Path) -> Path:
    """Written, and out of the page cache, if the file system of this machine does that."""
    path.write_bytes(os.urandom(SIZE))
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    return path


def until(reader: ReadAhead, files: int) -> None:
    deadline_s = time.monotonic() + 20
    while reader.files_read < files or not reader._queue.empty():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_a_cold_file_is_read_once(tmp_path: Path) -> None:
    path = evicted(tmp_path / "weights.bin")
    read_cold(str(path))  # False where the file system keeps its pages
    assert not read_cold(str(path))
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty"):
        read_cold(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError):
        read_cold(str(tmp_path / "none"))


def test_a_bundles_large_files_are_its_models(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, size in (("a.safetensors", SIZE), ("deep/b.onnx", 2 * SIZE), ("small.bin", 10), ("code.py", SIZE)):
        (tmp_path / name).write_bytes(bytes(size))
    assert large_files(tmp_path) == (str(tmp_path / "deep/b.onnx"), str(tmp_path / "a.safetensors"))
    assert large_files(tmp_path / "none") == ()


def test_what_a_process_has_mapped_is_its_models(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bytes(SIZE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ):
        found = mapped_files(os.getpid())
    assert str(path) in found
    assert not any(".so" in each for each in found)
    assert mapped_files(2**22 + 1) == ()


def test_a_model_is_read_once_until_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    def read(path: str) -> bool:
        reads.append(path)
        if len(reads) == 1:
            raise OSError  # gone meanwhile: the thread lives on
        return True

    monkeypatch.setattr(read_ahead, "MOST_MODELS", 2)
    monkeypatch.setattr(read_ahead, "read_cold", read)
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(bytes(SIZE))
    reader = ReadAhead()
    for _ in range(3):
        reader.expect("a@1", str(tmp_path))
    until(reader, 1)
    reader.loaded("a@1", str(tmp_path), os.getpid())
    reader.expect("a@1", str(tmp_path))
    until(reader, 3)
    for other in ("b@1", "c@1"):
        reader.expect(other, str(tmp_path / "none"))  # no files, so nothing to do; a@1 is forgotten
    reader.expect("a@1", str(tmp_path))
    until(reader, 5)
    assert {os.path.basename(path) for path in reads[:2] + reads[-2:]} == {"a.bin", "b.bin"}
    reader.close()
    assert reader._thread is not None
    reader._thread.join(10)
    assert not reader._thread.is_alive()


@story
async def test_a_node_looks_at_what_its_processes_mapped(recorder: Recorder) -> None:
    async with running(recorder) as node:
        node.expect(launch("Echo"))
        assert node._read_ahead._asked == {"Echo@1"}
        node.load(GPU, launch("Echo"))
        await recorder.hears("loaded")
        assert node._read_ahead._seen == {"Echo@1"}
        assert node._read_ahead._asked == set()
