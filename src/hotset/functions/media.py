"""Media types of bodies: their names, and how a Content-Type is read."""

from __future__ import annotations

import functools

import msgspec

JSON = "application/json"
OCTET_STREAM = "application/octet-stream"
NPY = "application/x-npy"
TEXT = "text/plain"
V2 = "application/vnd.hotset.v2"
"""First part of the content type of Open Inference Protocol requests (v2.py); only the gateway makes them."""

# What clients send who set no content type (curl -d).
_UNDECLARED = frozenset({"", "application/x-www-form-urlencoded"})

Body = bytes | bytearray | memoryview


class MediaType(msgspec.Struct, frozen=True):
    """A parsed Content-Type: ``name`` and parameter names in lower case."""

    name: str
    parameters: dict[str, str]

    @property
    def declared(self) -> bool:
        return self.name not in _UNDECLARED

    @property
    def is_json(self) -> bool:
        return self.name in (JSON, "text/json") or self.name.endswith("+json")


@functools.lru_cache(maxsize=256)
def parse_media_type(content_type: str) -> MediaType:
    """``'application/octet-stream; dtype=float32; shape="2,3"'`` -> its name and parameters; never raises."""
    name, *rest = content_type.split(";")
    pairs = (part.partition("=") for part in rest)
    parameters = {key.strip().lower(): value.strip().strip('"') for key, _, value in pairs}
    return MediaType(name=name.strip().lower(), parameters=parameters)
