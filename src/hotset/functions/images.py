"""PIL.Image.Image: image files as bodies, or base64 in JSON."""

from __future__ import annotations

import io
from typing import Any

import msgspec
from PIL import Image

from hotset.functions.codecs import Codec
from hotset.functions.media import JSON, Body, MediaType

MAX_PIXELS = 50_000_000
"""Larger pictures are refused before they are decompressed (200 MB as RGBA)."""

# Formats whose decoders start no other program and are fit for strangers' files.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

_WRITABLE = {
    "PNG": ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
}


class ImageCodec(Codec):
    """Reads PNG, JPEG, WebP, GIF (first frame) and BMP; pictures come as stored: convert to the mode you need."""

    media_types = ("image/*",)
    produces = ("image/png", "image/jpeg", JSON)

    def accepts(self, media: MediaType, body: Body) -> bool:
        if media.declared:
            return not media.is_json
        # No content type: a file, unless it can only be JSON.
        return bytes(body[:1]) not in (b"{", b'"', b"")

    def from_json(self, value: Any) -> Image.Image:
        return self._open(msgspec.convert(value, bytes))

    def from_raw(self, body: Body, media: MediaType) -> Image.Image:
        return self._open(body)

    def json_schema(self) -> dict[str, Any]:
        return {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/*"}

    def _open(self, data: Body) -> Image.Image:
        try:
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
        except Exception as error:
            # Decoders raise whatever a broken file makes them raise.
            raise ValueError(_refusal(error)) from error
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"the picture has {width} x {height} pixels; send one of at most {MAX_PIXELS:,}")
        try:
            picture.load()
        except Exception as error:
            raise ValueError(f"the picture is damaged: {type(error).__name__}") from error
        return picture


def to_file(picture: Image.Image, file_format: str = "PNG") -> bytes:
    """The picture as a PNG or JPEG file."""
    if picture.mode not in _WRITABLE[file_format]:
        picture = picture.convert("RGB")
    file = io.BytesIO()
    picture.save(file, format=file_format)
    return file.getvalue()


def _refusal(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"the picture has too many pixels; send one of at most {MAX_PIXELS:,}"
    return f"not a picture; send {', '.join(FORMATS)}"
