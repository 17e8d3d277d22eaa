"""The v2 protocol over HTTP: what every client of it may rely on, and what every wrong request is told."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from v2_world import BODY_LIMIT, Count, Double, Echo, Scale, World, binary_output, run, tensor

import hotset

ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)


def error(response: httpx.Response) -> str:
    return str(response.json()["error"])


def test_a_client_finds_the_server_and_its_models_and_calls_one(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path, Scale) as world:
            server = (await world.http.get("/v2")).json()
            assert server["name"] == "hotset"
            assert "binary_tensor_data" in server["extensions"]
            assert (await world.http.get("/v2/health/live")).json() == {"live": True}
            assert (await world.http.get("/v2/health/ready")).json() == {"ready": True}
            assert (await world.http.get("/v2/models/scale/ready")).json() == {"name": "scale", "ready": True}
            world.control.accepting = False
            assert (await world.http.get("/v2/health/ready")).status_code == 503
            assert (await world.http.get("/v2/health/live")).status_code == 200
            world.control.accepting = True
            assert (await world.http.get("/v2/models/scale")).json() == {
                "name": "scale",
                "versions": ["1"],
                "platform": "hotset_function",
                "inputs": [
                    {"name": "rows", "datatype": "FP32", "shape": [-1, 3]},
                    {"name": "by", "datatype": "FP64", "shape": [1]},
                ],
                "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1]}],
            }
            message = {
                "id": "42",
                "inputs": [{"name": "rows", "shape": [2, 3], "datatype": "FP32", "data": ROWS.tolist()}],
            }
            answer = await world.infer("scale/versions/1", message)
            assert answer.status_code == 200
            assert answer.headers["x-hotset-gpu"] == "local/virtual:0"
            assert answer.json() == {
                "model_name": "scale",
                "model_version": "1",
                "id": "42",
                "outputs": [{"name": "output", "datatype": "FP32", "shape": [2], "data": [3.0, 12.0]}],
            }

    run(story)


def test_binary_tensors_go_both_ways(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path, Scale) as world:
            message = {
                "inputs": [
                    {"name": "by", "shape": [1], "datatype": "FP64", "data": [2]},
                    tensor("rows", ROWS),
                ],
                "outputs": [{"name": "output", "parameters": {"binary_data": True}}],
            }
            answer = await world.infer("scale", message, ROWS.tobytes())
            assert answer.headers["content-type"] == "application/octet-stream"
            assert binary_output(answer).tolist() == [6.0, 24.0]

            every_output = {"inputs": [tensor("rows", ROWS)], "parameters": {"binary_data_output": True, "by": 3}}
            assert binary_output(await world.infer("scale", every_output, ROWS.tobytes())).tolist() == [9.0, 36.0]

            # A JSON header too large for the fast way still leads in front of the data.
            long = {**every_output, "id": "x" * 40_000}
            assert binary_output(await world.infer("scale", long, ROWS.tobytes())).tolist() == [9.0, 36.0]

    run(story)


def test_bodies_may_be_compressed_and_an_answer_is_where_that_alone_is_asked_for(tmp_path: Path) -> None:
    raw_deflate = zlib.compressobj(wbits=-15)
    message = orjson.dumps({"inputs": [{"name": "x", "shape": [3], "datatype": "INT64", "data": [1, 2, 3]}]})
    large = {"inputs": [{"name": "x", "shape": [100_000], "datatype": "INT64", "data": [7] * 100_000}]}

    async def story() -> None:
        async with World(tmp_path, Echo) as world:
            for encoding, body in (
                ("gzip", gzip.compress(message)),
                ("deflate", zlib.compress(message)),
                ("deflate", raw_deflate.compress(message) + raw_deflate.flush()),
                ("gzip", gzip.compress(orjson.dumps(large), mtime=0)),
            ):
                headers = {"content-encoding": encoding, "accept-encoding": encoding}
                answer = await world.http.post("/v2/models/echo/infer", content=body, headers=headers)
                assert answer.headers["content-encoding"] == encoding
                assert answer.json()["outputs"][0]["data"][0] in (1, 7)

            plain = await world.http.post(
                "/v2/models/echo/infer", content=message, headers={"accept-encoding": "gzip, deflate, br"}
            )
            assert "content-encoding" not in plain.headers

            bomb = gzip.compress(b" " * (BODY_LIMIT + 10))
            for body, encoding, status in (
                (bomb, "gzip", 413),
                (b"not gzip", "gzip", 400),
                (gzip.compress(message)[:-9], "gzip", 400),
                (message, "br", 415),
            ):
                headers = {"content-encoding": encoding}
                refused = await world.http.post("/v2/models/echo/infer", content=body, headers=headers)
                assert refused.status_code == status, error(refused)

    run(story)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (b"", "cannot be read"),
        (b"[]", "cannot be read"),
        (b"\xff{}", "cannot be read"),
        (b'{"inputs": [{"name": "rows"}]}', "missing required field"),
        ({"inputs": []}, "rows: is missing from the inputs"),
        ({"inputs": [{"name": "rows", "shape": [1, 3], "datatype": "FP32"}]}, "neither data nor a binary_data_size"),
        ({"inputs": [{"name": "other", "shape": [1], "datatype": "FP32", "data": [1]}]}, "is no input of this model"),
        ({"inputs": [{"name": "rows", "shape": [1, 3], "datatype": "FP99", "data": [1]}]}, "is not one of BOOL"),
        ({"inputs": [{"name": "rows", "shape": [1, 3], "datatype": "FP64", "data": [1, 2, 3]}]}, "is float64"),
        ({"inputs": [{"name": "rows", "shape": [1, 3], "datatype": "BYTES", "data": ["a", "b", "c"]}]}, "is BYTES"),
        ({"inputs": [{"name": "rows", "shape": [3, 1], "datatype": "FP32", "data": [1, 2, 3]}]}, "has shape [3, 1]"),
        ({"inputs": [{"name": "rows", "shape": [-1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}, "negative"),
        ({"inputs": [{"name": "rows", "shape": [2, 3], "datatype": "FP32", "data": [1, 2, 3]}]}, "but says [2, 3]"),
        ({"inputs": [{"name": "rows", "shape": [1, 3], "datatype": "FP32", "data": [[[1, 2, 3]]]}]}, "lists deep"),
        ({"inputs": [{"name": "rows", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, "3"]}]}, "cannot be read"),
        (
            {"inputs": [{"name": "rows", "shape": [1, 3], "datatype": "FP32", "data": [1e300, 2, 3]}]},
            "<= 3.40",
        ),
        (
            {"inputs": [{"name": "rows", "shape": [2, 3], "datatype": "FP32", "data": [[1, 2, 3], [4]]}]},
            "differ in length",
        ),
        ({"inputs": [{"name": "rows", "shape": [1] * 40, "datatype": "FP32", "data": [1]}]}, "40 dimensions"),
        ({"inputs": [{"name": "rows", "shape": [0, 2**62], "datatype": "FP32", "data": []}]}, "no array can have"),
        (
            {
                "inputs": [
                    {"name": "rows", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]},
                    {"name": "rows", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]},
                ]
            },
            "given twice",
        ),
        (
            {
                "inputs": [{"name": "rows", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}],
                "outputs": [{"name": "nothing"}],
            },
            "nothing: is no output of this model; it has output",
        ),
        (
            {
                "inputs": [{"name": "rows", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}],
                "outputs": [{"name": "output", "parameters": {"classification": "all"}}],
            },
            "classification must be",
        ),
        (
            {
                "inputs": [{"name": "rows", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}],
                "parameters": {"sequence_id": 7},
            },
            "keep no state",
        ),
    ],
)
def test_a_request_that_does_not_fit_is_told_why(tmp_path: Path, message: Any, told: str) -> None:
    async def story() -> None:
        async with World(tmp_path, Scale) as world:
            body = message if isinstance(message, bytes) else orjson.dumps(message)
            answer = await world.http.post("/v2/models/scale/infer", content=body)
            assert answer.status_code == 400
            assert told in error(answer)

    run(story)


@pytest.mark.parametrize(
    ("declared", "size", "told"),
    [
        ("9999", 24, "is not a length within the body"),
        ("-1", 24, "is not a length"),
        ("0x10", 24, "is not a length"),
        ("1" * 30, 24, "is not a length"),
        ("0", 24, "cannot be read"),
        (None, 20, "cannot be read"),  # the data is taken for JSON
        ("right", 20, "says binary_data_size 24, but 20 bytes are left"),
        ("right", 28, "4 bytes of binary data belong to no input"),
    ],
)
def test_a_lie_about_the_lengths_is_a_400(tmp_path: Path, declared: str | None, size: int, told: str) -> None:
    async def story() -> None:
        async with World(tmp_path, Scale) as world:
            header = orjson.dumps({"inputs": [tensor("rows", ROWS)]})
            headers = {}
            if declared is not None:
                headers["Inference-Header-Content-Length"] = str(len(header)) if declared == "right" else declared
            answer = await world.http.post(
                "/v2/models/scale/infer", content=header + (ROWS.tobytes() + b"more")[:size], headers=headers
            )
            assert answer.status_code == 400
            assert told in error(answer)

    run(story)


def test_a_body_beyond_the_limit_is_never_held(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path, Echo) as world:

            async def endless() -> Any:
                while True:
                    yield b" " * 65536

            for content in (b" " * (BODY_LIMIT + 1), endless()):
                answer = await world.http.post("/v2/models/echo/infer", content=content)
                assert answer.status_code == 413
                assert answer.headers["connection"] == "close"
            strange = await world.http.post("/v2/models/echo/infer", headers={"content-length": "many"})
            assert strange.status_code == 400

            world.control.open_body_bytes += 11 * BODY_LIMIT
            full = await world.http.post("/v2/models/echo/infer", content=b"{}")
            assert (full.status_code, full.headers["retry-after"]) == (429, "1")
            world.control.open_body_bytes -= 11 * BODY_LIMIT

    run(story)


@pytest.mark.parametrize("size", [2, 30_000], ids=["small", "large"])
def test_a_request_says_how_long_it_may_take(tmp_path: Path, size: int) -> None:
    async def story() -> None:
        async with World(tmp_path, Scale) as world:
            rows = np.ones((size, 3), np.float32)

            async def ask(timeout: Any, **headers: str) -> httpx.Response:
                message = {"inputs": [tensor("rows", rows)], "parameters": {"timeout": timeout}}
                return await world.infer("scale", message, rows.tobytes(), **headers)

            for none in (0, 10_000_000):
                assert (await ask(none)).status_code == 200
            for wrong in (-1, 1.5, "1000", True, [1]):
                refused = await ask(wrong)
                assert refused.status_code == 400, wrong
                assert "timeout" in error(refused)
            world.node.held = []
            for timeout, header in ((150_000, "30"), (30_000_000, "0.15")):
                late = await ask(timeout, **{"X-Hotset-Timeout": header})
                assert late.status_code == 504
                assert late.elapsed.total_seconds() < 10  # not the thirty seconds

    run(story)


def test_paths_and_methods_that_are_not_the_protocols(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path, Scale) as world:
            for method, path, status in (
                ("GET", "/v2/nothing", 404),
                ("GET", "/v2/models/absent", 404),
                ("GET", "/v2/models/scale/versions/7", 404),
                ("GET", "/v2/models//ready", 404),
                ("POST", "/v2/models/a/b/infer", 404),
                ("POST", "/v2/models/scale", 405),
                ("GET", "/v2/models/scale/infer", 404),
                ("GET", "/v2beta", 404),
                ("HEAD", "/v2", 200),
                ("GET", "/v2/", 200),
                ("POST", "/v2/models/absent/infer", 404),
                ("GET", "/v2/systemsharedmemory", 404),
            ):
                answer = await world.http.request(method, path)
                assert answer.status_code == status, path
                assert "error" not in answer.text or error(answer)

            timeout = {"X-Hotset-Timeout": "soon"}
            assert (await world.http.post("/v2/models/scale/infer", headers=timeout)).status_code == 400
            # The worker's own way of being told is no door for outsiders.
            forged = {"content-type": "application/vnd.hotset.v2; warm"}
            assert (await world.http.post("/function/scale", headers=forged)).status_code == 415

    run(story)


def test_classes_are_given_with_their_places(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path, Echo) as world:
            scores = {"name": "x", "shape": [2, 3], "datatype": "FP32", "data": [0.1, 0.7, 0.2, 5, 3, 4]}
            wanted = [{"name": "output", "parameters": {"classification": 2}}]
            answer = (await world.infer("echo", {"inputs": [scores], "outputs": wanted})).json()
            (output,) = answer["outputs"]
            assert output["datatype"] == "BYTES"
            assert output["shape"] == [2, 2]
            assert output["data"] == ["0.700000:1", "0.200000:2", "5.000000:0", "4.000000:2"]

            for spoilt, told in (
                ({"name": "x", "shape": [1], "datatype": "BYTES", "data": ["a"]}, "cannot be classified"),
                ({"name": "x", "shape": [0], "datatype": "FP32", "data": []}, "nothing to classify"),
            ):
                refused = await world.infer("echo", {"inputs": [spoilt], "outputs": wanted})
                assert refused.status_code == 400
                assert told in error(refused)

    run(story)


def test_requests_that_wait_for_one_model_share_a_run(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path, Double) as world:
            message = {"inputs": [{"name": "values", "shape": [2], "datatype": "INT64", "data": [1, 2]}]}
            assert (await world.infer("double", message)).json()["outputs"][0]["data"] == [2, 4]
            bad = await world.infer("double", {"inputs": [{**message["inputs"][0], "shape": [3]}]})
            assert bad.status_code == 400

    run(story)


def test_a_stream_is_not_for_http(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path, Count) as world:
            message = {"inputs": [{"name": "upto", "shape": [1], "datatype": "INT64", "data": [3]}]}
            answer = await world.infer("count", message)
            assert answer.status_code == 400
            assert "ModelStreamInfer" in error(answer)

    run(story)


def test_models_are_listed_unloaded_and_loaded_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path, Scale, Echo) as world:
            listed = (await world.http.post("/v2/repository/index")).json()
            assert [(each["name"], each["state"]) for each in listed] == [("scale", "READY"), ("echo", "READY")]

            load = await world.http.post("/v2/repository/models/scale/load")
            assert load.status_code == 200
            assert load.content == b""
            assert list(world.node.runtimes) == ["scale@1"]  # loaded without a call

            assert world.control.pinning.copies("scale") == 1  # and there to stay

            assert (await world.http.post("/v2/repository/models/scale/unload")).status_code == 200
            for _ in range(5):
                await world.http.get("/v2/health/live")
            assert not world.node.runtimes  # evicted at once
            assert (await world.http.get("/v2/models/scale/ready")).status_code == 400
            refused = await world.infer("scale", {"inputs": [tensor("rows", ROWS)]}, ROWS.tobytes())
            assert refused.status_code == 400
            assert "POST /v2/repository/models/scale/load" in error(refused)
            ready = (await world.http.post("/v2/repository/index", json={"ready": True})).json()
            assert [each["name"] for each in ready] == ["echo"]

            cold = await world.http.post("/v2/repository/models/scale/load", json={"parameters": {"warm": False}})
            assert cold.status_code == 503  # nobody keeps its bundle in this test
            assert "there is no bundle" in error(cold)

            for path, body, told in (
                ("absent/load", {}, "there is no model 'absent'"),
                ("absent/unload", {}, "there is no model 'absent'"),
                ("echo/load", {"parameters": {"config": "{}"}}, "load takes no config"),
                ("echo/load", {"parameters": []}, "must be a JSON object"),
                ("echo/load", [], "must be a JSON object"),
            ):
                answer = await world.http.post(f"/v2/repository/models/{path}", json=body)
                assert answer.status_code in (400, 404)
                assert told in error(answer)

    run(story)


def test_a_loaded_model_stays_hot_and_one_too_many_is_refused(tmp_path: Path) -> None:
    def sized(name: str, mib: int) -> type[Any]:
        body = {"__doc__": name, "predict": Echo.predict, "__module__": __name__}
        return hotset.function(gpu_memory=f"{mib}MiB")(type(name, (), body))

    async def story() -> None:
        big, small, other = sized("Big", 600), sized("Small", 300), sized("Other", 500)
        async with World(tmp_path, big, small, other) as world:
            for name in ("big", "small"):
                assert (await world.http.post(f"/v2/repository/models/{name}/load")).status_code == 200
            refused = await world.http.post("/v2/repository/models/other/load")
            assert refused.status_code == 400
            assert "no room to keep a copy of other hot" in error(refused)
            no_room = await world.infer("other", {"inputs": [tensor("x", ROWS)]}, ROWS.tobytes())
            assert no_room.status_code == 507
            assert "kept hot" in error(no_room)

            assert (await world.http.post("/v2/repository/models/big/unload")).status_code == 200
            served = await world.infer("other", {"inputs": [tensor("x", ROWS)]}, ROWS.tobytes())
            assert served.status_code == 200
            assert "small@1" in world.node.runtimes

    run(story)


def test_a_model_that_does_not_load_is_not_kept(tmp_path: Path) -> None:
    @hotset.function(gpu_memory="10MiB")
    class Broken:
        def load(self, device: str) -> None:
            raise RuntimeError("no weights")

        def predict(self, x: int) -> int:
            return x

    async def story() -> None:
        async with World(tmp_path, Broken) as world:
            answer = await world.http.post("/v2/repository/models/broken/load")
            assert answer.status_code >= 400
            assert "no weights" in error(answer)
            assert world.control.pinning.copies("broken") == 0

    run(story)


def test_statistics_configuration_and_trace_settings(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path, Scale, Echo) as world:
            await world.infer("scale", {"inputs": [tensor("rows", ROWS)]}, ROWS.tobytes())
            await world.infer("scale", {"inputs": []})
            (stats,) = (await world.http.get("/v2/models/scale/stats")).json()["model_stats"]
            assert stats["inference_count"] == 1
            assert stats["inference_stats"]["success"]["count"] == 1
            assert stats["inference_stats"]["fail"]["count"] == 1
            assert stats["inference_stats"]["compute_infer"]["ns"] == 1_000_000
            everybody = (await world.http.get("/v2/models/stats")).json()["model_stats"]
            assert [each["name"] for each in everybody] == ["scale", "echo"]
            versioned = await world.http.get("/v2/models/scale/versions/1/stats")
            assert versioned.json()["model_stats"][0]["version"] == "1"

            config = (await world.http.get("/v2/models/scale/config")).json()
            assert config["input"][0] == {"name": "rows", "data_type": "TYPE_FP32", "dims": [-1, 3], "optional": False}
            assert config["input"][1]["optional"] is True

            for path in ("/v2/trace/setting", "/v2/models/scale/trace/setting"):
                assert (await world.http.get(path)).json()["trace_level"] == ["OFF"]
                assert (await world.http.post(path, json={"trace_level": ["OFF"]})).status_code == 200
                on = await world.http.post(path, json={"trace_level": ["TIMESTAMPS"]})
                assert on.status_code == 400
            assert (await world.http.post("/v2/models/absent/trace/setting")).status_code == 404

    run(story)
