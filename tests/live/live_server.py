"""``hotset serve`` as its users start it: a program with a data directory, ended by signals."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil

from hotset.cli.remote import Remote
from hotset.store.bundles import make_bundle

ENDS_WITHIN_S = 20.0
"""The bound on every wait; a good run takes milliseconds."""


class LiveServer:
    """A running server."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process = process
        self.url = url

    def deploy(self, name: str, code: str, folder: Path, **env: str) -> dict[str, Any]:
        """Deploy a function's source text; its status."""
        source = folder / "function.py"
        source.write_text(code)
        return self.deploy_path(name, source, **env)

    def deploy_path(self, name: str, source: Path, **env: str) -> dict[str, Any]:
        """Deploy a file or a folder; its status."""
        with Remote(self.url) as remote, io.BytesIO() as archive:
            bundle = make_bundle(source, archive)
            archive.seek(0)
            remote.upload(bundle.digest, archive, lambda _: None)
            deployment = {"service": name, "image": f"sha256:{bundle.digest}", "envVars": env}
            status: dict[str, Any] = remote.deploy(deployment, lambda _: None)
            return status

    def state(self, *, processes: bool = False) -> dict[str, Any]:
        """``/system/state``."""
        with urlopen(
            f"{self.url}/system/state{'?processes=true' if processes else ''}", timeout=ENDS_WITHIN_S
        ) as answer:
            state: dict[str, Any] = json.load(answer)
            return state

    def learned(self, function: str) -> dict[str, float]:
        """What the server expects of a function's model, as its trace says."""
        with urlopen(f"{self.url}/system/trace", timeout=ENDS_WITHIN_S) as lines:
            models: dict[str, dict[str, float]] = json.loads(lines.readline())["models"]
            return models[function]

    def gpu_pids(self) -> list[int]:
        """The GPU processes that load or are resident."""
        return [process["pid"] for process in self.state(processes=True)["processes"]]

    def family(self) -> list[psutil.Process]:
        """Everything the server has started, and what that has started."""
        return list(psutil.Process(self.process.pid).children(recursive=True))


@contextlib.contextmanager
def live_server(data: Path, *arguments: str) -> Iterator[LiveServer]:
    """A server on two virtual GPUs; it may be ended, in any way, inside the context."""
    with (data.parent / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "hotset", "serve", "--port", "0", "--data-dir", str(data), "--json"),
                *("--virtual-gpus", "2", "--gpu-memory", "32MiB", "--drain", "10s", *arguments),
            ],
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    assert process.stdout is not None
    try:
        said = b""
        while not said.rstrip().endswith(b"}"):
            line = process.stdout.readline()
            assert line, (data.parent / "server.log").read_text()
            said += line
        yield LiveServer(process, str(json.loads(said)["url"]))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def all_gone(processes: list[psutil.Process]) -> bool:
    """Whether they end by themselves; an orphan's zombie, which only its new parent can reap, counts as ended."""
    _, alive = psutil.wait_procs(processes, timeout=ENDS_WITHIN_S)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive if process.is_running())
