"""How many status requests a second the server answers, each on a connection of its own.

An OpenFaaS gateway asks for a function's status before every call, and closes the connection after each answer; so this
is a hot path (docs/openfaas.md). The server runs on one virtual GPU; a few clients, without an HTTP library, send the
gateway's own request and read the answer to its end.

    python benchmarks/bench_status.py [--seconds 5] [--clients 8] [--functions 20]

The clients share the machine: what the server could do with a core of its own follows from its processor time, printed
beside. Exits with 1 below ``--least`` requests a second.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from urllib.parse import urlsplit

import httpx
import msgspec
import psutil  # type: ignore[import-untyped]
import uvloop

from hotset.store.bundles import make_bundle

REQUEST = (
    b"GET /system/function/f0?namespace=openfaas-fn&usage=false HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"User-Agent: Go-http-client/1.1\r\nX-Forwarded-For: 127.0.0.1:51234\r\nX-Forwarded-Host: 127.0.0.1:8080\r\n"
    b"Accept-Encoding: gzip\r\nConnection: close\r\n\r\n"
)


@contextmanager
def serving(data: Path) -> Iterator[tuple[str, psutil.Process]]:
    command = [sys.executable, "-m", "hotset", "serve", "--port", "0", "--virtual-gpus", "1", "--gpu-memory", "256MiB"]
    env = {**os.environ, "HOTSET_DATA_DIR": str(data), "HOTSET_LOG_LEVEL": "error"}
    process = subprocess.Popen([*command, "--json"], env=env, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        url = next(line.split(b'"')[3].decode() for line in process.stdout if b'"url"' in line)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def deploy(url: str, folder: Path, functions: int) -> None:
    source = folder / "image"
    source.mkdir()
    (source / "README").write_text("an image without code")
    with (folder / "image.zip").open("w+b") as archive, httpx.Client(base_url=url, timeout=30) as client:
        digest = make_bundle(source, archive).digest
        archive.seek(0)
        client.put(f"/system/bundles/{digest}", content=archive.read()).raise_for_status()
        for number in range(functions):
            wanted = {"service": f"f{number}", "image": f"sha256:{digest}", "envProcess": "cat"}
            client.post("/system/functions", json=wanted).raise_for_status()


async def ask(host: str, port: int, until_s: float) -> int:
    answered = 0
    while perf_counter() < until_s:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(REQUEST)
        answer = await reader.read(-1)
        writer.close()
        if not answer.startswith(b"HTTP/1.1 200") or not answer.endswith(b"}"):
            raise SystemExit(f"the server answered {answer[:200]!r}")
        answered += 1
    return answered


class Measured(msgspec.Struct, frozen=True):
    per_second: float
    server_cpu_s: float
    """Processor time of the server for one request."""


async def measure(url: str, server: psutil.Process, seconds: float, clients: int) -> Measured:
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    await ask(parts.hostname, parts.port, perf_counter() + 0.5)
    cpu_s, began_s = sum(server.cpu_times()[:2]), perf_counter()
    answered = sum(await asyncio.gather(*(ask(parts.hostname, parts.port, began_s + seconds) for _ in range(clients))))
    passed_s = perf_counter() - began_s
    return Measured(answered / passed_s, (sum(server.cpu_times()[:2]) - cpu_s) / answered)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--functions", type=int, default=20)
    parser.add_argument("--least", type=float, default=2_000.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "data") as (url, server):
        deploy(url, Path(folder), options.functions)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            measured = runner.run(measure(url, server, options.seconds, options.clients))
    print(
        f"{measured.per_second:.0f} status requests a second, each on a new connection, at {options.clients} clients "
        f"and {options.functions} functions; {measured.server_cpu_s * 1e6:.0f} us of the server's processor time each, "
        f"so {1 / measured.server_cpu_s:.0f} a second for a core of its own"
    )
    return 0 if measured.per_second >= options.least else 1


if __name__ == "__main__":
    sys.exit(main())
