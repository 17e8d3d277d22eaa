"""A model whose loads take now more, now less memory gets room for the next one before it is loaded."""

from __future__ import annotations

from pathlib import Path

from live_server import live_server

from hotset.cli.remote import Remote

MIB = 1 << 20
SIZED = """
import os
import numpy
import hotset

@hotset.function(gpu_memory="4MiB")
class Sized:
    def load(self, device: str) -> None:
        sizes_mib = os.environ["SIZES"].split()
        with open(os.environ["LOADS"], "a+") as loads:
            loads.seek(0)
            already = len(loads.read())
            loads.write("x")
        self.weights = numpy.ones(int(sizes_mib[min(already, len(sizes_mib) - 1)]) << 20, numpy.uint8)

    def predict(self) -> int:
        return len(self.weights) >> 20
"""


def test_what_a_varying_model_may_take_is_kept_free_also_after_a_restart(tmp_path: Path) -> None:
    loads = {name: tmp_path / f"loads-{name}" for name in ("varying", "large", "other")}
    serve = (tmp_path / "data", "--virtual-gpus", "1", "--host-memory", "0")

    def described(remote: Remote, name: str) -> tuple[int, int]:
        details = remote.function(name)["hotset"]
        return details["measured_memory_bytes"] // MIB, details["memory_margin_bytes"] // MIB

    def call(remote: Remote, *names: str) -> list[int]:
        return [remote.invoke(name, b"{}", {}).json() for name in names]

    with live_server(*serve) as server, Remote(server.url) as remote:
        for name, sizes in (("varying", "4 12 18"), ("large", "30"), ("other", "16")):
            server.deploy(name, SIZED, tmp_path, SIZES=sizes, LOADS=str(loads[name]))
        assert call(remote, "varying", "large") == [4, 30]
        assert described(remote, "varying") == (4, 0)
        assert call(remote, "varying") == [12]
        assert described(remote, "varying") == (12, 8)
        assert call(remote, "large") == [30]
        assert described(remote, "large") == (30, 0), "a model that is always the same gets no margin"
    with live_server(*serve) as server, Remote(server.url) as remote:
        assert described(remote, "varying") == (12, 8)
        assert call(remote, "other") == [16]
        # 16 MiB are free, which the 12 that it last took would fit in, but not the 18 that it takes now.
        assert call(remote, "varying") == [18]
        assert loads["varying"].read_text() == "xxx", "no load was tried that did not fit"
        (gpu,) = server.state()["gpus"]
        assert [each["memory_bytes"] // MIB for each in gpu["residents"]] == [18]
        assert call(remote, "other") == [16]
        (gpu,) = server.state()["gpus"]
        assert gpu["used_bytes"] <= gpu["capacity_bytes"]
