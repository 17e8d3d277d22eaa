"""numpy.ndarray and torch.Tensor: nested JSON lists, base64 objects, raw bytes and .npy bodies.

All of it is bounded by the body's own size: a shape that the bytes do not fill is refused before any memory is taken,
and nothing is ever unpickled.
"""

from __future__ import annotations

import functools
import importlib
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np

from hotset.errors import FunctionError
from hotset.functions.codecs import Codec
from hotset.functions.media import JSON, NPY, OCTET_STREAM, Body, MediaType

MAX_DIMENSIONS = 32

DTYPES = frozenset(
    {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"}
)

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Tensor:
    """What an array argument must be: ``Annotated[numpy.ndarray, Tensor("float32", (None, 3))]``.

    ``dtype``: numpy's name or type; None: as it comes (JSON integers are int64, other numbers float64).
    ``shape``: one entry per dimension, None (or -1) where any length will do; None: any shape.
    ``finite``: refuse NaN and infinities, which only raw bodies can hold.

    Raises ``FunctionError`` for a dtype or a shape that cannot be.
    """

    dtype: Any = None
    shape: Sequence[int | None] | None = None
    finite: bool = True

    def __post_init__(self) -> None:
        if self.dtype is not None:
            object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        if self.shape is not None:
            object.__setattr__(self, "shape", _checked_shape(self.shape))

    def __str__(self) -> str:
        return f"{self.dtype or 'tensor'}[{describe_shape(self.shape) if self.shape is not None else '...'}]"


class _Encoded(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor in JSON as bytes: ``{"dtype": "float32", "shape": [2, 3], "data": base64}``, little-endian, C order."""

    dtype: str
    shape: Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=2**40)]], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    data: bytes


class TensorCodec(Codec):
    """Reads one array type; ``torch``: hand out torch.Tensor (on the CPU) in place of numpy.ndarray."""

    media_types = (OCTET_STREAM, NPY)
    produces = (JSON, NPY, OCTET_STREAM)

    def __init__(self, spec: Tensor, torch: bool = False) -> None:
        self.spec = spec
        self.torch = torch
        self._dtype = None if spec.dtype is None else np.dtype(spec.dtype)
        self._from_numpy = importlib.import_module("torch").from_numpy if torch else None

    def from_json(self, value: Any) -> Any:
        if isinstance(value, dict):
            encoded = msgspec.convert(value, _Encoded)
            return self.from_array(_from_buffer(encoded.data, _wire_dtype(encoded.dtype), encoded.shape))
        return self.from_array(self._from_lists(value))

    def from_raw(self, body: Body, media: MediaType) -> Any:
        if media.name == NPY:
            return self.from_array(_from_npy(body))
        name = media.parameters.get("dtype", self.spec.dtype)
        if name is None:
            raise ValueError(f"say what the bytes are: Content-Type: {OCTET_STREAM}; dtype=float32; shape=2,3")
        dtype = _wire_dtype(name)
        text = media.parameters.get("shape")
        shape = self._implied_shape(len(body) // dtype.itemsize) if text is None else _parse_shape(text)
        return self.from_array(_from_buffer(body, dtype, shape))

    def json_schema(self) -> dict[str, Any]:
        lists: dict[str, Any] = {"type": "boolean" if self.spec.dtype == "bool" else "number"}
        if self.spec.shape is None:
            lists = {"type": ["array", "number"]}
        for length in reversed(self.spec.shape or ()):
            lists = {"type": "array", "items": lists}
            if length is not None:
                lists |= {"minItems": length, "maxItems": length}
        encoded = {
            "type": "object",
            "properties": {
                "dtype": {"type": "string", "enum": [self.spec.dtype] if self.spec.dtype else sorted(DTYPES)},
                "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                "data": {"type": "string", "contentEncoding": "base64"},
            },
            "required": ["dtype", "shape", "data"],
            "additionalProperties": False,
        }
        return {"title": str(self.spec), "anyOf": [lists, encoded]}

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ``ValueError`` for a shape that ``spec`` does not allow."""
        wanted = self.spec.shape
        if wanted is not None and not _fits(shape, wanted):
            raise ValueError(f"has shape [{describe_shape(shape)}], expected [{describe_shape(wanted)}]")

    def _from_lists(self, value: Any) -> Array:
        """Nested lists of numbers. msgspec checks every leaf (and names the first bad one) before numpy sees them."""
        depth, leaf = 0, value
        while isinstance(leaf, list) and depth <= MAX_DIMENSIONS:
            leaf = leaf[0] if leaf else 0.0
            depth += 1
        if depth > MAX_DIMENSIONS:
            raise ValueError(f"more than {MAX_DIMENSIONS} dimensions")
        element: Any = int | float
        if self._dtype is not None:
            element = {"b": bool, "f": float}.get(self._dtype.kind, int)
        elif isinstance(leaf, bool):
            element = bool
        checked = msgspec.convert(value, _nested(element, depth))
        try:
            array = np.asarray(checked)
        except ValueError:
            raise ValueError("the nested lists differ in length") from None
        if array.dtype.kind not in "biuf":
            raise ValueError("holds numbers beyond 64 bits")
        if self._dtype is None:
            return array
        if self._dtype.kind in "iu" and array.size:
            limits = np.iinfo(self._dtype)
            if array.min() < limits.min or array.max() > limits.max:
                raise ValueError(f"holds numbers outside {self.spec.dtype}'s range, {limits.min} to {limits.max}")
        with np.errstate(over="ignore"):
            return array.astype(self._dtype, copy=False)

    def _implied_shape(self, count: int) -> list[int]:
        """The shape of a raw body that does not say: at most one dimension may be open."""
        shape = self.spec.shape if self.spec.shape is not None else (None,)
        if list(shape).count(None) > 1:
            raise ValueError(f"say its shape, {describe_shape(shape)}: Content-Type: {OCTET_STREAM}; shape=2,3")
        known = math.prod(length for length in shape if length is not None)
        return [count // max(known, 1) if length is None else length for length in shape]

    def from_array(self, array: Array) -> Any:
        """An array as the argument: a view of it. Raises ``ValueError`` when it is not what ``spec`` asks for."""
        spec = self.spec
        if self._dtype is not None and array.dtype != self._dtype:
            raise ValueError(f"is {array.dtype}, expected {spec.dtype}")
        self.check_shape(array.shape)
        if spec.finite and array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"holds NaN, an infinity or numbers beyond {array.dtype}; send finite numbers")
        return array if self._from_numpy is None else self._from_numpy(array)


def to_npy(array: Array) -> bytes:
    """The array as a .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
    return file.getvalue()


def describe_shape(shape: Sequence[int | None]) -> str:
    """``2, any, 3``: a shape for messages."""
    return ", ".join("any" if length is None else str(length) for length in shape)


@functools.lru_cache(maxsize=256)
def _nested(element: Any, depth: int) -> Any:
    """``list[list[element]]``, ``depth`` lists deep."""
    return list[_nested(element, depth - 1)] if depth else element  # type: ignore[misc]


def _from_buffer(body: Body, dtype: np.dtype[Any], shape: Sequence[int], fortran: bool = False) -> Array:
    """A writable array of its own: the body may lie in memory that is used again after the call."""
    expected, got = math.prod(shape) * dtype.itemsize, len(body)
    if expected != got:
        raise ValueError(f"{got} bytes, but {dtype.name} [{describe_shape(shape)}] takes {expected}")
    if not got:
        return np.empty(shape, dtype.newbyteorder("="))
    flat = np.frombuffer(body, np.uint8) != 0 if dtype.kind == "b" else np.frombuffer(body, dtype)
    ordered = flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    return np.array(ordered, dtype=dtype.newbyteorder("="), order="C")


def _from_npy(body: Body) -> Array:
    """A .npy file. Its header is read first, so that a shape it does not fill takes no memory."""
    file = io.BytesIO(bytes(body[: 2**16]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
    except Exception as error:
        # numpy evaluates the header as a Python literal, which fails in many ways.
        raise ValueError("not a .npy file; make one with numpy.save") from error
    if dtype.name not in DTYPES or len(shape) > MAX_DIMENSIONS or any(length < 0 for length in shape):
        raise ValueError(f"a .npy file of {dtype} cannot be read; save one of {', '.join(sorted(DTYPES))}")
    return _from_buffer(memoryview(body)[file.tell() :], dtype, [int(length) for length in shape], fortran)


def _wire_dtype(name: str) -> np.dtype[Any]:
    if name not in DTYPES:
        raise ValueError(f"dtype {name[:40]!r} is not one of {', '.join(sorted(DTYPES))}")
    return np.dtype(name).newbyteorder("<")


def _parse_shape(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if len(parts) > MAX_DIMENSIONS or not all(part.isascii() and part.isdigit() and len(part) <= 12 for part in parts):
        raise ValueError(f"shape {text[:40]!r} is not a list of lengths such as 2,3")
    return [int(part) for part in parts]


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(w is None or w == s for s, w in zip(shape, wanted, strict=True))


def _dtype_name(dtype: Any) -> str:
    text = str(dtype).removeprefix("torch.")
    try:
        name = text if text in DTYPES else np.dtype(dtype).name
    except TypeError:
        name = text
    if name not in DTYPES:
        raise FunctionError(f"Tensor: dtype {dtype!r} is not one of {', '.join(sorted(DTYPES))}")
    return name


def _checked_shape(shape: Sequence[int | None]) -> tuple[int | None, ...]:
    lengths = tuple(None if length == -1 else length for length in shape)
    if len(lengths) > MAX_DIMENSIONS or not all(n is None or (type(n) is int and n >= 0) for n in lengths):
        raise FunctionError(f"Tensor: shape {shape!r} must be lengths, None where any will do, such as (None, 3)")
    return lengths
