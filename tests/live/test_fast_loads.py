"""A server says whether a function's fast loads are right, and makes none that are not; also after a restart."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import numpy as np
import onnx
import torch
from live_server import ENDS_WITHIN_S, LiveServer, live_server
from onnx import TensorProto, helper, numpy_helper

from hotset.cli.remote import Remote

NET = """
import torch
import hotset

@hotset.function(gpu_memory="10MiB")
class Net:
    def load(self, device: str) -> None:
        torch.manual_seed(4)
        self.net = torch.nn.Linear(4, 4)
        self.net.load_state_dict({"weight": torch.eye(4), "bias": torch.zeros(4)})
        self.more = %s

    def predict(self) -> list[float]:
        return [float(each) for each in self.more]
"""


SAVED = """
import torch
import hotset

@hotset.function(gpu_memory="10MiB")
class Saved:
    def load(self, device: str) -> None:
        self.state = torch.load("net.pt")

    def predict(self) -> list[str]:
        return [str(self.state["weight"].sum().item()), open("/proc/self/maps").read()]
"""
PLAIN = """
import hotset

@hotset.function
class Plain:
    def predict(self) -> int:
        return 1
"""


def verdict(server: LiveServer, name: str) -> str:
    deadline_s = time.monotonic() + 3 * ENDS_WITHIN_S
    with Remote(server.url) as remote:
        while (text := remote.function(name)["hotset"]["fast_load"]) is None:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
    return str(text)


def test_fast_loads_are_checked_and_not_used_where_they_are_wrong(tmp_path: Path) -> None:
    wrong = "not used: a tensor of (2,) differs from the ordinary load's"
    with live_server(tmp_path / "data") as server:
        plain = server.deploy("plain", PLAIN, tmp_path)
        assert plain["hotset"]["fast_load"] == "nothing to check: it loads neither torch nor ONNX models on a GPU"
        right = server.deploy("right", NET % "torch.ones(2)", tmp_path)
        assert right["hotset"].get("fast_load") is None
        server.deploy("wrong", NET % "torch.randn(2)", tmp_path)
        assert verdict(server, "right") == "equal to the ordinary load, bit by bit"
        assert verdict(server, "wrong") == wrong
        with Remote(server.url) as remote:
            first = remote.invoke("wrong", b"{}", {}).json()
    with live_server(tmp_path / "data") as server, Remote(server.url) as remote:
        assert remote.function("wrong")["hotset"]["fast_load"] == wrong
        assert remote.invoke("wrong", b"{}", {}).json() == first


def test_a_saved_state_is_converted_after_its_deploy_and_mapped_from_then_on(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "function.py").write_text(SAVED)
    torch.save({"weight": torch.ones(1 << 18)}, code / "net.pt", _use_new_zipfile_serialization=False)
    with live_server(tmp_path / "data") as server:
        server.deploy_path("saved", code)
        assert verdict(server, "saved") == "equal to the ordinary load, bit by bit; mapped as safetensors: net.pt"
    with live_server(tmp_path / "data") as server, Remote(server.url) as remote:
        total, maps = remote.invoke("saved", b"{}", {}).json()
    assert float(total) == 1 << 18
    assert "net.pt.safetensors" in maps


def test_an_onnx_file_is_converted_after_its_deploy_and_counts_as_much_memory_as_before(tmp_path: Path) -> None:
    width = 2500
    weights = numpy_helper.from_array(np.eye(width, dtype="float32"), "w")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "net", [x], [y], [weights])
    code = tmp_path / "code"
    code.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), code / "net.onnx")
    (code / "function.py").write_text(
        "from hotset.functions.model_files import model_file, settings_from\n\n"
        "Model = model_file('net.onnx', settings_from({'gpu_memory': '90MiB'}))\n"
    )
    row = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, width], "data": list(range(width))}]}
    with live_server(tmp_path / "data", "--gpu-memory", "100MiB") as server:
        server.deploy_path("net", code)
        equal = "equal to the ordinary load, bit by bit; ONNX mapped as packed: net.onnx"
        assert verdict(server, "net") == equal
    with live_server(tmp_path / "data", "--gpu-memory", "100MiB") as server, Remote(server.url) as remote:
        answer = httpx.post(f"{server.url}/v2/models/net/infer", json=row, timeout=ENDS_WITHIN_S).json()
        assert "outputs" in answer, answer
        assert answer["outputs"][0]["data"] == list(range(width))
        memory_bytes = remote.function("net")["hotset"]["measured_memory_bytes"]
        assert memory_bytes >= 4 * width**2
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in server.gpu_pids()]
        assert any(".tensors/net.onnx/weights" in each for each in maps)
    (folder,) = (tmp_path / "data").rglob("*.tensors")
    assert [path.name for path in folder.iterdir()] == ["net.onnx"]
