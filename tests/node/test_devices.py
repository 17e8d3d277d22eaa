"""Devices: virtual ones, and CUDA ones behind a fake NVML."""

from __future__ import annotations

import asyncio
import os
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest
from recording import MIB, STUB, Recorder, ask, launch, story

from hotset.errors import NodeError
from hotset.node import lane as lane_module
from hotset.node.contexts import MOST_CONTEXT_BYTES
from hotset.node.devices.cuda import CONTEXT_BYTES, RESERVE_BYTES, Nvml, cuda_devices
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
        self.free = 78 * GIB
        self.mig: dict[int, int] = {}
        """How many instances the GPUs in MIG mode have."""

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
        return SimpleNamespace(total=80 * GIB, free=self.free)

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"NVIDIA Model T"

    def nvmlDeviceGetUUID(self, handle: int | tuple[int, int]) -> str:
        return f"GPU-{handle}234" if isinstance(handle, int) else f"MIG-{handle[0]}-{handle[1]}"

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        if handle not in self.mig:
            raise self.NVMLError("Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: int) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: int, number: int) -> tuple[int, int]:
        if number >= self.mig[handle]:
            raise self.NVMLError("Not Found")
        return handle, number

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
    assert as_device.environment()["CUDA_VISIBLE_DEVICES"] == "GPU-0234"
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


def test_memory_is_set_aside_for_processes_that_wait_with_a_context() -> None:
    def usable_bytes(contexts: int, memory_bytes: int | None = None) -> int:
        (device,) = cuda_devices(Nvml(FakeNvml()), memory_bytes=memory_bytes, contexts=contexts)
        assert device.opens_ahead.memory_bytes == CONTEXT_BYTES
        return device.gpu.memory_bytes

    assert usable_bytes(2) == 78 * GIB - RESERVE_BYTES - 2 * CONTEXT_BYTES
    # A figure that was given is what models may use, as long as the contexts find room beside it.
    assert usable_bytes(2, 79 * GIB) == 79 * GIB
    assert usable_bytes(2, 80 * GIB) == 80 * GIB - 2 * CONTEXT_BYTES
    assert virtual_devices(1, memory_bytes=MIB)[0].opens_ahead is None


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["cuda:0", "cuda:2", "cuda:3/mig:0", "cuda:3/mig:1"]),
        ("2", ["cuda:2"]),
        ("2, 0", ["cuda:2", "cuda:0"]),
        ("GPU-2", ["cuda:2"]),
        ("0,9,2", ["cuda:0"]),  # CUDA stops at the first that is not there
        ("0,0", ["cuda:0"]),
        ("MIG-3-1,GPU-0234", ["cuda:3/mig:1", "cuda:0"]),
        ("3", ["cuda:3/mig:0", "cuda:3/mig:1"]),
    ],
)
def test_a_node_keeps_to_the_gpus_it_was_given(
    visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = FakeNvml(count=4)  # the second is lost
    library.mig = {3: 2}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices = cuda_devices(Nvml(library))
    assert [device.gpu.gpu_id for device in devices] == [f"local/{name}" for name in names]
    seen = [device.environment()["CUDA_VISIBLE_DEVICES"] for device in devices]
    assert len(set(seen)) == len(seen)
    assert all(uuid.startswith("MIG-3") == ("mig" in name) for uuid, name in zip(seen, names, strict=True))


@pytest.mark.parametrize("visible", ["", "-1", "7", "GPU-x", "none"])
def test_a_node_that_was_given_no_gpu_says_so(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(NodeError, match="CUDA_VISIBLE_DEVICES"):
        cuda_devices(Nvml(FakeNvml()))


def test_a_gpu_that_shares_the_hosts_memory_has_what_it_is_given() -> None:
    """As GB10 does: NVML refuses the question, which does not mean that the GPU is lost."""

    class Shares(FakeNvml):
        def nvmlDeviceGetMemoryInfo(self, handle: int | None) -> Any:
            if not self.broken:
                error = self.NVMLError("Not Supported")
                error.value = 3  # type: ignore[attr-defined]
                raise error
            return super().nvmlDeviceGetMemoryInfo(handle)

    library = Shares(count=1)
    with pytest.raises(NodeError, match=r"cuda:0 shares the host's memory.* --gpu-memory"):
        cuda_devices(Nvml(library))
    nvml = Nvml(library)
    (device,) = cuda_devices(nvml, memory_bytes=64 * GIB)
    assert (device.gpu.memory_bytes, device.free_bytes(), device.lost()) == (64 * GIB, None, None)
    library.broken = True
    assert device.lost() == "GPU is lost"


def test_frameworks_that_take_a_whole_gpu_are_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    (device,) = cuda_devices(Nvml(FakeNvml()))
    assert device.defaults()["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    assert device.defaults()["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
    assert device.defaults()["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"


def test_no_driver_and_no_gpu_are_errors_that_say_what_to_do() -> None:
    library = FakeNvml(count=0)
    with pytest.raises(NodeError, match="check nvidia-smi and CUDA_VISIBLE_DEVICES, or start with --virtual-gpus"):
        cuda_devices(Nvml(library))
    library.broken = True
    with pytest.raises(NodeError, match=r"\(Driver Not Loaded\): install the NVIDIA driver"):
        Nvml(library)


def test_devices_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    first, second = virtual_devices(2, memory_bytes=MIB)
    assert first.defaults()["OMP_NUM_THREADS"] == "4"
    assert first.defaults()["MKL_NUM_THREADS"] == "3", "the server's own"
    (on_cuda,) = cuda_devices(Nvml(FakeNvml()))
    assert on_cuda.defaults()["OMP_NUM_THREADS"] == "8"
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


@story
async def test_a_node_sets_aside_what_its_waiting_processes_take(recorder: Recorder) -> None:
    node = LocalNode(cuda=True, nvml=Nvml(FakeNvml()), source=Spawner(STUB), pool_contexts=2)
    await node.start(recorder)
    try:
        (gpu,) = node.gpus
        assert gpu.memory_bytes == 78 * GIB - RESERVE_BYTES - 2 * CONTEXT_BYTES
        assert node.waiting_with(gpu.gpu_id) == []  # its processes come from no pool
    finally:
        await node.stop()


@story
async def test_where_nvml_lists_no_processes_a_load_is_measured_by_what_the_device_lost(recorder: Recorder) -> None:
    """In a container NVML tells the host's process ids. The stub says that its model takes nothing."""
    library = FakeNvml()
    gpu = "local/cuda:0"
    node = LocalNode(cuda=True, nvml=Nvml(library), source=Spawner(STUB))
    await node.start(recorder)
    lane = node._lanes[gpu]
    try:
        for name, lost_bytes, counted_bytes in (("A", 300 * MIB, 300 * MIB), ("B", 9 * GIB, MOST_CONTEXT_BYTES)):
            node.load(gpu, launch(name))
            library.free -= lost_bytes
            told = await recorder.hears("loaded")
            assert told.memory_bytes == counted_bytes  # more than a context is somebody else's
        assert [report.device_bytes for report in node.processes()] == [300 * MIB, MOST_CONTEXT_BYTES]
        # The driver's figure counts where there is one, unless the process itself knows better.
        a, _ = lane.processes.values()
        library.processes = [SimpleNamespace(pid=a.pid, usedGpuMemory=5)]
        assert lane._taken_bytes(a, 3) == 5
        assert lane._taken_bytes(a, 7) == 7
    finally:
        await node.stop()


@story
async def test_a_load_waits_for_memory_that_the_driver_has_not_given_back_yet(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = FakeNvml()
    gpu = "local/cuda:0"
    node = LocalNode(cuda=True, nvml=Nvml(library), source=Spawner(STUB))
    await node.start(recorder)
    lane = node._lanes[gpu]
    try:
        node.load(gpu, launch("A"))
        await recorder.hears("loaded")
        library.free = GIB  # A's process is gone, its memory not yet
        node.unload(gpu, "A@1")
        node.load(gpu, launch("B", memory_bytes=2 * GIB))
        async with asyncio.timeout(20):
            while lane.processes or not isinstance(lane._turns.copying, lane_module.LoadOperation):
                await asyncio.sleep(0.005)
        assert recorder.told == []
        library.free = 3 * GIB
        assert (await recorder.hears("loaded")).model == "B@1"

        # Not for ever: what others keep is not waited for, and the load is tried.
        monkeypatch.setattr(lane_module, "COMES_BACK_WITHIN_S", 0.0)
        library.free = GIB
        node.unload(gpu, "B@1")
        node.load(gpu, launch("C", memory_bytes=2 * GIB))
        assert (await recorder.hears("loaded")).model == "C@1"
    finally:
        await node.stop()


@story
async def test_a_node_stops_while_a_load_waits_for_memory(recorder: Recorder) -> None:
    library = FakeNvml()
    gpu = "local/cuda:0"
    node = LocalNode(cuda=True, nvml=Nvml(library), source=Spawner(STUB))
    await node.start(recorder)
    lane = node._lanes[gpu]
    lane._left_s = monotonic()
    library.free = 0
    node.load(gpu, launch("A"))
    await node.stop()
    await asyncio.sleep(2 * lane_module._LOOK_AGAIN_S)
    assert not lane.processes
    assert recorder.told == []
