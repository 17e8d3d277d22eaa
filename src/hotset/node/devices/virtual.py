"""Virtual GPUs: a memory budget on the CPU, real models in it, one run at a time."""

from __future__ import annotations

from collections.abc import Mapping

from hotset.node.devices.threads import share_of_cores, thread_variables
from hotset.vocabulary import Gpu


class VirtualDevice:
    """A share of this machine's CPU and memory that behaves like a GPU."""

    device_name = "cpu"
    opens_ahead = None

    def __init__(self, gpu: Gpu, *, threads: int, copy_bandwidth: float | None = None) -> None:
        self.gpu = gpu
        self.copy_bandwidth = copy_bandwidth
        self._threads = threads

    def environment(self) -> Mapping[str, str]:
        return {"CUDA_VISIBLE_DEVICES": ""}

    def defaults(self) -> Mapping[str, str]:
        return thread_variables(self._threads)

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
    threads = share_of_cores(count)
    gpus = virtual_gpus(count, memory_bytes=memory_bytes, node=node)
    return [VirtualDevice(gpu, threads=threads, copy_bandwidth=copy_bandwidth) for gpu in gpus]
