"""Shared-memory slots: who owns what, until when."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy
import pytest

from hotset.node.frames import FrameError
from hotset.node.slots import UNIT_BYTES, Slots, create_arena

HALF = 8 * UNIT_BYTES


class Pair:
    """Both sides of one arena; ``read`` holds the offsets each side was told are read."""

    def __init__(self) -> None:
        fd = create_arena(HALF)
        self.told_node: list[int] = []
        self.told_process: list[int] = []
        self.node = Slots(fd, second_half=False, on_read=self.told_node.append)
        self.process = Slots(os.dup(fd), second_half=True, on_read=self.told_process.append)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.node.close()
    made.process.close()


def test_a_body_crosses_without_a_copy_and_its_slot_is_free_when_nobody_looks_any_more(pair: Pair) -> None:
    body = os.urandom(2 * UNIT_BYTES + 1)
    offset = pair.node.put(body)
    assert offset is not None
    view = pair.process.read(offset, len(body))
    assert view == body
    assert view.readonly
    array = numpy.frombuffer(view[4:8], numpy.uint8)
    del view
    assert pair.told_process == []  # the function kept an array of a slice of it
    del array
    assert pair.told_process == [offset]
    assert not pair.node.idle
    pair.node.freed(offset)
    assert pair.node.idle


def test_answers_have_a_half_of_their_own(pair: Pair) -> None:
    there, back = pair.node.put(b"call"), pair.process.put(b"answer")
    assert there == 0
    assert back == HALF
    assert bytes(pair.node.read(back, 6)) == b"answer"
    assert bytes(pair.process.read(there, 4)) == b"call"
    assert (pair.told_node, pair.told_process) == ([HALF], [0])


def test_slots_run_out_and_come_back_first_fit(pair: Pair) -> None:
    one = bytes(UNIT_BYTES)
    offsets = [pair.node.put(one) for _ in range(8)]
    assert offsets == [unit * UNIT_BYTES for unit in range(8)]
    assert pair.node.put(one) is None
    for offset in (0, 2 * UNIT_BYTES, 3 * UNIT_BYTES):
        pair.node.freed(offset)
    assert pair.node.put(one + one) == 2 * UNIT_BYTES  # adjacent units
    assert pair.node.put(one + one) is None
    assert pair.node.put(one) == 0
    assert pair.node.put(bytes(9 * UNIT_BYTES)) is None


@pytest.mark.parametrize(("offset", "size"), [(0, 10), (HALF - 1, 10), (2 * HALF - 5, 10), (1 << 31, 1)])
def test_a_reference_outside_the_other_half_is_refused(pair: Pair, offset: int, size: int) -> None:
    with pytest.raises(FrameError):
        pair.node.read(offset, size)


def test_a_slot_is_lent_once_and_freed_once(pair: Pair) -> None:
    offset = pair.process.put(b"answer")
    assert offset is not None
    view = pair.node.read(offset, 6)
    with pytest.raises(FrameError):
        pair.node.read(offset, 6)
    pair.process.freed(offset)
    with pytest.raises(FrameError):
        pair.process.freed(offset)
    del view


def test_views_outlive_the_arena_and_say_nothing_then() -> None:
    pair = Pair()
    offset = pair.process.put(b"answer")
    assert offset is not None
    view = pair.node.read(offset, 6)
    pair.node.close()
    pair.process.close()
    assert bytes(view) == b"answer"
    del view
    assert pair.told_node == []


def test_a_process_cannot_shrink_the_arena_under_the_node() -> None:
    fd = create_arena(HALF)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)
