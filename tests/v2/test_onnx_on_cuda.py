"""ONNX files on a GPU, as far as that can be told without one: what is missing is said, not worked around."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from hotset.errors import FunctionError
from hotset.functions.model_files import FileSettings
from hotset.functions.model_files.function import make_class
from hotset.functions.runtime import Runtime


def model_file(directory: Path) -> Path:
    """y = -x."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "negative", [x], [y])
    path = directory / "negative.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_cuda_is_missed_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    runtime = Runtime(make_class(model_file(tmp_path), FileSettings(), module="test"), device="cuda:0")
    with pytest.raises(FunctionError, match="onnxruntime-gpu"):
        runtime.load()


def test_a_session_that_fell_back_to_the_cpu_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime only warns when it cannot load CUDA's libraries, and computes on the CPU."""
    preloaded = []
    made = []

    def session(path: str, providers: list[Any]) -> SimpleNamespace:
        made.append(providers)
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: preloaded.append(1), raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    runtime = Runtime(make_class(model_file(tmp_path), FileSettings(), module="test"), device="cuda:0")
    with pytest.raises(FunctionError, match="fell back to the CPU"):
        runtime.load()
    ((name, options), last), *_ = made
    assert (name, options["device_id"], last) == ("CUDAExecutionProvider", 0, "CPUExecutionProvider")
    assert preloaded == [1]
