"""Copies between a GPU and host memory that is not pinned, through a ring of small pinned buffers.

A GPU reads and writes pinned memory by itself, at the speed of its bus, while the CPU does something else. From other
memory, a file's mapped pages above all, the driver copies piece by piece and the caller waits, page faults included.
So the CPU fills one buffer of the ring while the GPU takes the others, and the other way round:

    pages -> memcpy -> buffer -> copy on a stream of its own -> GPU          (``copy_in``)
    GPU -> copy on a stream of its own -> buffer -> memcpy -> host memory    (``copy_out``)

A buffer is used again when the event behind its last copy has come to pass. A process has one ring, made and pinned at
its first copy and kept until it ends: no transition pins memory.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec

from hotset.node.worker.slab import Slab

BUFFER_BYTES = 4 << 20
"""Fits a core's share of the cache: a memcpy into it is up to twice as fast as into one of 16 MiB or more. It is large
to a bus, which takes 80 to 330 microseconds for it, and some 10 to be told of it."""
BUFFERS = 8
"""More than ``MOST_THREADS`` fill, so that the GPU always has some."""
MOST_THREADS = 4
"""Of memcpy. One reaches 10 to 20 GB/s, a bus up to 55."""
ALIGNMENT = 512
"""Copies from and to the device are fastest between aligned addresses."""


class Copy(msgspec.Struct, frozen=True):
    """Two tensors of bytes (uint8, one dimension), as long as each other, one of them on the device."""

    destination: Any
    source: Any


class Event(Protocol):
    def synchronize(self) -> None:
        """Wait until all is done that was on the stream when the event was made."""


class CopyStream(Protocol):
    """A device's queue of copies, done one after the other, beside what the device computes."""

    def pinned(self, size_bytes: int) -> Slab | None:
        """Memory that the device can use by itself; None: there is none to be had."""

    def like(self, tensor: Any) -> Any:
        """A tensor on the device that is what this one is but for its values."""

    def after_current(self) -> None:
        """What follows here waits for what the current stream was given so far."""

    def before_current(self) -> None:
        """What the current stream is given from now on waits for what is here so far."""

    def copy(self, destination: Any, source: Any) -> None: ...

    def event(self) -> Event: ...

    def synchronize(self) -> None:
        """Wait until all copies are done."""


class CudaStream:
    """A ``CopyStream`` of the process's one GPU. Opens its CUDA context."""

    def __init__(self) -> None:
        self._cuda = sys.modules["torch"].cuda
        self._stream = self._cuda.Stream()

    def pinned(self, size_bytes: int) -> Slab | None:
        slab = Slab(size_bytes, pinned=True)
        if slab.pinned:
            return slab
        slab.close()
        return None

    def like(self, tensor: Any) -> Any:
        return sys.modules["torch"].empty_like(tensor, device="cuda")

    def after_current(self) -> None:
        self._stream.wait_stream(self._cuda.current_stream())

    def before_current(self) -> None:
        self._cuda.current_stream().wait_stream(self._stream)

    def copy(self, destination: Any, source: Any) -> None:
        with self._cuda.stream(self._stream):
            destination.copy_(source, non_blocking=True)

    def event(self) -> Event:
        event: Event = self._stream.record_event()
        return event

    def synchronize(self) -> None:
        self._stream.synchronize()


class Piece(msgspec.Struct, frozen=True):
    """Neighbouring bytes of one copy that pass through one buffer."""

    copy: int
    begin: int
    size_bytes: int
    offset: int
    """In the buffer."""


def pieces(sizes: Iterable[int], buffer_bytes: int) -> Iterator[list[Piece]]:
    """What of copies of these sizes goes through each buffer in turn: small ones share one, large ones take several."""
    filled: list[Piece] = []
    offset = 0
    for copy, size in enumerate(sizes):
        begin = 0
        while begin < size:
            count = min(size - begin, buffer_bytes - offset)
            filled.append(Piece(copy, begin, count, offset))
            begin += count
            offset += -(-count // ALIGNMENT) * ALIGNMENT
            if offset >= buffer_bytes:
                yield filled
                filled, offset = [], 0
    if filled:
        yield filled


class _Later:
    """A future of the only thread there is: done by whoever asks for its result."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        self._work = work
        self._arguments = arguments

    def result(self) -> None:
        self._work(*self._arguments)


class StagingRing:
    """``threads``: how many fill or empty buffers at the same time; None: as many as torch computes with by then, up to
    ``MOST_THREADS``. ``buffer_bytes`` is a multiple of 512.

    Where no memory can be pinned, copies are made without the ring, as torch makes them, which is said once.
    """

    def __init__(
        self, stream: CopyStream, *, threads: int | None = 1, buffers: int = BUFFERS, buffer_bytes: int = BUFFER_BYTES
    ) -> None:
        self._stream = stream
        self._asked_threads = threads
        self._most_threads = buffers - 1
        self._buffer_bytes = buffer_bytes
        self._lock = threading.Lock()
        self._turn = 0
        self._slab = stream.pinned(buffers * buffer_bytes)
        if self._slab is None:
            sys.stderr.write(
                "hotset: the driver pins no host memory, so copies from and to the GPU are slow: see what dmesg says\n"
            )
            return
        memory = self._slab.tensor
        self._buffers = [memory[each * buffer_bytes : (each + 1) * buffer_bytes] for each in range(buffers)]
        self._taken: list[Event | None] = [None] * buffers
        """What to wait for before a buffer is used again."""

    @property
    def _threads(self) -> int:
        asked = self._asked_threads
        asked = min(MOST_THREADS, sys.modules["torch"].get_num_threads()) if asked is None else asked
        return min(asked, self._most_threads)

    @property
    def pinned_bytes(self) -> int:
        return 0 if self._slab is None else self._slab.tensor.numel()

    def like(self, tensor: Any) -> Any:
        """As the stream has it."""
        return self._stream.like(tensor)

    def copy_in(self, copies: Sequence[Copy]) -> None:
        """Copy to the device. When this returns, the current stream waits for the copies and the sources may change;
        the host has to ``synchronize`` before it says that they are there."""
        with self._lock, self._working(copies) as begin:
            self._stream.after_current()
            try:
                if self._slab is None:
                    for each in copies:
                        self._stream.copy(each.destination, each.source)
                    return
                filling: deque[tuple[int, list[Piece], Any]] = deque()
                for group in self._groups(copies):
                    buffer = self._next_buffer()
                    filling.append((buffer, group, begin(self._fill, buffer, group, copies)))
                    if len(filling) >= self._threads:
                        self._send(copies, *filling.popleft())
                while filling:
                    self._send(copies, *filling.popleft())
            finally:
                self._stream.before_current()

    def copy_out(self, copies: Sequence[Copy]) -> None:
        """Copy to the host; done when this returns."""
        with self._lock, self._working(copies) as begin:
            self._stream.after_current()
            if self._slab is None:
                for each in copies:
                    self._stream.copy(each.destination, each.source)
                self._stream.synchronize()
                return
            landing: deque[Any] = deque()
            for group in self._groups(copies):
                if len(landing) == len(self._buffers):
                    landing.popleft().result()
                buffer = self._next_buffer()
                for piece in group:
                    self._stream.copy(self._staged(buffer, piece), _span(copies[piece.copy].source, piece))
                self._taken[buffer] = event = self._stream.event()
                landing.append(begin(self._land, event, buffer, group, copies))
            while landing:
                landing.popleft().result()

    def synchronize(self) -> None:
        """Wait until the device has all that was copied in."""
        self._stream.synchronize()

    def _groups(self, copies: Sequence[Copy]) -> Iterator[list[Piece]]:
        return pieces((len(each.destination) for each in copies), self._buffer_bytes)

    def _next_buffer(self) -> int:
        buffer, self._turn = self._turn, (self._turn + 1) % len(self._buffers)
        event, self._taken[buffer] = self._taken[buffer], None
        if event is not None:
            event.synchronize()
        return buffer

    def _staged(self, buffer: int, piece: Piece) -> Any:
        return self._buffers[buffer][piece.offset : piece.offset + piece.size_bytes]

    def _fill(self, buffer: int, group: list[Piece], copies: Sequence[Copy]) -> None:
        for piece in group:
            _memcpy(self._staged(buffer, piece), _span(copies[piece.copy].source, piece))

    def _send(self, copies: Sequence[Copy], buffer: int, group: list[Piece], filled: Any) -> None:
        filled.result()
        for piece in group:
            self._stream.copy(_span(copies[piece.copy].destination, piece), self._staged(buffer, piece))
        self._taken[buffer] = self._stream.event()

    def _land(self, event: Event, buffer: int, group: list[Piece], copies: Sequence[Copy]) -> None:
        event.synchronize()
        for piece in group:
            _memcpy(_span(copies[piece.copy].destination, piece), self._staged(buffer, piece))

    @contextmanager
    def _working(self, copies: Sequence[Copy]) -> Iterator[Callable[..., Any]]:
        """How work for one of the threads is begun; all that was is over when the context is left."""
        if self._threads < 2 or sum(len(each.source) for each in copies) <= self._buffer_bytes:
            yield _Later
            return
        from concurrent.futures import ThreadPoolExecutor  # which torch imports, but functions without it do not need

        with ThreadPoolExecutor(self._threads) as pool:
            yield pool.submit


def why_not_plain(tensor: Any) -> str | None:
    """Why a tensor is more than a strided view of plain memory; None: it is not."""
    torch = sys.modules["torch"]
    plain = torch.Tensor, torch.nn.Parameter, getattr(torch.nn, "Buffer", torch.nn.Parameter)
    if type(tensor) not in plain or tensor.layout is not torch.strided:
        return f"a tensor of type {type(tensor).__name__} cannot be copied as plain memory"
    if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return "a quantised, conjugated or negated tensor is more than its memory"
    return None


def whole(tensor: Any) -> Any:
    """The bytes of all of a tensor's storage."""
    return _memory(tensor, 0, tensor.untyped_storage().nbytes())


def dense(tensor: Any) -> Any:
    """The bytes of a tensor whose elements lie close together, in the order in which they lie."""
    return _memory(tensor, tensor.storage_offset() * tensor.itemsize, tensor.numel() * tensor.itemsize)


def _memory(tensor: Any, begin: int, size_bytes: int) -> Any:
    torch = sys.modules["torch"]
    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return memory.set_(tensor.untyped_storage(), begin, (size_bytes,), (1,))


@functools.cache
def process_ring() -> StagingRing:
    """The one of this process, for its one GPU. It may be made before the process knows its function, which says how
    many threads it is to have."""
    return StagingRing(CudaStream(), threads=None)


def is_gpu(device: Any) -> bool:
    """Whether this names the process's GPU, as torch's functions are told of devices."""
    torch = sys.modules["torch"]
    if isinstance(device, torch.device):
        return device.type == "cuda" and not device.index
    return device in ("cuda", "cuda:0") if isinstance(device, str) else type(device) is int and device == 0


def _span(memory: Any, piece: Piece) -> Any:
    return memory[piece.begin : piece.begin + piece.size_bytes]


def _memcpy(destination: Any, source: Any) -> None:
    """In this thread, without the interpreter's lock. torch would have threads of its own do it together, and wait for
    them at each piece, which takes a hundred times as long where somebody else needs a core."""
    ctypes.memmove(destination.data_ptr(), source.data_ptr(), len(source))
