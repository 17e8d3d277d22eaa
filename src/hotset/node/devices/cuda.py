"""CUDA GPUs, through NVML: the node itself never opens a CUDA context, which would take memory and die with its GPU."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Mapping
from typing import Any

from hotset.errors import NodeError
from hotset.vocabulary import Gpu

RESERVE_BYTES = 512 * 1024 * 1024
"""Left free on each GPU for contexts and for what allocators round up."""


class Nvml:
    """The few calls of NVML that a node makes, with its one exception turned into None or ``NodeError``.

    ``library``: the ``pynvml`` module, or anything that looks like it.
    """

    def __init__(self, library: Any = None) -> None:
        if library is None:
            library = importlib.import_module("pynvml")
        self._library = library
        self._open = True
        try:
            library.nvmlInit()
        except library.NVMLError as error:
            raise NodeError(
                f"no CUDA GPU can be used ({error}): install the NVIDIA driver, or start with --virtual-gpus"
            ) from None

    def ask(self, function: str, *arguments: Any) -> Any:
        """The result of one NVML function, None where NVML refuses it."""
        try:
            return getattr(self._library, function)(*arguments)
        except self._library.NVMLError:
            return None

    def refusal(self, function: str, *arguments: Any) -> str | None:
        """Why NVML refuses a call; None: it does not."""
        try:
            getattr(self._library, function)(*arguments)
        except self._library.NVMLError as error:
            return str(error)
        return None

    def close(self) -> None:
        """Once, though each device closes it: NVML counts, and one call too many ends it for others in this process."""
        if self._open:
            self._open = False
            with contextlib.suppress(self._library.NVMLError):
                self._library.nvmlShutdown()


class CudaDevice:
    """One NVIDIA GPU. Its processes see it alone, as ``cuda:0``."""

    device_name = "cuda:0"
    copy_bandwidth = None

    def __init__(self, nvml: Nvml, handle: Any, gpu: Gpu, uuid: str) -> None:
        self.gpu = gpu
        self._nvml = nvml
        self._handle = handle
        self._uuid = uuid

    def environment(self) -> Mapping[str, str]:
        return {"CUDA_VISIBLE_DEVICES": self._uuid, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}

    def process_bytes(self, pid: int) -> int | None:
        """From NVML, with what it started; None when none of them is listed (another PID namespace, an old driver)."""
        processes = self._nvml.ask("nvmlDeviceGetComputeRunningProcesses", self._handle)
        used = [
            int(each.usedGpuMemory)
            for each in processes or ()
            if each.usedGpuMemory is not None and (each.pid == pid or _group(each.pid) == pid)
        ]
        return sum(used) if used else None

    def free_bytes(self) -> int | None:
        memory = self._nvml.ask("nvmlDeviceGetMemoryInfo", self._handle)
        return None if memory is None else int(memory.free)

    def utilisation(self) -> float | None:
        rates = self._nvml.ask("nvmlDeviceGetUtilizationRates", self._handle)
        return None if rates is None else float(rates.gpu) / 100

    def lost(self) -> str | None:
        return self._nvml.refusal("nvmlDeviceGetMemoryInfo", self._handle)

    def close(self) -> None:
        self._nvml.close()


def cuda_devices(nvml: Nvml | None = None, *, node: str = "local", memory_bytes: int | None = None) -> list[CudaDevice]:
    """Every GPU the driver shows, named ``node/cuda:0`` and on.

    Models may use ``memory_bytes`` of each, or what is free at this moment less ``RESERVE_BYTES``. Raises ``NodeError``
    when there is no GPU.
    """
    nvml = nvml or Nvml()
    devices = []
    for index in range(nvml.ask("nvmlDeviceGetCount") or 0):
        handle = nvml.ask("nvmlDeviceGetHandleByIndex", index)
        memory = nvml.ask("nvmlDeviceGetMemoryInfo", handle)
        if handle is None or memory is None:
            continue
        name = nvml.ask("nvmlDeviceGetName", handle)
        uuid = nvml.ask("nvmlDeviceGetUUID", handle)
        usable = memory.free - RESERVE_BYTES if memory_bytes is None else min(memory_bytes, memory.total)
        gpu = Gpu(gpu_id=f"{node}/cuda:{index}", memory_bytes=max(0, usable), node=node, kind=_text(name, "cuda"))
        devices.append(CudaDevice(nvml, handle, gpu, _text(uuid, str(index))))
    if not devices:
        raise NodeError("the NVIDIA driver shows no usable GPU: check nvidia-smi, or start with --virtual-gpus")
    return devices


def _group(pid: int) -> int | None:
    """Its process group, which is that of the GPU process that started it."""
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def _text(value: str | bytes | None, default: str) -> str:
    if value is None:
        return default
    return value.decode() if isinstance(value, bytes) else value
