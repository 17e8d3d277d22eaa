"""The frames between a node and its GPU processes: what travels on the Unix stream socket, byte by byte.

A frame is a 16-byte little-endian header and its payload::

    u32 length | u8 kind | u8 flags | u16 status | u64 id        then ``length`` bytes

    node -> process                                    id              payload
      IMPORT   import this function; its LOAD follows  -               ImportOrder (MessagePack)
      LOAD     import, load and measure this model     -               LoadOrder (MessagePack)
      CALL     one request                             request id      u16 u16 sizes, content type, accept, body
      CANCEL   its client left                         request id      -
      FREE     an answer's slot was read               offset          -
      OFFLOAD  park the model in host memory           -               -
      RESTORE  bring the parked model back             -               -
      BYE      unload and exit                         -               -
      INSPECT  import this function, describe it, exit -               InspectOrder (MessagePack)
      OPEN     open this device; its LOAD follows      -               OpenOrder (MessagePack)
    process -> node
      LOADED   the model is ready                      -               Loaded (MessagePack)
      FAILED   load, offload, restore or device failed -               Failed (MessagePack)
      MOVED    the answer to OFFLOAD and RESTORE       -               Moved (MessagePack)
      MEASURED the model takes other memory by now     -               Measured (MessagePack)
      ANSWER   one result or one chunk of it           request id      f64 seconds, u16 size, content type, body
      RAN      every call of the run has its answer    -               f64 seconds
      FREE     a call's slot was read                  offset          -
      INSPECTED  the answer to INSPECT                 -               Inspected (MessagePack)
      OPENED   the answer to OPEN, as FAILED is        -               -

A CALL flagged LAST ends its run: the calls since the previous LAST are run together or one after the other. An ANSWER
flagged LAST is the request's final one; flagged ENDS it was all of its run, and no RAN follows. With the flag SLOT the
body is a reference into shared memory (slots.py): u32 offset, u32 length.

Nothing from a process is trusted: sizes are checked against ``MAX_BODY_BYTES``, references against the arena, and every
mistake is a ``FrameError``, which costs that process its life and nobody else anything.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from enum import IntEnum, IntFlag
from typing import TypeVar

import msgspec

from hotset.vocabulary import FailureKind

HEADER = struct.Struct("<IBBHQ")
HEADER_BYTES = HEADER.size
SLOT_REFERENCE = struct.Struct("<II")
CALL_PREFIX = struct.Struct("<HH")
ANSWER_PREFIX = struct.Struct("<dH")
SECONDS = struct.Struct("<d")
ANSWER_HEAD = struct.Struct("<IBBHQdH")
"""A header and an answer's prefix in one go."""
RAN_FRAME = struct.Struct("<IBBHQd")

INLINE_BYTES = 64 * 1024
"""A larger body travels in a shared-memory slot, when one is free."""
SMALL_FRAME_BYTES = INLINE_BYTES + 4096
"""Frames up to this size are decoded in the receive buffer; a larger one is received into memory of its own."""
MAX_BODY_BYTES = 512 * 1024 * 1024
"""Largest body either side sends; more is an error of that call."""
MAX_FRAME_BYTES = MAX_BODY_BYTES + 2 * 65536
"""The body and the two texts before it."""


class Kind(IntEnum):
    LOAD = 1
    CALL = 2
    CANCEL = 3
    FREE = 4
    BYE = 5
    LOADED = 6
    FAILED = 7
    ANSWER = 8
    RAN = 9
    OFFLOAD = 10
    RESTORE = 11
    MOVED = 12
    IMPORT = 13
    INSPECT = 14
    INSPECTED = 15
    OPEN = 16
    OPENED = 17
    MEASURED = 18


class Flag(IntFlag):
    LAST = 1
    SLOT = 2
    ENDS = 4


class FrameError(Exception):
    """The other side broke the protocol."""


class LoadOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What a fresh process needs to become the process of one model."""

    model: str
    entry: str
    code_path: str
    device: str
    """What the function's ``load(device)`` gets: ``cpu`` or ``cuda:0``."""
    limit_bytes: int | None = None
    """Device memory that is free for the model; None: not counted (CPU functions)."""
    env: Mapping[str, str] = {}
    """The function's environment variables."""
    fast: bool = True
    """Make the load fast (``worker/fast_load.py``)."""
    copy_bandwidth: float | None = None
    """Bytes a second at which weights get to the device where that is modelled; None: as fast as they do."""


class ImportOrder(LoadOrder, frozen=True, kw_only=True):
    """The same, for a process whose GPU has no room yet: a ``LoadOrder`` follows when it has."""


class InspectOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What a fresh process needs to tell what a function is, in place of serving it."""

    code_path: str
    entry: str
    env: Mapping[str, str] = {}


class OpenOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What a fresh process needs to open its device before it knows its model."""

    opener: str
    """``module:function``, called without arguments."""
    env: Mapping[str, str] = {}
    """The device's environment variables."""


class Inspected(msgspec.Struct, frozen=True, kw_only=True):
    description: bytes
    """JSON (``functions/description.py``)."""


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    memory_bytes: int
    frameworks: tuple[str, ...] = ()
    """What slow imports the function needed: the next process may have them done beforehand."""
    import_s: float = 0.0
    """Importing the function."""
    load_s: float = 0.0
    """Its ``load``."""


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    kind: FailureKind
    reason: str
    memory_bytes: int | None = None
    """What a load that did not fit would have taken."""


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """Where the model's memory is after an offload or a restore, as the process itself can tell."""

    device_bytes: int
    host_bytes: int


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What the loaded model takes of its device now, after runs: once for each of them at most."""

    memory_bytes: int | None
    """None: only the driver can say."""


NEWS_BYTES = 1 << 20
_NEWS_SHARE = 0.01


def is_news(before_bytes: int, now_bytes: int) -> bool:
    """Whether a size differs by so much that others should know."""
    return abs(now_bytes - before_bytes) >= max(NEWS_BYTES, _NEWS_SHARE * before_bytes)


def control(kind: Kind, payload: msgspec.Struct | None = None, id: int = 0) -> bytes:
    """One control frame."""
    body = b"" if payload is None else msgspec.msgpack.encode(payload)
    return HEADER.pack(len(body), kind, 0, 0, id) + body


_TEXT_LIMIT = 65535
# The same few headers come again and again.
_call_prefixes: dict[tuple[str, str], bytes] = {}
_call_texts: dict[bytes, tuple[str, str]] = {}
_answer_types: dict[bytes, str] = {}
_answer_kinds: dict[str, bytes] = {}
_CACHE_ENTRIES = 256
_CACHED_BYTES = 1024

K = TypeVar("K")
V = TypeVar("V")


def _remember(cache: dict[K, V], key: K, value: V, size: int) -> V:
    if size <= _CACHED_BYTES:
        if len(cache) >= _CACHE_ENTRIES:
            cache.clear()
        cache[key] = value
    return value


def _text(text: str) -> bytes:
    return text.encode("latin-1", "replace")[:_TEXT_LIMIT]


def call_prefix(content_type: str, accept: str) -> bytes:
    """What precedes a call's body."""
    key = (content_type, accept)
    prefix = _call_prefixes.get(key)
    if prefix is None:
        content, wanted = _text(content_type), _text(accept)
        prefix = CALL_PREFIX.pack(len(content), len(wanted)) + content + wanted
        _remember(_call_prefixes, key, prefix, len(prefix))
    return prefix


def split_call(payload: bytes | memoryview) -> tuple[str, str, int]:
    """Content type, accept, and where the body starts."""
    content_size, accept_size = CALL_PREFIX.unpack_from(payload)
    middle = CALL_PREFIX.size + content_size
    end = middle + accept_size
    raw = bytes(payload[:end])
    texts = _call_texts.get(raw)
    if texts is None:
        texts = (str(raw[CALL_PREFIX.size : middle], "latin-1"), str(raw[middle:], "latin-1"))
        _remember(_call_texts, raw, texts, end)
    return *texts, end


def split_answer(payload: bytes | bytearray | memoryview, start: int, end: int) -> tuple[float, str, int]:
    """Seconds, content type, and where the body starts, of an answer at ``payload[start:end]``.

    Raises ``FrameError`` when it does not add up.
    """
    body = start + ANSWER_PREFIX.size
    if body > end:
        raise FrameError("an answer that is shorter than its own prefix")
    inference_s, size = ANSWER_PREFIX.unpack_from(payload, start)
    if body + size > end:
        raise FrameError("an answer whose content type runs past its end")
    if not 0 <= inference_s < math.inf:
        raise FrameError("an answer that took an impossible time")
    raw = bytes(payload[body : body + size])
    content_type = _answer_types.get(raw)
    if content_type is None:
        content_type = raw.decode("latin-1")
        if not content_type.isprintable():
            raise FrameError("an answer whose content type is not printable")
        _remember(_answer_types, raw, content_type, size)
    return inference_s, content_type, body + size


def answer_kind(content_type: str) -> bytes:
    """An answer's content type, as it travels."""
    kind = _answer_kinds.get(content_type)
    if kind is None:
        kind = _remember(_answer_kinds, content_type, _text(content_type), len(content_type))
    return kind
