"""Tensors of the Open Inference Protocol v2: datatypes, and arrays to and from their binary and JSON forms.

Binary data is parsed as a view of the body wherever the body lies in shared memory and the data is aligned. Nothing is
taken by what a request claims: a shape that its data does not fill is refused before any memory is. ``ValueError`` has
one sentence for the caller.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np

from hotset.functions.encoding import to_json
from hotset.functions.media import Body
from hotset.functions.problems import UNREADABLE
from hotset.functions.tensors import Array, describe_shape

BF16 = "BF16"
BYTES = "BYTES"
MAX_DIMENSIONS = 32

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),
    BF16: np.dtype("<u2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    BYTES: np.dtype(object),
}
"""Datatype -> how its array is held: BF16, which numpy does not know, as its 16 bits, BYTES as Python ``bytes``."""

_DATATYPES = {dtype.name: name for name, dtype in DTYPES.items() if name not in (BF16, BYTES)}
_LENGTH = struct.Struct("<I")
# Numbers that are not rounded to infinity. FP64 needs none: msgspec refuses what is beyond it.
_LARGEST = {"FP16": 65519.99, BF16: 3.396e38, "FP32": 3.4028235677973362e38}


class WireTensor(msgspec.Struct, frozen=True, gc=False):
    """One named tensor. Its datatype says how ``array`` is to be read (``DTYPES``)."""

    name: str
    datatype: str
    array: Any


@functools.lru_cache(maxsize=64)
def datatype_of(dtype: np.dtype[Any]) -> str:
    """numpy's dtype as a v2 datatype; raises ``ValueError`` for one that v2 does not have (complex, dates)."""
    if dtype.kind in "OSU":
        return BYTES
    name = _DATATYPES.get(dtype.newbyteorder("=").name)
    if name is None:
        raise ValueError(f"{dtype} is no datatype of the protocol; use one of {', '.join(DTYPES)}")
    return name


def checked_count(datatype: str, shape: Sequence[int]) -> int:
    """How many elements a claimed shape has; raises ``ValueError`` for a shape or datatype that cannot be."""
    if datatype not in DTYPES:
        raise ValueError(f"datatype {datatype[:40]!r} is not one of {', '.join(DTYPES)}")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"has {len(shape)} dimensions, at most {MAX_DIMENSIONS} are possible")
    if shape and min(shape) < 0:
        raise ValueError(f"has shape [{describe_shape(shape)}]; lengths cannot be negative")
    return math.prod(shape)


def from_binary(datatype: str, shape: Sequence[int], data: memoryview) -> Array:
    """Raw little-endian data in C order; BYTES elements are each preceded by their length, four bytes.

    A view of ``data`` if it is aligned, read-only like ``data`` itself.
    """
    count = checked_count(datatype, shape)
    if datatype == BYTES:
        return _shaped(_split(data, count), shape)
    dtype = DTYPES[datatype]
    expected = count * dtype.itemsize
    if len(data) != expected:
        raise ValueError(f"has {len(data)} bytes of data, but {datatype} [{describe_shape(shape)}] takes {expected}")
    if not expected:
        return _shaped(np.empty(0, dtype), shape)
    # Any byte but 0 is true; numpy and torch are undefined for a bool that is neither 0 nor 1.
    flat = np.frombuffer(data, np.uint8) != 0 if datatype == "BOOL" else np.frombuffer(data, dtype)
    return _shaped(flat if flat.flags.aligned else flat.copy(), shape)


def from_json(datatype: str, shape: Sequence[int], data: Body) -> Array:
    """JSON data, flat or nested as the shape says; strings for BYTES, numbers for the rest."""
    count = checked_count(datatype, shape)
    depth = _depth(data)
    if depth not in (1, len(shape)):
        raise ValueError(f"has data {depth} lists deep; send one flat list, or lists nested as its shape says")
    try:
        values = _decoder(datatype, depth).decode(data)
    except UNREADABLE as error:
        raise ValueError(f"has data that cannot be read: {error}") from None
    try:
        array = _bytes_array(values, depth) if datatype == BYTES else _numbers(values, datatype)
    except OverflowError:
        raise ValueError(f"has numbers outside the range of {datatype}") from None
    except ValueError:
        raise ValueError("has nested lists that differ in length") from None
    if depth == 1 and array.size == count:
        return _shaped(array, shape)
    if array.shape != tuple(shape):
        raise ValueError(f"has data of shape [{describe_shape(array.shape)}], but says [{describe_shape(shape)}]")
    return array


def to_binary(tensor: WireTensor) -> bytes | memoryview:
    """The tensor's data as ``from_binary`` reads it; a view of the array where it is contiguous."""
    array = tensor.array
    if tensor.datatype == BYTES:
        parts: list[bytes] = []
        for element in array.reshape(-1):
            parts += (_LENGTH.pack(len(element)), element)
        return b"".join(parts)
    plain = np.ascontiguousarray(array, DTYPES[tensor.datatype]).reshape(-1)
    return plain.view(np.uint8).data if plain.size else b""


def to_json_data(tensor: WireTensor) -> Any:
    """The flat list of its elements, ready for orjson: NaN and infinities become null, BYTES must be UTF-8."""
    flat = tensor.array.reshape(-1)
    if tensor.datatype == BYTES:
        try:
            return [element.decode() for element in flat]
        except UnicodeDecodeError:
            raise ValueError(f"output {tensor.name} is not UTF-8: ask for it as binary data") from None
    if tensor.datatype == BF16:
        return widened(flat)
    return np.ascontiguousarray(flat)


def widened(bits: Array) -> Array:
    """BF16, as its bits, to the float32 of the same value."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: Array) -> Array:
    """float32 to BF16's bits, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def bytes_tensor(name: str, elements: Sequence[bytes], shape: Sequence[int] | None = None) -> WireTensor:
    """A BYTES tensor of these elements, one-dimensional unless ``shape`` says more."""
    array = np.empty(len(elements), object)
    array[:] = elements
    return WireTensor(name, BYTES, array if shape is None else array.reshape(shape))


def json_tensor(name: str, value: Any) -> WireTensor:
    """What v2 has no tensor for: one BYTES element that holds JSON."""
    return bytes_tensor(name, [to_json(value)])


def _split(data: memoryview, count: int) -> Array:
    """The elements of a BYTES tensor."""
    size = len(data)
    if count * _LENGTH.size > size:
        raise ValueError(f"has {size} bytes of data, too few for {count} BYTES elements and their lengths")
    elements = np.empty(count, object)
    at = 0
    for index in range(count):
        start = at + _LENGTH.size
        end = start + _LENGTH.unpack_from(data, at)[0] if start <= size else size + 1
        if end > size:
            raise ValueError(f"ends in the middle of BYTES element {index}")
        elements[index] = bytes(data[start:end])
        at = end
    if at != size:
        raise ValueError(f"has {size - at} bytes of data after its {count} BYTES elements")
    return elements


def _shaped(flat: Array, shape: Sequence[int]) -> Array:
    try:
        return flat.reshape(shape)
    except (ValueError, OverflowError):
        # Only an empty tensor gets here: one length is 0, another beyond what an array can have.
        raise ValueError(f"has shape [{describe_shape(shape)}], which no array can have") from None


def _depth(data: Body) -> int:
    """How many lists a JSON value opens before its first element."""
    depth = 0
    for byte in bytes(data[: 8 * MAX_DIMENSIONS]):
        if byte == 0x5B:
            depth += 1
        elif byte not in b" \t\r\n":
            break
    return depth


@functools.lru_cache(maxsize=256)
def _decoder(datatype: str, depth: int) -> msgspec.json.Decoder[Any]:
    """Reads lists of a datatype's numbers, ``depth`` deep, and refuses those beyond its range."""
    kind: Any
    if datatype == BYTES:
        kind = str
    elif datatype == "BOOL":
        kind = bool
    elif datatype == "FP64":
        kind = float
    elif datatype in _LARGEST:
        kind = Annotated[float, msgspec.Meta(ge=-_LARGEST[datatype], le=_LARGEST[datatype])]
    elif datatype == "UINT64":
        kind = int  # msgspec knows no bounds beyond 63 bits; numpy refuses what does not fit
    else:
        limits = np.iinfo(DTYPES[datatype])
        kind = Annotated[int, msgspec.Meta(ge=int(limits.min), le=int(limits.max))]
    for _ in range(depth):
        kind = list[kind]
    return msgspec.json.Decoder(kind)


def _numbers(values: Any, datatype: str) -> Array:
    if datatype == BF16:
        return narrowed(np.array(values, np.float32))
    return np.array(values, DTYPES[datatype])


def _bytes_array(values: Any, depth: int) -> Array:
    array = np.array(values, object) if depth > 1 else np.empty(len(values), object)
    if depth == 1:
        array[:] = values
    flat = array.reshape(-1)
    for index, element in enumerate(flat):
        if type(element) is not str:
            raise ValueError
        flat[index] = element.encode()
    return array
