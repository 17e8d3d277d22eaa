"""The whole server with real GPU processes, driven by Triton's four clients: HTTP, gRPC, and their asyncio variants."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest
from test_model_files import ROWS, classifier, script
from v2_world import quiet_import

import hotset

with quiet_import():
    import tritonclient.grpc
    import tritonclient.grpc.aio
    import tritonclient.http
    import tritonclient.http.aio
    from tritonclient.utils import InferenceServerException, shared_memory

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:tritonclient", "ignore::pytest.PytestUnraisableExceptionWarning"
)

FUNCTION = """
from collections.abc import Iterator
import hotset

@hotset.function(gpu_memory="16MiB")
class Tell:
    def predict(self, text: str, times: int = 1) -> Iterator[str]:
        for number in range(times):
            yield f"{text}{number}"
"""


class Server:
    """``hotset serve`` with a model repository, one deployed model file and one deployed function."""

    def __init__(self, folder: Path) -> None:
        self.models = folder / "models"
        version = self.models / "classifier" / "1"
        version.mkdir(parents=True)
        self.onnx = classifier(version).rename(version / "model.onnx")
        self._hotset = str(Path(sys.executable).parent / "hotset")
        arguments = ("--port", "0", "--grpc-port", "0", "--virtual-gpus", "1", "--gpu-memory", "500MiB")
        self._log = (folder / "log").open("w+")
        self._process = subprocess.Popen(
            [
                self._hotset,
                "serve",
                "--data-dir",
                str(folder / "data"),
                *arguments,
                "--model-repository",
                str(self.models),
            ],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        self._log.seek(0)
        log = self._log.read()
        found = re.search(r"http://[\d.]+:\d+", said)
        assert found is not None, log
        self.url = found[0]
        port = re.search(r"gRPC at ([\d.]+:\d+)", log)
        assert port is not None, log
        self.grpc = port[1]
        self.http = self.url.removeprefix("http://")
        (folder / "tell.py").write_text(FUNCTION)
        self.deploy(folder / "tell.py")
        self.deploy(script(folder), "--name", "scripted", "--gpu-memory", "64MiB")

    def deploy(self, *arguments: Any) -> None:
        command = [self._hotset, "deploy", *map(str, arguments), "--gateway", self.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    def close(self) -> None:
        self._process.terminate()
        assert self._process.wait(60) == 0
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.close()


def expected(server: Server) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(server.onnx), providers=["CPUExecutionProvider"])
    scores: np.ndarray = session.run(["scores"], {"x": ROWS})[0]
    return scores


def rows(client: Any) -> Any:
    given = client.InferInput("x", [2, 3], "FP32")
    given.set_data_from_numpy(ROWS)
    return given


def test_the_http_client(server: Server) -> None:
    client = tritonclient.http.InferenceServerClient(server.http)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("classifier", "1")
    assert client.get_server_metadata()["name"] == "hotset"
    assert client.get_model_metadata("classifier")["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    assert client.get_model_config("classifier")["platform"] == "onnxruntime_onnx"
    for binary in (True, False):
        outputs = [tritonclient.http.InferRequestedOutput("scores", binary_data=binary)]
        result = client.infer("classifier", [rows(tritonclient.http)], outputs=outputs, request_id="1")
        np.testing.assert_array_equal(result.as_numpy("scores"), expected(server))
    packed = client.infer(
        "classifier",
        [rows(tritonclient.http)],
        request_compression_algorithm="gzip",
        response_compression_algorithm="deflate",
    )
    np.testing.assert_array_equal(packed.as_numpy("scores"), expected(server))
    waiting = client.async_infer("classifier", [rows(tritonclient.http)])
    np.testing.assert_array_equal(waiting.get_result().as_numpy("scores"), expected(server))
    classes = client.infer(
        "classifier",
        [rows(tritonclient.http)],
        outputs=[tritonclient.http.InferRequestedOutput("scores", class_count=1)],
    )
    assert classes.as_numpy("scores").shape == (2, 1)
    body = tritonclient.http.InferenceServerClient.generate_request_body([rows(tritonclient.http)])
    assert body[1] is not None

    (stats,) = client.get_inference_statistics("classifier")["model_stats"]
    assert stats["inference_count"] >= 5
    assert client.get_trace_settings()["trace_level"] == ["OFF"]
    assert {each["name"] for each in client.get_model_repository_index()} == {"classifier", "tell", "scripted"}
    client.unload_model("classifier")
    assert not client.is_model_ready("classifier")
    with pytest.raises(InferenceServerException, match="unloaded"):
        client.infer("classifier", [rows(tritonclient.http)])
    client.load_model("classifier")
    assert client.is_model_ready("classifier")
    client.close()


def test_the_grpc_client(server: Server) -> None:
    client = tritonclient.grpc.InferenceServerClient(server.grpc)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("classifier")
    assert client.get_server_metadata().name == "hotset"
    assert client.get_model_metadata("classifier").platform == "onnxruntime_onnx"
    assert client.get_model_config("classifier", as_json=True)["config"]["input"][0]["data_type"] == "TYPE_FP32"
    result = client.infer("classifier", [rows(tritonclient.grpc)], request_id="1", compression_algorithm="gzip")
    np.testing.assert_array_equal(result.as_numpy("scores"), expected(server))
    assert client.get_inference_statistics("classifier").model_stats[0].inference_count >= 1
    assert client.get_trace_settings().settings["trace_level"].value == ["OFF"]
    assert len(client.get_model_repository_index().models) == 3
    client.unload_model("tell")
    assert not client.is_model_ready("tell")
    client.load_model("tell")
    assert client.is_model_ready("tell")

    answers: list[Any] = []
    client.start_stream(lambda result, error: answers.append(error or result))
    text = tritonclient.grpc.InferInput("text", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"n"], object))
    times = tritonclient.grpc.InferInput("times", [1], "INT64")
    times.set_data_from_numpy(np.array([3], np.int64))
    client.async_stream_infer("tell", [text, times], enable_empty_final_response=True)
    client.async_stream_infer("classifier", [rows(tritonclient.grpc)])
    client.stop_stream()
    assert [each.as_numpy("output").tolist() for each in answers[:3]] == [[b"n0"], [b"n1"], [b"n2"]]
    assert answers[3].get_response().parameters["triton_final_response"].bool_param
    np.testing.assert_array_equal(answers[4].as_numpy("scores"), expected(server))
    client.close()


def test_the_asyncio_clients(server: Server) -> None:
    async def http() -> None:
        async with tritonclient.http.aio.InferenceServerClient(server.http) as client:
            assert await client.is_server_live()
            assert await client.is_model_ready("classifier")
            assert (await client.get_model_metadata("classifier"))["name"] == "classifier"
            results = await asyncio.gather(
                *(client.infer("classifier", [rows(tritonclient.http)], request_id=str(number)) for number in range(8))
            )
            for result in results:
                np.testing.assert_array_equal(result.as_numpy("scores"), expected(server))
            assert await client.get_model_repository_index()
            assert (await client.get_inference_statistics("classifier"))["model_stats"]

    async def grpc() -> None:
        async with tritonclient.grpc.aio.InferenceServerClient(server.grpc) as client:
            assert await client.is_server_ready()
            result = await client.infer("classifier", [rows(tritonclient.grpc)])
            np.testing.assert_array_equal(result.as_numpy("scores"), expected(server))

            async def requests() -> AsyncIterator[dict[str, Any]]:
                for number in range(3):
                    yield {
                        "model_name": "classifier",
                        "inputs": [rows(tritonclient.grpc)],
                        "request_id": str(number),
                    }

            seen = []
            async for result, error in client.stream_infer(requests()):
                assert error is None
                seen.append(result.get_response().id)
            assert seen == ["0", "1", "2"]

    asyncio.run(http())
    asyncio.run(grpc())


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_tensors_in_shared_memory(server: Server, kind: str) -> None:
    module: Any = tritonclient.http if kind == "http" else tritonclient.grpc
    client = module.InferenceServerClient(server.http if kind == "http" else server.grpc)
    key = f"/hotset-test-{uuid.uuid4()}"
    region = shared_memory.create_shared_memory_region("all", key, 128)
    try:
        shared_memory.set_shared_memory_region(region, [ROWS])
        client.register_system_shared_memory("all", key, 128)
        assert client.get_system_shared_memory_status()
        given = module.InferInput("x", [2, 3], "FP32")
        given.set_shared_memory("all", ROWS.nbytes)
        wanted = module.InferRequestedOutput("scores")
        wanted.set_shared_memory("all", 32, offset=64)
        client.infer("classifier", [given], outputs=[wanted])
        scores = shared_memory.get_contents_as_numpy(region, np.float32, [2, 4], offset=64)
        np.testing.assert_array_equal(scores, expected(server))
        client.unregister_system_shared_memory("all")
    finally:
        shared_memory.destroy_shared_memory_region(region)
        client.close()


def test_large_tensors_cross_in_shared_slots_and_hotsets_own_client_agrees(server: Server) -> None:
    with hotset.Client(server.url) as client:
        assert client.ready("scripted")
        large = np.random.default_rng(0).random((50_000, 3), np.float32)
        result = client.infer("scripted", {"x": large, "scale": np.ones(1, np.float32)})
        assert result["output_0"].shape == (50_000, 2)
        np.testing.assert_allclose(result["output_1"], large.sum(axis=1), rtol=1e-5)
        assert client.infer("classifier", {"x": ROWS})["scores"].tobytes() == expected(server).tobytes()


def test_a_model_file_is_a_function_for_everybody_else_too(server: Server) -> None:
    answer = httpx.post(f"{server.url}/function/classifier", json={"x": ROWS.tolist()})
    np.testing.assert_array_equal(np.array(answer.json()["scores"], np.float32), expected(server))
    forged = httpx.post(f"{server.url}/function/classifier", headers={"content-type": "application/vnd.hotset.v2"})
    assert forged.status_code == 415


def test_the_guides_commands_and_programs_run(server: Server, tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()
    blocks = re.findall(r"```(python|sh)\n(.*?)```", guide, re.DOTALL)
    assert len(blocks) == 5
    for language, block in blocks:
        code = block.replace("http://127.0.0.1:8080", server.url)
        code = code.replace("127.0.0.1:8080", server.http).replace("127.0.0.1:8001", server.grpc)
        command = [sys.executable, "-W", "ignore", "-c", code] if language == "python" else ["sh", "-ec", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "scores" in done.stdout or re.search(r"0\.\d+", done.stdout), done.stdout
