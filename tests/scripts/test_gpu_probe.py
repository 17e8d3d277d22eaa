"""What the GPU check runs in GPU processes, on the CPU with CUDA's part left out."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu_checks.functions import probe
from gpu_checks.setup import Setup

from hotset.node.worker.slab import Slab
from hotset.node.worker.staging import StagingRing


class HostStream:
    """A ``CopyStream`` that copies at once, on the host."""

    def pinned(self, size_bytes: int) -> Slab:
        return Slab(size_bytes, pinned=False)

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        destination.copy_(source)

    def event(self) -> HostStream:
        return self

    def synchronize(self) -> None:
        """Nothing is under way."""

    after_current = before_current = synchronize


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SQUARE", 16)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 5)
    ring = functools.cache(lambda: StagingRing(HostStream()))
    monkeypatch.setattr(probe, "process_ring", ring)
    monkeypatch.setattr(probe, "CudaStream", HostStream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


@pytest.mark.usefixtures("no_cuda")
def test_the_probe_measures_copies() -> None:
    function = probe.Copies()
    function.load("cpu")
    plain = ("pageable", "pinned", "to_pinned", "memcpy", "to_fresh")
    rates = function.predict("bandwidth", 4)
    assert set(rates) == {f"{name}_gb_per_s" for name in (*plain, "offload", "restore")} | {"pinned_bytes"}
    assert all(float(rate) > 0 for rate in rates.values())
    rates = function.predict("staging", 8)
    assert {f"{name}_gb_per_s" for name in (*plain, "load", "mapped", "load_2x64")} < set(rates)
    assert [rates[name] for name in ("equal", "pins", "pinned_changed_bytes")] == [1, 0, 0]
    times = function.predict("overlap", 4)
    serial_s = float(times["copy_s"]) + float(times["compute_s"])
    assert float(times["ratio"]) == pytest.approx(serial_s / float(times["overlapped_s"]))


def test_the_keeper_sees_what_changed() -> None:
    function = probe.Keeper()
    function.load("cpu")
    assert [function.predict("state")["calls"], function.predict("state")] == [1, {"calls": 2, "same": 1, "shared": 1}]
    function.half.data = function.half + 1
    assert function.predict("state") == {"calls": 3, "same": 0, "shared": 0}


class FakeCudart:
    """Pins anything once."""

    def __init__(self) -> None:
        self.pinned: set[int] = set()

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
        code = 712 if address in self.pinned else 0
        self.pinned.add(address)
        return code

    def cudaHostUnregister(self, address: int) -> int:
        self.pinned.remove(address)
        return 0


def test_the_keeper_captures_a_graph_and_has_a_pin_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeCudart()
    graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(probe, "forget_last_error", lambda: None)
    function = probe.Keeper()
    function.load("cpu")
    assert function.predict("refused") == {"code": 712, "value": 8}
    assert runtime.pinned == set()
    assert function.predict("capture") == {"value": 16}
    assert function.graph is graph


@pytest.mark.usefixtures("no_cuda")
def test_the_probe_answers_for_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBE_WEIGHTS", str(Setup(tmp_path, nvml_library=None, model_mib=8).weights))
    monkeypatch.setenv("PROBE_FACTOR", "3")
    properties = SimpleNamespace(name="T", uuid="GPU-1", total_memory=10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (4, 10))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    function = probe.Probe()
    function.load("cpu")
    assert function.predict("scale", 7.0)["value"] == 21.0
    seen = function.predict("device")
    assert (seen["name"], seen["free_bytes"], seen["total_bytes"], seen["capability"]) == ("T", 4, 10, "9.0")
    assert function.predict("workspace", 1)["peak_bytes"] == 5
    assert function.predict("release") == {"allocated_bytes": 5, "reserved_bytes": 5}
    assert function.predict("hoard", 1) == {}
    with pytest.raises(RuntimeError, match="device-side assert"):
        function.predict("fault")
    # On the CPU the kernel's assert is an ordinary exception.
    function.device = torch.device("cpu")  # type: ignore[assignment]
    with pytest.raises(IndexError):
        function.predict("fault")
