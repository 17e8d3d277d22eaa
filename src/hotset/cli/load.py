"""The load generator of ``hotset bench``: HTTP/1.1 calls over kept connections at a few tens of microseconds each.

A general HTTP client costs about a millisecond of CPU a call: beside a server on the same machine that would be most of
what is measured. Requests are made by hand, answers parsed by httptools, as the server does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from urllib.parse import quote, urlsplit

import httptools
import msgspec

from hotset.errors import ConfigurationError


class Answered(msgspec.Struct, gc=False):
    """One answer. ``status`` 0: the connection broke off."""

    status: int
    headers: Mapping[bytes, bytes]
    """Names in lower case."""
    body: bytes = b""


class _Connection(asyncio.Protocol):
    """One kept connection; one call at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answered] | None = None
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._parser = httptools.HttpResponseParser(self)
        self.open = False

    def call(self, request: bytes) -> asyncio.Future[Answered]:
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self.open = True

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Answered(0, {}))

    # httptools

    def on_message_begin(self) -> None:
        self._headers, self._body = {}, []

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.open = False
            self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Answered(self._parser.get_status_code(), self._headers, b"".join(self._body)))


class LoadClient:
    """Calls of functions over a pool of connections, which grows to as many as are under way at once."""

    def __init__(self, gateway: str) -> None:
        url = urlsplit(gateway)
        if url.scheme != "http" or not url.hostname:
            raise ConfigurationError(f"the load generator speaks plain HTTP only, not {gateway!r}")
        self._host, self._port = url.hostname, url.port or 80
        self._path = url.path.rstrip("/")
        self._idle: list[_Connection] = []

    async def call(self, function: str, body: bytes, content_type: str) -> Answered:
        """POST to a function; a connection that the server closed while it was idle is replaced."""
        request = (
            f"POST {self._path}/function/{quote(function, safe='.')} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\n"
            f"content-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode() + body
        connection = await self._connection()
        if connection is None:
            return Answered(0, {})
        answer = await connection.call(request)
        if connection.open:
            self._idle.append(connection)
        return answer

    async def _connection(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        try:
            _, connection = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        except OSError:
            return None
        return connection

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
