"""The system shared memory extension: tensors read from and written to POSIX shared memory."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from v2_world import Echo, World, run

from hotset.gateway.v2 import shared_memory
from hotset.gateway.v2.refusal import Refusal
from hotset.gateway.v2.shared_memory import Place, Regions

VALUES = np.arange(8, dtype=np.float32)


@pytest.fixture
def key() -> Iterator[str]:
    """A shared-memory object of 64 bytes: eight floats, then room for eight more."""
    name = f"hotset-test-{uuid.uuid4()}"
    path = Path("/dev/shm") / name
    path.write_bytes(VALUES.tobytes() + bytes(32))
    yield f"/{name}"
    path.unlink(missing_ok=True)


def shared_input(**place: Any) -> dict[str, Any]:
    parameters = {"shared_memory_region": "in", "shared_memory_byte_size": 32, **place}
    return {"name": "x", "shape": [8], "datatype": "FP32", "parameters": parameters}


def test_tensors_travel_through_regions_both_ways(tmp_path: Path, key: str) -> None:
    async def story() -> None:
        async with World(tmp_path, Echo) as world:
            for name, offset in (("in", 0), ("out", 32)):
                answer = await world.http.post(
                    f"/v2/systemsharedmemory/region/{name}/register",
                    json={"key": key, "offset": offset, "byte_size": 32},
                )
                assert answer.status_code == 200
            status = (await world.http.get("/v2/systemsharedmemory/status")).json()
            assert [each["name"] for each in status] == ["in", "out"]
            one = (await world.http.get("/v2/systemsharedmemory/region/out/status")).json()
            assert one == [{"name": "out", "key": key, "offset": 32, "byte_size": 32}]

            plain = await world.infer("echo", {"inputs": [shared_input()]})
            assert plain.json()["outputs"][0]["data"] == VALUES.tolist()

            output = {"name": "output", "parameters": {"shared_memory_region": "out", "shared_memory_byte_size": 32}}
            moved = await world.infer("echo", {"inputs": [shared_input()], "outputs": [output]})
            assert moved.json()["outputs"][0]["parameters"] == {
                "shared_memory_region": "out",
                "shared_memory_offset": 0,
                "shared_memory_byte_size": 32,
            }
            written = Path("/dev/shm", key[1:]).read_bytes()[32:]
            np.testing.assert_array_equal(np.frombuffer(written, np.float32), VALUES)

            assert (await world.http.post("/v2/systemsharedmemory/region/in/unregister")).status_code == 200
            assert (await world.http.post("/v2/systemsharedmemory/unregister")).status_code == 200
            assert (await world.http.get("/v2/systemsharedmemory/status")).json() == []
            assert (await world.http.get("/v2/cudasharedmemory/status")).json() == []
            assert (await world.http.post("/v2/cudasharedmemory/unregister")).status_code == 200
            cuda = await world.http.post("/v2/cudasharedmemory/region/x/register", json={})
            assert cuda.status_code == 400

    run(story)


def test_an_object_of_another_user_must_be_open_to_everybody(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    regions = Regions()
    path = Path("/dev/shm", key[1:])
    path.chmod(0o600)
    regions.register("own", key, 0, 32)
    monkeypatch.setattr(shared_memory.os, "geteuid", lambda: path.stat().st_uid + 1)
    for mode in (0o600, 0o660, 0o664, 0o602):
        path.chmod(mode)
        with pytest.raises(Refusal, match="is another user's"):
            regions.register("other", key, 0, 32)
    path.chmod(0o666)
    regions.register("other", key, 0, 32)
    regions.close()


def test_regions_are_bounded(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "MAX_REGIONS", 2)
    regions = Regions()
    for name in "ab":
        regions.register(name, key, 0, 32)
    with pytest.raises(Refusal, match="unregister one first"):
        regions.register("c", key, 0, 32)
    regions.unregister("a")
    regions.register("c", key, 0, 32)
    regions.close()


def test_binary_and_shared_inputs_mix(tmp_path: Path, key: str) -> None:
    import hotset

    @hotset.function(gpu_memory="10MiB")
    class Join:
        def predict(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
            return np.concatenate([a, b, c])

    async def story() -> None:
        async with World(tmp_path, Join) as world:
            world.service.regions.register("in", key, 0, 32)
            raw = np.array([100.0], np.float32)
            message = {
                "inputs": [
                    {"name": "a", "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 4}},
                    {**shared_input(shared_memory_byte_size=8, shared_memory_offset=4), "name": "b", "shape": [2]},
                    {"name": "c", "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 4}},
                ]
            }
            answer = await world.infer("join", message, raw.tobytes() + (raw * 2).tobytes())
            assert answer.json()["outputs"][0]["data"] == [100, 1, 2, 200]
            short = await world.infer("join", message, raw.tobytes())
            assert short.status_code == 400
            long = await world.infer("join", message, bytes(12))
            assert long.status_code == 400

    run(story)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"inputs": [shared_input(shared_memory_region="other")]}, "there is no shared memory region 'other'"),
        ({"inputs": [shared_input(shared_memory_offset=4)]}, "outside the region"),
        ({"inputs": [shared_input(shared_memory_offset=-4)]}, "outside the region"),
        ({"inputs": [shared_input(shared_memory_byte_size=10**30)]}, "outside the region"),
        ({"inputs": [shared_input(shared_memory_byte_size="all")]}, "whole numbers"),
        ({"inputs": [shared_input(shared_memory_region=7)]}, "must be a name"),
        ({"inputs": [shared_input(binary_data_size=4)]}, "must bring no other data"),
        ({"inputs": [{**shared_input(), "data": [1]}]}, "must bring no other data"),
        ({"inputs": [shared_input(shared_memory_byte_size=16)]}, "x: has 16 bytes of data"),
        (
            {
                "inputs": [shared_input()],
                "outputs": [
                    {"name": "output", "parameters": {"shared_memory_region": "in", "shared_memory_byte_size": 8}}
                ],
            },
            "does not fit the 8",
        ),
        (b'{"inputs": [{"parameters": {"shared_memory_region": ', "cannot be read"),
        ({"inputs": "shared_memory_region"}, "cannot be read"),
        ({"inputs": [{"parameters": "shared_memory_region"}]}, "cannot be read"),
    ],
)
def test_a_place_that_is_not_there_is_told(tmp_path: Path, key: str, message: Any, told: str) -> None:
    async def story() -> None:
        async with World(tmp_path, Echo) as world:
            world.service.regions.register("in", key, 0, 32)
            body = message if isinstance(message, bytes) else __import__("json").dumps(message).encode()
            answer = await world.http.post("/v2/models/echo/infer", content=body)
            assert answer.status_code == 400
            assert told in answer.json()["error"]

    run(story)


def test_a_region_in_use_stays_and_one_that_shrank_harms_nobody(tmp_path: Path, key: str) -> None:
    async def story() -> None:
        async with World(tmp_path, Echo) as world:
            regions = world.service.regions
            regions.register("in", key, 0, 32)
            with regions.used([Place(region="in", offset=0, byte_size=8)]):
                for path in ("region/in/unregister", "unregister"):
                    answer = await world.http.post(f"/v2/systemsharedmemory/{path}")
                    assert answer.status_code == 400
                    assert "is in use" in answer.json()["error"]
            os.truncate(Path("/dev/shm", key[1:]), 8)
            answer = await world.infer("echo", {"inputs": [shared_input()]})
            assert answer.status_code == 400
            assert "smaller than it was" in answer.json()["error"]
            with pytest.raises(Refusal, match="smaller than it was"):
                regions.write(Place(region="in", offset=0, byte_size=32), bytes(32))

    run(story)


@pytest.mark.parametrize(
    ("name", "body", "told"),
    [
        ("in", {"key": "KEY", "byte_size": 32}, "registered already"),
        ("a%2Fb", {"key": "KEY", "byte_size": 32}, "leave out slashes"),
        ("new", {"key": "/../etc/passwd", "byte_size": 32}, "no name of a shared memory object"),
        ("new", {"key": "/..", "byte_size": 32}, "no name of a shared memory object"),
        ("new", {"key": "", "byte_size": 32}, "no name of a shared memory object"),
        ("new", {"key": "/hotset-not-there", "byte_size": 32}, "cannot be opened"),
        ("new", {"key": "KEY", "byte_size": 65}, "has fewer than 65 bytes"),
        ("new", {"key": "KEY", "offset": 33, "byte_size": 32}, "has fewer than 65 bytes"),
        ("new", {"key": "KEY", "offset": -1, "byte_size": 32}, "must not be negative"),
        ("new", {"key": "KEY", "byte_size": 0}, "more than 0"),
        ("new", {"key": "KEY"}, "byte_size"),
        ("new", {"key": 7, "byte_size": 32}, "key"),
    ],
)
def test_a_registration_that_cannot_be(tmp_path: Path, key: str, name: str, body: dict[str, Any], told: str) -> None:
    async def story() -> None:
        async with World(tmp_path, Echo) as world:
            world.service.regions.register("in", key, 0, 32)
            sent = orjson.dumps({**body, **({"key": key} if body["key"] == "KEY" else {})})
            answer = await world.http.post(f"/v2/systemsharedmemory/region/{name}/register", content=sent)
            assert answer.status_code == 400
            assert told in answer.json()["error"]

    run(story)


def test_folders_and_unknown_names(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    regions = Regions(str(tmp_path))
    with pytest.raises(Refusal, match="cannot be opened"):
        regions.register("x", "/folder", 0, 1)
    with pytest.raises(Refusal, match="there is no shared memory region 'x'"):
        regions.status("x")
    with pytest.raises(Refusal, match="leave out slashes"):
        regions.unregister("a/b")
    regions.unregister("never there")
    regions.close()
