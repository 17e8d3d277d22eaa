"""hotset.Client and hotset.AsyncClient, against the server itself and against one that says what the test wants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from v2_world import Echo, Scale, World, quiet_import, run

import hotset
from hotset.client import InferenceError, Retries, synchronous
from hotset.client.messages import infer_request, read_result, to_wire
from hotset.errors import ConfigurationError

with quiet_import():
    import ml_dtypes

ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)
ANSWER = {"model_name": "m", "outputs": [{"name": "y", "datatype": "FP32", "shape": [2], "data": [1, 2]}]}


def test_tensors_in_tensors_out(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path, Scale, Echo) as world, hotset.AsyncClient(transport=world.transport) as client:
            assert await client.ready()
            assert await client.ready("scale")
            assert not await client.ready("absent")
            metadata = await client.metadata("scale")
            assert [each.name for each in metadata.inputs] == ["rows", "by"]
            result = await client.infer(
                "scale", {"rows": ROWS}, parameters={"by": 2.0}, request_id="9", outputs=["output"], timeout_s=5
            )
            np.testing.assert_array_equal(result["output"], np.array([6, 24], np.float32))
            assert (result.model_name, result.model_version, result.id) == ("scale", "1", "9")
            assert result.gpu == "local/virtual:0"
            assert result.inference_s > 0
            assert result.call_id
            again = await client.infer("scale", {"rows": ROWS}, version="1")
            assert again.hit

            assert [each.name for each in await client.models()] == ["scale", "echo"]
            await client.load("echo")
            await client.unload("echo")
            assert [each.state for each in await client.models()] == ["READY", "UNAVAILABLE"]
            with pytest.raises(InferenceError, match="unloaded") as caught:
                await client.infer("echo", {"x": ROWS})
            assert caught.value.status == 400

    run(story)


@pytest.mark.parametrize(
    ("value", "datatype", "expected"),
    [
        (np.array([True, False]), "BOOL", None),
        (np.array([[1, 2]], ">i2"), "INT16", None),
        (np.asfortranarray(ROWS.T), "FP32", None),
        ([1.5, 2.5], "FP64", np.array([1.5, 2.5])),
        (7, "INT64", np.array([7])),
        ("text", "BYTES", np.array([b"text"], object)),
        (b"raw", "BYTES", np.array([b"raw"], object)),
        ([["a", "ü"]], "BYTES", np.array([[b"a", "ü".encode()]], object)),
        (torch.tensor([1, 2]), "INT64", np.array([1, 2])),
        (torch.tensor([1.5], dtype=torch.bfloat16), "BF16", np.array([1.5], np.float32)),
        (np.array([1.5], ml_dtypes.bfloat16), "BF16", np.array([1.5], np.float32)),
    ],
)
def test_every_kind_of_value_is_a_tensor_and_comes_back(
    tmp_path: Path, value: Any, datatype: str, expected: np.ndarray | None
) -> None:
    assert to_wire("x", value).datatype == datatype

    async def story() -> None:
        async with World(tmp_path, Echo) as world, hotset.AsyncClient(transport=world.transport) as client:
            result = await client.infer("echo", {"x": value})
            np.testing.assert_array_equal(result["output"], value if expected is None else expected)

    run(story)


def test_what_is_no_tensor_is_told_before_anything_is_sent() -> None:
    for value in ({"a": 1}, [None], np.array([1j])):
        with pytest.raises(ConfigurationError, match="x is no tensor"):
            infer_request("m", {"x": value})


def test_tensors_lie_aligned_behind_the_header() -> None:
    for name in ("x", "longer", "ü"):
        request = infer_request("a model/1", {name: ROWS}, version="2")
        assert int(request.headers["Inference-Header-Content-Length"]) % 64 == 0
        assert request.path == "/v2/models/a%20model%2F1/versions/2/infer"


class Scripted:
    """A server that gives these answers, one a request; an exception is what the connection does."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.waits: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def client(self, monkeypatch: pytest.MonkeyPatch, **retries: Any) -> hotset.Client:
        monkeypatch.setattr(synchronous.time, "sleep", self.waits.append)
        return hotset.Client(transport=httpx.MockTransport(self), retries=Retries(**retries))


def full(retry_after: str | None = None, status: int = 429) -> httpx.Response:
    headers = {} if retry_after is None else {"retry-after": retry_after}
    return httpx.Response(status, json={"error": "full"}, headers=headers)


def test_a_full_server_is_asked_again_when_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Scripted(full("2"), full(status=503), full("a date"), full("9999"), httpx.Response(200, json=ANSWER))
    with server.client(monkeypatch, longest_wait_s=5.0) as client:
        assert client.infer("m", {"x": 1})["y"].tolist() == [1, 2]
    assert server.waits == [2.0, 0.5, 5.0, 5.0]

    tired = Scripted(full("1"), full("1"))
    with tired.client(monkeypatch, attempts=2) as client, pytest.raises(InferenceError, match="full"):
        client.infer("m", {"x": 1})
    assert tired.waits == [1.0]

    with Scripted(full("1")).client(monkeypatch) as client:
        assert not client.ready("m")


def test_an_error_that_repeating_would_not_help_is_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer, told, status in (
        (httpx.Response(500, json={"error": "it raised"}), "it raised", 500),
        (httpx.Response(502, text="<html>"), "HTTP 502: <html>", 502),
        (httpx.ConnectError("refused"), "hotset serve", 0),
        (httpx.ReadTimeout("slow"), "did not answer in time", 0),
        (httpx.Response(200, text="hello"), "is no v2 inference response", 200),
    ):
        with (
            Scripted(answer).client(monkeypatch) as client,
            pytest.raises(InferenceError, match=told) as caught,
        ):
            client.infer("m", {"x": 1})
        assert caught.value.status == status
    with Scripted(httpx.ConnectError("refused")).client(monkeypatch) as client, pytest.raises(InferenceError):
        client.ready()


def test_the_blocking_client_has_the_same_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.method, request.url.path))
        if request.url.path.endswith("/index"):
            return httpx.Response(200, json=[{"name": "m", "version": "1", "state": "READY", "reason": ""}])
        if request.url.path.endswith("/models/m"):
            return httpx.Response(200, json={"name": "m", "versions": [], "platform": "", "inputs": [], "outputs": []})
        return httpx.Response(200)

    with hotset.Client("http://somewhere:1/", transport=httpx.MockTransport(answer)) as client:
        assert client.ready()
        assert client.metadata("m").name == "m"
        assert client.models()[0].state == "READY"
        client.load("m")
        client.unload("m")
    assert seen == [
        ("GET", "/v2/health/ready"),
        ("GET", "/v2/models/m"),
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/m/load"),
        ("POST", "/v2/repository/models/m/unload"),
    ]


def test_a_client_says_who_it_is_where_it_is_told_to() -> None:
    seen: list[httpx.Headers] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers)
        return httpx.Response(200)

    with hotset.Client(transport=httpx.MockTransport(answer), key="secret", auth=("ada", "pw")) as client:
        client.load("m")
    assert seen[0]["x-api-key"] == "secret"
    assert seen[0]["authorization"] == "Basic YWRhOnB3"


def test_the_asyncio_client_waits_and_fails_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        server = Scripted(
            full("0"), httpx.Response(200, json=ANSWER), httpx.ConnectError("refused"), httpx.ReadTimeout("")
        )
        async with hotset.AsyncClient(transport=httpx.MockTransport(server)) as client:
            assert (await client.infer("m", {"x": 1}))["y"].tolist() == [1, 2]
            for told in ("hotset serve", "in time"):
                with pytest.raises(InferenceError, match=told):
                    await client.infer("m", {"x": 1})

    run(story)


def test_an_answer_in_json_is_read_too() -> None:
    result = read_result({}, json.dumps(ANSWER).encode())
    assert result["y"].tolist() == [1, 2]
