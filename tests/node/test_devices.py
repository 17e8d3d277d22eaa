"""Devices: virtual ones, and CUDA ones behind a fake NVML."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
from recording import MIB, STUB, Recorder, ask, launch, story

from hotset.errors import NodeError
from hotset.node.devices.cuda import RESERVE_BYTES, Nvml, cuda_devices
from hotset.node.devices.device import Device
from hotset.node.devices.virtual import virtual_devices
from hotset.node.frames import Failed, Kind, control
from hotset.node.manager import LocalNode
from hotset.node.spawner import Spawner
from hotset.node.utilisation import BusyMeter
from hotset.vocabulary import FailureKind

GIB = 1 << 30
_DEVICE_FAILED = control(Kind.FAILED, Failed(kind=FailureKind.DEVICE, reason="illegal access"))


class FakeNvml:
    """Looks like ``pynvml``, with two GPUs of which the second does not answer."""

    class NVMLError(Exception):
        pass

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self.broken = False
        self.shut_down = 0
        self.processes: list[Any] = []

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:
        self.shut_down += 1
        raise self.NVMLError("Uninitialized")

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index == 1:
            raise self.NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int | None) -> Any:
        if handle is None or self.broken:
            raise self.NVMLError("GPU is lost")
        return SimpleNamespace(total=80 * GIB, free=78 * GIB)

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"NVIDIA Model T"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return "GPU-1234"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        return self.processes

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        if self.broken:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(gpu=40)


def test_cuda_devices_are_what_nvml_shows() -> None:
    library = FakeNvml()
    (device,) = cuda_devices(Nvml(library), node="box")
    as_device: Device = device
    assert as_device.gpu.gpu_id == "box/cuda:0"
    assert as_device.gpu.memory_bytes == 78 * GIB - RESERVE_BYTES
    assert as_device.gpu.kind == "NVIDIA Model T"
    assert as_device.device_name == "cuda:0"
    assert as_device.environment()["CUDA_VISIBLE_DEVICES"] == "GPU-1234"
    library.processes = [SimpleNamespace(pid=1, usedGpuMemory=None), SimpleNamespace(pid=2, usedGpuMemory=5)]
    assert [as_device.process_bytes(pid) for pid in (1, 2, 3)] == [None, 5, None]
    assert as_device.utilisation() == 0.4
    assert as_device.lost() is None
    library.broken = True
    assert as_device.utilisation() is None
    assert as_device.lost() == "GPU is lost"
    as_device.close()
    assert library.shut_down == 1


def test_the_memory_of_a_cuda_device_can_be_set() -> None:
    (device,) = cuda_devices(Nvml(FakeNvml()), memory_bytes=10 * GIB)
    assert device.gpu.memory_bytes == 10 * GIB


def test_no_driver_and_no_gpu_are_errors_that_say_what_to_do() -> None:
    library = FakeNvml(count=0)
    with pytest.raises(NodeError, match="check nvidia-smi, or start with --virtual-gpus"):
        cuda_devices(Nvml(library))
    library.broken = True
    with pytest.raises(NodeError, match=r"\(Driver Not Loaded\): install the NVIDIA driver"):
        Nvml(library)


def test_virtual_devices_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    first, second = virtual_devices(2, memory_bytes=MIB)
    assert first.environment()["OMP_NUM_THREADS"] == "4"
    assert "MKL_NUM_THREADS" not in first.environment()
    assert first.environment()["CUDA_VISIBLE_DEVICES"] == ""
    assert second.gpu.gpu_id == "local/virtual:1"
    assert (first.process_bytes(1), first.utilisation(), first.lost()) == (None, None, None)
    assert virtual_devices(0, memory_bytes=MIB) == []


def test_the_busy_meter_counts_what_runs_now() -> None:
    meter = BusyMeter()
    meter.end()
    assert meter.share() == 0.0
    meter.begin()
    for _ in range(5):
        share = meter.share()
    assert 0 < share <= 1
    meter.end()
    meter._samples[0] = (meter._samples[0][0] - 10, 0.0)
    meter._samples[1] = (meter._samples[1][0] - 5, 0.0)
    assert 0 < meter.share() < 0.5
    assert meter._samples[0][1] == 0.0


@story
async def test_a_node_of_cuda_gpus_believes_nvml_and_reports_a_lost_gpu(recorder: Recorder) -> None:
    library = FakeNvml()
    gpu = "local/cuda:0"
    node = LocalNode(cuda=True, nvml=Nvml(library), source=Spawner(STUB))
    await node.start(recorder)
    try:
        node.load(gpu, launch("Fine"))
        node.load(gpu, launch("Broken", env={"LIE": _DEVICE_FAILED.hex(), "LEAVE": "1"}))
        await recorder.hears("loaded", "loaded")
        fine, _ = node.processes()
        library.processes = [SimpleNamespace(pid=fine.pid, usedGpuMemory=7)]
        assert [report.device_bytes for report in node.processes()] == [7, 0]
        assert node.utilisation() == {gpu: 0.4}

        # A device failure with a GPU that still answers costs the process; with one that does not, everything on it.
        node.run(gpu, "Broken@1", [ask(1, "x")])
        assert (await recorder.hears("run_failed")).reason == "illegal access"
        node.load(gpu, launch("Broken", env={"LIE": _DEVICE_FAILED.hex(), "LEAVE": "1"}))
        await recorder.hears("loaded")
        library.broken = True
        node.run(gpu, "Broken@1", [ask(2, "x")])
        node.run(gpu, "Fine@1", [ask(3, "x")])
        assert (await recorder.hears("run_failed", "gpu_lost")).reason == "GPU is lost"
        assert node.gpus == []
        assert not node.healthy()
        node.load(gpu, launch("Fine"))
    finally:
        await node.stop()
    assert recorder.told == []
