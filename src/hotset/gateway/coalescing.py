"""uvicorn's connection, writing each answer at once.

uvicorn writes an answer's head and its body separately, and uvloop sends each when it is written: two system calls, two
packets, two wake-ups of the client. On the inference path that is the largest single cost, so what is written in one
turn of the loop is held and leaves together.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hotset.gateway.statuses import error_body


class CoalescingTransport:
    """A transport that joins the writes of one turn of the loop; all else is the transport's own."""

    __slots__ = ("_held", "_loop", "_transport", "get_extra_info", "is_closing", "pause_reading", "resume_reading")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: list[bytes] = []
        self.get_extra_info = transport.get_extra_info
        self.is_closing = transport.is_closing
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading

    def write(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)

    def write_at_once(self, data: bytes) -> None:
        """``write`` what is a whole answer: there is nothing to wait for."""
        if self._held:
            self._held.append(data)
        else:
            self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._transport.set_protocol(protocol)

    def _flush(self) -> None:
        held, self._held = self._held, []
        if held and not self._transport.is_closing():
            self._transport.writelines(held)


class CoalescingProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 over httptools, on a ``CoalescingTransport``."""

    transport: Any  # a CoalescingTransport, which uvicorn takes for asyncio's own

    def connection_made(self, transport: Any) -> None:
        super().connection_made(CoalescingTransport(transport, self.loop))  # type: ignore[arg-type]

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP gets the errors' usual shape too."""
        body = error_body(msg)
        head = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: "
        self.transport.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
