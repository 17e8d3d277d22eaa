"""What the way to a GPU process and back costs, beside the least it could cost on this machine.

    python benchmarks/bench_transport.py [--json]

Two pairs of figures, each pair measured in turns so that other load on the machine hits both alike:

  small   100 bytes there and back. Floor: two processes that echo through a bare Unix socket pair, the node's side on
          the same event loop. Ours: ``LocalNode`` with the real worker and a function that returns its bytes.
  large   602,112 bytes there (a 1x3x224x224 float32 tensor), 4 kB back, against the same bytes through the bare socket.

"rate" keeps 32 calls in flight (ours through the CPU pool, which pipelines; a GPU runs one thing at a time). The ratios
are what counts; it ends by itself in under 20 seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

import uvloop

from hotset.node.cpu import CpuPool
from hotset.node.interface import Answer, Call, LaunchSpec
from hotset.node.manager import LocalNode

SMALL = b"x" * 100
LARGE = b"x" * (3 * 224 * 224 * 4)
ROUNDS = 5
SECONDS = 0.35
GPU = "local/virtual:0"

FUNCTIONS = """
import hotset

@hotset.function
class Echo:
    def predict(self, data: bytes) -> bytes:
        return data[:4096]

@hotset.function
def echo(data: bytes) -> bytes:
    return data[:4096]
"""

# The floor: a process that knows nothing but lengths.
BARE = """
import socket, struct, sys
sock = socket.socket(fileno=int(sys.argv[1]))
buffer = bytearray(4 << 20)
view = memoryview(buffer)
filled = 0
while received := sock.recv_into(view[filled:]):
    filled += received
    start, out = 0, []
    while filled - start >= 4:
        (size,) = struct.unpack_from("<I", buffer, start)
        if filled - start - 4 < size:
            break
        body = bytes(view[start + 4 : start + 4 + min(size, 4096)])
        out += (struct.pack("<I", len(body)), body)
        start += 4 + size
    if out:
        sock.sendall(b"".join(out))
    if start:
        buffer[: filled - start] = buffer[start:filled]
        filled -= start
"""


class BareProtocol(asyncio.Protocol):
    """The node's end of the floor."""

    def __init__(self) -> None:
        self.answered: Callable[[], None] = lambda: None
        self._left = 0
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def send(self, body: bytes) -> None:
        header = len(body).to_bytes(4, "little")
        if len(body) < 65536:
            self.transport.write(header + body)  # type: ignore[attr-defined]
        else:
            self.transport.writelines((header, body))  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        data = self._head + data
        start = 0
        while len(data) - start >= 4:
            size = int.from_bytes(data[start : start + 4], "little")
            if len(data) - start - 4 < size:
                break
            start += 4 + size
            self.answered()
        self._head = data[start:]


class Listener:
    """Counts; everything else a node may report is a failure of the benchmark."""

    def __init__(self) -> None:
        self.on_answer: Callable[[], None] = lambda: None
        self.on_ran: Callable[[], None] = lambda: None
        self.ready = asyncio.Event()

    def loaded(self, *_: object) -> None:
        self.ready.set()

    def answered(self, answer: Answer) -> None:
        if answer.status != 200:
            raise SystemExit(f"the function answered {answer.status}: {bytes(answer.body)!r}")
        self.on_answer()

    def run_finished(self, *_: object) -> None:
        self.on_ran()

    def logged(self, model: str, line: str) -> None:
        print(f"{model}: {line}", file=sys.stderr)

    def _failed(self, *what: object) -> None:
        raise SystemExit(f"a process failed: {what}")

    load_failed = run_failed = process_lost = gpu_lost = _failed


async def one_at_a_time(send: Callable[[], None], hook: Callable[[Callable[[], None]], None]) -> dict[str, float]:
    """Round trips for ``SECONDS``, the next sent from inside the answer to the last: microseconds."""
    done = asyncio.get_running_loop().create_future()
    times: list[float] = []
    end_s = perf_counter() + SECONDS
    sent_s = cpu_s = 0.0

    def answered() -> None:
        nonlocal sent_s
        now_s = perf_counter()
        times.append(now_s - sent_s)
        if now_s >= end_s:
            done.set_result(None)
            return
        sent_s = perf_counter()
        send()

    hook(answered)
    cpu_s = process_time()
    sent_s = perf_counter()
    send()
    await done
    return {"p50_us": statistics.median(times) * 1e6, "cpu_us": (process_time() - cpu_s) / len(times) * 1e6}


async def many(
    send: Callable[[], None], hook: Callable[[Callable[[], None]], None], in_flight: int = 32
) -> dict[str, float]:
    """Calls a second with ``in_flight`` of them on their way."""
    done = asyncio.get_running_loop().create_future()
    begin_s = perf_counter()
    end_s = begin_s + SECONDS
    cpu_s = process_time()
    count = open_calls = 0

    def answered() -> None:
        nonlocal count, open_calls
        count += 1
        if perf_counter() < end_s:
            send()
            return
        open_calls -= 1
        if not open_calls:
            done.set_result(None)

    hook(answered)
    for _ in range(in_flight):
        open_calls += 1
        send()
    await done
    return {"per_s": count / (perf_counter() - begin_s), "cpu_us": (process_time() - cpu_s) / count * 1e6}


async def measure(folder: Path) -> dict[str, dict[str, float]]:
    loop = asyncio.get_running_loop()
    (folder / "echoes.py").write_text(FUNCTIONS)
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    ours.setblocking(False)
    bare_process = subprocess.Popen([sys.executable, "-c", BARE, str(theirs.fileno())], pass_fds=(theirs.fileno(),))
    theirs.close()
    bare = BareProtocol()
    await loop.create_unix_connection(lambda: bare, sock=ours)

    listener = Listener()
    node = LocalNode(virtual_gpus=1, memory_bytes=1 << 30)
    pool = CpuPool()
    await node.start(listener)  # type: ignore[arg-type]
    await pool.start(listener)  # type: ignore[arg-type]
    settings = {"code_path": str(folder), "python": sys.executable, "memory_bytes": 0}
    on_gpu = LaunchSpec(model="Echo@1", entry="echoes:Echo", **settings)  # type: ignore[arg-type]
    on_cpu = LaunchSpec(model="echo@1", entry="echoes:echo", **settings)  # type: ignore[arg-type]
    ids = iter(range(1, 1 << 60))

    def call(body: bytes) -> Call:
        return Call(request_id=next(ids), body=body, content_type="application/octet-stream")

    def on_bare(answered: Callable[[], None]) -> None:
        bare.answered = answered

    def on_run(answered: Callable[[], None]) -> None:
        listener.on_answer, listener.on_ran = lambda: None, answered

    def on_answer(answered: Callable[[], None]) -> None:
        listener.on_answer, listener.on_ran = answered, lambda: None

    results: dict[str, list[dict[str, float]]] = {}
    try:
        node.load(GPU, on_gpu)
        await listener.ready.wait()
        warm = loop.create_future()
        on_answer(lambda: warm.set_result(None))
        pool.run(on_cpu, call(SMALL))
        await warm
        for _ in range(ROUNDS):
            for size, body in (("small", SMALL), ("large", LARGE)):
                turns = {
                    f"{size} bare": one_at_a_time(lambda body=body: bare.send(body), on_bare),  # type: ignore[misc]
                    f"{size} node": one_at_a_time(
                        lambda body=body: node.run(GPU, "Echo@1", [call(body)]),  # type: ignore[misc]
                        on_run,
                    ),
                    f"{size} bare rate": many(lambda body=body: bare.send(body), on_bare),  # type: ignore[misc]
                    f"{size} pool rate": many(lambda body=body: pool.run(on_cpu, call(body)), on_answer),  # type: ignore[misc]
                }
                for name, turn in turns.items():
                    results.setdefault(name, []).append(await turn)
    finally:
        await node.stop()
        await pool.stop()
        bare.transport.close()  # type: ignore[attr-defined]
        bare_process.kill()
        bare_process.wait()
    return {
        name: {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        for name, rounds in results.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    as_json = parser.parse_args().json
    with tempfile.TemporaryDirectory() as folder:
        figures = uvloop.run(measure(Path(folder)))
    for size in ("small", "large"):
        figures[f"{size} ratios"] = {
            "p50": figures[f"{size} node"]["p50_us"] / figures[f"{size} bare"]["p50_us"],
            "rate": figures[f"{size} pool rate"]["per_s"] / figures[f"{size} bare rate"]["per_s"],
        }
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; medians of {ROUNDS} rounds")
    for name, values in figures.items():
        print(f"{name:16}" + "".join(f"{key:>8} {value:12,.2f}" for key, value in values.items()))


if __name__ == "__main__":
    main()
