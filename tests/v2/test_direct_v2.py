"""Inference requests that their connection hands in itself answer as those that go through ASGI do."""

from __future__ import annotations

import asyncio
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import uvicorn
from uvicorn.server import ServerState
from v2_world import MIB, Count, Echo, Scale, World, run, tensor
from wire import Wire, parsed

from hotset.gateway.auth import ApiKeys, Guard
from hotset.gateway.direct import DirectProtocol
from hotset.gateway.intake import READ_BYTES, Intake

ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)
BIG = np.random.default_rng(0).random((400, 500), np.float32)


class Line:
    """One connection to a v2 world; ``tasks`` counts the requests that uvicorn made a task for."""

    def __init__(self, world: World) -> None:
        self.wire = Wire()
        guard = Guard(world.application, None, ApiKeys())
        config = uvicorn.Config(guard, ws="none", log_config=None, lifespan="off")
        self.loop = asyncio.get_running_loop()
        self.state = ServerState()
        fronts = {b"/v2/models/": world.front}
        self.connection = DirectProtocol(
            world.control, world.bodies, fronts, guard.admits, config=config, server_state=self.state, app_state={}
        )
        self.intake = Intake(self.connection, memoryview(bytearray(READ_BYTES)))
        self.intake.connection_made(self.wire)  # type: ignore[arg-type]

    async def post(self, path: str, body: bytes, *lines: str) -> tuple[int, dict[str, str], bytes]:
        head = [f"POST {path} HTTP/1.1", "host: here", f"content-length: {len(body)}", *lines, "", ""]
        data = "\r\n".join(head).encode() + body
        while data and not self.wire.closed:
            data = self.wire.arrive(self.intake, data)
            await asyncio.sleep(0)
        while b"\r\n\r\n" not in self.wire.sent:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        (answer,), self.wire.sent = parsed(self.wire.sent), b""
        return answer


def message(array: np.ndarray, name: str, *, binary: bool = True, **more: Any) -> tuple[bytes, bytes, str]:
    outputs = [{"name": "output", "parameters": {"binary_data": binary}}]
    header = orjson.dumps({"inputs": [tensor(name, array)], "outputs": outputs, **more})
    return header, header + array.tobytes(), f"inference-header-content-length: {len(header)}"


@pytest.mark.parametrize("array", [ROWS, BIG], ids=["small", "large"])
def test_a_binary_tensor_comes_back_as_it_was(tmp_path: Path, array: np.ndarray) -> None:
    async def story() -> None:
        async with World(tmp_path, Echo) as world:
            line = Line(world)
            header, body, length = message(array, "x", id="7")
            for _ in range(2):
                status, headers, answer = await line.post("/v2/models/echo/infer", body, length)
                assert (status, headers["content-type"]) == (200, "application/octet-stream")
                size = int(headers["inference-header-content-length"])
                assert orjson.loads(answer[:size])["id"] == "7"
                assert answer[size:] == array.tobytes()
                assert headers["x-hotset-gpu"] == "local/virtual:0"
            assert not line.state.tasks
            # The same through ASGI: the same headers, the same answer.
            sent = {"inference-header-content-length": str(len(header))}
            asgi = await world.http.post("/v2/models/echo/infer", content=body, headers=sent)
            assert asgi.content == answer
            assert set(asgi.headers) == set(headers)
            assert world.service.statistics.of("echo", "1")["inference_count"] == 3
            assert world.bodies.reading_bytes == world.control.open_body_bytes == 0

    run(story)


def test_errors_are_the_protocols(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path, Scale, Count) as world:
            line = Line(world)
            _, body, length = message(ROWS, "nothing")
            for path, sent, lines, status, told in (
                ("scale", body, [length], 400, "nothing: is no input"),
                ("scale", b"{", [], 400, "cannot be read"),
                ("scale", b"{" + BIG.tobytes(), ["inference-header-content-length: 1"], 400, "cannot be read"),
                ("scale", body, ["inference-header-content-length: 1000000"], 400, "is not a length within"),
                ("scale", body, ["x-hotset-timeout: never"], 400, "X-Hotset-Timeout"),
                ("absent", body, [length], 404, "there is no model"),
                ("absent", BIG.tobytes(), [], 404, "there is no model"),
                ("scale/versions/9", body, [length], 404, "has no version"),
                (
                    "count",
                    orjson.dumps({"inputs": [{**tensor("upto", np.array([3])), "parameters": {}, "data": [3]}]}),
                    [],
                    400,
                    "ModelStreamInfer",
                ),
            ):
                answer = await line.post(f"/v2/models/{path}/infer", sent, *lines)
                assert answer[0] == status, answer
                assert told in orjson.loads(answer[2])["error"]
            assert not world.control.calls

    run(story)


def test_compressed_bodies_and_answers_go_through_asgi(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(tmp_path, Echo, limit_bytes=2 * MIB) as world:
            line = Line(world)
            _, body, length = message(BIG, "x")
            packed = gzip.compress(body)
            status, headers, answer = await line.post("/v2/models/echo/infer", packed, length, "content-encoding: gzip")
            size = int(headers["inference-header-content-length"])
            assert (status, answer[size:]) == (200, BIG.tobytes())
            status, headers, answer = await line.post("/v2/models/echo/infer", body, length, "accept-encoding: gzip")
            assert headers["content-encoding"] == "gzip"
            assert gzip.decompress(answer)[size:] == BIG.tobytes()

    run(story)
