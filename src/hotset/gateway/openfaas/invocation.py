"""Calls of process functions: whole HTTP requests in, whole responses out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote

from hotset.functions.http_envelope import PROCESS_ENTRY, RESPONSE, RequestHead, pack, unpack_response
from hotset.gateway.calls import Result
from hotset.gateway.functions import Version

Headers = list[tuple[str, str]]

HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "content-length")
)
OURS = frozenset(("date", "x-call-id", "x-start-time", "x-duration-seconds"))
"""Response headers that the gateway writes itself."""
_PATH_SAFE = "/%:@!$&'()*+,;=-._~"
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")


def is_process(version: Version) -> bool:
    """Whether it speaks HTTP itself, and so gets and gives whole requests and responses."""
    return version.spec.launch.entry == PROCESS_ENTRY


def is_response(version: Version, result: Result) -> bool:
    """Whether a result is such a response: a process that failed has none."""
    return result.content_type == RESPONSE and is_process(version)


def request_envelope(
    method: str,
    path: str,
    query: str,
    headers: Iterable[tuple[str, str]],
    body: bytes,
    added: Iterable[tuple[str, str]],
) -> bytes:
    """A request as a process function gets it. ``path`` and ``query`` as they were sent; header names in lower case.

    ``added``: headers that say where it came from, unless it says so itself.
    """
    kept = [(name, value) for name, value in headers if name not in HOP_BY_HOP and _HEADER_NAME.fullmatch(name)]
    given = {name for name, _ in kept}
    kept += [(name, value) for name, value in added if name not in given]
    head = RequestHead(method, quote(path, safe=_PATH_SAFE) or "/", quote(query, safe=f"{_PATH_SAFE}?"), kept)
    return pack(head, body)


def opened(envelope: bytes | memoryview) -> tuple[Headers, memoryview]:
    """Headers and body of a process function's answer."""
    head, body = unpack_response(envelope)
    headers = [(name.lower(), value) for name, value in head.headers]
    return [(name, value) for name, value in headers if name not in HOP_BY_HOP and name not in OURS], body


def forwarded(client: Sequence[str | int] | None, host: str, call_id: str, start_ns: int) -> Headers:
    """The headers by which a function knows whom it serves."""
    where = f"{client[0]}:{client[1]}" if client else "unknown"
    return [
        ("x-forwarded-for", where),
        ("x-forwarded-host", host),
        ("x-call-id", call_id),
        ("x-start-time", str(start_ns)),
    ]
