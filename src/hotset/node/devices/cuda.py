"""CUDA GPUs, through NVML: the node itself never opens a CUDA context, which would take memory and die with its GPU."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from hotset.errors import NodeError
from hotset.node.devices.device import OpensAhead
from hotset.node.devices.threads import share_of_cores, thread_variables
from hotset.vocabulary import Gpu

RESERVE_BYTES = 512 * 1024 * 1024
"""Left free on each GPU for contexts and for what allocators round up."""
CONTEXT_BYTES = 512 * 1024 * 1024
"""What a process that waits with its context open is assumed to take. PyTorch loads kernels as they are used: its own
measurement (pull request 86509) is 287 MB so, other GPUs are reported with up to 500; what is more comes off
``RESERVE_BYTES``."""
_NOT_SUPPORTED = 3
"""``NVML_ERROR_NOT_SUPPORTED``."""
_AS_NEEDED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}
"""JAX takes three quarters of a GPU at its first operation, TensorFlow all of it, unless they are told not to."""


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
        """Why NVML refuses a call; None: it does not, or this kind of GPU does not have what is asked for."""
        try:
            getattr(self._library, function)(*arguments)
        except self._library.NVMLError as error:
            return None if getattr(error, "value", None) == _NOT_SUPPORTED else str(error)
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
    opens_ahead = OpensAhead("torch", "hotset.node.worker.context:open_cuda", CONTEXT_BYTES)

    def __init__(self, nvml: Nvml, handle: Any, gpu: Gpu, uuid: str, *, threads: int = 1) -> None:
        self.gpu = gpu
        self._threads = threads
        self._nvml = nvml
        self._handle = handle
        self._uuid = uuid

    def environment(self) -> Mapping[str, str]:
        """By UUID: an index means another GPU to NVML than to CUDA, which counts the fastest first."""
        return {"CUDA_VISIBLE_DEVICES": self._uuid, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}

    def defaults(self) -> Mapping[str, str]:
        as_needed = {name: os.environ.get(name, value) for name, value in _AS_NEEDED.items()}
        return thread_variables(self._threads) | as_needed

    def process_bytes(self, pid: int) -> int | None:
        """From NVML, with what it started; None when none of them is listed: in a container, where NVML goes on telling
        the host's process ids, and with drivers that do not count by process."""
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


def cuda_devices(
    nvml: Nvml | None = None, *, node: str = "local", memory_bytes: int | None = None, contexts: int = 0
) -> list[CudaDevice]:
    """Every GPU the driver shows, named ``node/cuda:0`` and on, or those that ``CUDA_VISIBLE_DEVICES`` names.

    A GPU in MIG mode is its instances (``node/cuda:0/mig:1``). Models may use ``memory_bytes`` of each, or what is free
    at this moment less ``RESERVE_BYTES``. So many ``contexts`` are to wait on each without a model, ``CONTEXT_BYTES``
    for each of them: set aside of what is free; beside ``memory_bytes``, which is for models alone, out of the rest of
    the GPU, so that models get less only where there is no such rest. A GPU that has no memory of its own, but the
    host's, tells nobody what is free, and is there only if ``memory_bytes`` is given. Raises ``NodeError`` when there
    is no GPU.
    """
    nvml = nvml or Nvml()
    devices, shares = [], []
    visible = visible_gpus(nvml)
    threads = share_of_cores(len(visible))
    set_aside_bytes = contexts * CONTEXT_BYTES
    for found in visible:
        memory = nvml.ask("nvmlDeviceGetMemoryInfo", found.handle)
        if memory is None and nvml.refusal("nvmlDeviceGetMemoryInfo", found.handle) is not None:
            continue
        if memory_bytes is None:
            if memory is None:
                shares.append(found.name)
                continue
            usable = memory.free - RESERVE_BYTES - set_aside_bytes
        else:
            usable = memory_bytes if memory is None else min(memory_bytes, memory.total - set_aside_bytes)
        kind = _text(nvml.ask("nvmlDeviceGetName", found.handle), "cuda")
        gpu = Gpu(gpu_id=f"{node}/{found.name}", memory_bytes=max(0, usable), node=node, kind=kind)
        devices.append(CudaDevice(nvml, found.handle, gpu, found.uuid, threads=threads))
    if shares and not devices:
        raise NodeError(
            f"{shares[0]} shares the host's memory, of which the driver does not tell what is free: say with"
            " --gpu-memory how much of it models may use"
        )
    if not devices:
        raise NodeError(
            "the NVIDIA driver shows no usable GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES, or start with"
            " --virtual-gpus"
        )
    return devices


class NvmlGpu(msgspec.Struct, frozen=True):
    """One GPU, or one MIG instance of it, as NVML lists them: in the order of their PCI addresses."""

    name: str
    index: int
    handle: Any
    uuid: str
    gpu_uuid: str
    """Of the GPU that an instance is a part of; else its own."""


def _found(nvml: Nvml) -> Iterator[NvmlGpu]:
    for index in range(nvml.ask("nvmlDeviceGetCount") or 0):
        gpu = nvml.ask("nvmlDeviceGetHandleByIndex", index)
        if gpu is None:
            continue
        name, uuid = f"cuda:{index}", _text(nvml.ask("nvmlDeviceGetUUID", gpu), str(index))
        current_mode, _ = nvml.ask("nvmlDeviceGetMigMode", gpu) or (0, 0)
        if not current_mode:
            yield NvmlGpu(name, index, gpu, uuid, uuid)
            continue
        for number in range(nvml.ask("nvmlDeviceGetMaxMigDeviceCount", gpu) or 0):
            instance = nvml.ask("nvmlDeviceGetMigDeviceHandleByIndex", gpu, number)
            own_uuid = None if instance is None else nvml.ask("nvmlDeviceGetUUID", instance)
            if own_uuid is not None:
                yield NvmlGpu(f"{name}/mig:{number}", index, instance, _text(own_uuid, ""), uuid)


def visible_gpus(nvml: Nvml) -> list[NvmlGpu]:
    """What this process's ``CUDA_VISIBLE_DEVICES`` allows: indices, or beginnings of UUIDs, up to the first that names
    nothing. An index counts as ``nvidia-smi`` does, whatever ``CUDA_DEVICE_ORDER`` says."""
    found = list(_found(nvml))
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return found
    chosen: dict[str, NvmlGpu] = {}
    for name in map(str.strip, names.split(",")):
        these = [each for each in found if _is_named(each, name)]
        if not these:
            break
        chosen |= {each.uuid: each for each in these}
    return list(chosen.values())


def _is_named(found: NvmlGpu, name: str) -> bool:
    if name.isdecimal():
        return int(name) == found.index
    return name.startswith(("GPU-", "MIG-")) and (found.uuid.startswith(name) or found.gpu_uuid.startswith(name))


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
