"""ONNX files, run by ONNX Runtime on the CPU or on CUDA."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from hotset.errors import FunctionError, InputError
from hotset.functions.model_files.adapter import Adapter
from hotset.functions.model_files.onnx_header import Header, read_header
from hotset.functions.v2_types import TensorMetadata


class OnnxFile(Adapter):
    platform = "onnxruntime_onnx"
    torch = False
    typed = True

    @functools.cached_property
    def _header(self) -> Header:
        header = read_header(self.path)
        for each in (*header.inputs, *header.outputs):
            if each.datatype == "BF16":
                raise FunctionError(f"{each.name} is bfloat16, which numpy does not have: cast it inside the model")
        return header

    @property
    def inputs(self) -> Sequence[TensorMetadata]:
        return self._header.inputs

    @property
    def outputs(self) -> Sequence[TensorMetadata]:
        return self._header.outputs

    def beside(self) -> Sequence[str]:
        return self._header.external

    def load(self, device: str) -> None:
        try:
            import onnxruntime  # type: ignore[import-untyped]
        except ModuleNotFoundError:
            raise FunctionError("ONNX files need onnxruntime: pip install 'hotset[onnx]'") from None
        kind, _, index = device.partition(":")
        providers: list[Any] = ["CPUExecutionProvider"]
        if kind == "cuda":
            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                raise FunctionError("this onnxruntime knows no CUDA: install onnxruntime-gpu in its place")
            preload = getattr(onnxruntime, "preload_dlls", None)  # from 1.21: CUDA and cuDNN as pip installed them
            if preload is not None:
                preload()
            # Its arena doubles whenever it grows, unless it is told to take what it needs: others share the GPU.
            options = {"device_id": int(index or 0), "arena_extend_strategy": "kSameAsRequested"}
            providers.insert(0, ("CUDAExecutionProvider", options))
        self._session = onnxruntime.InferenceSession(str(self.path), providers=providers)
        if kind == "cuda" and "CUDAExecutionProvider" not in self._session.get_providers():
            raise FunctionError(
                "onnxruntime fell back to the CPU: install the CUDA and cuDNN that it names in the log"
                " (pip install 'onnxruntime-gpu[cuda,cudnn]')"
            )
        self._names = [each.name for each in self.inputs]
        self._wanted = [each.name for each in self.outputs]
        self._text = [each.datatype == "BYTES" for each in self.inputs]
        self._invalid = onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument

    def run(self, tensors: Sequence[Any]) -> Sequence[Any]:
        given = [_texts(each) if text else each for each, text in zip(tensors, self._text, strict=True)]
        try:
            results: list[Any] = self._session.run(self._wanted, dict(zip(self._names, given, strict=True)))
        except self._invalid as error:
            raise InputError("", _reason(error)) from None
        return results


def _texts(array: Any) -> Any:
    """BYTES elements as the strings that ONNX Runtime takes."""
    try:
        return np.array([element.decode() for element in array.reshape(-1)], object).reshape(array.shape)
    except UnicodeDecodeError:
        raise InputError("", "the model takes text: send BYTES that are UTF-8") from None


def _reason(error: Exception) -> str:
    """``[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions ...`` without what comes before."""
    return str(error).partition("INVALID_ARGUMENT : ")[2].strip()[:500] or str(error)[:500]
