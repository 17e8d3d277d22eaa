"""Between a socket and its HTTP connection: small reads go through one buffer, a large body goes where it shall lie.

asyncio hands a ``Protocol`` every read as new bytes; the HTTP parser copies what is a body, uvicorn gathers that and
copies it once more for the application. A ``BufferedProtocol`` says where the next read shall go: the head of a request
and short bodies go into a buffer that all connections share, parsed at once, and the rest of a large body straight into
the memory in which it waits to be copied to its GPU process.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from hotset.gateway.bodies import Incoming

READ_BYTES = 64 * 1024
"""Of one read, unless it is a large body's."""


class HttpConnection(Protocol):
    """What this stands before: uvicorn's protocol, and more."""

    intake: Intake | None

    def connection_made(self, transport: asyncio.Transport) -> None: ...

    def connection_lost(self, exc: Exception | None) -> None: ...

    def data_received(self, data: bytes) -> None: ...

    def body_received(self) -> None: ...

    def eof_received(self) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...


class Intake(asyncio.BufferedProtocol):
    """A connection as the event loop sees it. ``buffer``: for the reads of all connections, one after the other."""

    def __init__(self, connection: HttpConnection, buffer: memoryview) -> None:
        self._connection = connection
        self._buffer = buffer
        self._incoming: Incoming | None = None
        connection.intake = self
        self.pause_writing = connection.pause_writing  # type: ignore[method-assign]
        self.resume_writing = connection.resume_writing  # type: ignore[method-assign]
        self.eof_received = connection.eof_received  # type: ignore[method-assign]

    def receive(self, incoming: Incoming) -> None:
        """What comes next is the rest of this body; ``body_received`` tells when all of it is there."""
        self._incoming = incoming

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._connection.connection_made(transport)  # type: ignore[arg-type]

    def connection_lost(self, exc: Exception | None) -> None:
        self._incoming = None
        self._connection.connection_lost(exc)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer if self._incoming is None else self._incoming.left

    def buffer_updated(self, nbytes: int) -> None:
        incoming = self._incoming
        if incoming is None:
            self._connection.data_received(self._buffer[:nbytes])  # type: ignore[arg-type] # the parser takes any buffer
            return
        incoming.filled += nbytes
        if incoming.filled == incoming.size:
            self._incoming = None
            self._connection.body_received()
