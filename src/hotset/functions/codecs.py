"""What a codec is: the reader of bodies, or of JSON values, of a type that msgspec does not know.

Arrays, tensors (tensors.py) and images (images.py) have codecs of their own; annotations.py finds the one of a type.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from enum import Enum
from typing import Any

from hotset.functions.media import JSON, OCTET_STREAM, TEXT, Body, MediaType


class BodyCodec(ABC):
    """Reads whole request bodies of other kinds than JSON into one argument."""

    media_types: tuple[str, ...]
    """The bodies it reads, for messages and the schema (``image/*`` is a pattern)."""
    produces: tuple[str, ...]
    """What a result of this type can be sent as, the default first (encoding.py)."""

    @abstractmethod
    def from_raw(self, body: Body, media: MediaType) -> Any:
        """A whole request body -> the argument; raises ``ValueError`` with the problem."""

    def accepts(self, media: MediaType, body: Body) -> bool:
        """Whether ``from_raw`` should read this body; otherwise it is read as JSON."""
        return media.name in self.media_types


class Codec(BodyCodec):
    """Reads, besides, the values of a type that msgspec does not know out of JSON."""

    @abstractmethod
    def from_json(self, value: Any) -> Any:
        """A decoded JSON value (dict, list, str, number, None) -> the argument; raises ``ValueError``."""

    @abstractmethod
    def json_schema(self) -> dict[str, Any]:
        """JSON schema of what ``from_json`` takes."""


class BytesCodec(BodyCodec):
    """``bytes``: any body as it is, unless it says it is JSON (base64, which msgspec reads)."""

    media_types = (OCTET_STREAM,)
    produces = (OCTET_STREAM, JSON)

    def accepts(self, media: MediaType, body: Body) -> bool:
        return not media.is_json

    def from_raw(self, body: Body, media: MediaType) -> bytes:
        return bytes(body)


class TextCodec(BodyCodec):
    """``str``: a ``text/plain`` body, UTF-8."""

    media_types = (TEXT,)
    produces = (JSON, TEXT)

    def from_raw(self, body: Body, media: MediaType) -> str:
        if media.parameters.get("charset", "utf-8").lower() not in ("utf-8", "utf8", "us-ascii"):
            raise ValueError("send the text in UTF-8")
        try:
            return str(body, "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {error.start}") from None


class Special(Enum):
    """Types with a codec of their own, by name: known without importing the package they come from."""

    ARRAY = "numpy.ndarray"
    TENSOR = "torch.Tensor"
    IMAGE = "PIL.Image.Image"


@functools.lru_cache(maxsize=1024)
def special_kind(cls: type) -> Special | None:
    """Which special type a class is, or inherits from; None for all others."""
    for base in cls.__mro__:
        name = f"{base.__module__}.{base.__qualname__}"
        for kind in Special:
            if kind.value == name:
                return kind
    return None
