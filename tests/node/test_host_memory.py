"""What a process takes of the host: what it wrote counts whole, what several map counts once for all of them."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from hotset.node.host_memory import HostMemory, host_memory

MIB = 1 << 20
SIZE = 64 * MIB
SLACK = 4 * MIB

MAPS = f"""
import mmap, sys
with open(sys.argv[1], "rb") as file:
    weights = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    sum(weights[at] for at in range(0, {SIZE}, {mmap.PAGESIZE}))
print("ready", flush=True)
sys.stdin.read()
"""
WRITES = f"""
import sys
written = bytearray(b"x") * {SIZE}
print("ready", flush=True)
sys.stdin.read()
"""
IDLES = 'import sys; print("ready", flush=True); sys.stdin.read()'


@contextmanager
def process(code: str, *arguments: str) -> Iterator[int]:
    """Its id, once it has done what it is to do; it ends with the block."""
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == b"ready\n"
        yield started.pid
        assert started.stdin is not None
        started.stdin.close()


@pytest.fixture
def weights(tmp_path: Path) -> str:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(MIB) * (SIZE // MIB))
    return str(path)


def test_what_a_process_wrote_is_its_own() -> None:
    with process(IDLES) as idle, process(WRITES) as writer:
        more_bytes = host_memory(writer).private_bytes - host_memory(idle).private_bytes
        assert abs(more_bytes - SIZE) < SLACK


def test_mapped_weights_are_shared_even_while_one_process_maps_them(weights: str) -> None:
    with process(IDLES) as idle, process(MAPS, weights) as reader:
        base, seen = host_memory(idle), host_memory(reader)
        assert abs(seen.shared_bytes - base.shared_bytes - SIZE) < SLACK
        assert abs(seen.private_bytes - base.private_bytes) < SLACK


def test_weights_that_several_map_count_once_for_all(weights: str) -> None:
    with ExitStack() as alive:
        idle = alive.enter_context(process(IDLES))
        readers = [alive.enter_context(process(MAPS, weights)) for _ in range(4)]
        base_bytes = host_memory(idle).shared_bytes
        shared = [host_memory(pid).shared_bytes - base_bytes for pid in readers]
        assert all(abs(each - SIZE // 4) < SLACK for each in shared)


def test_a_process_that_is_gone_takes_nothing() -> None:
    with process(IDLES) as pid:
        assert host_memory(pid).private_bytes > 0
    assert host_memory(pid) == HostMemory()


def test_a_kernel_without_sums_is_asked_for_what_they_are_made_of(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    mapping = (
        "1000-3000 rw-p 0 00:00 0 \nRss: {0} kB\nPss: {1} kB\nPss_Dirty: 9 kB\n"
        "Private_Dirty: {2} kB\nAnonymous: {3} kB\n"
    )
    (tmp_path / "7" / "smaps").write_text(mapping.format(8, 6, 4, 6) + mapping.format(8, 2, 0, 0))
    assert host_memory(7, tmp_path) == HostMemory(private_bytes=4 << 10, shared_bytes=4 << 10)


def test_a_process_that_may_not_be_looked_into_counts_as_nothing(tmp_path: Path) -> None:
    class Closed(type(tmp_path)):  # type: ignore[misc]
        def read_bytes(self) -> bytes:
            raise PermissionError(self)

    assert host_memory(7, Closed(tmp_path)) == HostMemory()
