"""A model repository: what its layout and configurations mean, and how changes on disk reach those who call."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_model_files import ROWS, WEIGHT, classifier, script
from v2_world import Scale, World, binary_output, run, tensor

from hotset.errors import ConfigurationError
from hotset.functions.contract import FunctionKind, options_of
from hotset.functions.model_files import FileSettings
from hotset.functions.model_files.function import make_class
from hotset.gateway.v2 import repository
from hotset.gateway.v2.repository import DirectoryRepository
from hotset.store.repository import ModelFolder, read_model, scan

PBTXT = """
name: "cls"
backend: "onnxruntime"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 3 ] } ]
output [
  { name: "scores" data_type: TYPE_FP32 dims: [ 4 ] label_filename: "labels.txt" },
  { name: "logits.1" data_type: TYPE_FP32 dims: [ 4 ] }
]
dynamic_batching { preferred_batch_size: [ 8 ] max_queue_delay_microseconds: 2500 }
instance_group [ { name: "one" kind: KIND_GPU count: 1 } ]
version_policy { specific { versions: [ 1, 3 ] } }
"""
YAML = """
backend: pytorch
default_model_filename: net.pt
input:
- {name: INPUT__0, data_type: TYPE_FP32, dims: [-1, 3]}
- {name: INPUT__1, data_type: TYPE_FP32, dims: [1]}
hotset: {gpu_memory: 50MiB, timeout: 5s}
"""


def add(models: Path, name: str, version: int = 1, config: str | None = None, file: str = "config.pbtxt") -> Path:
    """A model with the classifier in it."""
    folder = models / name / str(version)
    folder.mkdir(parents=True)
    classifier(folder).rename(folder / "model.onnx")
    if config is not None:
        (models / name / file).write_text(config)
    return models / name


def problem_of(folder: ModelFolder) -> str:
    assert folder.problem is not None
    assert not folder.versions
    return folder.problem


def test_a_directory_is_read_as_triton_users_lay_it_out(tmp_path: Path) -> None:
    add(tmp_path, "plain", 2)
    add(tmp_path, "plain", 10)
    cls = add(tmp_path, "cls", 1, PBTXT)
    for version in (2, 3):
        shutil.copytree(cls / "1", cls / str(version))
    (cls / "labels.txt").write_text("cat\ndog\n")
    net = tmp_path / "net" / "1"
    net.mkdir(parents=True)
    script(net)
    (tmp_path / "net" / "model.yaml").write_text(YAML)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "README").write_text("not a model")

    found = {each.name: each for each in scan(tmp_path)}
    assert {name: each.problem for name, each in found.items()} == {"plain": None, "cls": None, "net": None}
    assert [each.version for each in found["plain"].versions] == ["10"]
    assert found["plain"].versions[0].settings == FileSettings()
    assert [each.version for each in found["cls"].versions] == ["3", "1"]
    settings = found["cls"].versions[0].settings
    assert (settings.max_rows, settings.join, settings.join_wait_s, settings.cpu) == (8, True, 0.0025, False)
    assert settings.outputs[0].labels == ("cat", "dog")
    own = found["net"].versions[0]
    assert (own.file.name, own.settings.gpu_memory, own.settings.timeout) == ("net.pt", "50MiB", "5s")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        scan(tmp_path / "absent")


def test_where_and_how_long_a_configuration_lets_requests_wait(tmp_path: Path) -> None:
    batching = "max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 2500 }"
    for name, config, kind, max_batch, wait_s in (
        ("delayed", batching, FunctionKind.GPU, 8, 0.0025),
        ("plain", "max_batch_size: 8", FunctionKind.GPU, 1, 0.0),
        ("cpu", "max_batch_size: 8 instance_group [ { kind: KIND_CPU } ]", FunctionKind.CPU, 1, 0.0),
    ):
        folder = read_model(add(tmp_path, name, 1, config))
        assert folder.problem is None
        served = options_of(make_class(folder.versions[0].file, folder.versions[0].settings, module="m"))
        assert served is not None
        assert (served.kind, served.max_batch, served.max_batch_wait_s) == (kind, max_batch, wait_s)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ('name: "other"', "named 'other', its folder 'cls'"),
        ('backend: "tensorrt"', "backend 'tensorrt' does not serve model.onnx"),
        ('platform: "pytorch_libtorch"', "does not serve model.onnx"),
        ('backend: "onnxruntime" platform: "onnxruntime_onnx"', "both backend and platform"),
        ("max_batch_size: -1", "must be 0 or more"),
        ("dynamic_batching { }", "needs a max_batch_size"),
        ("max_batch_size: 8 dynamic_batching { preferred_batch_size: [4, 8] }", "leave out preferred_batch_size"),
        ("max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 60000001 }", "at most 60 seconds"),
        ("max_batch_size: 8 dynamic_batching { preserve_ordering: true }", "leave out preserve_ordering"),
        ("max_batch_size: 8 dynamic_batching { } instance_group [ { kind: KIND_CPU } ]", "run one by one"),
        ("max_batch_size: 8 dynamic_batching { priority_levels: 2 }", "priority_levels"),
        ("instance_group [ { kind: KIND_MODEL } ]", "use KIND_GPU or KIND_CPU"),
        ("instance_group [ { count: 1 }, { count: 1 } ]", "leave out count"),
        ("instance_group [ { profile: ['p'] } ]", "profile"),
        ('parameters [ { key: "a" value: { string_value: "b" } } ]', "parameters"),
        ('input [ { name: "x" data_type: TYPE_FP32 dims: [3] reshape: { shape: [] } } ]', "reshape"),
        ("response_cache { enable: true }", "response_cache"),
        ("instance_group [ { count: 2 } ]", "leave out count"),
        ("instance_group [ { gpus: [0] } ]", "leave out gpus"),
        ("model_transaction_policy { decoupled: true }", "leave out decoupled"),
        ("sequence_batching { }", "sequence_batching"),
        ("optimization { graph { level: 1 } }", "optimization"),
        ('default_model_filename: "../model.onnx"', "must name a file of"),
        ('default_model_filename: "other.onnx"', "holds no other.onnx"),
        ("version_policy { specific { versions: [7] } }", "wants none of the versions"),
        ('input [ { name: "x" } ]', "needs a name and a data_type"),
        ('input [ { name: "x" data_type: TYPE_FP32 dims: [3] optional: true } ]', "cannot be optional"),
        ('output [ { name: "x" data_type: TYPE_FP32 label_filename: "no.txt" } ]', "is no file beside"),
        ("this is no configuration", "cannot be read"),
    ],
)
def test_a_configuration_is_honoured_or_refused(tmp_path: Path, config: str, told: str) -> None:
    assert told in problem_of(read_model(add(tmp_path, "cls", 1, config)))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("backend: [", "cannot be read"),
        ("- a list", "must be a mapping"),
        ("nonsense: 1", "nonsense"),
        ("hotset: {gpus: 1}", "gpus"),
        ("version_policy: {latest: {num_versions: many}}", "num_versions"),
    ],
)
def test_a_yaml_configuration_is_honoured_or_refused(tmp_path: Path, config: str, told: str) -> None:
    assert told in problem_of(read_model(add(tmp_path, "cls", 1, config, "model.yaml")))


def test_version_policies(tmp_path: Path) -> None:
    folder = add(tmp_path, "cls")
    for version in (2, 3):
        shutil.copytree(folder / "1", folder / str(version))
    for policy, versions in (
        ("latest { num_versions: 2 }", ["3", "2"]),
        ("all { }", ["3", "2", "1"]),
        ("specific { versions: [2, 9] }", ["2"]),
    ):
        (folder / "config.pbtxt").write_text(f"version_policy {{ {policy} }}")
        assert [each.version for each in read_model(folder).versions] == versions


def test_folders_that_hold_no_model_say_why(tmp_path: Path) -> None:
    assert "leave it out" not in problem_of(read_model(add(tmp_path, "bad name")))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "it has no version" in problem_of(read_model(empty))
    (empty / "1").mkdir()
    (empty / "01").mkdir()
    assert "holds no model.onnx or" in problem_of(read_model(empty))
    (empty / "1" / "model.onnx").touch()
    (empty / "1" / "model.pt").touch()
    assert "default_model_filename" in problem_of(read_model(empty))
    both = add(tmp_path, "both", 1, "")
    (both / "model.yaml").touch()
    assert "keep one of them" in problem_of(read_model(both))
    huge = add(tmp_path, "huge", 1, " " * (1 << 20) + " ")
    assert "is larger than" in problem_of(read_model(huge))
    assert problem_of(read_model(tmp_path / "vanished"))


class Served:
    """A gateway that serves a repository; a test changes the disk and says when to look."""

    def __init__(self, tmp_path: Path, *functions: Any) -> None:
        self.directory = tmp_path / "repository"
        self.directory.mkdir()
        self.world = World(tmp_path / "data", *functions)
        self.repository = DirectoryRepository(self.directory, tmp_path / "made", self.world.deployments)
        self.world.repository = self.repository

    async def index(self) -> dict[str, tuple[str, str]]:
        listed = (await self.world.http.post("/v2/repository/index")).json()
        return {f"{each['name']}/{each['version']}": (each["state"], each["reason"]) for each in listed}

    async def logits(self, model: str, rows: np.ndarray = ROWS) -> np.ndarray:
        message = {
            "inputs": [tensor("x", rows)],
            "outputs": [{"name": "logits.1", "parameters": {"binary_data": True}}],
        }
        answer = await self.world.infer(model, message, rows.tobytes())
        assert answer.status_code == 200, answer.text
        return binary_output(answer)


def test_models_come_change_and_go_with_their_files(tmp_path: Path) -> None:
    served = Served(tmp_path)

    async def story() -> None:
        async with served.world as world:
            await served.repository.look()
            assert await served.index() == {}

            folder = add(served.directory, "Net_1.v2")
            await served.repository.look()
            assert await served.index() == {"Net_1.v2/1": ("READY", "")}
            assert np.allclose(await served.logits("Net_1.v2"), ROWS @ WEIGHT)

            # A second version takes over; the first goes when nobody wants it.
            shutil.copytree(folder / "1", folder / "2")
            await served.repository.look()
            assert await served.index() == {"Net_1.v2/2": ("READY", "")}
            assert (await world.http.get("/v2/models/Net_1.v2/versions/1")).status_code == 404

            (folder / "config.pbtxt").write_text("version_policy { all { } }")
            await served.repository.look()
            assert (await world.http.get("/v2/models/Net_1.v2")).json()["versions"] == ["1", "2"]
            for version in ("1", "2"):
                assert np.allclose(await served.logits(f"Net_1.v2/versions/{version}"), ROWS @ WEIGHT)
            assert (await world.http.get("/v2/models/Net_1.v2:1")).status_code == 404  # no name of a model

            # A mistake leaves what serves in service, and says what is wrong.
            (folder / "config.pbtxt").write_text("instance_group [ { count: 9 } ]")
            await served.repository.look()
            await served.repository.look()
            states = await served.index()
            assert states["Net_1.v2/2"][0] == "READY"
            assert "leave out count" in states["Net_1.v2/2"][1]

            (folder / "config.pbtxt").unlink()
            await served.repository.look()
            assert await served.index() == {"Net_1.v2/2": ("READY", "")}
            shutil.rmtree(folder)
            await served.repository.look()
            assert await served.index() == {}
            assert (await world.http.get("/v2/models/Net_1.v2")).status_code == 404

    run(story)


def test_a_model_is_unloaded_and_loaded_as_its_files_are_then(tmp_path: Path) -> None:
    served = Served(tmp_path)

    async def story() -> None:
        async with served.world as world:
            folder = add(served.directory, "net")
            await served.repository.look()
            load, unload = "/v2/repository/models/net/load", "/v2/repository/models/net/unload"
            assert (await world.http.post(unload)).status_code == 200
            assert (await served.index())["net/1"][0] == "UNAVAILABLE"
            await served.repository.look()  # what was unloaded stays so
            assert (await world.http.get("/v2/models/net/ready")).status_code == 400
            assert (await world.http.post(load)).status_code == 200
            assert np.allclose(await served.logits("net"), ROWS @ WEIGHT)

            await world.http.post(unload)
            shutil.copytree(folder / "1", folder / "2")
            assert (await world.http.post(load)).status_code == 200
            assert (await served.index())["net/2"] == ("READY", "")

            (folder / "config.pbtxt").write_text("nonsense")
            broken = await world.http.post(load)
            assert broken.status_code == 400
            assert "cannot be served" in broken.json()["error"]

            add(served.directory, "late")  # not seen yet
            assert (await world.http.post("/v2/repository/models/late/load")).status_code == 200
            assert (await world.http.post("/v2/repository/models/..%2Fnet/load")).status_code == 404
            assert (await world.http.post("/v2/repository/models/absent/load")).status_code == 404

    run(story)


def test_what_cannot_be_served_is_listed_with_the_reason(tmp_path: Path) -> None:
    served = Served(tmp_path, Scale)

    async def story() -> None:
        async with served.world:
            add(served.directory, "scale")
            bad = served.directory / "bad" / "1"
            bad.mkdir(parents=True)
            (bad / "model.onnx").write_bytes(b"not a model")
            pickled = served.directory / "pickled" / "1"
            pickled.mkdir(parents=True)
            (pickled / "model.pt").write_bytes(b"\x80\x04N.")
            await served.repository.look()
            states = await served.index()
            assert states["scale/"] == (
                "UNAVAILABLE",
                "a function of this name is deployed: remove it, or rename the model",
            )
            assert "is no ONNX model" in states["bad/"][1]
            assert "--trust-pickle" in states["pickled/"][1]

    run(story)


def test_looking_goes_on_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(tmp_path)
    monkeypatch.setattr(repository, "LOOK_EVERY_S", 0.001)
    mishaps = [OSError("the disk is full"), ConfigurationError("no such directory")]
    seen = asyncio.Event()

    async def look() -> None:
        if mishaps:
            raise mishaps.pop()
        seen.set()

    async def story() -> None:
        async with served.world:
            monkeypatch.setattr(served.repository, "look", look)
            watching = asyncio.create_task(served.repository.watch())
            await seen.wait()
            watching.cancel()
            await asyncio.wait([watching])
        assert "no such directory" in caplog.text
        assert "the disk is full" in caplog.text

    run(story)


def test_a_disk_that_takes_no_more_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(tmp_path)

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    async def story() -> None:
        async with served.world:
            add(served.directory, "net")
            monkeypatch.setattr(repository, "_write_entry", full)
            await served.repository.look()
            assert (await served.index())["net/"] == ("UNAVAILABLE", "no space left on device")

    run(story)


def test_a_repository_that_vanishes_is_told(tmp_path: Path) -> None:
    served = Served(tmp_path)

    async def story() -> None:
        async with served.world:
            served.directory.rmdir()
            with pytest.raises(ConfigurationError, match="model repository"):
                await served.repository.look()

    run(story)
