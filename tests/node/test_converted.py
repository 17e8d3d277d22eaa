"""Files of ``torch.save`` are read from their safetensors twin, and come out as they were, or are left alone."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from hotset.node import read_ahead
from hotset.node.read_ahead import ReadAhead
from hotset.node.worker import converted
from hotset.node.worker.check import convert_and_check
from hotset.node.worker.converted import convert_all, folder_of, read_twin, twin_of
from hotset.node.worker.fast_load import fast_load
from hotset.node.worker.tensor_files import MappedFile, Unreadable

MANY = 1 << 30
FORMATS = pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "weights").mkdir(parents=True)
    return folder


def save(bundle: Path, value: Any, *, as_zip: bool = True, name: str = "weights/net.pt") -> Path:
    path = bundle / name
    torch.save(value, path, _use_new_zipfile_serialization=as_zip)
    return path


def net_state() -> OrderedDict[str, torch.Tensor]:
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.BatchNorm1d(256), torch.nn.Linear(256, 4))
    return net.state_dict()  # type: ignore[return-value]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            type(one) is type(other)
            and list(one) == list(other)
            and all(same(one[key], other[key]) for key in one)
            and same(getattr(one, "__dict__", None) or None, getattr(other, "__dict__", None) or None)
        )
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@FORMATS
def test_a_state_dict_is_the_same_and_its_pages_are_the_converted_files(bundle: Path, as_zip: bool) -> None:
    path = save(bundle, net_state(), as_zip=as_zip)
    assert convert_all(str(bundle), MANY) == ["weights/net.pt"]
    twin = Path(folder_of(str(bundle))) / "weights/net.pt.safetensors"
    assert [each for each in Path(folder_of(str(bundle))).rglob("*") if each.is_file()] == [twin]
    assert path.exists()
    assert not mapped(twin)
    with fast_load(str(bundle)):
        state = torch.load(path)
    assert mapped(twin)
    assert same(state, torch.load(path, weights_only=True))
    assert state._metadata["1"] == {"version": 2}
    assert set(MappedFile(twin).keys()) == set(state), "the tensors have their own names in it"
    state["0.weight"].zero_()
    with fast_load(str(bundle)):
        assert torch.load(path, map_location="cpu")["0.weight"].any(), "writing to a tensor changes no file"


@FORMATS
def test_a_checkpoint_of_many_things_is_the_same(bundle: Path, as_zip: bool) -> None:
    big = torch.arange(40_000, dtype=torch.float32)
    checkpoint = {
        "model": net_state(),
        "epoch": 3,
        "loss": [math.nan, math.inf, 0.1 + 0.2],
        "steps": (1 << 70, None, True, "ä"),
        2: {"momentum": torch.randn(5).to(torch.bfloat16), "scalar": torch.tensor(7), "empty": torch.empty(0, 3)},
        "tied": [big, big],
        "model.0.weight": torch.ones(2),
    }
    path = save(bundle, checkpoint, as_zip=as_zip)
    assert convert_all(str(bundle), MANY) == ["weights/net.pt"]
    with fast_load(str(bundle)):
        loaded = torch.load(path)
    assert same(loaded, checkpoint)
    first, second = loaded["tied"]
    assert first.data_ptr() == second.data_ptr(), "tied weights are one"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_safetensors_cannot_hold_is_left_as_it_is(bundle: Path) -> None:
    big = torch.zeros(40_000)
    for name, value in {
        "parameter": {"a": torch.nn.Parameter(big)},
        "overlapping": {"a": big[1:], "b": big},
        "transposed": {"a": big.view(200, 200).T},
        "complex": {"a": big.to(torch.complex64)},
        "sparse": {"a": torch.ones(400, 400).to_sparse()},
        "code": {"a": big, "b": Path("a")},
    }.items():
        save(bundle, value, name=f"{name}.pt")
    save(bundle, torch.zeros(4), name="small.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(200, 200)), bundle / "script.pt")  # type: ignore[no-untyped-call]
    (bundle / "garbage.pt").write_bytes(os.urandom(100_000))
    (bundle / "garbage.bin").write_bytes(b"PK\x03\x04" + bytes(100_000))
    assert convert_all(str(bundle), MANY) == []
    assert not Path(folder_of(str(bundle))).exists() or not any(
        each.is_file() for each in Path(folder_of(str(bundle))).rglob("*")
    )
    with fast_load(str(bundle)):
        assert torch.load(bundle / "transposed.pt")["a"].shape == (200, 200)


def test_no_more_memory_disk_or_files_are_taken_than_may_be(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.pt", "b.pt"):
        save(bundle, net_state(), as_zip=False, name=name)
    save(bundle, net_state(), name="c.pt")
    assert convert_all(str(bundle), 1000) == ["c.pt"], "a zip is mapped"
    monkeypatch.setattr(converted, "MOST_FILES", 2)
    assert convert_all(str(bundle), MANY) == ["a.pt", "b.pt"]
    usage = converted.shutil.disk_usage(bundle)
    monkeypatch.setattr(converted.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert convert_all(str(bundle), MANY) == []


def test_a_file_that_was_changed_or_broken_since_is_read_itself(bundle: Path) -> None:
    path = save(bundle, net_state())
    convert_all(str(bundle), MANY)
    other = {"a": torch.ones(3)}
    save(bundle, other)
    with fast_load(str(bundle)):
        assert same(torch.load(path), other)
    with pytest.raises(Unreadable, match="changed"):
        read_twin(path, str(bundle), anywhere=True)
    twin = Path(twin_of(path, str(bundle)) or "")
    for broken in (b"", b"abc", twin.read_bytes()[:900]):
        twin.write_bytes(broken)
        with fast_load(str(bundle)):
            assert same(torch.load(path), other)


def test_tensors_of_another_device_come_to_the_cpu_only_where_that_is_asked_for(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
    path = save(bundle, net_state())
    monkeypatch.undo()
    convert_all(str(bundle), MANY)
    assert same(read_twin(path, str(bundle), anywhere=True), net_state())
    with pytest.raises(Unreadable, match="another device"):
        read_twin(path, str(bundle), anywhere=False)


def test_only_files_of_the_bundle_have_twins(bundle: Path) -> None:
    code = str(bundle)
    assert twin_of(bundle / "a.pt", code) == f"{code}.tensors/a.pt.safetensors"
    assert twin_of(f"{code}/../elsewhere.pt", code) is twin_of("/elsewhere.pt", code) is None
    assert twin_of(bundle / "a.safetensors", code) is twin_of(bundle / "a.pt", "") is None
    with open(save(bundle, net_state()), "rb") as file, pytest.raises(Unreadable):
        read_twin(file, code, anywhere=True)


def test_the_check_after_a_deploy_converts_and_compares(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle)
    monkeypatch.syspath_prepend(str(bundle))
    source = "import torch\nimport hotset\n\n@hotset.function(gpu_memory='1MiB')\nclass Model:\n"
    source += "    def load(self, device):\n"
    predict = "\n    def predict(self, value: int) -> int:\n        return value\n"
    save(bundle, net_state())
    load = "        self.state = torch.load('weights/net.pt')"
    (bundle / "converted_model.py").write_text(source + load + predict)
    found = convert_and_check(str(bundle), "converted_model:Model", MANY)
    assert found.fast
    assert found.text == "equal to the ordinary load, bit by bit; mapped as safetensors: weights/net.pt"
    wrong = "        net = torch.nn.Linear(2, 2)\n        self.noise = torch.randn(3)\n"
    (bundle / "random_model.py").write_text(source + wrong + load + predict)
    assert not convert_and_check(str(bundle), "random_model:Model", MANY).fast
    assert not Path(folder_of(str(bundle))).exists(), "what is not used takes no disk"


def test_the_converted_file_is_read_ahead_in_place_of_the_original(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(bundle, {"a": torch.zeros(1 << 19)})
    convert_all(str(bundle), MANY)
    ahead = ReadAhead()
    read: list[str] = []
    monkeypatch.setattr(read_ahead, "read_cold", lambda file: read.append(file) or True)
    ahead.expect("net@1", str(bundle))
    ahead.close()
    assert ahead._thread is not None
    ahead._thread.join()
    assert read == [twin_of(path, str(bundle))]
