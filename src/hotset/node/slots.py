"""Shared-memory slots: large bodies cross between a node and a GPU process without going through the socket.

Each process has one *arena*, a sealed memfd of two halves. The node puts calls into the first half, the process puts
answers into the second; whoever puts a body also owns its slot and learns by a FREE frame that the other side has read
it. A body that finds no room goes through the socket instead, so the pool bounds memory and never blocks anybody.

The reader gets a read-only view of the slot, no copy. The slot is free when the last view of it is gone: an array a
function keeps, or a slow client's unsent answer, simply holds its slot.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref
from collections.abc import Callable

from hotset.node.frames import FrameError

UNIT_BYTES = 256 * 1024
"""Slots are whole, adjacent units: a 600 kB tensor takes three."""
HALF_BYTES = 32 * 1024 * 1024
"""Memory of one direction. Pages that were never used take no memory."""


def create_arena(half_bytes: int = HALF_BYTES) -> int:
    """A new arena's file descriptor, close-on-exec. It can no longer change size: a process that shrank it would turn
    the node's next read into a SIGBUS."""
    fd = os.memfd_create("hotset-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 2 * half_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd


class Units:
    """Which units of a stretch of memory are free."""

    def __init__(self, memory_bytes: int) -> None:
        self._all = self._free = (1 << (memory_bytes // UNIT_BYTES)) - 1
        self._taken: dict[int, int] = {}

    def take(self, size: int) -> int | None:
        """The offset of as many adjacent units as ``size`` bytes take, the first there are; None: they are not free."""
        units = -(-size // UNIT_BYTES)
        starts = self._free
        for _ in range(units - 1):
            starts &= starts >> 1
            if not starts:
                return None
        if not starts:
            return None
        first = (starts & -starts).bit_length() - 1
        mask = ((1 << units) - 1) << first
        self._free &= ~mask
        self._taken[first * UNIT_BYTES] = mask
        return first * UNIT_BYTES

    def give_back(self, offset: int) -> None:
        """Raises ``KeyError`` for what was not taken."""
        self._free |= self._taken.pop(offset)

    @property
    def idle(self) -> bool:
        """None is taken."""
        return self._free == self._all


class Slots:
    """One side's view of an arena: it puts bodies into its own half and reads the other one.

    ``on_read`` is called with the offset of a slot of the other side when its last view is gone, from whatever thread
    dropped it. The arena is mapped at its first use.
    """

    def __init__(self, fd: int, *, second_half: bool, on_read: Callable[[int], None]) -> None:
        self._fd = fd
        self._half_bytes = os.fstat(fd).st_size // 2
        self._own = self._half_bytes if second_half else 0
        self._other = self._half_bytes - self._own
        self._on_read = on_read
        self._units = Units(self._half_bytes)
        self._lent: dict[int, weakref.ref[ctypes.Array[ctypes.c_char]]] = {}
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None

    def put(self, *parts: bytes | bytearray | memoryview) -> int | None:
        """Copy a body, in parts (bytes, one dimension), into a free slot; its offset, or None when none is free."""
        taken = self._units.take(sum(map(len, parts)))
        if taken is None:
            return None
        offset = at = self._own + taken
        view = self._mapped()
        for part in parts:
            view[at : at + len(part)] = part
            at += len(part)
        return offset

    def freed(self, offset: int) -> None:
        """The other side has read this slot of ours."""
        try:
            self._units.give_back(offset - self._own)
        except KeyError:
            raise FrameError("a slot was freed that was not in use") from None

    def read(self, offset: int, size: int) -> memoryview:
        """A read-only view of a slot the other side has put; raises ``FrameError`` for one outside its half."""
        if not (self._other <= offset and offset + size <= self._other + self._half_bytes) or offset in self._lent:
            raise FrameError("a slot reference outside the other side's free memory")
        self._mapped()
        assert self._map is not None
        # A ctypes array, because every view and every numpy or torch array made from it keeps the array itself alive.
        array = (ctypes.c_char * size).from_buffer(self._map, offset)
        self._lent[offset] = weakref.ref(array, lambda _: self._forget(offset))
        return memoryview(array).cast("B").toreadonly()

    @property
    def idle(self) -> bool:
        """Nothing of ours is in flight."""
        return self._units.idle

    def close(self) -> None:
        """Stop reporting, close the descriptor. Memory goes when the last view does."""
        self._lent.clear()
        self._view = None
        self._map = None
        os.close(self._fd)

    def _forget(self, offset: int) -> None:
        if self._lent.pop(offset, None) is not None:
            self._on_read(offset)

    def _mapped(self) -> memoryview:
        if self._view is None:
            self._map = mmap.mmap(self._fd, 2 * self._half_bytes)
            self._view = memoryview(self._map)
        return self._view
