"""Model files as functions: the file says the interface, and outputs are the framework's own, bit for bit."""

from __future__ import annotations

import contextlib
import pickle  # noqa: TID251 - files that must not be opened are made with it
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from hotset.cli.model_bundle import model_folder
from hotset.errors import ConfigurationError, FunctionError, InputError
from hotset.functions.contract import FunctionKind, options_of
from hotset.functions.loading import load_entry
from hotset.functions.media import V2
from hotset.functions.model_files import FileSettings, source_of
from hotset.functions.model_files.declared import Declared
from hotset.functions.model_files.function import SPARE_BYTES, make_class, settings_from
from hotset.functions.model_files.onnx_header import read_header
from hotset.functions.model_files.torch_files import torch_datatype
from hotset.functions.runtime import Call, Outcome, Runtime
from hotset.functions.v2 import header_bytes
from hotset.functions.v2_types import Tensors, tensors_of

WEIGHT = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
ROWS = np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)
DATATYPES = {"float32": "FP32", "int64": "INT64", "float64": "FP64"}


def value_info(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def save_onnx(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any] = ()) -> Path:
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(weights))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def classifier(folder: Path) -> Path:
    """x [batch, 3] -> its product with WEIGHT ("logits.1"), and softmax of that."""
    return save_onnx(
        folder / "classifier.onnx",
        [
            helper.make_node("MatMul", ["x", "weight"], ["logits.1"]),
            helper.make_node("Softmax", ["logits.1"], ["scores"]),
        ],
        [value_info("x", ["batch", 3])],
        [value_info("logits.1", ["batch", 4]), value_info("scores", ["batch", 4])],
        [numpy_helper.from_array(WEIGHT, "weight")],
    )


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(x) * scale, x.sum(-1)


SCALE = np.array([2], np.float32)


def script(folder: Path, module: torch.nn.Module | None = None) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script((module or Net()).eval()).save(str(folder / "net.pt"))
    return folder / "net.pt"


def export(folder: Path) -> Path:
    batch = torch.export.Dim("batch", min=1, max=64)
    given = (torch.ones(2, 3), torch.ones(1))
    program = torch.export.export(Net().eval(), given, dynamic_shapes={"x": {0: batch}, "scale": None})
    torch.export.save(program, folder / "net.pt2")
    return folder / "net.pt2"


def served(path: Path, **how: Any) -> Runtime:
    runtime = Runtime(make_class(path, FileSettings(**how), module="test"))
    runtime.load()
    return runtime


def described(path: Path, **how: Any) -> Tensors:
    return tensors_of(Runtime(make_class(path, FileSettings(**how), module="test")).signature)


def request(**inputs: np.ndarray) -> Call:
    listed = [
        {
            "name": name,
            "shape": each.shape,
            "datatype": DATATYPES[each.dtype.name],
            "parameters": {"binary_data_size": each.nbytes},
        }
        for name, each in inputs.items()
    ]
    header = orjson.dumps({"inputs": listed, "parameters": {"binary_data_output": True}}).decode()
    return Call(
        b"".join(each.tobytes() for each in inputs.values()), f"{V2}; model=m; version=1; header=accept", header
    )


def ask(runtime: Runtime, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    call = request(**inputs)
    return answer_of(runtime.call(call.body, call.content_type, call.accept))


def answer_of(outcome: Outcome) -> dict[str, np.ndarray]:
    assert outcome.status == 200, outcome.body
    at = header_bytes(outcome.content_type) or 0
    found = {}
    for output in orjson.loads(outcome.whole[:at])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        dtype = {"FP32": "<f4", "INT64": "<i8"}[output["datatype"]]
        found[output["name"]] = np.frombuffer(outcome.whole[at : at + size], dtype).reshape(output["shape"])
        at += size
    return found


def refusal(path: Path, **how: Any) -> str:
    with pytest.raises(FunctionError) as caught:
        described(path, **how)
    return str(caught.value)


def test_an_onnx_file_is_served_as_onnx_runtime_runs_it(tmp_path: Path) -> None:
    path = classifier(tmp_path)
    tensors = described(path)
    assert [(each.name, each.datatype, list(each.shape)) for each in tensors.inputs] == [("x", "FP32", [-1, 3])]
    assert [each.name for each in tensors.outputs] == ["logits.1", "scores"]
    assert tensors.platform == "onnxruntime_onnx"

    expected = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": ROWS})
    runtime = served(path)
    answer = ask(runtime, x=ROWS)
    for name, array in zip(("logits.1", "scores"), expected, strict=True):
        assert answer[name].tobytes() == array.tobytes()
    # Over plain HTTP it is a function like any other, whatever its outputs are called.
    plain = orjson.loads(runtime.call(orjson.dumps({"x": ROWS.tolist()})).body)
    assert plain["scores"] == pytest.approx(expected[1])


def test_a_script_module_is_served_as_torch_runs_it(tmp_path: Path) -> None:
    runtime = served(script(tmp_path))
    tensors = tensors_of(runtime.signature)
    assert [each.name for each in tensors.inputs] == ["x", "scale"]
    assert [each.name for each in tensors.outputs] == ["output_0", "output_1"]
    with torch.inference_mode():
        expected = Net().eval()(torch.from_numpy(ROWS), torch.from_numpy(SCALE))
    answer = ask(runtime, x=ROWS, scale=SCALE)
    for name, tensor in zip(("output_0", "output_1"), expected, strict=True):
        assert answer[name].tobytes() == tensor.numpy().tobytes()


def test_an_exported_program_is_served_as_torch_runs_it(tmp_path: Path) -> None:
    runtime = served(export(tmp_path))
    tensors = tensors_of(runtime.signature)
    assert [(each.name, list(each.shape)) for each in tensors.inputs] == [("x", [-1, 3]), ("scale", [1])]
    assert [(each.name, list(each.shape)) for each in tensors.outputs] == [("output_0", [-1, 2]), ("output_1", [-1])]
    with torch.inference_mode():
        expected = Net().eval()(torch.from_numpy(ROWS), torch.from_numpy(SCALE))
    answer = ask(runtime, x=ROWS, scale=SCALE)
    assert answer["output_0"].tobytes() == expected[0].numpy().tobytes()
    call = request(x=np.ones((99, 3), np.float32), scale=SCALE)
    beyond = runtime.call(call.body, call.content_type, call.accept)
    assert beyond.status == 400  # it was exported for 64 rows at most
    assert "64" in orjson.loads(beyond.body)["error"]


def test_safetensors_are_served_by_their_class(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n\nclass Twice(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.factor = torch.nn.Parameter(torch.ones(1))\n\n    def forward(self, x, shift=None):\n"
        "        return {'doubled': x * self.factor}\n\nnumber = 7\n"
    )
    path = tmp_path / "twice.safetensors"
    save_file({"factor": torch.tensor([2.0])}, str(path))
    runtime = served(path, module="net.py:Twice", outputs=(Declared(name="doubled", datatype="FP32", shape=(-1, 3)),))
    assert ask(runtime, x=ROWS)["doubled"].tobytes() == (2 * ROWS).tobytes()

    assert "name their class" in refusal(path) or "name the class" in refusal(path)
    assert "has no class number" in refusal(path, module="net.py:number")
    assert "such as net.py:Net" in refusal(path, module="../net.py:Twice")
    save_file({"other": torch.tensor([2.0])}, str(path))
    assert "does not fit net.py:Twice" in refusal(path, module="net.py:Twice")
    assert "leave out --module" in refusal(classifier(tmp_path), module="net.py:Twice")


def test_pickles_are_refused_unless_they_are_trusted(tmp_path: Path) -> None:
    whole, weights, old = tmp_path / "whole.pt", tmp_path / "weights.pt", tmp_path / "old.pkl"
    torch.save(Net(), whole)
    torch.save(Net().state_dict(), weights)
    old.write_bytes(pickle.dumps([1]))
    for path in (whole, weights, old):
        assert "--trust-pickle" in refusal(path)
    assert "deploy them with their class" in refusal(weights, trust_pickle=True)
    runtime = served(
        whole,
        trust_pickle=True,
        outputs=tuple(Declared(name=name, datatype="FP32", shape=(-1,)) for name in ("a", "b")),
    )
    assert ask(runtime, x=ROWS, scale=SCALE)["b"].tolist() == pytest.approx(ROWS.sum(-1))


class Trap:
    """What a hostile file would hold: unpickling it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("part", ["sample_inputs/model.pt", "weights/model_weights_config.json"])
def test_a_pickle_inside_an_exported_program_is_never_opened(tmp_path: Path, part: str) -> None:
    mark = tmp_path / "sprung"
    content = pickle.dumps(Trap(mark))
    if part.endswith(".json"):
        content = orjson.dumps({"config": {"w": {"path_name": "opaque_obj_0", "use_pickle": False}}})
    bad = tmp_path / "bad.pt2"
    with zipfile.ZipFile(export(tmp_path)) as read, zipfile.ZipFile(bad, "w", zipfile.ZIP_STORED) as write:
        for name in read.namelist():
            write.writestr(name, content if name.endswith(part) else read.read(name))
    assert "--trust-pickle" in refusal(bad)
    assert not mark.exists()

    twice = tmp_path / "twice.pt2"
    with zipfile.ZipFile(twice, "w") as write, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("a/archive_format", "a/models/model.json", "a/models/model.json"):
            write.writestr(name, b"")
    assert "two entries of one name" in refusal(twice)


def test_files_that_are_no_models_say_so(tmp_path: Path) -> None:
    for name, content, told in (
        ("empty.onnx", b"", "is no ONNX model"),
        ("text.onnx", b"hello, this is text", "is no ONNX model"),
        ("short.onnx", b"\x3a\xff\x7f\x01", "is no ONNX model"),
        ("graphless.onnx", b"\x08\x09", "no graph with outputs"),
        ("notes.txt", b"", "is no model file"),
        ("old.pt2", b"", "torch.export.save"),
    ):
        (tmp_path / name).write_bytes(content)
        assert told in refusal(tmp_path / name)
    assert "is not there" in refusal(tmp_path / "absent.onnx")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_no_bytes_break_the_onnx_reader(tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = folder / "fuzzed.onnx"
    if not (folder / "sound.onnx").exists():
        classifier(folder).rename(folder / "sound.onnx")
    content = bytearray((folder / "sound.onnx").read_bytes())
    content[at : at + len(noise)] = noise
    path.write_bytes(bytes(content))
    with contextlib.suppress(FunctionError):
        assert read_header(path).outputs


def test_what_v2_has_no_tensor_for_is_refused_at_deploy(tmp_path: Path) -> None:
    identity = [helper.make_node("Identity", ["x"], ["y"])]
    for kind, told in ((TensorProto.COMPLEX64, "element type 14"), (TensorProto.BFLOAT16, "is bfloat16")):
        path = save_onnx(tmp_path / "odd.onnx", identity, [value_info("x", [1], kind)], [value_info("y", [1], kind)])
        assert told in refusal(path)
    sequence = helper.make_value_info(
        "y", helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [1]))
    )
    path = save_onnx(
        tmp_path / "odd.onnx", [helper.make_node("SequenceConstruct", ["x"], ["y"])], [value_info("x", [1])], [sequence]
    )
    assert "is a sequence" in refusal(path)

    class Lists(torch.nn.Module):
        def forward(self, x: list[torch.Tensor]) -> torch.Tensor:
            return x[0]

    class Number(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> int:
            return 1

    assert "make it take tensors" in refusal(script(tmp_path, Lists()))
    assert "make it return tensors" in refusal(script(tmp_path, Number()))
    assert torch_datatype(torch.uint8) == "UINT8"
    assert torch_datatype(torch.bfloat16) == "BF16"
    with pytest.raises(FunctionError, match="complex64 is no datatype"):
        torch_datatype(torch.complex64)


def test_text_goes_through_onnx(tmp_path: Path) -> None:
    path = save_onnx(
        tmp_path / "text.onnx",
        [helper.make_node("Identity", ["x"], ["y"])],
        [value_info("x", ["n"], TensorProto.STRING)],
        [value_info("y", ["n"], TensorProto.STRING)],
    )
    runtime = served(path)
    body = orjson.dumps({"inputs": [{"name": "x", "shape": [2], "datatype": "BYTES", "data": ["a", "ü"]}]})
    assert orjson.loads(runtime.call(body, V2).body)["outputs"][0]["data"] == ["a", "ü"]
    raw = orjson.dumps(
        {"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 5}}]}
    ).decode()
    refused = runtime.call(b"\1\0\0\0\xff", f"{V2}; header=accept", raw)
    assert (refused.status, b"UTF-8" in refused.body) == (400, True)


def test_weights_beside_the_file_belong_to_it(tmp_path: Path) -> None:
    path = classifier(tmp_path)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    header = read_header(path)
    assert header.external == ["weights.bin"]
    options = options_of(make_class(path, FileSettings(), module="test"))
    assert options is not None
    assert options.gpu_memory_bytes is not None
    assert options.gpu_memory_bytes > SPARE_BYTES + (tmp_path / "weights.bin").stat().st_size
    assert ask(served(path), x=ROWS)["logits.1"] == pytest.approx(ROWS @ WEIGHT)

    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../elsewhere.bin"
    path.write_bytes(model.SerializeToString())
    assert "put them beside the model" in refusal(path)


def test_a_model_file_is_deployed_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    path = classifier(tmp_path)
    (tmp_path / "requirements.txt").write_text("onnxruntime")
    (tmp_path / "unrelated").touch()
    with model_folder(path, FileSettings(max_rows=2)) as folder:
        assert sorted(each.name for each in folder.iterdir()) == [
            "classifier.onnx",
            "hotset_model.py",
            "requirements.txt",
        ]
        assert "classifier.onnx" in (folder / "hotset_model.py").read_text()
    assert not folder.exists()

    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with model_folder(path, FileSettings()) as folder:
        assert (folder / "weights.bin").read_bytes() == (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ConfigurationError, match=r"needs weights\.bin beside it"), model_folder(path, FileSettings()):
        pass


def test_requests_join_row_by_row_and_one_with_too_many_fails_alone(tmp_path: Path) -> None:
    scores = Declared(name="scores", datatype="FP32", shape=(4,), labels=("cat", "dog"))
    logits = Declared(name="logits.1", datatype="FP32", shape=(4,))
    runtime = served(classifier(tmp_path), max_rows=8, join=True, outputs=(scores, logits))
    assert tensors_of(runtime.signature).labels == {"scores": ["cat", "dog"]}
    given = [ROWS, ROWS[:1], np.ones((9, 3), np.float32), np.ones((7, 3), np.float32), np.ones((1, 3), np.float32)]
    outcomes = runtime.call_batch([request(x=rows) for rows in given])
    assert [outcome.status for outcome in outcomes] == [200, 200, 400, 200, 200]
    for rows, outcome in zip(given, outcomes, strict=True):
        if outcome.status == 200:
            assert answer_of(outcome)["logits.1"] == pytest.approx(rows @ WEIGHT, abs=1e-6)

    alone = served(classifier(tmp_path), max_rows=2)
    assert ask(alone, x=ROWS)["scores"].shape == (2, 4)
    call = request(x=np.ones((3, 3), np.float32))
    assert b"from 1 to 2" in alone.call(call.body, call.content_type, call.accept).body

    joined = served(
        script(tmp_path),
        max_rows=8,
        join=True,
        inputs=(
            Declared(name="INPUT__0", datatype="FP32", shape=(3,)),
            Declared(name="INPUT__1", datatype="FP32", shape=(1,)),
        ),
    )
    calls = [request(INPUT__0=ROWS, INPUT__1=np.ones((2, 1), np.float32))] * 2
    outputs = [answer_of(each)["output_1"].tolist() for each in joined.call_batch(calls)]
    assert outputs[0] == outputs[1] == pytest.approx(ROWS.sum(-1).tolist())


def test_a_model_that_does_not_work_row_by_row_cannot_join(tmp_path: Path) -> None:
    path = save_onnx(
        tmp_path / "sum.onnx",
        [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=1)],
        [value_info("x", ["n", 3])],
        [value_info("y", ["m", 1])],
    )
    outcomes = served(path, max_rows=8, join=True).call_batch([request(x=ROWS), request(x=ROWS)])
    assert [each.status for each in outcomes] == [200, 200]  # run again one by one
    assert "no open first dimension" in refusal(export(tmp_path), max_rows=8)
    assert "at least 2" in refusal(path, max_rows=1, join=True)


def test_the_wrong_shape_for_a_model_is_a_400(tmp_path: Path) -> None:
    path = save_onnx(
        tmp_path / "add.onnx",
        [helper.make_node("Add", ["a", "b"], ["y"])],
        [value_info("a", ["n"]), value_info("b", ["n"])],
        [value_info("y", ["n"])],
    )
    call = request(a=np.ones(2, np.float32), b=np.ones(3, np.float32))
    outcome = served(path).call(call.body, call.content_type, call.accept)
    assert outcome.status in (400, 500)
    fixed = save_onnx(
        tmp_path / "fixed.onnx",
        [helper.make_node("Identity", ["x"], ["y"])],
        [value_info("x", [2])],
        [value_info("y", [2])],
    )
    with pytest.raises(InputError, match="x: has shape"):
        raise served(fixed).call(*_triple(request(x=np.ones(3, np.float32)))).error  # type: ignore[misc]


def _triple(call: Call) -> tuple[Any, str, str]:
    return call.body, call.content_type, call.accept


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ((Declared(name="y", datatype="FP32", shape=(-1, 3)),), "input y is configured, but the model's are: x"),
        ((Declared(name="x", datatype="FP64", shape=(-1, 3)),), "but the model has FP32"),
        ((Declared(name="x", datatype="FP32", shape=(-1, 4)),), "but the model has FP32 [-1, 3]"),
        ((Declared(name="x", datatype="FP32", shape=(3,)),), "but the model has FP32 [-1, 3]"),
        ((Declared(name="x", datatype="FP32", shape=(-2, 3)),), "dims must be lengths"),
        ((Declared(name="x", datatype="FP31", shape=(-1, 3)),), "is no datatype"),
        ((Declared(name="x", datatype="FP32", shape=(-1, 3)),) * 2, "2 inputs are configured, but the model has 1"),
    ],
)
def test_a_configuration_that_contradicts_the_file_is_refused(
    tmp_path: Path, inputs: tuple[Declared, ...], told: str
) -> None:
    assert told in refusal(classifier(tmp_path), inputs=inputs)


def test_one_input_cannot_be_configured_twice(tmp_path: Path) -> None:
    twice = (
        Declared(name="x", datatype="FP32", shape=(-1, 3)),
        Declared(name="INPUT__0", datatype="FP32", shape=(1,)),
    )
    assert "are the same input" in refusal(script(tmp_path), inputs=twice)
    beyond = (
        Declared(name="x", datatype="FP32", shape=(-1, 3)),
        Declared(name="INPUT__7", datatype="FP32", shape=(1,)),
    )
    assert "INPUT__7 is configured" in refusal(script(tmp_path), inputs=beyond)


def test_the_file_that_is_deployed_is_a_few_readable_lines(tmp_path: Path) -> None:
    settings = FileSettings(max_rows=4, join=True, gpu_memory="90MiB", timeout="5s", load_timeout=20, name="cls")
    source = source_of(classifier(tmp_path).name, settings)
    (tmp_path / "hotset_model.py").write_text(source)
    sys.modules.pop("hotset_model", None)  # of another test's model file
    target = load_entry(tmp_path, "hotset_model", reload=True)
    options = options_of(target)
    assert options is not None
    assert (options.name, options.max_batch, options.timeout_s, options.load_timeout_s) == ("cls", 4, 5.0, 20.0)
    assert (options.kind, options.gpu_memory_bytes) == (FunctionKind.GPU, 90 << 20)
    with pytest.raises(FunctionError, match="settings cannot be read"):
        settings_from({"max_rows": "many"})
    with pytest.raises(FunctionError, match="gpu_memory"):
        make_class(tmp_path / "classifier.onnx", FileSettings(gpu_memory="much"), module="test")
    on_cpu = options_of(make_class(tmp_path / "classifier.onnx", FileSettings(cpu=True), module="test"))
    assert on_cpu is not None
    assert (on_cpu.kind, on_cpu.gpu_memory_bytes) == (FunctionKind.CPU, None)


def test_a_model_that_gives_fewer_outputs_than_were_named(tmp_path: Path) -> None:
    names = tuple(Declared(name=name, datatype="FP32", shape=(-1,)) for name in "abc")
    runtime = served(script(tmp_path), outputs=names)
    call = request(x=ROWS, scale=SCALE)
    outcome = runtime.call(call.body, call.content_type, call.accept)
    assert outcome.status == 500
    assert b"gave 2 outputs, 3 were expected" in outcome.body
