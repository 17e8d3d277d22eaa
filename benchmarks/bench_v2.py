"""The v2 protocol beside the least that any Python server can do with the same requests, in the same run.

    hotset   uvicorn -> v2 front door -> control loop -> scheduler -> frames, shared slots -> worker's codec -> predict
    asgi     uvicorn -> an ASGI callable that adds up the tensor itself: one process, no scheduling, no codec
    raw      an asyncio protocol of 40 lines that does the same without any HTTP library: the ceiling

Three loads: a 1x3x224x224 FP32 tensor (602 kB) as binary data on 8 connections, its sum as the answer; and 16 floats as
JSON on 1 and on 32 connections. The servers' rounds are interleaved and medians compared, since this machine may not be
ours alone; with 2 cores the load generator competes with the servers, for all alike. Ends by itself in two minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import uvicorn
import uvloop

from hotset.gateway.server import ServerConfig, run
from hotset.store.bundles import make_bundle

FUNCTION = '''
from typing import Annotated

import numpy as np

import hotset

@hotset.function(gpu_memory="64MiB")
class Sum:
    """The sum of its tensor."""

    def predict(self, x: Annotated[np.ndarray, hotset.Tensor("float32", finite=False)]) -> np.ndarray:
        return x.sum(dtype=np.float32)
'''
MIB = 1 << 20
LENGTH = b"inference-header-content-length: "


def head(size: int, json_size: int | None = None) -> bytes:
    lines = [b"POST /v2/models/sum/infer HTTP/1.1", b"host: localhost", b"content-length: %d" % size]
    if json_size is not None:
        lines.append(b"%b%d" % (LENGTH, json_size))
    return b"\r\n".join([*lines, b"", b""])


def binary_request() -> bytes:
    data = np.random.default_rng(0).random((1, 3, 224, 224), np.float32)
    described = {"name": "x", "shape": data.shape, "datatype": "FP32", "parameters": {"binary_data_size": data.nbytes}}
    header = json.dumps({"inputs": [described], "outputs": [{"name": "output", "parameters": {"binary_data": True}}]})
    body = header.encode() + data.tobytes()
    return head(len(body), len(header)) + body


def json_request() -> bytes:
    values = [index / 7 for index in range(16)]
    body = json.dumps({"inputs": [{"name": "x", "shape": [16], "datatype": "FP32", "data": values}]}).encode()
    return head(len(body)) + body


class Load(msgspec.Struct, frozen=True):
    """What is asked, and how much at once."""

    name: str
    request: bytes
    connections: int


class Round(msgspec.Struct):
    """One server under load for a while."""

    requests_per_s: float
    latencies_s: list[float]
    cpu_us: float
    """Of the server's first process, per request."""


# The three servers, each run in a process of its own by this very file


def answer_to(body: bytes | memoryview, json_size: int | None) -> tuple[bytes, bytes]:
    """What a v2 server must at least do: find the tensor, add it up, say so. The answer's length header and body."""
    if json_size is None:
        total = np.float32(sum(msgspec.json.decode(body)["inputs"][0]["data"]))
        return b"", (
            b'{"model_name":"sum","model_version":"1","outputs":[{"name":"output","datatype":"FP32","shape":[1],'
            b'"data":[%f]}]}' % total
        )
    total = np.frombuffer(body, np.uint8)[json_size:].view("<f4").sum(dtype=np.float32)
    header = (
        b'{"model_name":"sum","model_version":"1","outputs":[{"name":"output","datatype":"FP32","shape":[1],'
        b'"parameters":{"binary_data_size":4}}]}'
    )
    return b"%d" % len(header), header + total.tobytes()


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    declared = dict(scope["headers"]).get(LENGTH[:-2])
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message["body"])
        more = message.get("more_body", False)
    size, body = answer_to(b"".join(parts), None if declared is None else int(declared))
    headers = [(b"content-length", b"%d" % len(body))]
    if size:
        headers.append((LENGTH[:-2], size))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Raw(asyncio.Protocol):
    """HTTP as far as the load generator speaks it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.received = bytearray()

    def data_received(self, data: bytes) -> None:
        self.received += data
        end = self.received.find(b"\r\n\r\n", 0, 4096) + 4
        if end < 4 or len(self.received) < end + number(self.received, b"content-length: "):
            return
        json_size = number(self.received, LENGTH) if self.received.find(LENGTH, 0, end) >= 0 else None
        size, body = answer_to(memoryview(self.received)[end:], json_size)
        extra = b"%b%b\r\n" % (LENGTH, size) if size else b""
        self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n%b\r\n%b" % (len(body), extra, body))
        self.received = bytearray()


async def serve_asgi() -> None:
    config = uvicorn.Config(
        asgi,
        port=0,
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        proxy_headers=False,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    announce(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
    await serving


async def serve_raw() -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    server = await loop.create_server(Raw, "127.0.0.1", 0)
    announce(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await stopped.wait()
    server.close()


async def serve_hotset() -> None:
    with tempfile.TemporaryDirectory() as data:
        config = ServerConfig(port=0, data=Path(data), virtual_gpus=1, gpu_memory_bytes=256 * MIB, drain_s=1.0)
        await run(config, ready=announce)


SERVERS: dict[str, Callable[[], Any]] = {"hotset": serve_hotset, "asgi": serve_asgi, "raw": serve_raw}


def announce(url: str) -> None:
    print(url, flush=True)


@contextmanager
def started(name: str) -> Iterator[tuple[str, int]]:
    """A server in a process group of its own: its URL and process id."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", name], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


# The load generator


class Connection(asyncio.Protocol):
    """Sends one request after the other until told to stop."""

    def __init__(self, request: bytes, end_s: float, latencies_s: list[float], done: asyncio.Future[None]) -> None:
        self.request = request
        self.end_s = end_s
        self.latencies_s = latencies_s
        self.done = done
        self.received = b""
        self.sent_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.send()

    def send(self) -> None:
        self.sent_s = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        received = self.received + data if self.received else data
        end = received.find(b"\r\n\r\n")
        if end < 0 or len(received) < end + 4 + number(received, b"content-length: "):
            self.received = received
            return
        now_s = time.perf_counter()
        self.received = b""
        if not received.startswith(b"HTTP/1.1 200"):
            self.done.set_exception(RuntimeError(received.decode(errors="replace")))
            return
        self.latencies_s.append(now_s - self.sent_s)
        if now_s < self.end_s:
            self.send()
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


def number(message: bytes | bytearray, name: bytes) -> int:
    start = message.index(b"\r\n" + name) + 2 + len(name)
    return int(message[start : message.index(b"\r", start)])


async def put_under(load: Load, url: str, pid: int, seconds: float) -> Round:
    host, port = url.removeprefix("http://").split(":")
    loop = asyncio.get_running_loop()
    latencies_s: list[float] = []
    before_s = cpu_s(pid)
    start_s = time.perf_counter()
    futures = [loop.create_future() for _ in range(load.connections)]
    for done in futures:
        await loop.create_connection(
            lambda done=done: Connection(load.request, start_s + seconds, latencies_s, done), host, int(port)
        )
    await asyncio.wait_for(asyncio.gather(*futures), seconds + 10)
    rate = len(latencies_s) / (time.perf_counter() - start_s)
    return Round(rate, latencies_s, (cpu_s(pid) - before_s) / len(latencies_s) * 1e6)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percentile_ms(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] * 1e3


def deploy(url: str) -> None:
    with tempfile.TemporaryDirectory() as folder, httpx.Client(base_url=url, timeout=60) as client:
        file = Path(folder) / "add.py"
        file.write_text(FUNCTION)
        archive = BytesIO()
        bundle = make_bundle(file, archive)
        client.put(f"/system/bundles/{bundle.digest}", content=archive.getvalue()).raise_for_status()
        client.post("/system/functions", json={"service": "sum", "image": f"sha256:{bundle.digest}"}).raise_for_status()
        client.post("/v2/repository/models/sum/load").raise_for_status()


def compare(rounds: int, seconds: float) -> None:
    loads = [
        Load("602 kB binary tensor", binary_request(), 8),
        Load("16 floats JSON", json_request(), 1),
        Load("16 floats JSON", json_request(), 32),
    ]
    with ExitStack() as stack, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        servers = {name: stack.enter_context(started(name)) for name in SERVERS}
        deploy(servers["hotset"][0])
        for load in loads:
            for url, pid in servers.values():
                runner.run(put_under(load, url, pid, 0.3))
            measured: dict[str, list[Round]] = {name: [] for name in servers}
            for _ in range(rounds):
                for name, (url, pid) in servers.items():
                    measured[name].append(runner.run(put_under(load, url, pid, seconds)))
            report(load, measured)


def report(load: Load, measured: dict[str, list[Round]]) -> None:
    rounds = len(measured["hotset"])
    print(f"\n{load.name}, {load.connections} connections, median of {rounds} rounds (lowest-highest)")
    rates = {name: [each.requests_per_s for each in rounds] for name, rounds in measured.items()}
    for name, each in measured.items():
        p50, p99 = (statistics.median(percentile_ms(one.latencies_s, share) for one in each) for share in (0.5, 0.99))
        rate, cpu_us = rates[name], statistics.median(one.cpu_us for one in each)
        print(
            f"  {name:7} {statistics.median(rate):8.0f} requests/s ({min(rate):.0f}-{max(rate):.0f})   "
            f"p50 {p50:7.3f} ms  p99 {p99:7.3f} ms   {cpu_us:6.0f} us CPU/request"
        )
    reached = statistics.median(rates["hotset"])
    print(
        f"  hotset reaches {reached / statistics.median(rates['asgi']):.0%} of the bare ASGI server's rate, "
        f"{reached / statistics.median(rates['raw']):.0%} of the ceiling's"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a round")
    parser.add_argument("--serve", choices=list(SERVERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as serving:
            serving.run(SERVERS[options.serve]())
    else:
        compare(options.rounds, options.seconds)
