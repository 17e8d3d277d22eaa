"""ONNX sessions are made of the converted file where that answers the same, and of the original wherever it may not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from hotset.node import read_ahead
from hotset.node.read_ahead import ReadAhead
from hotset.node.worker import converted_sessions
from hotset.node.worker.check import convert_and_check
from hotset.node.worker.converted import folder_of
from hotset.node.worker.converted_sessions import accept, convert_sessions, watched_sessions, weights_twin_of
from hotset.node.worker.fast_load import fast_load

MANY = 1 << 40
WIDTH = 512
EQUAL = "equal to the ordinary load, bit by bit"
FUNCTION = """
import onnxruntime
import hotset

@hotset.function(gpu_memory="10MiB")
class Model:
    def load(self, device: str) -> None:
        %s

    def predict(self) -> int:
        return 1
"""


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of one file with a megabyte of weights, which counts as large."""
    monkeypatch.setattr(converted_sessions, "LEAST_BYTES", 1 << 20)
    folder = tmp_path / "bundle"
    folder.mkdir()
    write_model(folder / "net.onnx")
    return folder


def write_model(path: Path) -> None:
    weights = np.random.default_rng(1).standard_normal((WIDTH, WIDTH)).astype("float32")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", WIDTH]) for name in "xy")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        *("net", [x], [y], [numpy_helper.from_array(weights, "w")]),
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def convert(bundle: Path) -> None:
    names = convert_sessions(str(bundle), MANY)
    assert names == ["net.onnx"]
    accept(str(bundle), names, names)


def answer(session: Any) -> Any:
    return session.run(None, {"x": np.linspace(-1, 1, 3 * WIDTH, dtype="float32").reshape(3, WIDTH)})[0]


def mapped(bundle: Path, *args: Any, **kwargs: Any) -> int:
    """How many bytes of a session's weights are mapped, if it is made so in a fast load; its answers are right."""
    path = str(bundle / "net.onnx")
    with fast_load(str(bundle)) as made:
        session = onnxruntime.InferenceSession(path, *args, **kwargs)
    assert np.allclose(answer(session), answer(onnxruntime.InferenceSession(path)), rtol=1e-4, atol=1e-4)
    assert [each.session for each in made] == [session]
    return made[0].mapped_bytes


def test_a_session_is_made_of_the_converted_file_and_answers_the_same(bundle: Path) -> None:
    size = (bundle / "net.onnx").stat().st_size
    assert mapped(bundle) == 0
    convert(bundle)
    assert sorted(os.listdir(f"{folder_of(str(bundle))}/net.onnx")) == ["graph.onnx", "origin.json", "weights"]
    with fast_load(str(bundle)):
        session = onnxruntime.InferenceSession(bundle / "net.onnx", providers=["CPUExecutionProvider"])
    assert f"{folder_of(str(bundle))}/net.onnx/weights" in Path("/proc/self/maps").read_text()
    ordinary = onnxruntime.InferenceSession(bundle / "net.onnx", providers=["CPUExecutionProvider"])
    assert np.array_equal(answer(session), answer(ordinary))
    session.set_providers(["CPUExecutionProvider"])
    assert session._model_path == str(bundle / "net.onnx"), "it is made anew of the original"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    assert mapped(bundle) == mapped(bundle, options) == size


def test_what_the_converted_file_was_not_made_for_is_made_of_the_original(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(bundle)
    assert mapped(bundle)
    basic, saving = onnxruntime.SessionOptions(), onnxruntime.SessionOptions()
    basic.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    saving.optimized_model_filepath = str(tmp_path / "saved.onnx")
    assert not mapped(bundle, basic)
    assert not mapped(bundle, saving)
    assert not mapped(bundle, disabled_optimizers=["ConstantFolding"])
    assert not mapped(bundle, None, ["CPUExecutionProvider"], [{}])
    assert not mapped(bundle, providers=["AzureExecutionProvider", "CPUExecutionProvider"])
    with fast_load(str(bundle)) as made:
        onnxruntime.InferenceSession((bundle / "net.onnx").read_bytes())
        write_model(tmp_path / "elsewhere.onnx")
        onnxruntime.InferenceSession(tmp_path / "elsewhere.onnx")
    assert [each.mapped_bytes for each in made] == [0, 0]
    with monkeypatch.context() as patched:
        patched.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
        assert not mapped(bundle), "which provider it gets is not known"
    with monkeypatch.context() as patched:
        patched.setattr(converted_sessions, "_cpu", lambda: "of another machine")
        assert not mapped(bundle)
    with monkeypatch.context() as patched:
        patched.setattr(onnxruntime, "__version__", "0.1")
        assert not mapped(bundle)
    assert mapped(bundle)


def test_a_file_that_was_changed_or_broken_since_is_read_itself(bundle: Path) -> None:
    convert(bundle)
    twin = Path(folder_of(str(bundle))) / "net.onnx"
    graph = (twin / "graph.onnx").read_bytes()
    (twin / "graph.onnx").write_bytes(b"garbage")
    assert not mapped(bundle)
    (twin / "graph.onnx").write_bytes(graph)
    assert mapped(bundle)
    os.utime(bundle / "net.onnx", ns=(1, 1))
    assert not mapped(bundle)


def test_no_more_memory_disk_or_files_are_taken_than_may_be(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bundle / "broken.onnx").write_bytes(bytes(2 << 20))
    assert convert_sessions(str(bundle), 2 << 20) == []
    monkeypatch.setattr(converted_sessions, "MOST_FILES", 0)
    assert convert_sessions(str(bundle), MANY) == []
    monkeypatch.setattr(converted_sessions, "MOST_FILES", 2)
    assert convert_sessions(str(bundle), MANY) == ["net.onnx"]
    monkeypatch.setattr(converted_sessions, "LEAST_BYTES", 16 << 20)
    assert convert_sessions(str(bundle), MANY) == []
    monkeypatch.setattr(converted_sessions, "LEAST_BYTES", 1 << 20)
    usage = converted_sessions.shutil.disk_usage(bundle)
    monkeypatch.setattr(converted_sessions.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert convert_sessions(str(bundle), MANY) == []


def deployed(bundle: Path, name: str, load: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the check after a deploy of a function with this load says."""
    monkeypatch.chdir(bundle)
    monkeypatch.syspath_prepend(str(bundle))
    (bundle / f"{name}.py").write_text(FUNCTION % load)
    return convert_and_check(str(bundle), f"{name}:Model", MANY).text


def test_it_is_used_once_the_outputs_of_the_functions_own_sessions_were_compared(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = "self.session = onnxruntime.InferenceSession('net.onnx')"
    convert_sessions(str(bundle), MANY)
    assert not mapped(bundle), "it was not compared"
    for _ in range(2):  # another version of the same bundle
        assert deployed(bundle, "onnx_equal", load, monkeypatch) == f"{EQUAL}; ONNX mapped as packed: net.onnx"
        assert mapped(bundle)
    assert os.listdir(folder_of(str(bundle))) == ["net.onnx"]
    assert (
        deployed(bundle, "onnx_none", "pass", monkeypatch)
        == "not checked: the object holds no tensors; ONNX read as it is: net.onnx"
    )
    assert os.listdir(folder_of(str(bundle))) == []


def test_it_is_not_used_where_it_answers_something_else_or_cannot_be_asked(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = "self.session = onnxruntime.InferenceSession('net.onnx')"
    with monkeypatch.context() as patched:
        patched.setattr(converted_sessions, "_plain", lambda array: object())
        text = deployed(bundle, "onnx_different", load, monkeypatch)
    assert text == "not used: an ONNX session's outputs differ from the ordinary load's"
    assert not Path(folder_of(str(bundle))).exists()
    with monkeypatch.context() as patched:
        patched.setattr(converted_sessions, "_made_up", lambda _: {"x": np.zeros((1, 2), "float32")})
        text = deployed(bundle, "onnx_refusing", load, monkeypatch)
    assert text.startswith("not checked: the ONNX model refuses made-up inputs")
    assert text.endswith("; ONNX read as it is: net.onnx")
    assert not mapped(bundle)


def test_inputs_are_made_up_of_every_kind_of_number(tmp_path: Path) -> None:
    kinds = [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BOOL, TensorProto.UINT8, TensorProto.INT64]
    inputs = [helper.make_tensor_value_info(f"x{kind}", kind, [2, "n"]) for kind in kinds]
    outputs = [helper.make_tensor_value_info(f"y{kind}", kind, [2, "n"]) for kind in kinds]
    nodes = [helper.make_node("Identity", [f"x{kind}"], [f"y{kind}"]) for kind in kinds]
    graph = helper.make_graph(nodes, "every", inputs, outputs)
    path = tmp_path / "every.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    session = onnxruntime.InferenceSession(path)
    answers = session.run(None, converted_sessions._made_up(session))
    assert [each.dtype.name for each in answers] == ["float16", "float64", "bool", "uint8", "int64"]
    assert {each.shape for each in answers} == {(2, 1)}


def test_other_sessions_made_are_a_difference(bundle: Path) -> None:
    convert(bundle)
    with watched_sessions(str(bundle)) as ours:
        onnxruntime.InferenceSession(bundle / "net.onnx")
    with watched_sessions("") as none:
        pass
    assert converted_sessions.sessions_difference(ours, none) == "it makes 1 ONNX sessions, the ordinary load 0"


def test_the_converted_weights_are_read_ahead_in_place_of_the_original(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(bundle)
    ahead = ReadAhead()
    read: list[str] = []
    monkeypatch.setattr(read_ahead, "read_cold", lambda file: read.append(file) or True)
    ahead.expect("net@1", str(bundle))
    ahead.close()
    assert ahead._thread is not None
    ahead._thread.join()
    assert read == [weights_twin_of(bundle / "net.onnx", str(bundle))]
