"""Results -> answer bodies; streams -> NDJSON or server-sent events."""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import orjson

from hotset.errors import FunctionError
from hotset.functions.codecs import Special, special_kind
from hotset.functions.media import JSON, NPY, OCTET_STREAM, TEXT

NDJSON = "application/x-ndjson"
EVENT_STREAM = "text/event-stream"

_ANY = "*/*"
_PLAIN = frozenset({list, dict, float, int, bool, tuple, type(None)})


class Encoded(msgspec.Struct, frozen=True, gc=False):
    """An answer's body and what it is."""

    content_type: str
    body: bytes | memoryview
    rest: Sequence[bytes | memoryview] = ()
    """What follows ``body``, as it lies in memory (bytes, one dimension): joined only where it is sent."""


class StreamFormat(msgspec.Struct, frozen=True):
    """How the items of a stream are written."""

    content_type: str
    item: Callable[[Any], bytes]
    error: Callable[[dict[str, Any]], bytes]
    """The last thing written when ``predict`` raises midway; its argument is the JSON error."""


class Writer(Protocol):
    """Writes the answer to one call, in the form its caller asked for."""

    def encode(self, result: Any) -> Encoded: ...

    @property
    def stream(self) -> StreamFormat: ...


class PlainWriter:
    """Answers in the form that an Accept header asks for."""

    def __init__(self, accept: str = _ANY) -> None:
        self._accept = accept

    def encode(self, result: Any) -> Encoded:
        return encode(result, self._accept)

    @property
    def stream(self) -> StreamFormat:
        return stream_format(self._accept)


def encode(result: Any, accept: str = _ANY) -> Encoded:
    """A result as the client wants it (``accept``: its Accept header), by the result's own type:

    str: JSON, or text/plain · bytes: application/octet-stream, or base64 in JSON · image: PNG, JPEG, or base64 PNG in
    JSON · array and tensor: nested JSON lists, application/x-npy, or application/octet-stream with ``dtype`` and
    ``shape`` parameters (little-endian, C order) · anything else: JSON, in which NaN and infinities are null, and bytes
    and images are base64. An Accept that offers none of these gets the first.

    Raises ``FunctionError`` for a result that JSON cannot hold.
    """
    kind: type = type(result)
    if kind in _PLAIN or (kind is str and accept == _ANY):
        return Encoded(JSON, to_json(result))
    if kind is str:
        return _encode_text(result, accept)
    if isinstance(result, bytes | bytearray | memoryview):
        return _encode_bytes(bytes(result), accept)
    special = special_kind(kind)
    if special is Special.IMAGE:
        return _encode_image(result, accept)
    if special is not None:
        return _encode_array(result if special is Special.ARRAY else _to_numpy(result), accept)
    return Encoded(JSON, to_json(result))


def to_json(value: Any) -> bytes:
    """Any result as JSON; raises ``FunctionError`` when JSON cannot hold it."""
    try:
        return orjson.dumps(value, _jsonable, orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:
        pass
    try:
        # Slower, hence second: dictionaries whose keys are numbers, enums or dates.
        return orjson.dumps(value, _jsonable, orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    except TypeError as error:
        cause = error.__cause__ if isinstance(error.__cause__, FunctionError) else error
        raise FunctionError(f"predict returned a {type(value).__name__} that JSON cannot hold: {cause}") from error


def stream_format(accept: str = _ANY) -> StreamFormat:
    """NDJSON, or server-sent events where Accept asks for them."""
    return _EVENTS if negotiate(accept, (NDJSON, EVENT_STREAM)) == EVENT_STREAM else _LINES


@functools.lru_cache(maxsize=256)
def negotiate(accept: str, offers: tuple[str, ...]) -> str:
    """The offer that an Accept header likes best; the first one when it likes none or all the same."""
    ranges = []
    for position, part in enumerate(accept.split(",")):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = next((_quality(p[2:]) for p in parameters if p.startswith("q=")), 1.0)
        if quality > 0:
            ranges.append((-quality, position, name))
    for _, _, name in sorted(ranges):
        for offer in offers:
            if name in (offer, _ANY) or (name.endswith("/*") and offer.startswith(name[:-1])):
                return offer
    return offers[0]


def _quality(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 1.0


def _encode_text(result: str, accept: str) -> Encoded:
    if negotiate(accept, (JSON, TEXT)) == TEXT:
        return Encoded(f"{TEXT}; charset=utf-8", result.encode("utf-8", "replace"))
    return Encoded(JSON, to_json(result))


def _encode_bytes(result: bytes, accept: str) -> Encoded:
    if negotiate(accept, (OCTET_STREAM, JSON)) == JSON:
        return Encoded(JSON, to_json(result))
    return Encoded(OCTET_STREAM, result)


def _encode_image(result: Any, accept: str) -> Encoded:
    from hotset.functions.images import to_file

    chosen = negotiate(accept, ("image/png", "image/jpeg", JSON))
    if chosen == JSON:
        return Encoded(JSON, to_json(result))
    return Encoded(chosen, to_file(result, chosen.removeprefix("image/").upper()))


def _encode_array(result: Any, accept: str) -> Encoded:
    from hotset.functions.tensors import DTYPES, to_npy

    chosen = negotiate(accept, (JSON, NPY, OCTET_STREAM))
    if chosen == JSON or result.dtype.name not in DTYPES:
        return Encoded(JSON, to_json(result))
    if chosen == NPY:
        return Encoded(NPY, to_npy(result))
    shape = ",".join(str(length) for length in result.shape)
    plain = result.astype(result.dtype.newbyteorder("<"), order="C", copy=False)
    body = plain.reshape(-1).view("u1").data if plain.size else b""
    return Encoded(f'{OCTET_STREAM}; dtype={result.dtype.name}; shape="{shape}"', body)


def _to_numpy(tensor: Any) -> Any:
    tensor = tensor.detach().cpu()
    try:
        return tensor.numpy()
    except TypeError:
        # numpy has no bfloat16 and no 8-bit floats.
        return tensor.float().numpy()


def _jsonable(value: Any) -> Any:
    """orjson's ``default``: one step towards JSON for a type it does not know."""
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode("ascii")
    kind: type = type(value)
    special = special_kind(kind)
    if special is Special.ARRAY:
        # orjson takes arrays of plain numbers in C order only.
        return value.tolist()
    if special is Special.TENSOR:
        return _to_numpy(value)
    if special is Special.IMAGE:
        from hotset.functions.images import to_file

        return base64.b64encode(to_file(value)).decode("ascii")
    if isinstance(value, msgspec.Struct):
        return msgspec.structs.asdict(value)
    if isinstance(value, set | frozenset):
        return list(value)
    raise FunctionError(f"a {kind.__name__} is no JSON value")


def _line(value: Any) -> bytes:
    return to_json(value) + b"\n"


def _event(value: Any) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


def _error_event(error: dict[str, Any]) -> bytes:
    return b"event: error\n" + _event(error)


_LINES = StreamFormat(NDJSON, _line, _line)
_EVENTS = StreamFormat(EVENT_STREAM, _event, _error_event)
