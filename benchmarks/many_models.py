"""The scene of bench_many_models.py: twelve models of 100 MB, servers too small for them, a look at their memory."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from hotset.cli.remote import Remote
from hotset.store.bundles import make_bundle

MODELS = 12
LAYERS = 24
WIDTH = 1024
GPUS = 2
MIB = 1 << 20
GPU_MEMORY = "320MiB"
"""Three models of 96.1 MiB."""
AMPLE_MEMORY = "2GiB"

FUNCTION = f'''
import os
import time

import torch
from safetensors.torch import load_file

import hotset


@hotset.function(gpu_memory="100MiB")
class Linear:
    """{LAYERS} layers of {WIDTH}."""

    def load(self, device: str) -> None:
        time.sleep(float(os.environ["MORE_LOAD_S"]))
        self.net = torch.nn.Sequential(*(torch.nn.Linear({WIDTH}, {WIDTH}) for _ in range({LAYERS})))
        self.net.load_state_dict(load_file(os.environ["WEIGHTS"]))
        self.net.to(device).eval()

    def predict(self, seed: int) -> float:
        with torch.inference_mode():
            generator = torch.Generator().manual_seed(seed)
            return float(self.net(torch.rand(16, {WIDTH}, generator=generator)).sum())
'''
CALL = b'{"seed": 1}'


def names() -> list[str]:
    """The functions, most popular first."""
    return [f"model-{index:02}" for index in range(MODELS)]


def weights_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def make_weights(folder: Path) -> None:
    """One file of random weights for each model, in a process of its own: this one stays without torch."""
    script = (
        "import sys, torch\n"
        "from safetensors.torch import save_file\n"
        "for seed, path in enumerate(sys.argv[1:]):\n"
        "    torch.manual_seed(seed)\n"
        f"    layers = (torch.nn.Linear({WIDTH}, {WIDTH}) for _ in range({LAYERS}))\n"
        "    save_file(torch.nn.Sequential(*layers).state_dict(), path)\n"
    )
    paths = [str(weights_path(folder, name)) for name in names()]
    subprocess.run([sys.executable, "-c", script, *paths], check=True)


class Server(msgspec.Struct, frozen=True):
    """A running ``hotset serve``."""

    url: str
    log: Path


@contextlib.contextmanager
def serving(data: Path, gpu_memory: str, policy: str, eviction: str) -> Iterator[Server]:
    """``hotset serve`` on two virtual GPUs, in a process of its own that ends with the context."""
    log_path = data.parent / "server.log"
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "hotset", "serve", "--port", "0", "--data-dir", str(data), "--json"),
                *("--virtual-gpus", str(GPUS), "--gpu-memory", gpu_memory, "--drain", "5s"),
                # Parked models would lie in the same memory as the virtual GPUs, and no other server here has that.
                *("--policy", policy, "--eviction", eviction, "--host-memory", "0"),
            ],
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        )
    assert process.stdout is not None
    try:
        said = b""
        while not said.rstrip().endswith(b"}"):
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the server did not start:\n{log_path.read_text()}")
            said += line
        yield Server(json.loads(said)["url"], log_path)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def deploy(server: Server, folder: Path, more_load_s: float) -> None:
    """The twelve functions: one bundle, each with its own weights."""
    code = folder / "linear.py"
    code.write_text(FUNCTION)
    with Remote(server.url) as remote, tempfile.TemporaryFile() as archive:
        bundle = make_bundle(code, archive)
        archive.seek(0)
        remote.upload(bundle.digest, archive, lambda _: None)
        for name in names():
            env = {"WEIGHTS": str(weights_path(folder, name)), "MORE_LOAD_S": str(more_load_s)}
            deployment = {"service": name, "image": f"sha256:{bundle.digest}", "envVars": env}
            remote.deploy(deployment, lambda _: None)


@contextlib.contextmanager
def deployed(prepared: Path, gpu_memory: str, policy: str, eviction: str) -> Iterator[Server]:
    """A server on a copy of a prepared data directory: every run starts from the same knowledge."""
    with tempfile.TemporaryDirectory(dir=prepared.parent) as folder:
        data = Path(folder) / "data"
        shutil.copytree(prepared, data)
        with serving(data, gpu_memory, policy, eviction) as server:
            yield server


def invoke(server: Server, name: str) -> None:
    """One call, alone; ends the benchmark with what the server said when it fails."""
    request = urllib.request.Request(
        f"{server.url}/function/{name}", data=CALL, headers={"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{name}: {error} {error.read().decode()}\n{server.log.read_text()}") from None


class MemoryReport(msgspec.Struct):
    """What the sampler saw."""

    samples: int = 0
    over_budget: int = 0
    """Samples in which the residents of a GPU, or its account, exceeded its capacity."""
    most_reported_bytes: int = 0
    """The largest sum of residents on one GPU."""
    looks: int = 0
    """Samples in which the processes themselves were looked into."""
    most_weights_bytes: int = 0
    """The largest sum, on one GPU, of the weights' pages that its processes had in memory."""
    most_own_bytes: int = 0
    """The most any process had written for itself: interpreter, framework, scratch memory of a run."""
    unaccounted: int = 0
    """Looks in which a GPU's processes held more pages of weights than were reported for it."""


class MemorySampler(threading.Thread):
    """Compares ``/system/state`` with the budgets, and every tenth time with what the kernel says of the processes."""

    EVERY_S = 0.1
    LOOK_EVERY = 10

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.report = MemoryReport()
        self.error: Exception | None = None
        self._url = server.url
        self._ended = threading.Event()

    def __enter__(self) -> MemorySampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()
        if self.error is not None:
            raise self.error

    def run(self) -> None:
        try:
            while not self._ended.wait(self.EVERY_S):
                self._sample(look=self.report.samples % self.LOOK_EVERY == 0)
        except Exception as error:  # noqa: BLE001 - raised again by the thread that waits for this one
            self.error = error

    def _sample(self, *, look: bool) -> None:
        state = self._state("?processes=true" if look else "")
        report = self.report
        report.samples += 1
        reported = {}
        for gpu in state["gpus"]:
            residents_bytes = sum(resident["memory_bytes"] for resident in gpu["residents"])
            reported[gpu["gpu_id"]] = residents_bytes
            report.over_budget += max(residents_bytes, gpu["used_bytes"]) > gpu["capacity_bytes"]
            report.most_reported_bytes = max(report.most_reported_bytes, residents_bytes)
        if look:
            self._look(state["processes"], reported)

    def _look(self, processes: list[dict[str, Any]], reported: dict[str, int]) -> None:
        report = self.report
        report.looks += 1
        weights: defaultdict[str, int] = defaultdict(int)
        for process in processes:
            weights_bytes, own_bytes = memory_of(process["pid"])
            weights[process["gpu_id"]] += weights_bytes
            report.most_own_bytes = max(report.most_own_bytes, own_bytes)
        for gpu_id, held_bytes in weights.items():
            report.most_weights_bytes = max(report.most_weights_bytes, held_bytes)
            # Between the two looks a model may have come and another gone: compared with the budget, not the moment.
            report.unaccounted += held_bytes > max(reported[gpu_id], report.most_reported_bytes)

    def _state(self, query: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self._url}/system/state{query}", timeout=10) as answer:
            state: dict[str, Any] = json.load(answer)
        return state


_MAPPING = re.compile(rb"^[0-9a-f]+-[0-9a-f]+ ")


def memory_of(pid: int) -> tuple[int, int]:
    """Bytes of weights files that a process has in memory, and bytes it wrote for itself; zeros once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps").read_bytes().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    weights = own = 0
    in_weights = False
    for line in lines:
        if _MAPPING.match(line):
            in_weights = line.endswith(b".safetensors")
        elif line.startswith(b"Rss:") and in_weights:
            weights += int(line.split()[1]) * 1024 - mmap.PAGESIZE  # the file's header
        elif line.startswith(b"Private_Dirty:"):
            own += int(line.split()[1]) * 1024
    return weights, own
