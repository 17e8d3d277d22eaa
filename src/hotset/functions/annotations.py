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
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec

from hotset.errors import FunctionError
from hotset.functions.codecs import BodyCodec, BytesCodec, Codec, Special, TextCodec, special_kind


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
