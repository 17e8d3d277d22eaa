"""The process's end of the socket: blocking reads, replies gathered and sent together."""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Sequence

import msgspec

from hotset.node.frames import (
    ANSWER_HEAD,
    ANSWER_PREFIX,
    HEADER,
    HEADER_BYTES,
    INLINE_BYTES,
    RAN_FRAME,
    SECONDS,
    SLOT_REFERENCE,
    SMALL_FRAME_BYTES,
    Failed,
    Flag,
    ImportOrder,
    Inspected,
    InspectOrder,
    Kind,
    Loaded,
    LoadOrder,
    Measured,
    Moved,
    OpenOrder,
    answer_kind,
    control,
    split_call,
)
from hotset.node.interface import Call
from hotset.node.slots import Slots

_CALL = int(Kind.CALL)
_ANSWER = int(Kind.ANSWER)
_RAN = int(Kind.RAN)
_LAST = int(Flag.LAST)
_SLOT = int(Flag.SLOT)
_ENDS = int(Flag.ENDS)
_ORDERS: dict[int, type[LoadOrder | InspectOrder | OpenOrder]] = {
    Kind.LOAD: LoadOrder,
    Kind.IMPORT: ImportOrder,
    Kind.INSPECT: InspectOrder,
    Kind.OPEN: OpenOrder,
}
_TIMEVAL = struct.Struct("@ll")
_GATHERED_PARTS = 256
"""Replies are sent at the latest when this many pieces wait."""
_JOINED_BYTES = 1024 * 1024
"""Up to this size one copy and one ``send`` are cheaper than a ``send`` per piece."""


class ClosedError(Exception):
    """The node is gone."""


class ByeError(Exception):
    """The node wants this process to end."""


class Channel:
    """Everything a GPU process hears and says. The node is trusted, so nothing is checked here.

    ``cancelled`` holds the requests whose client left, as far as the frames received so far tell.
    """

    def __init__(self, sock: socket.socket, arena_fd: int) -> None:
        self.cancelled: set[int] = set()
        self._socket = sock
        self._unannounced: deque[int] = deque()
        # A plain append: the last view of a slot may go in any thread of the function's.
        self._slots = Slots(arena_fd, second_half=True, on_read=self._unannounced.append)
        self._buffer = bytearray(4 * SMALL_FRAME_BYTES)
        self._view = memoryview(self._buffer)
        self._filled = 0
        self._orders: deque[LoadOrder | InspectOrder | OpenOrder] = deque()
        self._work: deque[list[Call] | Kind] = deque()
        self._calls: list[Call] = []
        self._bye = False
        self._patience_s: float | None = None
        self._out: list[bytes | memoryview] = []

    # In

    def next_order(self) -> LoadOrder | InspectOrder | OpenOrder:
        """Wait for the order to become some model's process, to say what a function is, or to open a device.

        Raises ``ClosedError`` or ``ByeError``.
        """
        while not self._orders:
            self._receive()
        return self._orders.popleft()

    def next_work(self, patience_s: float | None = None) -> list[Call] | Kind | None:
        """The calls of the next run, or ``OFFLOAD`` or ``RESTORE``; replies leave before it waits. None: nothing has
        come for ``patience_s``.

        Raises ``ClosedError`` or ``ByeError``.
        """
        while not self._work:
            self.flush()
            self._be_patient(patience_s)
            try:
                self._receive()
            except BlockingIOError:
                return None
        return self._work.popleft()

    def _be_patient(self, patience_s: float | None) -> None:
        """How long a read may wait. The kernel sees to it: a call that comes in time costs nothing more."""
        if patience_s != self._patience_s:
            self._patience_s = patience_s
            seconds, rest_s = divmod(patience_s or 0.0, 1.0)
            self._socket.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(int(seconds), int(rest_s * 1e6))
            )

    def poll(self) -> None:
        """Take in what has arrived, without waiting. Raises ``ClosedError`` when the node is gone."""
        try:
            self._receive(socket.MSG_DONTWAIT)
        except BlockingIOError:
            return

    def _receive(self, flags: int = 0) -> None:
        if self._bye:
            raise ByeError
        received = self._socket.recv_into(self._view[self._filled :], 0, flags)
        if not received:
            raise ClosedError
        self._filled += received
        start = 0
        while self._filled - start >= HEADER_BYTES:
            length, kind, frame_flags, _, id = HEADER.unpack_from(self._buffer, start)
            body = start + HEADER_BYTES
            end = body + length
            if end <= self._filled:
                self._frame(kind, frame_flags, id, bytes(self._view[body:end]))
                start = end
                continue
            if length > SMALL_FRAME_BYTES:
                start = self._filled
                self._frame(kind, frame_flags, id, self._receive_large(length, self._view[body : self._filled]))
            break
        left = self._filled - start
        if start and left:
            self._buffer[:left] = self._buffer[start : self._filled]
        self._filled = left

    def _receive_large(self, length: int, beginning: memoryview) -> memoryview:
        payload = memoryview(bytearray(length))
        payload[: len(beginning)] = beginning
        filled = len(beginning)
        while filled < length:
            try:
                received = self._socket.recv_into(payload[filled:])
            except BlockingIOError:  # the rest of a frame is waited for as long as it takes
                continue
            if not received:
                raise ClosedError
            filled += received
        return payload

    def _frame(self, kind: int, flags: int, id: int, payload: bytes | memoryview) -> None:
        if kind == _CALL:
            content_type, accept, start = split_call(payload)
            body = payload[start:]
            if flags & _SLOT:
                body = self._slots.read(*SLOT_REFERENCE.unpack(body))
            self._calls.append(Call(request_id=id, body=body, content_type=content_type, accept=accept))
            if flags & _LAST:
                self._work.append(self._calls)
                self._calls = []
        elif kind == Kind.FREE:
            self._slots.freed(id)
        elif kind == Kind.CANCEL:
            self.cancelled.add(id)
        elif (order := _ORDERS.get(kind)) is not None:
            self._orders.append(msgspec.msgpack.decode(payload, type=order))
        elif kind in (Kind.OFFLOAD, Kind.RESTORE):
            self._work.append(Kind(kind))
        elif kind == Kind.BYE:
            self._bye = True

    @property
    def idle(self) -> bool:
        """Nothing has been received that was not handed out, a BYE neither."""
        return not (self._work or self._calls or self._bye)

    # Out

    def answer(
        self,
        request_id: int,
        status: int,
        content_type: str,
        body: bytes | bytearray | memoryview,
        inference_s: float,
        *,
        rest: Sequence[bytes | memoryview] = (),
        final: bool,
        ends: bool = False,
    ) -> None:
        """Gather one answer, or one chunk of it (not ``final``). ``rest`` (bytes, one dimension) follows ``body``; all
        of it is copied once, into a slot where one is free. ``ends``: it was the only call of its run."""
        flags = (_LAST if final else 0) | (_ENDS if ends else 0)
        kind = answer_kind(content_type)
        if type(body) is not bytes:
            body = memoryview(body).cast("B")
        size = len(body)
        if rest:
            size += sum(map(len, rest))
        if size > INLINE_BYTES and (offset := self._slots.put(body, *rest)) is not None:
            flags |= _SLOT
            body = SLOT_REFERENCE.pack(offset, size)
            size = SLOT_REFERENCE.size
        elif rest or type(body) is not bytes:
            # It may be a function's own memory, and that may run again before this leaves.
            body = b"".join((body, *rest))
        length = ANSWER_PREFIX.size + len(kind) + size
        self._out.append(ANSWER_HEAD.pack(length, _ANSWER, flags, status, request_id, inference_s, len(kind)))
        self._out.append(kind)
        self._out.append(body)
        if len(self._out) >= _GATHERED_PARTS:
            self.flush()

    def ran(self, inference_s: float) -> None:
        """Gather the end of a run."""
        self._out.append(RAN_FRAME.pack(SECONDS.size, _RAN, 0, 0, 0, inference_s))

    def loaded(self, loaded: Loaded) -> None:
        self._out.append(control(Kind.LOADED, loaded))
        self.flush()

    def moved(self, moved: Moved) -> None:
        self._out.append(control(Kind.MOVED, moved))
        self.flush()

    def measured(self, measured: Measured) -> None:
        self._out.append(control(Kind.MEASURED, measured))
        self.flush()

    def inspected(self, inspected: Inspected) -> None:
        self._out.append(control(Kind.INSPECTED, inspected))
        self.flush()

    def opened(self) -> None:
        self._out.append(control(Kind.OPENED))
        self.flush()

    def failed(self, failed: Failed) -> None:
        self._out.append(control(Kind.FAILED, failed))
        self.flush()

    def flush(self) -> None:
        """Send what was gathered. Raises ``ClosedError`` when the node is gone."""
        while self._unannounced:
            self._out.append(control(Kind.FREE, id=self._unannounced.popleft()))
        if not self._out:
            return
        out, self._out = self._out, []
        try:
            if sum(map(len, out)) <= _JOINED_BYTES:
                self._socket.sendall(b"".join(out))
            else:
                for part in out:
                    self._socket.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            raise ClosedError from None
