"""Request bodies that are compressed, and answers compressed for those who ask for it."""

from __future__ import annotations

import asyncio
import gzip
import zlib

from hotset.gateway.bodies import too_large
from hotset.gateway.v2.refusal import Refusal

IN_A_THREAD_BYTES = 1 << 18
"""Larger bodies are (de)compressed in a thread: the loop that serves everybody must not wait for them."""

# wbits: gzip's own header; zlib's header, or, for the clients that mean it by "deflate", none.
_WBITS = {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}


async def decompress(body: bytes, encoding: str, limit_bytes: int) -> bytes:
    """A body of this Content-Encoding (empty: none) as it was before.

    Raises ``Refusal``: 400 for what is not compressed as it says, 415 for an encoding that is not known; ``BodyError``
    for one that is larger than ``limit_bytes`` then.
    """
    if not encoding:
        return body
    if encoding not in _WBITS:
        raise Refusal(415, f"Content-Encoding {encoding[:40]!r} is not understood: use gzip, deflate or none")
    if len(body) < IN_A_THREAD_BYTES:
        return _decompress(body, encoding, limit_bytes)
    return await asyncio.to_thread(_decompress, body, encoding, limit_bytes)


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
            raise too_large(limit_bytes)
        if inflating.eof and not inflating.unused_data:
            return plain
        break
    raise Refusal(400, f"the body is not {encoding}, or not all of it: check its Content-Encoding")
