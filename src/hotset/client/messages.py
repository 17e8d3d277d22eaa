"""Requests and answers of the client as values: no connection, no time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import msgspec
import numpy as np

from hotset.errors import ConfigurationError, HotsetError
from hotset.functions.tensors import Array
from hotset.functions.v2_tensors import (
    BF16,
    BYTES,
    WireTensor,
    datatype_of,
    from_binary,
    from_json,
    to_binary,
    widened,
)
from hotset.functions.v2_types import TensorMetadata as TensorMetadata

HEADER_LENGTH = "Inference-Header-Content-Length"
ALIGNMENT_BYTES = 64
"""The JSON is padded to a multiple of this, so that the tensors behind it are aligned where the server puts them."""

_encode = msgspec.json.Encoder().encode


class InferenceError(HotsetError):
    """The server refused or failed a request; ``status`` is HTTP's (0: no answer came)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ModelMetadata(msgspec.Struct, frozen=True):
    """A model's inputs and outputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelStatus(msgspec.Struct, frozen=True):
    """A line of the server's list of models."""

    name: str
    version: str = ""
    state: str = ""
    """``READY`` or ``UNAVAILABLE``."""
    reason: str = ""


class InferResult(msgspec.Struct, frozen=True, kw_only=True):
    """The outputs of one inference, and what it took."""

    model_name: str
    model_version: str
    id: str
    outputs: dict[str, Any]
    """Name -> numpy array. BYTES are arrays of ``bytes`` objects, BF16 is widened to float32."""
    call_id: str
    """For ``hotset explain``."""
    gpu: str
    """Empty: it ran on no GPU."""
    hit: bool
    """The model was in GPU memory already."""
    queue_s: float
    load_s: float
    inference_s: float

    def __getitem__(self, name: str) -> Array:
        array: Array = self.outputs[name]
        return array


class Request(msgspec.Struct, frozen=True):
    """One HTTP request."""

    method: str
    path: str
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    body: bytes | None = None


def infer_request(
    model: str,
    inputs: Mapping[str, Any],
    *,
    version: str = "",
    outputs: Sequence[str] | None = None,
    parameters: Mapping[str, bool | int | float | str] | None = None,
    request_id: str = "",
    timeout_s: float | None = None,
) -> Request:
    """An inference; raises ``ConfigurationError`` for a value that is no tensor."""
    described: list[dict[str, Any]] = []
    raw: list[bytes | memoryview] = []
    for name, value in inputs.items():
        tensor = to_wire(name, value)
        data = to_binary(tensor)
        shape = list(tensor.array.shape)
        described.append(
            {
                "name": name,
                "datatype": tensor.datatype,
                "shape": shape,
                "parameters": {"binary_data_size": len(data)},
            }
        )
        raw.append(data)
    message: dict[str, Any] = {"inputs": described, "parameters": {**(parameters or {}), "binary_data_output": True}}
    if request_id:
        message["id"] = request_id
    if outputs is not None:
        message["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    header = _encode(message)
    header += b" " * (-len(header) % ALIGNMENT_BYTES)
    headers = {
        "Content-Type": "application/octet-stream",
        HEADER_LENGTH: str(len(header)),
    }
    if timeout_s is not None:
        headers["X-Hotset-Timeout"] = f"{timeout_s:g}"
    return Request("POST", f"{_model_path(model, version)}/infer", headers, b"".join((header, *raw)))


def json_request(method: str, path: str, body: Any = None) -> Request:
    if body is None:
        return Request(method, path)
    return Request(method, path, {"Content-Type": "application/json"}, _encode(body))


def metadata_request(model: str, version: str) -> Request:
    return json_request("GET", _model_path(model, version))


def ready_request(model: str, version: str) -> Request:
    return json_request("GET", f"{_model_path(model, version)}/ready" if model else "/v2/health/ready")


def index_request() -> Request:
    return json_request("POST", "/v2/repository/index", {})


def load_request(model: str, verb: str) -> Request:
    return json_request("POST", f"/v2/repository/models/{quote(model, safe='')}/{verb}", {})


def read_result(headers: Mapping[str, str], body: bytes) -> InferResult:
    """A successful answer; raises ``InferenceError`` for one that is not the protocol's."""
    declared = headers.get(HEADER_LENGTH.lower())
    size = len(body) if declared is None else int(declared)
    try:
        message = msgspec.json.decode(memoryview(body)[:size], type=_Answer)
        outputs: dict[str, Any] = {}
        at = size
        for each in message.outputs:
            binary = each.parameters.get("binary_data_size")
            if binary is None:
                array = from_json(each.datatype, each.shape, memoryview(each.data))
            else:
                array = from_binary(each.datatype, each.shape, memoryview(body)[at : at + binary])
                at += binary
            outputs[each.name] = widened(array) if each.datatype == BF16 else array
    except (msgspec.MsgspecError, ValueError) as error:
        raise InferenceError(200, f"the answer is no v2 inference response: {error}") from None
    return InferResult(
        model_name=message.model_name,
        model_version=message.model_version,
        id=message.id,
        outputs=outputs,
        call_id=headers.get("x-call-id", ""),
        gpu=headers.get("x-hotset-gpu", ""),
        hit=headers.get("x-hotset-cache") == "hit",
        queue_s=float(headers.get("x-hotset-queue-seconds", 0)),
        load_s=float(headers.get("x-hotset-load-seconds", 0)),
        inference_s=float(headers.get("x-hotset-inference-seconds", 0)),
    )


def read_error(status: int, body: bytes) -> InferenceError:
    """What the server says is wrong."""
    try:
        message = msgspec.json.decode(body)["error"]
    except (msgspec.MsgspecError, KeyError, TypeError):
        message = f"HTTP {status}: {body[:200].decode('utf-8', 'replace')}"
    return InferenceError(status, str(message))


def to_wire(name: str, value: Any) -> WireTensor:
    """A numpy array, a torch tensor, a number, a string, bytes, or lists of these, as a tensor.

    Raises ``ConfigurationError`` for anything else.
    """
    if type(value).__module__.partition(".")[0] == "torch":
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            import torch

            return WireTensor(name, BF16, value.contiguous().view(torch.int16).numpy().view(np.uint16))
        value = value.numpy()
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":
        return WireTensor(name, BF16, np.ascontiguousarray(array).view(np.uint16))
    if array.ndim == 0:
        array = array.reshape(1)
    try:
        datatype = datatype_of(array.dtype)
        return WireTensor(name, datatype, _as_bytes(array) if datatype == BYTES else array)
    except ValueError as error:
        raise ConfigurationError(f"{name} is no tensor: {error}") from None


class _Output(msgspec.Struct, frozen=True):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = msgspec.field(default_factory=dict)
    data: msgspec.Raw = msgspec.Raw(b"[]")


class _Answer(msgspec.Struct, frozen=True):
    model_name: str
    model_version: str = ""
    id: str = ""
    outputs: list[_Output] = msgspec.field(default_factory=list)


def _as_bytes(array: Array) -> Array:
    elements = np.empty(array.shape, object)
    flat = elements.reshape(-1)
    for index, element in enumerate(array.reshape(-1)):
        if isinstance(element, str):
            flat[index] = element.encode()
        elif isinstance(element, bytes):
            flat[index] = element
        else:
            raise ValueError(f"it holds a {type(element).__name__}; give numbers, strings or bytes")
    return elements


def _model_path(model: str, version: str) -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path
