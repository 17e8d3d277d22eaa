"""The whole server: real sockets, real signals, and in the last tests real GPU processes."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest
from gateway_world import MIB, HandClock
from gateway_world import run as run_story

from hotset.errors import ConfigurationError, StoreError
from hotset.gateway import server as server_module
from hotset.gateway.listener import bind
from hotset.gateway.server import ServerConfig, run
from hotset.node.fake import FakeFunction, FakeNode, virtual_gpus
from hotset.node.interface import Answer, Call
from hotset.store.bundles import make_bundle
from hotset.store.sqlite import SqliteDatastore

CODE = """
import hotset

@hotset.function(gpu_memory="64MiB", timeout="20s")
class Total:
    def predict(self, values: list[float]) -> float:
        return sum(values)
"""


def bundle_of(folder: Path) -> tuple[str, bytes]:
    """Digest and archive of a folder that holds CODE."""
    (folder / "code").mkdir(exist_ok=True)
    (folder / "code" / "total.py").write_text(CODE)
    archive = io.BytesIO()
    return make_bundle(folder / "code", archive).digest, archive.getvalue()


class Running:
    """A server on the test's own loop, over a fake node whose time the test moves."""

    def __init__(self, node: FakeNode, clock: HandClock, url: str, task: asyncio.Task[None]) -> None:
        self.node = node
        self.clock = clock
        self.url = url
        self.task = task
        self.client = httpx.AsyncClient(base_url=url, timeout=20)

    async def deploy(self, folder: Path) -> None:
        digest, archive = bundle_of(folder)
        (await self.client.put(f"/system/bundles/{digest}", content=archive)).raise_for_status()
        wanted = {"service": "total", "image": f"sha256:{digest}"}
        assert (await self.client.post("/system/functions", json=wanted)).status_code == 202

    async def until(self, verb: str) -> None:
        """Let the node's time pass until it was asked for this."""
        while not any(each.verb == verb for each in self.node.operations):
            await self.turn(0.2)

    async def turn(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await asyncio.sleep(0)

    async def answered(self, call: asyncio.Task[httpx.Response]) -> httpx.Response:
        while not call.done():
            await self.turn(0.2)
        return call.result()


@asynccontextmanager
async def running(data: Path, **settings: str | float) -> AsyncIterator[Running]:
    clock = HandClock()
    node = FakeNode(virtual_gpus(1, memory_bytes=320 * MIB), clock=clock)
    node.default = FakeFunction(load_s=0.1, inference_s=1.0)
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    config = ServerConfig(port=0, data=data, virtual_gpus=1, gpu_memory_bytes=320 * MIB, **settings)
    task = asyncio.create_task(run(config, nodes=[node], ready=ready.set_result))
    done, _ = await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
    if task in done:
        task.result()
    server = Running(node, clock, await ready, task)
    try:
        yield server
    finally:
        await server.client.aclose()
        for _ in range(2):
            if not task.done():
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.sleep(0)
        await task


def test_the_policy_is_made_with_the_settings_that_were_given(tmp_path):
    async def story():
        given = {"o3_limit": 1, "max_skips": 2, "max_wait_s": 3.0, "overrun_s": 4.0}
        async with running(tmp_path / "data", policy="mqfq_sticky", **given) as server:
            header = json.loads((await server.client.get("/system/trace")).text.splitlines()[0])
            assert (header["policy"], header["settings"]) == ("mqfq_sticky", given)

    run_story(story)


def test_a_stop_lets_calls_end(tmp_path):
    async def story():
        async with running(tmp_path / "data") as server:
            await server.deploy(tmp_path)
            call = asyncio.create_task(server.client.post("/function/total", content=b"[1]"))
            await server.until("run")
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0)
            assert not call.done()
            reply = await server.answered(call)
            assert (reply.status_code, reply.content) == (200, b"[1]")
            await server.task
            assert server.node.operations[-1].verb == "stop"
            with pytest.raises(httpx.ConnectError):
                await httpx.AsyncClient().get(server.url)

    run_story(story)


def test_a_call_that_does_not_end_in_time_gets_its_answer_all_the_same(tmp_path):
    async def story():
        async with running(tmp_path / "data", drain_s=0.05) as server:
            await server.deploy(tmp_path)
            call = asyncio.create_task(server.client.post("/function/total", content=b"[1]"))
            await server.until("run")
            os.kill(os.getpid(), signal.SIGTERM)
            reply = await call
            assert (reply.status_code, reply.json()["reason"]) == (503, "shutting_down")
            await server.task

    run_story(story)


def test_a_second_signal_stops_at_once(tmp_path):
    async def story():
        async with running(tmp_path / "data", drain_s=3600.0) as server:
            await server.deploy(tmp_path)
            call = asyncio.create_task(server.client.post("/function/total", content=b"[1]"))
            await server.until("run")
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(0)
            await server.task
            assert (await call).status_code == 503

    run_story(story)


def test_streams_arrive_as_they_are_made_and_uploads_may_come_in_chunks(tmp_path):
    def count(call: Call) -> list[Answer]:
        items = [b"1\n", b"2\n", b"3\n"]
        return [Answer(request_id=call.request_id, content_type="application/x-ndjson", body=item) for item in items]

    async def pieces() -> AsyncIterator[bytes]:
        yield b"["
        yield b"1]"

    async def story():
        async with running(tmp_path / "data") as server:
            await server.deploy(tmp_path)
            call = asyncio.create_task(server.client.post("/function/total", content=pieces()))
            assert (await server.answered(call)).content == b"[1]"
            server.node.default = FakeFunction(load_s=0.1, inference_s=3.0, respond=count)

            async def read() -> list[bytes]:
                seen = []
                async with server.client.stream("POST", "/function/total") as reply:
                    async for chunk in reply.aiter_raw():
                        seen.append(chunk)
                        server.clock.advance(1.0)
                return seen

            reading = asyncio.create_task(read())
            while len([each for each in server.node.operations if each.verb == "run"]) < 2:
                await asyncio.sleep(0)
            server.clock.advance(1.0)
            assert await reading == [b"1\n", b"2\n", b"3\n"]

    run_story(story)


def test_requests_sent_ahead_are_answered_in_order_and_in_whole(tmp_path):
    """Pipelining: the answers of one connection must not mix, although each is held for one turn of the loop."""

    async def story():
        async with running(tmp_path / "data") as server:
            port = int(server.url.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            one = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
            two = b"POST /function/none HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n[]"
            writer.write(one + two + one)
            text = b""
            while text.count(b'"status":"ok"') < 2:
                text += await reader.read(65536)
            assert text.startswith(b"HTTP/1.1 200 OK")
            assert text.index(b'{"status"') < text.index(b"404 Not Found") < text.rindex(b'{"status"')
            writer.write(b"this is no HTTP\r\n\r\n")
            refusal = (await reader.read()).decode()
            assert refusal.startswith("HTTP/1.1 400 Bad Request")
            assert json.loads(refusal.partition("\r\n\r\n")[2])["error"]
            writer.close()

    run_story(story)


def test_an_address_in_use_is_said_before_anything_is_started(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = ServerConfig(port=port, data=tmp_path / "data", virtual_gpus=1, gpu_memory_bytes=MIB)
        with pytest.raises(ConfigurationError, match=f"127.0.0.1:{port} cannot be listened on .* --port"):
            run_story(lambda: run(config))
    assert not (tmp_path / "data").exists()
    with pytest.raises(ConfigurationError, match="no address of this machine"):
        bind("no.such.host.invalid", 0)


def test_a_datastore_that_takes_nothing_does_not_stop_the_server(tmp_path, monkeypatch, caplog):
    async def story():
        async with running(tmp_path / "data") as server:
            while "could not be written" not in caplog.text:
                await asyncio.sleep(0)
            assert (await server.client.get("/healthz")).status_code == 200
            monkeypatch.undo()

    def full(*_):
        raise StoreError("the disk is full")

    monkeypatch.setattr(server_module, "PROFILES_EVERY_S", 0.0)
    monkeypatch.setattr(SqliteDatastore, "save_profiles", full)
    run_story(story)


# With real GPU processes


SERVE = """
import sys
from pathlib import Path
from hotset.gateway.server import ServerConfig, serve
serve(
    ServerConfig(port=0, data=Path(sys.argv[1]), virtual_gpus=2, gpu_memory_bytes=320 << 20, drain_s=5.0),
    ready=lambda url: print(url, flush=True),
)
"""


@contextmanager
def real_server(folder: Path) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    """``hotset serve`` in a process of its own, with one function deployed."""
    command = [sys.executable, "-c", SERVE, str(folder / "data")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        with httpx.Client(base_url=process.stdout.readline().strip(), timeout=30) as client:
            digest, archive = bundle_of(folder)
            client.put(f"/system/bundles/{digest}", content=archive).raise_for_status()
            wanted = {"service": "total", "image": f"sha256:{digest}"}
            client.post("/system/functions", json=wanted).raise_for_status()
            yield client, process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_thousand_malformed_bodies_get_a_4xx_each_and_harm_nobody(tmp_path):
    draw = random.Random(11)

    def malformed() -> bytes:
        match draw.randrange(4):
            case 0:
                return draw.randbytes(draw.randrange(64))
            case 1:
                return json.dumps({"values": [draw.random(), "x"]}).encode()
            case 2:
                return json.dumps({"valuez": [1.0]}).encode()
            case _:
                return json.dumps({"values": [1.0] * 8}).encode()[: draw.randrange(1, 20)]

    with real_server(tmp_path) as (client, process):
        for _ in range(1000):
            body = malformed()
            reply = client.post("/function/total", content=body)
            assert 400 <= reply.status_code < 500, (body, reply.content)
            assert reply.json()["error"]
        assert client.post("/function/total", json={"values": [1, 2]}).json() == 3.0
        state = client.get("/system/state?processes=true").json()
        assert len(state["processes"]) == 1
        process.terminate()
        assert process.wait(20) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(state["processes"][0]["pid"], 0)


def test_gpu_processes_killed_under_load_lose_no_call(tmp_path):
    with real_server(tmp_path) as (client, _), ThreadPoolExecutor(4) as clients:

        def call(number: int) -> float:
            reply = client.post("/function/total", json={"values": [number, 1]})
            assert reply.status_code == 200, reply.content
            return float(reply.json())

        answers = [call(0)]
        for start in range(1, 200, 50):
            (victim, *_) = client.get("/system/state?processes=true").json()["processes"]
            waiting = [clients.submit(call, number) for number in range(start, start + 50)]
            os.kill(victim["pid"], signal.SIGKILL)
            answers += [each.result() for each in waiting]
        assert answers == [number + 1.0 for number in range(201)]
        assert client.get("/healthz").status_code == 200
