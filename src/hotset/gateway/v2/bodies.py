"""Request bodies, read and decompressed within a limit, and answers compressed for those who ask for it."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Mapping

from hotset.gateway.calls import Receive
from hotset.gateway.control import Control
from hotset.gateway.v2.refusal import Refusal

IN_A_THREAD_BYTES = 1 << 18
"""Larger bodies are (de)compressed in a thread: the loop that serves everybody must not wait for them."""

# wbits: gzip's own header; zlib's header, or, for the clients that mean it by "deflate", none.
_WBITS = {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}


class BodyReader:
    """Reads bodies as long as there is room: for the body itself, and for all that the server holds together."""

    def __init__(self, control: Control, *, max_body_bytes: int, max_open_bytes: int) -> None:
        self._control = control
        self._max_body_bytes = max_body_bytes
        self._max_open_bytes = max_open_bytes
        self._reading_bytes = 0

    async def read(
        self, headers: Mapping[bytes, bytes], receive: Receive, limit_bytes: int | None = None
    ) -> bytes | None:
        """The whole body, decompressed; None: the client left. ``limit_bytes``: less than the server's limit.

        Raises ``Refusal``: 413 as soon as it is larger than allowed, compressed or not, 429 when the server holds too
        much already, 400 for what is not compressed as it says, 415 for an encoding that is not known.
        """
        limit = self._max_body_bytes if limit_bytes is None else min(limit_bytes, self._max_body_bytes)
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or len(declared) > 18:
            raise Refusal(400, "Content-Length must be the number of bytes of the body", close=True)
        self._check_room(int(declared), limit)
        encoding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
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
                self._reading_bytes += len(parts[-1])
                self._check_room(size, limit)
                more = message.get("more_body", False)
        finally:
            self._reading_bytes -= size
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        if not encoding or encoding == "identity":
            return bytes(body)
        if encoding not in _WBITS:
            raise Refusal(415, f"Content-Encoding {encoding[:40]!r} is not understood: use gzip, deflate or none")
        if len(body) < IN_A_THREAD_BYTES:
            return _decompress(body, encoding, limit)
        return await asyncio.to_thread(_decompress, body, encoding, limit)

    def _check_room(self, size: int, limit: int) -> None:
        if size > limit:
            raise _too_large(limit)
        if self._reading_bytes + self._control.open_body_bytes > self._max_open_bytes:
            raise Refusal(
                429, "the server holds too many bytes of other calls: try again later", retry_after_s=1.0, close=True
            )


def _too_large(limit_bytes: int) -> Refusal:
    return Refusal(413, f"the body is larger than {limit_bytes} bytes: send less, or raise max_body_bytes", close=True)


async def compress(body: bytes | memoryview, encoding: str) -> bytes:
    """``body`` as ``gzip`` or ``deflate``."""
    work = gzip.compress if encoding == "gzip" else zlib.compress
    if len(body) < IN_A_THREAD_BYTES:
        return work(body, 1)
    return await asyncio.to_thread(work, body, 1)


def asked_for(accept_encoding: str) -> str | None:
    """``gzip`` or ``deflate`` when a client names that coding and no other.

    Most HTTP libraries offer several with every request; compressing tensors for all of them would cost far more than
    it saves, so only who asks for exactly one gets it.
    """
    wanted = accept_encoding.strip().lower()
    return wanted if wanted in ("gzip", "deflate") else None


def _decompress(body: bytes, encoding: str, limit_bytes: int) -> bytes:
    for wbits in _WBITS[encoding]:
        inflating = zlib.decompressobj(wbits)
        try:
            plain = inflating.decompress(body, limit_bytes + 1)
        except zlib.error:
            continue
        if len(plain) > limit_bytes:
            raise _too_large(limit_bytes)
        if inflating.eof and not inflating.unused_data:
            return plain
        break
    raise Refusal(400, f"the body is not {encoding}, or not all of it: check its Content-Encoding")
