"""A call of a function, whoever makes it: what goes to its process, and the answer's status, headers and body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from hotset.functions.http_envelope import PROCESS_ENTRY, RequestHead, pack, unpack_response
from hotset.gateway.functions import Version

Headers = list[tuple[str, str]]

_HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "content-length")
)


class Invocation(msgspec.Struct, frozen=True, kw_only=True):
    """An HTTP call of a function; header names in lower case, ``path`` what follows the function's name."""

    method: str
    path: str
    query: str
    headers: Sequence[tuple[str, str]]
    body: bytes

    def header(self, name: str, default: str = "") -> str:
        return next((value for key, value in self.headers if key == name), default)


def is_process(version: Version) -> bool:
    """Whether it speaks HTTP itself, and so gets and gives whole requests and responses."""
    return version.spec.launch.entry == PROCESS_ENTRY


def envelope(invocation: Invocation, added: Mapping[str, str]) -> bytes:
    """The call as a process function gets it; ``added``: headers that say where it came from, if it does not itself."""
    headers = [(name, value) for name, value in invocation.headers if name not in _HOP_BY_HOP]
    given = {name for name, _ in headers}
    headers += [(name, value) for name, value in added.items() if name not in given]
    head = RequestHead(invocation.method, invocation.path or "/", invocation.query, headers)
    return pack(head, invocation.body)


def opened(body: bytes | memoryview) -> tuple[Headers, memoryview]:
    """Headers and body of a process function's answer."""
    head, rest = unpack_response(body)
    return [(name.lower(), value) for name, value in head.headers if name.lower() not in _HOP_BY_HOP], rest
