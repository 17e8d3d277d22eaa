"""Bodies of calls on their way in: how large one may be, how much the server holds of all, and the memory they lie in.

A large body is received into memory that is used again and again (``BodyMemory``): fresh memory would cost a page fault
for every 4 kB of it, which is more than receiving it costs.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections import deque
from collections.abc import Mapping

from hotset.gateway.calls import Receive
from hotset.gateway.control import Control
from hotset.node.slots import Units

DEFAULT_MAX_BODY_BYTES = 64 << 20
DEFAULT_MAX_OPEN_BYTES = 2 << 30
MEMORY_BYTES = 64 << 20
"""Of bodies that are received in place. Pages that were never used take no memory."""
CLOSE = (b"connection", b"close")

_SHORT_LENGTH = 18
"""Digits of the longest Content-Length that is looked at."""


class BodyError(Exception):
    """A request that is refused before it is a call; the message is one sentence for the caller."""

    def __init__(self, status: int, message: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class BodyMemory:
    """Memory for bodies, lent as views. It is free again when the last view of it, or of a part of it, is gone."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._map = mmap.mmap(-1, memory_bytes)
        self._units = Units(memory_bytes)
        self._lent: dict[int, weakref.ref[ctypes.Array[ctypes.c_char]]] = {}
        # Appended to by whatever thread drops the last view.
        self._returned: deque[int] = deque()

    def take(self, size: int) -> memoryview:
        """So many bytes to write to; of its own where none are free."""
        while self._returned:
            offset = self._returned.popleft()
            del self._lent[offset]
            self._units.give_back(offset)
        taken = self._units.take(size)
        if taken is None:
            return memoryview(bytearray(size))
        offset = taken
        array = (ctypes.c_char * size).from_buffer(self._map, offset)
        self._lent[offset] = weakref.ref(array, lambda _: self._returned.append(offset))
        return memoryview(array).cast("B")


class Incoming:
    """A body that is being received. Ends with ``close``, complete or not."""

    __slots__ = ("_bodies", "filled", "size", "view")

    def __init__(self, bodies: Bodies, view: memoryview) -> None:
        self._bodies = bodies
        self.view = view
        self.size = len(view)
        self.filled = 0

    @property
    def left(self) -> memoryview:
        """Where the rest goes."""
        return self.view[self.filled :]

    def feed(self, data: bytes) -> None:
        end = self.filled + len(data)
        self.view[self.filled : end] = data
        self.filled = end

    def close(self) -> None:
        """It is a call's, or nobody's, from here on."""
        self._bodies.reading_bytes -= self.size


class Bodies:
    """What both front doors ask before, and while, they read a body."""

    def __init__(
        self,
        control: Control,
        *,
        max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
        max_open_bytes: int = DEFAULT_MAX_OPEN_BYTES,
    ) -> None:
        """``max_body_bytes``: of one call. ``max_open_bytes``: of all calls that are being read, wait or run."""
        self.max_body_bytes = max_body_bytes
        self.reading_bytes = 0
        self._control = control
        self._max_open_bytes = max_open_bytes
        self._memory = BodyMemory()

    def check(self, size: int, limit_bytes: int | None = None, *, read: int = 0) -> None:
        """Refuse (``BodyError``) a body that is too large, or one too many to hold. ``read``: so much of it is here."""
        limit = self.max_body_bytes if limit_bytes is None else min(limit_bytes, self.max_body_bytes)
        if size > limit:
            raise too_large(limit)
        if self.reading_bytes - read + self._control.open_body_bytes + size > self._max_open_bytes:
            raise BodyError(
                429, "the server holds too many bytes of other calls: try again later", CLOSE, (b"retry-after", b"1")
            )

    def begin(self, size: int) -> Incoming:
        """A body of this size is about to come; raises ``BodyError``."""
        self.check(size)
        incoming = Incoming(self, self._memory.take(size))
        self.reading_bytes += size
        return incoming

    async def read(
        self, headers: Mapping[bytes, bytes], receive: Receive, limit_bytes: int | None = None
    ) -> bytes | None:
        """The whole body, as an ASGI server hands it over; None: the client left. ``limit_bytes``: less than the
        server's limit.

        Raises ``BodyError``: 413 as soon as it is larger than allowed, 429 when the server holds too much already, 400
        for an impossible length.
        """
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or len(declared) > _SHORT_LENGTH:
            raise BodyError(400, "Content-Length must be the number of bytes of the body", CLOSE)
        self.check(int(declared), limit_bytes)
        parts: list[bytes] = []
        size = 0
        try:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                self.reading_bytes += len(parts[-1])
                self.check(size, limit_bytes, read=size)
                more = message.get("more_body", False)
        finally:
            self.reading_bytes -= size
        return parts[0] if len(parts) == 1 else b"".join(parts)


def too_large(limit_bytes: int) -> BodyError:
    return BodyError(413, f"the body is larger than {limit_bytes} bytes: send less, or raise max_body_bytes", CLOSE)
