"""Which codec belongs to which type of a signature.

JSON types (numbers, strings, lists, dicts, Literal, unions, dataclasses, TypedDict, msgspec.Struct, bytes as base64)
are msgspec's own business. Tensors and images are not JSON types: each has a ``Codec``, which msgspec reaches through
``decode_hook`` wherever such a type stands in a signature.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec

from hotset.errors import FunctionError

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


class _ConstrainedMeta(type):
    """msgspec checks that a decoded value is an instance of its type; a constrained type takes any value."""

    def __instancecheck__(cls, instance: object) -> bool:
        return True


class _Constrained(metaclass=_ConstrainedMeta):
    """Stands in msgspec types for an annotation that carries its own codec: ``Annotated[ndarray, Tensor(...)]``."""

    codec: Codec


def codec_of(annotation: Any) -> BodyCodec | None:
    """The codec that reads raw bodies for this type (``X | None`` counts as ``X``), else None."""
    args = [arg for arg in get_args(annotation) if arg is not types.NoneType]
    if _is_union(annotation) and len(args) == 1:
        return codec_of(args[0])
    if annotation is bytes:
        return BytesCodec()
    if annotation is str:
        return TextCodec()
    return _hook_codec(annotation)


def translate(annotation: Any, owner: str) -> Any:
    """The annotation as msgspec is to see it: types whose codec depends on the annotation become classes of their own.

    Raises ``FunctionError`` naming ``owner`` for a ``Tensor`` where it would not be checked.
    """
    codec = _special_codec(annotation)
    if codec is not None:
        return type("Constrained", (_Constrained,), {"codec": codec})
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return Annotated[(translate(args[0], owner), *args[1:])]
    if origin is None or origin is typing.Literal:
        _refuse_hidden_tensors(annotation, owner)
        return annotation
    inner = tuple(arg if arg is Ellipsis else translate(arg, owner) for arg in args)
    if _is_union(annotation):
        return functools.reduce(operator.or_, inner)
    return origin[inner]


def decode_hook(annotation: Any, value: Any) -> Any:
    """msgspec's ``dec_hook``: a JSON value for a type that msgspec does not know."""
    codec = _hook_codec(annotation)
    if codec is None:
        raise NotImplementedError(f"{annotation!r} cannot be read from JSON")
    try:
        return codec.from_json(value)
    except msgspec.ValidationError as error:
        # msgspec adds the outer path to a ValueError, but passes its own errors through as they are.
        raise ValueError(str(error)) from None


def schema_hook(annotation: Any) -> dict[str, Any]:
    """msgspec's ``schema_hook``: the JSON schema of a type that msgspec does not know."""
    codec = _hook_codec(annotation)
    if codec is None:
        raise NotImplementedError(f"{annotation!r} has no JSON schema")
    return codec.json_schema()


def _hook_codec(annotation: Any) -> Codec | None:
    if isinstance(annotation, type) and issubclass(annotation, _Constrained):
        return annotation.codec
    return _special_codec(annotation)


def _special_codec(annotation: Any) -> Codec | None:
    """The codec of a tensor or image type; imports what it needs only then."""
    base, metadata = annotation, []
    if get_origin(annotation) is Annotated:
        base, *metadata = get_args(annotation)
    element: Any = None
    if get_origin(base) is not None:
        # numpy.typing.NDArray[numpy.float32] is ndarray[Any, dtype[float32]].
        base, (_, dtype) = get_origin(base), (*get_args(base)[:2], None, None)[:2]
        element = next(iter(get_args(dtype)), None)
    kind = special_kind(base) if isinstance(base, type) else None
    if kind is None:
        return None
    if kind is Special.IMAGE:
        from hotset.functions.images import ImageCodec

        return ImageCodec()
    from hotset.functions.tensors import Tensor, TensorCodec

    declared = [item for item in metadata if isinstance(item, Tensor)]
    if declared:
        return TensorCodec(declared[0], torch=kind is Special.TENSOR)
    return TensorCodec(Tensor(dtype=element if isinstance(element, type) else None), torch=kind is Special.TENSOR)


def _refuse_hidden_tensors(annotation: Any, owner: str) -> None:
    """msgspec reads the fields of records itself and would drop a ``Tensor(...)`` it finds there, unchecked."""
    for where, inner in _annotations_inside(annotation, set()):
        if any(type(item).__name__ == "Tensor" for item in getattr(inner, "__metadata__", ())):
            raise FunctionError(
                f"{owner}: Tensor(...) inside {where} would not be checked; make it a parameter of predict, or use a "
                f"bare numpy.ndarray there"
            )


def _annotations_inside(annotation: Any, seen: set[Any]) -> Iterator[tuple[str, Any]]:
    for arg in get_args(annotation) if get_origin(annotation) is not typing.Literal else ():
        yield from _annotations_inside(arg, seen)
    is_record = isinstance(annotation, type) and (
        dataclasses.is_dataclass(annotation)
        or typing.is_typeddict(annotation)
        or issubclass(annotation, msgspec.Struct)
    )
    if not is_record or annotation in seen:
        return
    seen.add(annotation)
    for name, hint in typing.get_type_hints(annotation, include_extras=True).items():
        yield f"{annotation.__name__}.{name}", hint
        yield from _annotations_inside(hint, seen)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)
