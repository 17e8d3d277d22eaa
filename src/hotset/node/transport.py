"""The node's end of one GPU process: frames in, frames out, on the node's event loop.

The hot path makes no Task and no Future: a read is decoded frame by frame and each answer is handed to the handler at
once; the calls of one run leave in one write.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Protocol, cast

import msgspec

from hotset.node.frames import (
    HEADER,
    HEADER_BYTES,
    INLINE_BYTES,
    MAX_FRAME_BYTES,
    SECONDS,
    SLOT_REFERENCE,
    SMALL_FRAME_BYTES,
    Failed,
    Flag,
    FrameError,
    Kind,
    Loaded,
    Measured,
    Moved,
    call_prefix,
    control,
    split_answer,
)
from hotset.node.interface import Answer, Call
from hotset.node.slots import Slots

_BUFFER_BYTES = 2 * SMALL_FRAME_BYTES

_CALL = int(Kind.CALL)
_ANSWER = int(Kind.ANSWER)
_RAN = int(Kind.RAN)
_LAST = int(Flag.LAST)
_SLOT = int(Flag.SLOT)
_ENDS = int(Flag.ENDS)


class FrameHandler(Protocol):
    """What a process says, decoded. The methods may raise ``FrameError`` for what they did not ask for."""

    def on_answer(self, answer: Answer) -> None: ...

    def on_ran(self, inference_s: float) -> None: ...

    def on_loaded(self, loaded: Loaded) -> None: ...

    def on_failed(self, failed: Failed) -> None: ...

    def on_moved(self, moved: Moved) -> None: ...

    def on_measured(self, measured: Measured) -> None: ...

    def on_closed(self, broken: str | None) -> None:
        """Nothing more will come. ``broken`` says which rule the process broke, None: it closed the socket."""
        ...


class ProcessTransport(asyncio.BufferedProtocol):
    """Connect with ``loop.create_unix_connection(lambda: transport, sock=...)``; what is sent before that waits.

    It owns ``arena_fd``.
    """

    def __init__(self, handler: FrameHandler, arena_fd: int) -> None:
        self._handler = handler
        self._slots = Slots(arena_fd, second_half=False, on_read=self._answer_read)
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._held: list[bytes | memoryview] = []
        self._holding = True
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._filled = 0
        self._large: bytearray | None = None
        self._large_filled = 0
        self._broken: str | None = None
        self._closed = False

    # Out

    def send(self, frame: bytes) -> None:
        """One control frame."""
        self._write([frame])

    def send_run(self, calls: Sequence[Call]) -> None:
        """The calls of one run, in order, in one write."""
        parts: list[bytes | memoryview] = []
        left = len(calls)
        for call in calls:
            left -= 1
            flags = 0 if left else _LAST
            prefix = call_prefix(call.content_type, call.accept)
            body = call.body
            if type(body) is not bytes:
                body = memoryview(body).cast("B")
            size = len(body)
            if size > INLINE_BYTES and (offset := self._slots.put(body)) is not None:
                flags |= _SLOT
                body = SLOT_REFERENCE.pack(offset, size)
                size = SLOT_REFERENCE.size
            parts.append(HEADER.pack(len(prefix) + size, _CALL, flags, 0, call.request_id))
            parts.append(prefix)
            parts.append(body)
        self._write(parts)

    def close(self) -> None:
        """Drop the connection now; ``on_closed`` follows from the loop."""
        if self._transport is not None:
            self._transport.abort()

    def _write(self, parts: list[bytes | memoryview]) -> None:
        if self._closed:
            return
        if self._holding or self._transport is None:
            self._held += parts
        elif sum(map(len, parts)) <= INLINE_BYTES:
            self._transport.write(b"".join(parts))
        else:
            self._transport.writelines(parts)

    def _release(self) -> None:
        """Send what was held back, in one go."""
        self._holding = False
        if self._held:
            parts, self._held = self._held, []
            self._write(parts)

    def _answer_read(self, offset: int) -> None:
        """The last view of an answer's slot is gone; any thread may have dropped it."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.send, control(Kind.FREE, id=offset))

    # In

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._release()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        self._transport = None
        self._slots.close()
        self._handler.on_closed(self._broken)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._large is not None:
            return memoryview(self._large)[self._large_filled :]
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._broken is not None:
            return
        # What the answers in this read cause to be sent leaves together.
        self._holding = True
        try:
            if self._large is not None:
                self._receive_large(nbytes)
            else:
                self._filled += nbytes
                self._decode()
        except FrameError as error:
            self._break(str(error))
        except msgspec.MsgspecError as error:
            self._break(f"a control frame that cannot be read ({error})")
        finally:
            self._release()

    def _break(self, rule: str) -> None:
        """Hear no more of a process that breaks the protocol."""
        self._broken = rule
        self._filled = 0
        self._large = None
        self.close()

    def _receive_large(self, nbytes: int) -> None:
        assert self._large is not None
        self._large_filled += nbytes
        if self._large_filled < len(self._large):
            return
        frame, self._large = self._large, None
        length, kind, flags, status, id = HEADER.unpack_from(frame)
        self._frame(kind, flags, status, id, frame, HEADER_BYTES, HEADER_BYTES + length)

    def _decode(self) -> None:
        buffer = self._buffer
        filled = self._filled
        start = 0
        while filled - start >= HEADER_BYTES:
            length, kind, flags, status, id = HEADER.unpack_from(buffer, start)
            end = start + HEADER_BYTES + length
            if end <= filled:
                self._frame(kind, flags, status, id, buffer, start + HEADER_BYTES, end)
                start = end
                continue
            if length > MAX_FRAME_BYTES:
                raise FrameError(f"a frame of {length} bytes, more than any may have")
            if length > SMALL_FRAME_BYTES:
                self._large = bytearray(HEADER_BYTES + length)
                self._large_filled = filled - start
                self._large[: self._large_filled] = self._view[start:filled]
                start = filled
            break
        if start:
            left = filled - start
            if left:
                buffer[:left] = buffer[start:filled]
            self._filled = left

    def _frame(self, kind: int, flags: int, status: int, id: int, buffer: bytearray, start: int, end: int) -> None:
        if kind == _ANSWER:
            inference_s, content_type, start = split_answer(buffer, start, end)
            body: bytes | memoryview
            if flags & _SLOT:
                if end - start != SLOT_REFERENCE.size:
                    raise FrameError("a slot reference of the wrong size")
                body = self._slots.read(*SLOT_REFERENCE.unpack_from(buffer, start))
            else:
                # The buffer is used again; a large frame has memory of its own.
                body = bytes(self._view[start:end]) if buffer is self._buffer else memoryview(buffer)[start:end]
            if not 200 <= status <= 599:
                raise FrameError(f"an answer with status {status}, which no HTTP answer may have")
            self._handler.on_answer(
                Answer(
                    request_id=id,
                    status=status,
                    content_type=content_type,
                    body=body,
                    inference_s=inference_s,
                    final=bool(flags & _LAST),
                )
            )
            if flags & _ENDS:
                self._handler.on_ran(inference_s)
        elif kind == _RAN:
            if end - start != SECONDS.size:
                raise FrameError("a duration of the wrong size")
            (inference_s,) = SECONDS.unpack_from(buffer, start)
            if not 0 <= inference_s < math.inf:
                raise FrameError("a run that took an impossible time")
            self._handler.on_ran(inference_s)
        elif kind == Kind.FREE:
            self._slots.freed(id)
        elif kind == Kind.LOADED:
            self._handler.on_loaded(msgspec.msgpack.decode(buffer[start:end], type=Loaded))
        elif kind == Kind.FAILED:
            self._handler.on_failed(msgspec.msgpack.decode(buffer[start:end], type=Failed))
        elif kind == Kind.MOVED:
            self._handler.on_moved(msgspec.msgpack.decode(buffer[start:end], type=Moved))
        elif kind == Kind.MEASURED:
            self._handler.on_measured(msgspec.msgpack.decode(buffer[start:end], type=Measured))
        else:
            raise FrameError(f"a frame of kind {kind}, which no process may send")
