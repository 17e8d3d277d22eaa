"""Between the protocol's gRPC messages and its JSON: one decoder and one encoder, in the worker, serve both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np

from hotset.functions.v2_tensors import BYTES, DTYPES, WireTensor, bytes_tensor, to_binary
from hotset.gateway.v2.inference import Response
from hotset.gateway.v2.refusal import Refusal
from hotset.protocol.messages import message_class

InferResponse = message_class("ModelInferResponse")

FINAL_RESPONSE = "triton_final_response"
"""Response parameter that tells the last response to a streamed request."""
WANTS_EMPTY_FINAL = "triton_enable_empty_final_response"

# Datatype -> the field of InferTensorContents that carries it.
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}

_encode = msgspec.json.Encoder().encode


def request_parts(request: Any) -> tuple[bytes, bytes]:
    """A ``ModelInferRequest`` as the JSON header and the binary data behind it; raises ``Refusal`` (400)."""
    raw = list(request.raw_input_contents)
    inputs: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for each in request.inputs:
        parameters = _values(each.parameters)
        if "shared_memory_region" not in parameters:
            if not request.raw_input_contents:
                data = _contents(each)
            elif raw and not each.HasField("contents"):
                data = raw.pop(0)
            else:
                raise Refusal(400, f"{each.name}: send the data of all inputs as raw_input_contents, or of none")
            parameters["binary_data_size"] = len(data)
            parts.append(data)
        inputs.append(
            {"name": each.name, "datatype": each.datatype, "shape": list(each.shape), "parameters": parameters}
        )
    if raw:
        raise Refusal(400, f"{len(raw)} of the raw_input_contents belong to no input")
    header: dict[str, Any] = {
        "id": request.id,
        "parameters": {**_values(request.parameters), "binary_data_output": True},
        "inputs": inputs,
    }
    if request.outputs:
        header["outputs"] = [{"name": each.name, "parameters": _values(each.parameters)} for each in request.outputs]
    return _encode(header), parts[0] if len(parts) == 1 else b"".join(parts)


def infer_response(answer: Response) -> Any:
    """An answer as a ``ModelInferResponse``."""
    message = msgspec.json.decode(answer.header)
    response = InferResponse(
        model_name=message["model_name"], model_version=message["model_version"], id=message.get("id", "")
    )
    binary = memoryview(answer.binary)
    at = 0
    for output in message["outputs"]:
        parameters = output.get("parameters", {})
        size = parameters.pop("binary_data_size", 0)
        tensor = response.outputs.add(name=output["name"], datatype=output["datatype"], shape=output["shape"])
        for name, value in parameters.items():
            set_parameter(tensor.parameters[name], value)
        response.raw_output_contents.append(bytes(binary[at : at + size]))
        at += size
    return response


def final_response(request: Any, version: str) -> Any:
    """The empty response that ends a streamed one, for the clients that ask for it."""
    response = InferResponse(model_name=request.model_name, model_version=version, id=request.id)
    set_parameter(response.parameters[FINAL_RESPONSE], True)
    return response


def set_parameter(parameter: Any, value: Any) -> None:
    """A Python value into an ``InferParameter``."""
    match value:
        case bool():
            parameter.bool_param = value
        case int():
            parameter.int64_param = value
        case float():
            parameter.double_param = value
        case _:
            parameter.string_param = str(value)


def _values(parameters: Any) -> dict[str, Any]:
    """A map of parameters as Python values."""
    found = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        found[name] = None if choice is None else getattr(parameter, choice)
    return found


def _contents(tensor: Any) -> bytes:
    """An input's typed contents as raw data; raises ``Refusal`` (400)."""
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        known = tensor.datatype in DTYPES
        hint = "send it as raw_input_contents" if known else f"use one of {', '.join(DTYPES)}"
        raise Refusal(400, f"{tensor.name}: datatype {tensor.datatype[:40]!r} has no typed contents; {hint}")
    values: Iterable[Any] = getattr(tensor.contents, field)
    if tensor.datatype == BYTES:
        return bytes(to_binary(bytes_tensor(tensor.name, list(values))))
    try:
        array = np.array(values, DTYPES[tensor.datatype])
    except OverflowError:
        raise Refusal(400, f"{tensor.name}: has numbers outside the range of {tensor.datatype}") from None
    return bytes(to_binary(WireTensor(tensor.name, tensor.datatype, array)))
