"""Open Inference Protocol v2 messages: an infer request and an infer response, byte by byte.

A message is a JSON header and, behind it, the raw data of those tensors that say ``binary_data_size``, in their order.
``InputError`` names the tensor and has one sentence for the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import orjson

from hotset.errors import InputError
from hotset.functions.media import Body
from hotset.functions.problems import UNREADABLE
from hotset.functions.tensors import describe_shape
from hotset.functions.v2_tensors import (
    BYTES,
    WireTensor,
    bytes_tensor,
    from_binary,
    from_json,
    to_binary,
    to_json_data,
)

Parameters = dict[str, bool | int | float | str | None]


class RequestedOutput(msgspec.Struct, frozen=True):
    """One output the caller wants."""

    name: str
    parameters: Parameters = msgspec.field(default_factory=dict)


class _Input(msgspec.Struct, frozen=True):
    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters = msgspec.field(default_factory=dict)
    data: msgspec.Raw = msgspec.Raw(b"")


class _Header(msgspec.Struct, frozen=True):
    inputs: list[_Input]
    id: str = ""
    parameters: Parameters = msgspec.field(default_factory=dict)
    outputs: list[RequestedOutput] | None = None


class InferRequest(msgspec.Struct, frozen=True):
    """A request, read and checked."""

    inputs: dict[str, WireTensor]
    id: str
    parameters: Parameters
    outputs: tuple[RequestedOutput, ...] | None
    """None: all that there are."""


_decoder = msgspec.json.Decoder(_Header)


def read_request(header: Body, binary: memoryview) -> InferRequest:
    """Parse a request. ``binary``: all that stands behind the header, read-only; tensors may be views of it."""
    try:
        message = _decoder.decode(header)
    except UNREADABLE as error:
        raise InputError("", f"the inference request cannot be read: {error}") from None
    inputs: dict[str, WireTensor] = {}
    at = 0
    for each in message.inputs:
        name = each.name
        if name in inputs:
            raise InputError(name, "is given twice")
        size = each.parameters.get("binary_data_size")
        try:
            if size is None:
                if not len(each.data):
                    raise ValueError("has neither data nor a binary_data_size")
                array = from_json(each.datatype, each.shape, memoryview(each.data))
            else:
                if type(size) is not int or not 0 <= size <= len(binary) - at:
                    raise ValueError(f"says binary_data_size {size}, but {len(binary) - at} bytes are left")
                if len(each.data):
                    raise ValueError("has both data and a binary_data_size; send one of them")
                array = from_binary(each.datatype, each.shape, binary[at : at + size])
                at += size
        except ValueError as error:
            raise InputError(name[:200], str(error)) from None
        inputs[name] = WireTensor(name, each.datatype, array)
    if at != len(binary):
        raise InputError("", f"{len(binary) - at} bytes of binary data belong to no input")
    outputs = None if message.outputs is None else tuple(message.outputs)
    return InferRequest(inputs, message.id, message.parameters, outputs)


class Written(msgspec.Struct, frozen=True):
    """A response: its JSON header, and the raw data of its binary outputs as it lies in memory."""

    header: bytes
    raw: Sequence[bytes | memoryview]


def write_response(
    request: InferRequest, model_name: str, model_version: str, tensors: Sequence[WireTensor], labels: Labels
) -> Written:
    """The response to ``request``: the outputs it asked for, in its order, in the forms it asked for.

    Raises ``InputError`` for an output that there is not, ``ValueError`` for one that has no JSON form.
    """
    binary_default = request.parameters.get("binary_data_output") is True
    wanted = request.outputs
    if wanted is None:
        chosen = [(tensor, binary_default) for tensor in tensors]
    else:
        by_name = {tensor.name: tensor for tensor in tensors}
        chosen = [_choose(output, by_name, binary_default, labels) for output in wanted]
    outputs: list[dict[str, Any]] = []
    raw: list[bytes | memoryview] = []
    for tensor, binary in chosen:
        described: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.array.shape),
        }
        if binary:
            data = to_binary(tensor)
            described["parameters"] = {"binary_data_size": len(data)}
            raw.append(data)
        else:
            described["data"] = to_json_data(tensor)
        outputs.append(described)
    message: dict[str, Any] = {"model_name": model_name, "model_version": model_version}
    if request.id:
        message["id"] = request.id
    message["outputs"] = outputs
    header = orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)
    return Written(header, raw)


Labels = Mapping[str, Sequence[str]]
"""Output name -> what its classes are called, for the classification extension."""


def _choose(
    output: RequestedOutput, by_name: Mapping[str, WireTensor], binary_default: bool, labels: Labels
) -> tuple[WireTensor, bool]:
    tensor = by_name.get(output.name)
    if tensor is None:
        raise InputError(output.name[:200], f"is no output of this model; it has {', '.join(by_name) or 'none'}")
    binary = output.parameters.get("binary_data", binary_default) is True
    classes = output.parameters.get("classification", 0)
    if type(classes) is not int or classes < 0:
        raise InputError(output.name, "classification must be the number of classes to give")
    return (classified(tensor, classes, labels.get(output.name, ())) if classes else tensor), binary


def classified(tensor: WireTensor, classes: int, labels: Sequence[str]) -> WireTensor:
    """The classification extension: the ``classes`` largest values of each row as ``value:index[:label]``.

    A tensor of one dimension is one row; else the first dimension counts rows. Raises ``InputError`` for BYTES.
    """
    array = tensor.array
    if tensor.datatype == BYTES:
        raise InputError(tensor.name, "is BYTES, which cannot be classified")
    if not array.size:
        raise InputError(tensor.name, f"is empty [{describe_shape(array.shape)}], so there is nothing to classify")
    values = to_json_data(tensor) if tensor.datatype == "BF16" else array
    rows = np.reshape(values, (array.shape[0], -1) if array.ndim > 1 else (1, -1))
    count = min(classes, rows.shape[1])
    elements: list[bytes] = []
    for row in rows:
        for index in np.argsort(-row.astype(np.float64), kind="stable")[:count]:
            label = f":{labels[index]}" if index < len(labels) else ""
            elements.append(f"{float(row[index]):f}:{index}{label}".encode())
    return bytes_tensor(tensor.name, elements, (rows.shape[0], count) if array.ndim > 1 else (count,))
