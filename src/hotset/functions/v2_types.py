"""A function's signature as v2 metadata: its parameters are the inputs, what it returns are the outputs.

Arrays, numbers, strings, bytes and lists of these are tensors. A type that v2 has no tensor for (a dataclass, a dict, a
picture) is one BYTES element that holds its JSON, or the picture's file. A returned record (dataclass, TypedDict,
msgspec.Struct) is one output per field, a tuple one per entry; anything else is one output named ``output``.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from enum import Enum
from typing import Any

import msgspec
import numpy as np

from hotset.functions.annotations import codec_of
from hotset.functions.signature import Signature
from hotset.functions.tensors import TensorCodec
from hotset.functions.v2_tensors import BYTES, datatype_of

OUTPUT = "output"
"""The one output of a function that returns neither a record nor a tuple."""
UNDECLARED = "FP32"
"""What metadata says of an array whose dtype its function leaves open; v2 has no word for "any"."""

_kinds = msgspec.inspect
_TEXTS = (_kinds.DateTimeType, _kinds.DateType, _kinds.TimeType, _kinds.UUIDType, _kinds.DecimalType)
_LISTS = (_kinds.ListType, _kinds.SetType, _kinds.FrozenSetType, _kinds.VarTupleType, _kinds.CollectionType)
_RECORDS = (_kinds.StructType, _kinds.DataclassType, _kinds.TypedDictType)


class Form(Enum):
    """How a value and its tensor correspond."""

    ARRAY = "array"
    """The tensor is the value: numpy.ndarray or torch.Tensor."""
    SCALAR = "scalar"
    """A tensor of one element."""
    LIST = "list"
    """Nested lists of equal length."""
    JSON = "json"
    """One BYTES element: JSON, or a picture's file."""


class TensorType(msgspec.Struct, frozen=True, kw_only=True):
    """What tensor carries values of a type."""

    form: Form
    datatype: str
    """Of an array that may have any dtype: ``UNDECLARED``."""
    shape: tuple[int, ...]
    """-1: any length."""
    text: bool = False
    """BYTES elements are Python strings, not bytes."""


class TensorMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """One input or output as the protocol describes it."""

    name: str
    datatype: str
    shape: Sequence[int]


class Tensors(msgspec.Struct, frozen=True, kw_only=True):
    """All of a function's inputs and outputs; what the gateway answers metadata requests from."""

    inputs: Sequence[TensorMetadata]
    outputs: Sequence[TensorMetadata]
    """Empty where only a call tells (a dict of arrays)."""
    optional: Sequence[str] = ()
    """Inputs that may be left out."""
    platform: str = "hotset_function"
    labels: dict[str, list[str]] = msgspec.field(default_factory=dict)
    """Output -> names of its classes."""


class Field(msgspec.Struct, frozen=True):
    """A part of what a function returns that is an output of its own."""

    name: str
    annotation: Any


def tensor_type(annotation: Any) -> TensorType:
    """The tensor for values of this type, as ``annotations.translate`` gives types."""
    codec = codec_of(annotation)
    if isinstance(codec, TensorCodec):
        spec = codec.spec
        datatype = UNDECLARED if spec.dtype is None else datatype_of(np.dtype(spec.dtype))
        shape = (-1,) if spec.shape is None else tuple(-1 if length is None else length for length in spec.shape)
        return TensorType(form=Form.ARRAY, datatype=datatype, shape=shape)
    return _of(_kinds.type_info(annotation))


def output_fields(returns: Any) -> list[Field] | None:
    """The outputs of a function that returns this type; None: only a result tells (``Any``, a dict of arrays)."""
    if returns is Any or isinstance(codec_of(returns), TensorCodec):
        return None if returns is Any else [Field(OUTPUT, returns)]
    try:
        info = _kinds.type_info(returns)
    except (TypeError, ValueError):
        return None
    if isinstance(info, _RECORDS):
        hints = typing.get_type_hints(info.cls, include_extras=True)
        return [Field(field.name, hints[field.name]) for field in info.fields]
    if isinstance(info, _kinds.TupleType):
        entries = getattr(returns, "__args__", ())
        return [Field(f"{OUTPUT}_{index}", entry) for index, entry in enumerate(entries)]
    if isinstance(info, _kinds.DictType) and _array_values(info):
        return None
    return [Field(OUTPUT, returns)]


def tensors_of(signature: Signature) -> Tensors:
    """A signature as v2 metadata."""
    if signature.tensors is not None:
        return signature.tensors
    inputs = [_metadata(parameter.name, parameter.annotation) for parameter in signature.parameters]
    fields = output_fields(signature.returns)
    return Tensors(
        inputs=inputs,
        outputs=[_metadata(field.name, field.annotation) for field in fields or ()],
        optional=[parameter.name for parameter in signature.parameters if not parameter.required],
    )


def _metadata(name: str, annotation: Any) -> TensorMetadata:
    kind = tensor_type(annotation)
    return TensorMetadata(name=name, datatype=kind.datatype, shape=kind.shape)


def _array_values(info: msgspec.inspect.DictType) -> bool:
    value = info.value_type
    return isinstance(value, _kinds.CustomType) and isinstance(codec_of(value.cls), TensorCodec)


def _scalar(datatype: str, text: bool = False) -> TensorType:
    return TensorType(form=Form.SCALAR, datatype=datatype, shape=(1,), text=text)


_JSON = TensorType(form=Form.JSON, datatype=BYTES, shape=(1,))


def _of(info: msgspec.inspect.Type) -> TensorType:
    match info:
        case _kinds.Metadata():
            return _of(info.type)
        case _kinds.BoolType():
            return _scalar("BOOL")
        case _kinds.IntType():
            return _scalar("INT64")
        case _kinds.FloatType():
            return _scalar("FP64")
        case _kinds.BytesType():
            return _scalar(BYTES)
        case _kinds.StrType():
            return _scalar(BYTES, text=True)
        case _kinds.LiteralType() | _kinds.EnumType():
            values = info.values if isinstance(info, _kinds.LiteralType) else [member.value for member in info.cls]
            return _scalar(BYTES, text=True) if all(isinstance(value, str) for value in values) else _scalar("INT64")
        case _kinds.UnionType():
            return _of_union(info)
        case _ if isinstance(info, _TEXTS):
            return _scalar(BYTES, text=True)
        case _ if isinstance(info, _LISTS):
            return _of_list(_of(info.item_type))
    return _JSON


def _of_list(inner: TensorType) -> TensorType:
    if inner.form is Form.JSON:
        return _JSON
    shape = (-1,) if inner.form is Form.SCALAR else (-1, *inner.shape)
    return TensorType(form=Form.LIST, datatype=inner.datatype, shape=shape, text=inner.text)


def _of_union(info: msgspec.inspect.UnionType) -> TensorType:
    """``X | None`` is X, ``int | float`` is a float."""
    kinds = [_of(member) for member in info.types if not isinstance(member, _kinds.NoneType)]
    if len(kinds) == 1:
        return kinds[0]
    if {kind.datatype for kind in kinds} == {"INT64", "FP64"} and len({kind.shape for kind in kinds}) == 1:
        return next(kind for kind in kinds if kind.datatype == "FP64")
    return _JSON
