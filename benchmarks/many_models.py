"""The scene of bench_many_models.py: twelve models of 100 MB and servers on two virtual GPUs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil  # type: ignore[import-untyped]

from hotset.cli.remote import Remote
from hotset.store.bundles import make_bundle

MODELS = 12
LAYERS = 24
WIDTH = 1024
ROWS = 1
"""Of one call. With a single row a run reads the model's 100 MB once and computes next to nothing, which takes one core
8 to 12 ms: what the other servers' inferences took. With 16 rows it is 17 ms, and the machine is overloaded."""
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
            return float(self.net(torch.rand({ROWS}, {WIDTH}, generator=generator)).sum())
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
    pid: int


@contextlib.contextmanager
def serving(data: Path, gpu_memory: str, policy: str, eviction: str, *more: str) -> Iterator[Server]:
    """``hotset serve`` on two virtual GPUs, in a process of its own that ends with the context; ``more``: arguments."""
    log_path = data.parent / "server.log"
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "hotset", "serve", "--port", "0", "--data-dir", str(data), "--json"),
                *("--virtual-gpus", str(GPUS), "--gpu-memory", gpu_memory, "--drain", "5s"),
                *("--policy", policy, "--eviction", eviction, *more),
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
        yield Server(json.loads(said)["url"], log_path, process.pid)
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
def deployed(prepared: Path, gpu_memory: str, policy: str, eviction: str, *more: str) -> Iterator[Server]:
    """A server on a copy of a prepared data directory: every run starts from the same knowledge. Its processes come
    from a pool already, and each function was called once, the most popular one last."""
    with tempfile.TemporaryDirectory(dir=prepared.parent) as folder:
        data = Path(folder) / "data"
        shutil.copytree(prepared, data)
        with serving(data, gpu_memory, policy, eviction, *more) as server:
            wait_for_pool(server)
            for name in reversed(names()):
                invoke(server, name)
            yield server


def wait_for_pool(server: Server) -> None:
    """Until processes wait to be used: before that, a load imports torch, and takes fifty times as long."""
    for _ in range(600):
        for child in psutil.Process(server.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "hotset.node.worker.zygote" in child.cmdline() and len(child.children()) >= GPUS:
                    return
        time.sleep(0.1)
    raise SystemExit(f"the server has no pool of processes after a minute:\n{server.log.read_text()}")


def wait_for_load_checks(server: Server) -> None:
    """Until fast loads of all functions are compared with ordinary ones, which takes processes of their own beside what
    is measured, and begins again at the next start if it is cut short."""
    with Remote(server.url) as remote:
        for _ in range(1200):
            if all(remote.function(name)["hotset"]["fast_load"] is not None for name in names()):
                return
            time.sleep(0.1)
    raise SystemExit(f"the loads are not checked after two minutes:\n{server.log.read_text()}")


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
