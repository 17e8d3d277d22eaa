"""What makes forks of the zygote quick, and that it changes nothing else."""

from __future__ import annotations

import os
import sys
import textwrap

import pytest

from hotset.functions.runtime import Runtime
from hotset.node.worker.rehearsal import Rehearsal, rehearse
from hotset.node.worker.zygote import collapse_pages, own_memory


def test_a_rehearsal_loads_and_answers_like_a_function() -> None:
    pytest.importorskip("torch")
    runtime = Runtime(Rehearsal)
    runtime.load()

    assert (runtime.call(b"1").status, runtime.call(b"1").body) == (200, b"0.0")


def test_a_rehearsal_works_without_torch_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    runtime = Runtime(Rehearsal)
    runtime.load()
    assert runtime.call(b"1").body == b"1.0"

    path, folder = list(sys.path), os.getcwd()
    rehearse()
    assert (list(sys.path), os.getcwd()) == (path, folder)


def test_its_own_memory_is_what_is_writable_private_and_no_files() -> None:
    maps = textwrap.dedent(
        """\
        55d4c0a00000-55d4c0e00000 rw-p 00000000 00:00 0                          [heap]
        7f1a00000000-7f1a00400000 rw-p 00000000 00:00 0
        7f1a10000000-7f1a10400000 r--p 00000000 fd:00 4711                       /usr/lib/libtorch.so
        7f1a20000000-7f1a20400000 rw-p 00000000 fd:00 4711                       /usr/lib/libtorch.so
        7f1a30000000-7f1a30400000 rw-s 00000000 00:01 99                         /dev/shm/arena (deleted)
        7ffd10000000-7ffd10400000 rw-p 00000000 00:00 0                          [stack]
        """
    )

    assert own_memory(maps.splitlines()) == [(0x55D4C0A00000, 0x55D4C0E00000), (0x7F1A00000000, 0x7F1A00400000)]


def test_collapsing_keeps_what_is_in_memory() -> None:
    block = bytearray(os.urandom(1 << 20)) * 8
    before = hash(bytes(block))

    collapse_pages()

    assert hash(bytes(block)) == before
