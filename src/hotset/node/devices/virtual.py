"""Virtual GPUs: a memory budget on the CPU, real models in it, one run at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping

from hotset.vocabulary import Gpu

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class VirtualDevice:
    """A share of this machine's CPU and memory that behaves like a GPU."""

    device_name = "cpu"

    def __init__(self, gpu: Gpu, *, threads: int, copy_bandwidth: float | None = None) -> None:
        self.gpu = gpu
        self.copy_bandwidth = copy_bandwidth
        self._threads = threads

    def environment(self) -> Mapping[str, str]:
        """Devices compute at the same time, as GPUs do, so each takes its share of the cores, unless the server's own
        environment says otherwise."""
        threads = {name: str(self._threads) for name in _THREAD_VARIABLES if name not in os.environ}
        return {"CUDA_VISIBLE_DEVICES": "", **threads}

    def process_bytes(self, pid: int) -> int | None:
        return None

    def free_bytes(self) -> int | None:
        return None

    def utilisation(self) -> float | None:
        return None

    def lost(self) -> str | None:
        return None

    def close(self) -> None:
        return None


def virtual_gpus(count: int, *, memory_bytes: int, node: str = "local") -> list[Gpu]:
    """``count`` equal virtual GPUs, named ``node/virtual:0`` and on."""
    return [Gpu(gpu_id=f"{node}/virtual:{index}", memory_bytes=memory_bytes, node=node) for index in range(count)]


def virtual_devices(
    count: int, *, memory_bytes: int, node: str = "local", copy_bandwidth: float | None = None
) -> list[VirtualDevice]:
    """The same as devices; the machine's cores are divided among them, each has a bus of its own."""
    threads = max(1, len(os.sched_getaffinity(0)) // count) if count else 1
    gpus = virtual_gpus(count, memory_bytes=memory_bytes, node=node)
    return [VirtualDevice(gpu, threads=threads, copy_bandwidth=copy_bandwidth) for gpu in gpus]
