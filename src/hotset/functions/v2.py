"""Open Inference Protocol v2 as one more way to call a function: tensors by name in, tensors by name out.

The gateway forwards an inference request unread. Its content type says what the worker must know::

    application/vnd.hotset.v2; model=NAME; version=V             the body is the JSON request
    application/vnd.hotset.v2; ...; header=N                     N bytes of JSON, then raw tensor data
    application/vnd.hotset.v2; ...; header=accept                the JSON is in the call's ``accept`` (Latin-1 for its
                                                                 bytes), the body is the raw data alone, hence aligned
    application/vnd.hotset.v2; warm                              be loaded; answered without calling ``predict``

It is never taken from a client: the gateway makes it. The answer is ``application/json`` (all of it JSON) or
``application/vnd.hotset.v2; header=N``; a stream's items are framed by ``frame``.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from hotset.errors import FunctionError, InputError
from hotset.functions.annotations import codec_of, decode_hook
from hotset.functions.codecs import Special, special_kind
from hotset.functions.encoding import Encoded, StreamFormat, to_json
from hotset.functions.media import JSON, OCTET_STREAM, V2, Body, MediaType, parse_media_type
from hotset.functions.problems import UNREADABLE, input_error
from hotset.functions.signature import Parameter, Signature
from hotset.functions.tensors import Array, TensorCodec
from hotset.functions.v2_tensors import (
    BF16,
    BYTES,
    DTYPES,
    WireTensor,
    bytes_tensor,
    datatype_of,
    json_tensor,
    widened,
)
from hotset.functions.v2_types import OUTPUT, Field, Form, TensorType, output_fields, tensor_type
from hotset.functions.v2_wire import InferRequest, Labels, Parameters, read_request, write_response

WARM = f"{V2}; warm"
MAX_HEADER_IN_ACCEPT_BYTES = 32_000
"""A larger JSON header stays in front of the body."""

_FRAME = struct.Struct("<II")


class V2Writer:
    """Writes what ``predict`` returned as the answer to one inference request."""

    def __init__(self, plan: Plan, request: InferRequest, model: str, version: str) -> None:
        self._plan = plan
        self._request = request
        self._model = model
        self._version = version

    def encode(self, result: Any) -> Encoded:
        """The response; raises ``InputError`` for an output that the caller wants and there is not, ``FunctionError``
        for a result that v2 cannot hold."""
        try:
            written = write_response(
                self._request, self._model, self._version, self._plan.outputs(result), self._plan.labels
            )
        except ValueError as error:
            raise FunctionError(f"predict's result cannot be sent: {error}") from None
        if not written.raw:
            return Encoded(JSON, written.header)
        return Encoded(f"{V2}; header={len(written.header)}", written.header, written.raw)

    @property
    def stream(self) -> StreamFormat:
        """Every item of a stream as a response of its own."""
        return StreamFormat(content_type=f"{V2}; stream", item=self._item, error=lambda body: frame(to_json(body)))

    def _item(self, result: Any) -> bytes:
        encoded = self.encode(result)
        return frame(b"".join((encoded.body, *encoded.rest)), header_bytes(encoded.content_type))


class WarmWriter:
    """The answer to a call that only wants the model to be loaded."""

    stream = StreamFormat(content_type=JSON, item=to_json, error=to_json)

    def encode(self, result: Any) -> Encoded:
        return Encoded(JSON, b"{}")


def decode(signature: Signature, body: Body, content_type: str, accept: str) -> tuple[tuple[Any, ...], V2Writer]:
    """An inference request -> the arguments in the order of ``signature.parameters``, and what writes the answer.

    Raises ``InputError``. Tensors are views of ``body`` where that is a memoryview (shared memory, read-only), else of
    one copy of it.
    """
    media = parse_media_type(content_type)
    where = media.parameters.get("header")
    if where is None:
        header, binary = body, memoryview(b"")
    elif where == "accept":
        header, binary = accept.encode("latin-1"), memoryview(body)
    else:
        size = int(where)
        header, binary = body[:size], memoryview(body)[size:]
    if isinstance(body, bytes):
        binary = memoryview(bytearray(binary))  # small, so a copy is cheap and gives arrays that may be written to
    request = read_request(header, binary)
    plan = plan_of(signature)
    arguments = plan.arguments(request)
    return arguments, V2Writer(plan, request, media.parameters.get("model", ""), media.parameters.get("version", ""))


def frame(response: bytes, header: int | None = None) -> bytes:
    """One item of a streamed answer: how long its JSON and all of it are, then the response."""
    return _FRAME.pack(len(response) if header is None else header, len(response)) + response


def unframe(chunk: Body) -> tuple[Body, int]:
    """A streamed item's response, and how many bytes of it are JSON."""
    header, size = _FRAME.unpack_from(chunk)
    return chunk[_FRAME.size : _FRAME.size + size], header


def header_bytes(content_type: str) -> int | None:
    """How many bytes of an answer of this content type are JSON; None: all of them."""
    _, found, size = content_type.partition("header=")
    return int(size) if found else None


class Plan:
    """How one signature's values and tensors correspond; made once per function."""

    def __init__(self, signature: Signature) -> None:
        self.labels: Labels = signature.tensors.labels if signature.tensors is not None else {}
        self._parameters = signature.parameters
        self._readers = {parameter.name: _reader(parameter) for parameter in signature.parameters}
        self._fields = output_fields(signature.returns) if signature.tensors is None else None
        self._types = {field.name: tensor_type(field.annotation) for field in self._fields or ()}
        self._is_tuple = self._fields is not None and isinstance(_info(signature.returns), msgspec.inspect.TupleType)
        self._is_lone = self._fields is not None and self._fields == [Field(OUTPUT, signature.returns)]

    def arguments(self, request: InferRequest) -> tuple[Any, ...]:
        """The arguments of ``predict``; raises ``InputError``."""
        readers = self._readers
        for name in request.inputs:
            if name not in readers:
                raise InputError(name[:200], f"is no input of this model; it takes {', '.join(readers) or 'none'}")
        if request.parameters:
            _check_parameters(request.parameters)
        values = []
        for parameter in self._parameters:
            tensor = request.inputs.get(parameter.name)
            if tensor is not None:
                values.append(readers[parameter.name](tensor))
            elif parameter.name in request.parameters:
                values.append(_convert(request.parameters[parameter.name], parameter))
            elif parameter.required:
                raise InputError(parameter.name, "is missing from the inputs")
            else:
                values.append(parameter.default)
        return tuple(values)

    def outputs(self, result: Any) -> list[WireTensor]:
        """What ``predict`` returned as tensors; raises ``ValueError`` for what v2 cannot hold."""
        types = self._types
        if self._is_lone:
            return [to_tensor(OUTPUT, result, types[OUTPUT])]
        if self._is_tuple:
            return [to_tensor(name, value, types[name]) for name, value in zip(types, result, strict=True)]
        if isinstance(result, Mapping):
            named: Mapping[str, Any] = result
        elif isinstance(result, msgspec.Struct):
            named = msgspec.structs.asdict(result)
        elif dataclasses.is_dataclass(result) and not isinstance(result, type):
            named = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
        else:
            return [to_tensor(OUTPUT, result)]
        if types:
            return [to_tensor(name, named.get(name), types[name]) for name in types]
        if all(_is_array(value) for value in named.values()):
            return [to_tensor(str(name), value) for name, value in named.items()]
        return [json_tensor(OUTPUT, result)]


@functools.lru_cache(maxsize=16)
def plan_of(signature: Signature) -> Plan:
    """The plan of a signature; a process serves one function, so few are ever kept."""
    return Plan(signature)


def to_tensor(name: str, value: Any, kind: TensorType | None = None) -> WireTensor:
    """A value as a tensor: of the type its annotation declared (``kind``), else of what it is.

    Raises ``ValueError`` for a dtype that the protocol does not have.
    """
    cls: type = type(value)
    special = special_kind(cls)
    if special is Special.TENSOR:
        return _from_torch(name, value)
    if special is Special.IMAGE:
        from hotset.functions.images import to_file

        return bytes_tensor(name, [to_file(value, "PNG")])
    if special is Special.ARRAY or isinstance(value, np.generic):
        array = np.asarray(value)
        datatype = datatype_of(array.dtype)
        return WireTensor(name, datatype, _encoded_elements(array) if datatype == BYTES else _at_least_1d(array))
    if kind is not None and kind.form is Form.JSON:
        return json_tensor(name, value)
    if isinstance(value, str | bytes | bytearray | memoryview):
        return bytes_tensor(name, [_element(value)])
    if isinstance(value, bool | int | float):
        return _from_numbers(name, [value], kind, value)
    if isinstance(value, list | tuple) and (kind is not None or _plain_leaves(value)):
        return _from_numbers(name, value, kind, value)
    return json_tensor(name, value)


def _from_numbers(name: str, values: Sequence[Any], kind: TensorType | None, whole: Any) -> WireTensor:
    """Lists of numbers or strings; what turns out not to be rectangular is JSON."""
    wanted = None if kind is None else DTYPES[kind.datatype]
    try:
        if wanted is not None and wanted.kind == "O":
            return WireTensor(name, BYTES, _encoded_elements(np.array(values, object)))
        array = np.array(values, wanted)
        datatype = datatype_of(array.dtype)
    except (ValueError, TypeError, OverflowError):
        return json_tensor(name, whole)
    return WireTensor(name, datatype, _encoded_elements(array) if datatype == BYTES else array)


def _plain_leaves(value: Any) -> bool:
    while isinstance(value, list | tuple):
        if not value:
            return True
        value = value[0]
    return isinstance(value, bool | int | float | str | bytes)


def _encoded_elements(array: Array) -> Array:
    out = np.empty(max(array.size, 0), object)
    out[:] = [_element(element) for element in array.reshape(-1)]
    return out.reshape(array.shape or (1,))


def _element(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "replace")
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    return to_json(value)


def _at_least_1d(array: Array) -> Array:
    return array if array.ndim else array.reshape(1)


def _is_array(value: Any) -> bool:
    cls: type = type(value)
    return special_kind(cls) in (Special.ARRAY, Special.TENSOR)


def _from_torch(name: str, tensor: Any) -> WireTensor:
    import torch

    host = tensor.detach().cpu().contiguous()
    if host.dtype is torch.bfloat16:
        return WireTensor(name, BF16, _at_least_1d(host.view(torch.int16).numpy().view(np.uint16)))
    try:
        array = host.numpy()
    except TypeError as error:
        raise ValueError(f"{name} has a dtype that the protocol does not have ({error})") from None
    return WireTensor(name, datatype_of(array.dtype), _at_least_1d(array))


def _info(annotation: Any) -> msgspec.inspect.Type | None:
    try:
        return msgspec.inspect.type_info(annotation)
    except (TypeError, ValueError):
        return None


def _check_parameters(parameters: Parameters) -> None:
    for name in ("sequence_id", "sequence_start", "sequence_end"):
        if parameters.get(name):
            raise InputError(name, "models here keep no state between requests; send it without a sequence")


def _convert(value: Any, parameter: Parameter) -> Any:
    """A Python value as the argument: msgspec checks its type and its bounds."""
    try:
        return msgspec.convert(value, parameter.annotation, dec_hook=decode_hook)
    except UNREADABLE as error:
        raise input_error(error, parameter.name, parameter.name, (), b"") from None


Reader = Callable[[WireTensor], Any]
"""Makes an argument of a tensor."""


def _reader(parameter: Parameter) -> Reader:
    codec = parameter.codec
    if isinstance(codec, TensorCodec):
        return functools.partial(_read_array, parameter.name, codec)
    kind = tensor_type(parameter.annotation)
    if kind.form is Form.JSON:
        return functools.partial(_read_json, parameter)
    return functools.partial(_read_plain, parameter, kind)


def _read_array(name: str, codec: TensorCodec, tensor: WireTensor) -> Any:
    array = tensor.array
    try:
        if tensor.datatype == BF16:
            if codec.torch and codec.spec.dtype is None:
                return _torch_bfloat16(codec, array)
            array = widened(array)
        elif tensor.datatype == BYTES and (codec.torch or codec.spec.dtype is not None):
            raise ValueError(f"is BYTES, expected {codec.spec}")
        if codec.torch:
            with warnings.catch_warnings():
                # torch warns of read-only memory; this memory is the call's own, so writing to it harms nobody.
                warnings.simplefilter("ignore", UserWarning)
                return codec.from_array(array)
        return codec.from_array(array)
    except ValueError as error:
        raise InputError(name, str(error)) from None


def _torch_bfloat16(codec: TensorCodec, bits: Array) -> Any:
    import torch

    codec.check_shape(bits.shape)
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)


def _read_plain(parameter: Parameter, kind: TensorType, tensor: WireTensor) -> Any:
    """Numbers, strings, and lists of them."""
    array = widened(tensor.array) if tensor.datatype == BF16 else tensor.array
    if kind.form is Form.SCALAR:
        if array.size != 1:
            raise InputError(parameter.name, f"takes one value, but the tensor holds {array.size}")
        value = array.reshape(-1)[0]
        value = value.item() if isinstance(value, np.generic) else value
    else:
        depth = len(kind.shape)
        if array.ndim != depth:
            raise InputError(parameter.name, f"takes a tensor of {depth} dimensions, but got {array.ndim}")
        value = array.tolist()
    if tensor.datatype == BYTES and kind.text:
        value = _texts(parameter.name, value)
    return _convert(value, parameter)


def _texts(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_texts(name, each) for each in value]
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InputError(name, f"not UTF-8 at byte {error.start}") from None


def _read_json(parameter: Parameter, tensor: WireTensor) -> Any:
    """One BYTES element with JSON, or with the file that the type's codec reads."""
    if tensor.datatype != BYTES:
        return _convert(tensor.array.tolist(), parameter)
    if tensor.array.size != 1:
        raise InputError(parameter.name, f"takes one BYTES element, but the tensor holds {tensor.array.size}")
    element: bytes = tensor.array.reshape(-1)[0]
    codec = codec_of(parameter.annotation)
    media = MediaType(name=OCTET_STREAM, parameters={})
    try:
        if codec is not None and codec.accepts(media, element):
            return codec.from_raw(element, media)
        return msgspec.json.decode(element, type=parameter.annotation, dec_hook=decode_hook)
    except UNREADABLE as error:
        if not isinstance(error, msgspec.ValidationError):
            raise InputError(parameter.name, f"not valid JSON: {error}") from None
        raise input_error(error, parameter.name, parameter.name, (JSON,), element) from None
    except ValueError as error:
        raise InputError(parameter.name, str(error)) from None
