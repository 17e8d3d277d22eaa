"""The GPU Manager: owns this machine's GPUs and the processes on them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence

from hotset.errors import ConfigurationError
from hotset.node.contexts import ContextPool
from hotset.node.devices.cuda import Nvml, cuda_devices
from hotset.node.devices.device import Device
from hotset.node.devices.virtual import virtual_devices
from hotset.node.history import History, ModelHistory
from hotset.node.host_memory import host_memory
from hotset.node.interface import Call, LaunchSpec, NodeListener, ProcessReport
from hotset.node.lane import Lane, LoadOperation, OffloadOperation, RestoreOperation, RunOperation, UnloadOperation
from hotset.node.order import HostMemoryOrder
from hotset.node.read_ahead import ReadAhead
from hotset.node.spawner import ProcessSource
from hotset.node.zygote import ZygoteSource
from hotset.vocabulary import Gpu

_PROBE_S = 2.0
"""How often a node that cannot start processes tries whether it can again."""


class LocalNode:
    """``Node`` for this machine: its CUDA GPUs (``cuda=True``), or so many ``virtual_gpus`` of ``memory_bytes`` each.

    ``memory_bytes`` with ``cuda=True``: what models may use of each GPU, instead of what is free. ``copy_bandwidth``:
    bytes a second of a virtual GPU's modelled bus; None: weights are there as soon as the process has them.
    ``source``: where processes come from; ``pool_contexts``: how many of its pool wait with each GPU open, where there
    is something to open; ``nvml``: how CUDA GPUs are found.
    """

    def __init__(
        self,
        *,
        virtual_gpus: int = 0,
        memory_bytes: int | None = None,
        cuda: bool = False,
        copy_bandwidth: float | None = None,
        name: str = "local",
        source: ProcessSource | None = None,
        pool_contexts: int = 0,
        nvml: Nvml | None = None,
    ) -> None:
        if virtual_gpus < 0 or (memory_bytes is not None and memory_bytes <= 0):
            raise ConfigurationError("the number of virtual GPUs and their memory must be positive")
        if virtual_gpus and memory_bytes is None:
            raise ConfigurationError("virtual GPUs need a size: give --gpu-memory, for example --gpu-memory 2GiB")
        if bool(virtual_gpus) == cuda:
            raise ConfigurationError("a node has either CUDA GPUs or virtual ones: choose one")
        if copy_bandwidth is not None and (cuda or not copy_bandwidth > 0):
            raise ConfigurationError(
                "a copy bandwidth is more than 0, and for virtual GPUs only: leave it out, or say how many of them"
            )
        self._virtual_gpus = virtual_gpus
        self._copy_bandwidth = copy_bandwidth
        self._memory_bytes = memory_bytes
        self._name = name
        self._source = source or ZygoteSource()
        self._pool_contexts = pool_contexts
        self._nvml = nvml
        self._lanes: dict[str, Lane] = {}
        self._contexts: dict[str, ContextPool] = {}
        self._where: dict[int, Lane] = {}
        self._history = History()
        self._read_ahead = ReadAhead()
        self._probing: asyncio.TimerHandle | None = None

    @property
    def gpus(self) -> Sequence[Gpu]:
        """Those found by ``start`` and not lost since."""
        return [lane.device.gpu for lane in self._lanes.values() if not lane.over]

    async def start(self, listener: NodeListener) -> None:
        devices: Sequence[Device]
        if self._virtual_gpus:
            assert self._memory_bytes is not None
            devices = virtual_devices(
                self._virtual_gpus,
                memory_bytes=self._memory_bytes,
                node=self._name,
                copy_bandwidth=self._copy_bandwidth,
            )
        else:
            devices = cuda_devices(
                self._nvml, memory_bytes=self._memory_bytes, node=self._name, contexts=self._pool_contexts
            )
        host = HostMemoryOrder()
        for device in devices:
            gpu_id, opens = device.gpu.gpu_id, device.opens_ahead
            if self._pool_contexts and opens is not None and isinstance(self._source, ZygoteSource):
                self._contexts[gpu_id] = ContextPool(device, opens, self._source, self._pool_contexts)
            self._lanes[gpu_id] = Lane(
                device,
                listener,
                self._source,
                self._where,
                self._history,
                host,
                self._read_ahead,
                self._contexts.get(gpu_id),
            )

    async def stop(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
        await asyncio.gather(*(lane.stop() for lane in self._lanes.values()))
        for lane in self._lanes.values():
            lane.device.close()
        self._lanes, self._contexts = {}, {}
        self._read_ahead.close()
        self._source.close()

    def prepare(self, spec: LaunchSpec) -> None:
        self._source.prepare(spec.python, spec.frameworks)
        for contexts in self._contexts.values():
            contexts.expect(spec)

    def waiting_with(self, gpu_id: str) -> list[int]:
        """Process ids of those that wait for a model with this GPU open. What they take of it is no model's."""
        contexts = self._contexts.get(gpu_id)
        return [] if contexts is None else contexts.waiting()

    def expect(self, spec: LaunchSpec) -> None:
        self._read_ahead.expect(spec.model, spec.code_path)

    def load(self, gpu_id: str, spec: LaunchSpec) -> None:
        self._lanes[gpu_id].submit(LoadOperation(model=spec.model, spec=spec))

    def unload(self, gpu_id: str, model: str) -> None:
        self._lanes[gpu_id].submit(UnloadOperation(model=model))

    def offload(self, gpu_id: str, model: str) -> None:
        self._lanes[gpu_id].submit(OffloadOperation(model=model))

    def restore(self, gpu_id: str, model: str) -> None:
        self._lanes[gpu_id].submit(RestoreOperation(model=model))

    def run(self, gpu_id: str, model: str, calls: Sequence[Call]) -> None:
        lane = self._lanes[gpu_id]
        for call in calls:
            self._where[call.request_id] = lane
        lane.submit(RunOperation(model=model, calls=calls))

    def cancel(self, request_id: int) -> None:
        lane = self._where.get(request_id)
        if lane is not None:
            lane.cancel(request_id)

    def healthy(self) -> bool:
        """False while no GPU is left, or the system will not start processes; the latter is tried again by itself."""
        if any(lane.spawn_failed for lane in self._lanes.values()):
            if self._probing is None:
                self._probing = asyncio.get_running_loop().call_later(_PROBE_S, self._probe)
            return False
        return bool(self.gpus)

    def processes(self) -> list[ProcessReport]:
        reports = []
        for lane in list(self._lanes.values()):
            for process in list(lane.processes.values()):
                host = host_memory(process.pid)
                measured_bytes = lane.device.process_bytes(process.pid)
                reports.append(
                    ProcessReport(
                        gpu_id=lane.gpu_id,
                        model=process.spec.model,
                        pid=process.pid,
                        device_bytes=process.memory_bytes if measured_bytes is None else measured_bytes,
                        private_bytes=host.private_bytes,
                        shared_bytes=host.shared_bytes,
                    )
                )
        return reports

    def pids(self) -> Mapping[int, str]:
        return {process.pid: process.spec.model for lane in self._lanes.values() for process in lane.processes.values()}

    def history(self) -> Mapping[str, ModelHistory]:
        return self._history.report()

    def utilisation(self) -> Mapping[str, float]:
        shares = {}
        for lane in self._lanes.values():
            measured = lane.device.utilisation()
            shares[lane.gpu_id] = lane.meter.share() if measured is None else measured
        return shares

    def _probe(self) -> None:
        """Start a process and end it: if that works, the next load may work too."""
        self._probing = None
        try:
            spawned = self._source.spawn(sys.executable, {})
        except OSError:
            self._probing = asyncio.get_running_loop().call_later(_PROBE_S, self._probe)
            return
        os.killpg(spawned.process.pid, signal.SIGKILL)
        spawned.process.reap(lambda _: self._source.forget(spawned.process.pid))
        spawned.close()
        for lane in self._lanes.values():
            lane.spawn_failed = False
