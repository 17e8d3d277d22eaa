"""From a model file and how it is to be served to a class that fulfils the function contract."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from hotset.errors import ConfigurationError, FunctionError, InputError
from hotset.functions.annotations import codec_of, translate
from hotset.functions.contract import (
    DEFAULT_LOAD_TIMEOUT_S,
    DEFAULT_TIMEOUT_S,
    MAX_BATCH,
    OPTIONS_ATTRIBUTE,
    FunctionKind,
    FunctionOptions,
    function_name,
)
from hotset.functions.inspection import SIGNATURE_ATTRIBUTE
from hotset.functions.model_files.adapter import Adapter
from hotset.functions.model_files.declared import Declared, reconcile
from hotset.functions.model_files.formats import open_file
from hotset.functions.signature import Parameter, Signature
from hotset.functions.tensors import Tensor
from hotset.functions.units import parse_bytes, parse_duration
from hotset.functions.v2_tensors import BF16, BYTES, DTYPES
from hotset.functions.v2_types import TensorMetadata, Tensors

SPARE_RATIO = 1.25
SPARE_BYTES = 64 << 20
"""A model whose memory nobody declared is first expected to take its file's size, times and plus these."""


class FileSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model file is served; what is left out is read from the file or has its usual value."""

    name: str | None = None
    inputs: tuple[Declared, ...] = ()
    """What is known of inputs; a file that tells its own must agree."""
    outputs: tuple[Declared, ...] = ()
    max_rows: int = 0
    """Above 0: the first dimension counts rows, and a request may bring so many (Triton's max_batch_size)."""
    join: bool = False
    """Requests that wait are run together, up to ``max_rows`` rows (Triton's dynamic_batching)."""
    join_wait_s: float = 0.0
    """How long one may be held back for others to join it (Triton's max_queue_delay_microseconds)."""
    cpu: bool = False
    """Runs on the CPU and holds no GPU memory."""
    gpu_memory: str | int | None = None
    timeout: str | float | None = None
    load_timeout: str | float | None = None
    module: str | None = None
    """``FILE.py:CLASS``: the class that safetensors belong to."""
    trust_pickle: bool = False
    """The file may be a Python pickle, which runs the code it holds."""


def model_file(path: str | Path, settings: FileSettings | None = None) -> type:
    """The class that serves a model file; a relative path is seen from the file of the caller.

    Raises ``FunctionError`` for a file that cannot be served so, and says why.
    """
    caller = inspect.stack()[1].frame.f_globals
    folder = Path(caller["__file__"]).parent if "__file__" in caller else Path()
    return make_class(folder / path, settings or FileSettings(), module=str(caller.get("__name__", __name__)))


def make_class(path: Path, settings: FileSettings, *, module: str) -> type:
    """``model_file`` with nothing left to guess; ``module``: where the class claims to be from."""
    adapter = open_file(path, module=settings.module, trust_pickle=settings.trust_pickle)
    options = _options(adapter, settings)
    if settings.join and settings.max_rows < 2:
        raise FunctionError("requests cannot be joined unless max_batch_size is at least 2")

    class Model:
        def load(self, device: str) -> None:
            self.adapter = adapter
            adapter.load(device)

        def predict(self, *tensors: Any) -> Any:
            outputs = signature().tensors.outputs  # type: ignore[union-attr]
            if settings.join:
                return [_named(outputs, each) for each in run_joined(adapter, tensors, settings.max_rows)]
            if settings.max_rows:
                _rows(tensors, settings.max_rows)
            return _named(outputs, adapter.run(tensors))

    made: list[Signature] = []

    def signature() -> Signature:
        if not made:
            made.append(_signature(adapter, settings, options))
        return made[0]

    Model.__doc__ = f"Serves the file {path.name}."
    Model.__module__ = module
    setattr(Model, OPTIONS_ATTRIBUTE, options)
    setattr(Model, SIGNATURE_ATTRIBUTE, signature)
    return Model


def source_of(path: str, settings: FileSettings) -> str:
    """A Python file that serves a model file: what is deployed when somebody deploys the model file alone."""
    given = {field: value for field in settings.__struct_fields__ if (value := getattr(settings, field))}
    literal = repr(msgspec.to_builtins(given))
    return (
        f'"""Made by hotset: serves {Path(path).name!r}."""\n\n'
        "from hotset.functions.model_files import model_file, settings_from\n\n"
        f"Model = model_file({path!r}, settings_from({literal}))\n"
    )


def settings_from(values: dict[str, Any]) -> FileSettings:
    """Settings of plain values; raises ``FunctionError``."""
    try:
        return msgspec.convert(values, FileSettings)
    except msgspec.ValidationError as error:
        raise FunctionError(f"the model's settings cannot be read: {error}") from None


def run_joined(adapter: Adapter, columns: Sequence[Sequence[Any]], max_rows: int) -> list[Sequence[Any]]:
    """Run several requests together. ``columns``: for each input, the tensors of all requests.

    Requests join in order while their rows are ``max_rows`` at most and their other dimensions and datatypes agree.
    Raises ``InputError`` for a request with no rows, or too many: it fails again when it is run alone, and the others
    do not.
    """
    requests = list(zip(*columns, strict=True))
    counts = [_rows(request, max_rows) for request in requests]
    results: list[Sequence[Any]] = []
    first = 0
    while first < len(requests):
        last, rows = first + 1, counts[first]
        while (
            last < len(requests) and rows + counts[last] <= max_rows and _kind(requests[last]) == _kind(requests[first])
        ):
            rows += counts[last]
            last += 1
        results += _run_group(adapter, requests[first:last], counts[first:last])
        first = last
    return results


def _run_group(adapter: Adapter, requests: Sequence[Sequence[Any]], counts: Sequence[int]) -> list[Sequence[Any]]:
    if len(requests) == 1:
        return [adapter.run(requests[0])]
    joined = [_concatenate(column, adapter.torch) for column in zip(*requests, strict=True)]
    outputs = adapter.run(joined)
    if any(not len(each.shape) or each.shape[0] != sum(counts) for each in outputs):
        raise FunctionError("the model does not give one row of output per row of input: serve it without batching")
    results: list[Sequence[Any]] = []
    start = 0
    for count in counts:
        results.append([each[start : start + count] for each in outputs])
        start += count
    return results


def _concatenate(tensors: Sequence[Any], torch_tensors: bool) -> Any:
    if torch_tensors:
        import torch

        return torch.cat(list(tensors))
    return np.concatenate(tensors)


def _kind(request: Sequence[Any]) -> list[tuple[Any, tuple[int, ...]]]:
    return [(tensor.dtype, tuple(tensor.shape[1:])) for tensor in request]


def _rows(tensors: Sequence[Any], max_rows: int) -> int:
    """How many rows one request brings: every input has the same number."""
    counts = {tensor.shape[0] if len(tensor.shape) else 0 for tensor in tensors}
    if len(counts) != 1 or not 1 <= next(iter(counts)) <= max_rows:
        shown = ", ".join(str(count) for count in sorted(counts))
        raise InputError("", f"the inputs bring {shown} rows; all must bring the same number, from 1 to {max_rows}")
    return int(counts.pop())


def _named(outputs: Sequence[TensorMetadata], results: Sequence[Any]) -> dict[str, Any]:
    if len(outputs) != len(results):
        raise FunctionError(f"the model gave {len(results)} outputs, {len(outputs)} were expected: name them all")
    return {each.name: result for each, result in zip(outputs, results, strict=True)}


def _signature(adapter: Adapter, settings: FileSettings, options: FunctionOptions) -> Signature:
    batched = settings.max_rows > 0
    inputs = reconcile("input", adapter.inputs, settings.inputs, typed=adapter.typed, batched=batched)
    outputs = reconcile("output", adapter.outputs, settings.outputs, typed=adapter.typed, batched=batched)
    labels = {each.name: list(each.labels) for each in settings.outputs if each.labels}
    known = adapter.typed or bool(settings.inputs)
    return Signature(
        name=options.name,
        parameters=[_parameter(each, torch=adapter.torch, known=known) for each in inputs],
        returns=dict[str, Any],
        description=f"The model file {adapter.path.name}.",
        batched=options.max_batch > 1,
        tensors=Tensors(inputs=inputs, outputs=outputs, platform=adapter.platform, labels=labels),
    )


def _parameter(tensor: TensorMetadata, *, torch: bool, known: bool) -> Parameter:
    dtype = None if not known or tensor.datatype in (BYTES, BF16) else DTYPES[tensor.datatype].name
    shape = tuple(None if length < 0 else length for length in tensor.shape) if known else None
    base: Any = np.ndarray
    if torch:
        import torch as framework

        base = framework.Tensor
    annotation = Annotated[base, Tensor(dtype, shape, finite=False)]
    return Parameter(
        name=tensor.name,
        annotation=translate(annotation, tensor.name),
        codec=codec_of(annotation),
        required=True,
    )


def _options(adapter: Adapter, settings: FileSettings) -> FunctionOptions:
    try:
        memory_bytes = None if settings.gpu_memory is None else parse_bytes(settings.gpu_memory, "gpu_memory")
        timeout_s = DEFAULT_TIMEOUT_S if settings.timeout is None else parse_duration(settings.timeout, "timeout")
        load_timeout_s = (
            DEFAULT_LOAD_TIMEOUT_S
            if settings.load_timeout is None
            else parse_duration(settings.load_timeout, "load_timeout")
        )
    except ConfigurationError as error:
        raise FunctionError(str(error)) from None
    if memory_bytes is None and not settings.cpu:
        memory_bytes = round(_weights_bytes(adapter) * SPARE_RATIO) + SPARE_BYTES
    return FunctionOptions(
        name=settings.name or function_name(adapter.path.stem),
        kind=FunctionKind.CPU if settings.cpu else FunctionKind.GPU,
        gpu_memory_bytes=memory_bytes,
        max_batch=min(settings.max_rows, MAX_BATCH) if settings.join else 1,
        max_batch_wait_s=settings.join_wait_s if settings.join else 0.0,
        timeout_s=timeout_s,
        load_timeout_s=load_timeout_s,
    )


def _weights_bytes(adapter: Adapter) -> int:
    """The file, and those beside it that belong to it."""
    path = adapter.path
    files = [path, *(path.parent / name for name in adapter.beside())]
    return sum(each.stat().st_size for each in files if each.is_file())
