"""The inputs and outputs of an ONNX file, read from its protobuf bytes without ONNX Runtime and without its weights.

Only the fields on the way there are decoded; everything else, weights above all, is skipped by its length, so a file of
gigabytes takes microseconds and no memory. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import msgspec

from hotset.errors import FunctionError
from hotset.functions.v2_types import TensorMetadata

_GRAPH = 7
_INITIALIZER, _INPUT, _OUTPUT = 5, 11, 12
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TENSOR_NAME, _TENSOR_EXTERNAL = 8, 13
_KEY, _VALUE = 1, 2
_TENSOR_TYPE = 1
_ELEMENT_TYPE, _SHAPE = 1, 2
_DIMENSION = 1
_DIMENSION_VALUE = 1

# TensorProto.DataType -> v2 datatype. What is missing (complex numbers, 8-bit floats, 4-bit integers) v2 does not have.
_DATATYPES = {
    1: "FP32",
    2: "UINT8",
    3: "INT8",
    4: "UINT16",
    5: "INT16",
    6: "INT32",
    7: "INT64",
    8: "BYTES",
    9: "BOOL",
    10: "FP16",
    11: "FP64",
    12: "UINT32",
    13: "UINT64",
    16: "BF16",
}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Header(msgspec.Struct, frozen=True):
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    external: list[str]
    """Files beside it that hold weights."""


def read_header(path: Path) -> Header:
    """Inputs (those that are not weights) and outputs; a length the file leaves open is -1.

    Raises ``FunctionError`` for what is no ONNX model, or takes or gives what v2 has no tensor for.
    """
    with path.open("rb") as file:
        try:
            # Unmapped when the last view of it is gone; an error's traceback may hold some for a while.
            return _read_model(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
        except (ValueError, IndexError, UnicodeDecodeError) as error:
            # An empty file cannot be mapped; one that is no protobuf breaks its own lengths.
            raise FunctionError(f"{path.name} is no ONNX model: {error or 'it ends too early'}") from None


def _read_model(model: memoryview) -> Header:
    inputs: list[TensorMetadata] = []
    outputs: list[TensorMetadata] = []
    weights: set[str] = set()
    external: set[str] = set()
    found = False
    for number, value in _fields(model):
        if number != _GRAPH or not isinstance(value, memoryview):
            continue
        found = True
        for part, content in _fields(value):
            if not isinstance(content, memoryview):
                continue
            if part == _INPUT:
                inputs.append(_read_value(content))
            elif part == _OUTPUT:
                outputs.append(_read_value(content))
            elif part == _INITIALIZER:
                weights.add(_text(content, _TENSOR_NAME))
                external.update(_locations(content))
    if not found or not outputs:
        raise ValueError("it has no graph with outputs")
    for name in external:
        if Path(name).name != name:
            raise FunctionError(f"its weights are in {name!r}; put them beside the model")
    return Header([each for each in inputs if each.name not in weights], outputs, sorted(external))


def _locations(tensor: memoryview) -> Iterator[str]:
    """Where a tensor's data is, if it is in another file."""
    for number, entry in _fields(tensor):
        if number == _TENSOR_EXTERNAL and isinstance(entry, memoryview) and _text(entry, _KEY) == "location":
            yield _text(entry, _VALUE)


def _read_value(value: memoryview) -> TensorMetadata:
    name = _text(value, _VALUE_NAME)
    kind = _message(value, _VALUE_TYPE)
    tensor = None if kind is None else _message(kind, _TENSOR_TYPE)
    if tensor is None:
        raise FunctionError(f"{name} is a sequence, a map or optional, which v2 has no tensor for: export it without")
    element = next((item for number, item in _fields(tensor) if number == _ELEMENT_TYPE), 0)
    datatype = _DATATYPES.get(element) if isinstance(element, int) else None
    if datatype is None:
        raise FunctionError(f"{name} has the element type {element}, which v2 does not have: cast it in the model")
    shape = _message(tensor, _SHAPE)
    lengths: list[int] = []
    for number, dimension in _fields(shape) if shape is not None else ():
        if number == _DIMENSION and isinstance(dimension, memoryview):
            known = [item for inner, item in _fields(dimension) if inner == _DIMENSION_VALUE and isinstance(item, int)]
            lengths.append(known[0] if known and known[0] < 1 << 62 else -1)
    return TensorMetadata(name=name, datatype=datatype, shape=lengths)


def _text(message: memoryview, wanted: int) -> str:
    found = _message(message, wanted)
    return "" if found is None else str(found, "utf-8")


def _message(message: memoryview, wanted: int) -> memoryview | None:
    for number, value in _fields(message):
        if number == wanted and isinstance(value, memoryview):
            return value
    return None


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers and values of one protobuf message, in order; raises ``ValueError`` where it is broken."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield number, value
        elif wire == _BYTES:
            size, at = _varint(message, at)
            if size > end - at:
                raise ValueError("it ends too early")
            yield number, message[at : at + size]
            at += size
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError("its bytes are no protobuf message")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("its bytes are no protobuf message")
