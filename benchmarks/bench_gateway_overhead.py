"""What hotset costs per call, beside a bare server: the least that an ASGI application under uvicorn can do.

Both answer the sum of 16 floats, computed by the same function in the same kind of worker process over the same frames:

    hotset   uvicorn's parser -> control loop -> scheduler -> GPU Manager -> frames -> worker
    bare     uvicorn -> an ASGI callable of ten lines      ->               frames -> worker

hotset answers such calls without a task and in one write (gateway/direct.py), which uvicorn does not do for the bare
one; that pays for a part of what scheduling costs. The rounds of the two are interleaved and the medians compared,
since this machine may not be ours alone. The load generator is a process of its own; with 2 cores it competes with the
server, for both alike. Ends by itself in a minute.
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
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import msgspec
import uvicorn
import uvloop

from hotset.gateway.server import ServerConfig, run
from hotset.node.frames import Failed, Kind, Loaded, LoadOrder, control
from hotset.node.interface import Answer, Call
from hotset.node.spawner import Spawner
from hotset.node.transport import ProcessTransport
from hotset.store.bundles import make_bundle

FUNCTION = '''
import hotset

@hotset.function(gpu_memory="64MiB")
class Sum:
    """The sum of its numbers."""

    def predict(self, values: list[float]) -> float:
        return sum(values)
'''
BODY = json.dumps({"values": [i / 7 for i in range(16)]}).encode()
HEADERS = (
    b"POST /function/sum HTTP/1.1\r\nhost: localhost\r\nuser-agent: hotset-bench\r\naccept: */*\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(BODY)
)
MIB = 1 << 20


class Round(msgspec.Struct):
    """One server under load for a while."""

    requests_per_s: float
    latencies_s: list[float]
    inside_s: list[float]
    """Latency less what the response headers say of queueing, loading and the function; only hotset says so."""


# The two servers, each run in a process of its own by this very file


class Bare:
    """Frames for a server that schedules nothing: one worker, one Future per call."""

    def __init__(self) -> None:
        self.loaded = asyncio.get_running_loop().create_future()
        self.waiting: dict[int, asyncio.Future[Answer]] = {}
        self.count = 0

    async def start(self, code_path: str) -> None:
        spawned = Spawner().spawn(sys.executable, {})
        self.transport = ProcessTransport(self, spawned.arena_fd)
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self.transport, sock=spawned.socket)
        order = LoadOrder(model="sum@1", entry="add:Sum", code_path=code_path, device="cpu")
        self.transport.send(control(Kind.LOAD, order))
        await self.loaded

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        self.count = request_id = self.count + 1
        future = self.waiting[request_id] = asyncio.get_running_loop().create_future()
        self.transport.send_run([Call(request_id=request_id, body=body)])
        answer = await future
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer.body))]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})

    def on_answer(self, answer: Answer) -> None:
        self.waiting.pop(answer.request_id).set_result(answer)

    def on_ran(self, inference_s: float) -> None:
        pass

    def on_loaded(self, loaded: Loaded) -> None:
        self.loaded.set_result(None)

    def on_failed(self, failed: Failed) -> None:
        raise RuntimeError(failed.reason)

    def on_closed(self, broken: str | None) -> None:
        pass


async def serve_bare(code_path: str) -> None:
    bare = Bare()
    await bare.start(code_path)
    config = uvicorn.Config(
        bare,
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


async def serve_hotset(data: str) -> None:
    config = ServerConfig(port=0, data=Path(data), virtual_gpus=1, gpu_memory_bytes=256 * MIB, drain_s=1.0)
    await run(config, ready=announce)


def announce(url: str) -> None:
    print(url, flush=True)


@contextmanager
def started(*arguments: str) -> Iterator[tuple[str, int]]:
    """A server in a process group of its own: its URL and process id."""
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True
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

    def __init__(self, end_s: float, measured: Round, done: asyncio.Future[None]) -> None:
        self.end_s = end_s
        self.measured = measured
        self.done = done
        self.received = b""
        self.sent_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.send()

    def send(self) -> None:
        self.sent_s = time.perf_counter()
        self.transport.write(HEADERS + BODY)

    def data_received(self, data: bytes) -> None:
        received = self.received + data if self.received else data
        head_end = received.find(b"\r\n\r\n")
        if head_end < 0 or len(received) < head_end + 4 + content_length(received):
            self.received = received
            return
        now_s = time.perf_counter()
        self.received = b""
        if not received.startswith(b"HTTP/1.1 200"):
            self.done.set_exception(RuntimeError(received.decode()))
            return
        self.measured.latencies_s.append(now_s - self.sent_s)
        if len(self.measured.inside_s) < 20_000 and b"x-hotset-queue" in received:
            elsewhere_s = sum(header(received, name) for name in ELSEWHERE)
            self.measured.inside_s.append(now_s - self.sent_s - elsewhere_s)
        if now_s < self.end_s:
            self.send()
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


ELSEWHERE = (b"x-hotset-queue-seconds: ", b"x-hotset-load-seconds: ", b"x-hotset-inference-seconds: ")


def header(response: bytes, name: bytes) -> float:
    start = response.index(name) + len(name)
    return float(response[start : response.index(b"\r", start)])


def content_length(response: bytes) -> int:
    return int(header(response, b"content-length: "))


async def load(url: str, connections: int, seconds: float) -> Round:
    host, port = url.removeprefix("http://").split(":")
    loop = asyncio.get_running_loop()
    measured = Round(0.0, [], [])
    start_s = time.perf_counter()
    futures = [loop.create_future() for _ in range(connections)]
    for done in futures:
        await loop.create_connection(lambda done=done: Connection(start_s + seconds, measured, done), host, int(port))
    await asyncio.wait_for(asyncio.gather(*futures), seconds + 10)
    measured.requests_per_s = len(measured.latencies_s) / (time.perf_counter() - start_s)
    return measured


def deploy(url: str, file: Path) -> None:
    archive = BytesIO()
    bundle = make_bundle(file, archive)
    with httpx.Client(base_url=url, timeout=30) as client:
        client.put(f"/system/bundles/{bundle.digest}", content=archive.getvalue()).raise_for_status()
        client.post("/system/functions", json={"service": "sum", "image": f"sha256:{bundle.digest}"}).raise_for_status()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


def start_up(data: str) -> None:
    """From nothing to the first answer."""
    start_s = time.perf_counter()
    with started("--hotset", data) as (url, pid), httpx.Client(base_url=url) as client:
        client.get("/healthz").raise_for_status()
        seconds = time.perf_counter() - start_s
        print(f"start to first answer {seconds:.2f} s (aim <= 1), {rss_mib(pid):.0f} MiB (aim <= 150)")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compare(rounds: int, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "add.py"
        file.write_text(FUNCTION)
        start_up(f"{folder}/first")
        with started("--hotset", f"{folder}/data") as hotset, started("--bare", folder) as bare:
            deploy(hotset[0], file)
            servers = {"hotset": hotset, "bare": bare}
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                for url, _ in servers.values():
                    runner.run(load(url, 8, 0.5))
                for connections in (1, 32):
                    report(runner, servers, connections, rounds, seconds)


def report(
    runner: asyncio.Runner, servers: dict[str, tuple[str, int]], connections: int, rounds: int, seconds: float
) -> None:
    measured: dict[str, list[Round]] = {name: [] for name in servers}
    cpu_us: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(rounds):
        for name, (url, pid) in servers.items():
            before_s = cpu_s(pid)
            measured[name].append(runner.run(load(url, connections, seconds)))
            cpu_us[name].append((cpu_s(pid) - before_s) / len(measured[name][-1].latencies_s) * 1e6)
    print(f"\n{connections} connection{'s' if connections > 1 else ''}, median of {rounds} rounds (lowest-highest)")
    rates: dict[str, float] = {}
    for name, each in measured.items():
        rate = [one.requests_per_s for one in each]
        rates[name] = statistics.median(rate)
        p50, p99 = (
            statistics.median(percentile(one.latencies_s, share) for one in each) * 1e6 for share in (0.5, 0.99)
        )
        print(
            f"  {name:7} {rates[name]:8.0f} requests/s ({min(rate):.0f}-{max(rate):.0f})   "
            f"p50 {p50:6.0f} us  p99 {p99:6.0f} us   server CPU {statistics.median(cpu_us[name]):5.1f} us/request"
        )
    inside = [[percentile(one.inside_s, share) * 1e6 for one in measured["hotset"]] for share in (0.5, 0.99)]
    print(
        f"  hotset less queueing, loading and the function (seen by the client, its own socket included): "
        f"p50 {statistics.median(inside[0]):.0f} us, p99 {statistics.median(inside[1]):.0f} us"
    )
    print(f"  hotset reaches {rates['hotset'] / rates['bare']:.0%} of the bare server's rate")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a round")
    parser.add_argument("--hotset", metavar="DATA", help=argparse.SUPPRESS)
    parser.add_argument("--bare", metavar="CODE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hotset or options.bare:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as serving:
            serving.run(serve_hotset(options.hotset) if options.hotset else serve_bare(options.bare))
    else:
        compare(options.rounds, options.seconds)
