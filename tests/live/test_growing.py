"""A model that keeps more with each call takes memory that is counted, and shown, and not its neighbours'."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from live_server import LiveServer, live_server

from hotset.cli.remote import Remote

MIB = 1 << 20
SEEN_WITHIN_S = 90.0
"""A process looks at itself no more often than it can afford."""
HOARDER = """
import numpy
import hotset

@hotset.function(gpu_memory="4MiB")
class Hoarder:
    def load(self, device: str) -> None:
        self.kept = [numpy.ones(4 << 20, numpy.uint8)]

    def predict(self, mib: int = 0) -> int:
        self.kept.append(numpy.ones(mib << 20, numpy.uint8))
        return sum(map(len, self.kept)) >> 20
"""


def until(holds: Callable[[], object]) -> None:
    begin_s = time.monotonic()
    while not holds():
        assert time.monotonic() < begin_s + SEEN_WITHIN_S
        time.sleep(0.02)


def gpu(server: LiveServer) -> dict[str, Any]:
    (only,) = server.state()["gpus"]
    return dict(only)


def sizes(server: LiveServer) -> dict[str, int]:
    """What is on the GPU, in MiB."""
    return {each["model"].partition("@")[0]: each["memory_bytes"] // MIB for each in gpu(server)["residents"]}


def test_what_a_model_adds_while_it_runs_is_counted_shown_and_kept_free_next_time(tmp_path: Path) -> None:
    serve = (tmp_path / "data", "--virtual-gpus", "1", "--host-memory", "0")

    def call(remote: Remote, name: str, mib: int) -> int:
        return int(remote.invoke(name, b'{"mib": %d}' % mib, {}).json())

    with live_server(*serve) as server, Remote(server.url) as remote:
        for name in ("quiet", "large"):
            server.deploy(name, HOARDER, tmp_path)
        assert [call(remote, "quiet", 8), call(remote, "large", 0)] == [12, 4]
        until(lambda: sizes(server) == {"quiet": 12, "large": 4})

        assert call(remote, "large", 20) == 24
        until(lambda: sizes(server) == {"large": 24})
        assert gpu(server)["used_bytes"] <= gpu(server)["capacity_bytes"]
        details = remote.function("large")["hotset"]
        assert details["measured_memory_bytes"] // MIB == 24
        (process,) = server.state(processes=True)["processes"]
        assert process["device_bytes"] // MIB == 24

        # Alone on its GPU it is too large by now: it leaves, and is loaded again when it is called, not before.
        assert call(remote, "large", 20) == 44
        until(lambda: sizes(server) == {})
        assert call(remote, "quiet", 0) == 4
        until(lambda: sizes(server) == {"quiet": 12})
        assert call(remote, "large", 0) == 4
        assert sizes(server) == {"large": 32}, "all there is, as it was seen to need that"

    with live_server(*serve) as server, Remote(server.url) as remote:
        assert call(remote, "quiet", 0) == 4
        assert sizes(server) == {"quiet": 12}, "what was learned is kept over a restart"
