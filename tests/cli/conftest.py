"""A real server for the commands that talk to one: started once for all of them, ended by its own stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import hotset

FUNCTIONS = {
    "greet.py": '''
import hotset

@hotset.function(gpu_memory="8MiB", timeout="20s")
class Greet:
    """Greets."""

    def load(self, device: str) -> None:
        print("greet is here")

    def predict(self, name: str, times: int = 1) -> str:
        print(f"greeting {name}")
        return f"hello {name}" * times
''',
    "count.py": '''
from collections.abc import Iterator

import hotset

@hotset.function(gpu_memory="8MiB")
class Count:
    """Counts."""

    def predict(self, to: int) -> Iterator[int]:
        yield from range(to)
''',
    "total.py": '''
import hotset

@hotset.function
def total(values: list[float]) -> float:
    """Adds up."""
    return sum(values)
''',
    "raw.py": '''
import hotset

@hotset.function
def raw(data: bytes) -> bytes:
    """Returns what it gets, backwards."""
    return data[::-1]
''',
}


@pytest.fixture(scope="session")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("functions")
    for name, code in FUNCTIONS.items():
        (folder / name).write_text(code)
    return folder


@pytest.fixture(scope="session")
def gateway(functions: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server with two virtual GPUs and all ``FUNCTIONS`` deployed."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("wb") as errors:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "hotset", "serve", "--port", "0", "--virtual-gpus", "2"),
                *("--gpu-memory", "64MiB", "--data-dir", str(log.parent / "data"), "--drain", "2s", "--json"),
            ],
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    assert server.stdout is not None
    said = b""
    while not said.rstrip().endswith(b"}"):
        line = server.stdout.readline()
        assert line, log.read_text()
        said += line
    url = str(json.loads(said)["url"])
    for name in FUNCTIONS:
        result = hotset("deploy", str(functions / name), "--gateway", url)
        assert result.exit_code == 0, result.output
    yield url
    server.send_signal(signal.SIGTERM)
    server.wait(30)
    server.stdout.close()
