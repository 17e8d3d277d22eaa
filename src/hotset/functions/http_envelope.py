"""A whole HTTP request or response as one body, for functions that speak HTTP themselves (process.py).

Between the gateway and a GPU process a call is a body, a content type and what the caller accepts. Method, path, query
and headers travel in front of the body: four bytes of length, big-endian, then that many of JSON.
"""

from __future__ import annotations

import struct

import msgspec

from hotset.functions.media import Body

REQUEST = "application/vnd.hotset.http-request"
RESPONSE = "application/vnd.hotset.http-response"
PROCESS_ENTRY = "process:"
"""In place of ``module:Name``: the function is a command (``env fprocess``), and its calls come in envelopes."""
SECRETS_VARIABLE = "secret_mount_path"
"""Environment variable that says where a function finds its secrets as files."""

_LENGTH = struct.Struct(">I")


class RequestHead(msgspec.Struct, frozen=True):
    """What stands before the body; ``path`` begins with a slash, ``query`` is as it was sent, names in lower case."""

    method: str
    path: str
    query: str
    headers: list[tuple[str, str]]


class ResponseHead(msgspec.Struct, frozen=True):
    headers: list[tuple[str, str]]


def pack(head: RequestHead | ResponseHead, body: bytes | memoryview = b"") -> bytes:
    encoded = msgspec.json.encode(head)
    return b"".join((_LENGTH.pack(len(encoded)), encoded, body))


def unpack_request(envelope: Body) -> tuple[RequestHead, memoryview]:
    """Raises ``ValueError`` (``msgspec.DecodeError`` too) when it is none."""
    head, body = _split(envelope)
    return msgspec.json.decode(head, type=RequestHead), body


def unpack_response(envelope: Body) -> tuple[ResponseHead, memoryview]:
    """Raises ``ValueError`` (``msgspec.DecodeError`` too) when it is none."""
    head, body = _split(envelope)
    return msgspec.json.decode(head, type=ResponseHead), body


def _split(envelope: Body) -> tuple[memoryview, memoryview]:
    view = memoryview(envelope)
    if len(view) < _LENGTH.size:
        raise ValueError("an HTTP envelope is cut off")
    end = _LENGTH.size + _LENGTH.unpack_from(view)[0]
    if end > len(view):
        raise ValueError("an HTTP envelope is cut off")
    return view[_LENGTH.size : end], view[end:]
