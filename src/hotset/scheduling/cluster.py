"""ClusterState: what is where, who is busy, until when. Policies read it; only the Scheduler changes it.

Idle GPUs, the idle holders of each model and the earliest finishing busy holder of each model are kept as indexes, so a
decision looks at a few GPUs, not at all of them.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from heapq import heapify, heappop, heappush

import msgspec

from hotset.scheduling.cache import CacheManager, GpuMemory
from hotset.scheduling.profiles import Profiles
from hotset.scheduling.queue import Entry, GlobalQueue
from hotset.vocabulary import Gpu, Model


class Work:
    """What a busy GPU is doing: one load and run, or one run."""

    __slots__ = ("entries", "hit", "load_s", "loading", "model", "started_s")

    def __init__(self, model: str, entries: list[Entry], *, hit: bool, now_s: float) -> None:
        self.model = model
        self.entries = entries
        self.hit = hit
        self.loading = not hit
        self.started_s = now_s
        self.load_s = 0.0
        """Measured time of the load that came first; 0 for a hit."""


class GpuState:
    """One GPU as the scheduler sees it. One run at a time (paper)."""

    __slots__ = (
        "busy_until_s",
        "gpu",
        "gpu_id",
        "index",
        "kind",
        "local_backlog_s",
        "local_queue",
        "memory",
        "stamp",
        "work",
    )

    def __init__(self, gpu: Gpu, index: int, memory: GpuMemory) -> None:
        self.gpu = gpu
        self.gpu_id = gpu.gpu_id
        self.kind = gpu.kind
        self.index = index
        """Order of joining; ties break by it."""
        self.memory = memory
        self.work: Work | None = None
        self.busy_until_s = 0.0
        """Estimated end of ``work``."""
        self.local_queue: deque[Entry] = deque()
        self.local_backlog_s = 0.0
        """Estimated inference time of the local queue."""
        self.stamp = 0
        """Version of the finish estimate; older entries of the finish index are stale."""

    @property
    def finish_s(self) -> float:
        """Estimated time at which the running work and the local queue are done; may lie in the past if overdue."""
        return self.busy_until_s + self.local_backlog_s


class _FinishRecord(msgspec.Struct, order=True, gc=False):
    finish_s: float
    index: int
    stamp: int


class FinishIndex:
    """Per model, the busy GPUs that hold it, by estimated finish: heaps with stale records dropped when met.

    Overdue GPUs are ordered by their overdue estimates, which is the order of their real finish as far as anyone knows.
    """

    def __init__(self, gpus: dict[int, GpuState]) -> None:
        self._gpus = gpus
        self._heaps: dict[str, list[_FinishRecord]] = {}

    def update(self, gpu: GpuState) -> None:
        """The GPU's finish estimate, or what it holds, changed."""
        gpu.stamp += 1
        record = _FinishRecord(gpu.finish_s, gpu.index, gpu.stamp)
        for model in gpu.memory.residents:
            heap = self._heaps.get(model)
            if heap is None:
                heap = self._heaps[model] = []
            elif len(heap) > 256:
                heap[:] = [old for old in heap if self._valid(old, model)]
                heapify(heap)
            heappush(heap, record)

    def earliest(self, model: str) -> GpuState | None:
        """The busy holder that is expected to be done first."""
        heap = self._heaps.get(model)
        while heap:
            if self._valid(heap[0], model):
                return self._gpus[heap[0].index]
            heappop(heap)
        return None

    def _valid(self, record: _FinishRecord, model: str) -> bool:
        gpu = self._gpus.get(record.index)
        return gpu is not None and gpu.stamp == record.stamp and gpu.work is not None and model in gpu.memory.residents


class Cluster:
    """Everything a policy may look at."""

    def __init__(self, cache: CacheManager, profiles: Profiles, *, local_queues: bool) -> None:
        self.cache = cache
        self.profiles = profiles
        self.queue = GlobalQueue()
        self.models: dict[str, Model] = {}
        self.gpus: dict[str, GpuState] = {}
        self.idle: OrderedDict[GpuState, None] = OrderedDict()
        """GPUs with nothing to do, the one idle longest first."""
        self._idle_holders: dict[str, OrderedDict[GpuState, None]] = {}
        self._by_index: dict[int, GpuState] = {}
        self._joined = 0
        self._finish = FinishIndex(self._by_index) if local_queues else None

    # What policies ask

    def first_idle(self, model: str | None = None) -> GpuState | None:
        """The GPU idle longest; with a model: the first on which it fits (a scan only where GPUs differ in size)."""
        for gpu in self.idle:
            if model is None or gpu.memory.capacity_bytes >= self.models[model].memory_bytes:
                return gpu
        return None

    def idle_holder(self, model: str) -> GpuState | None:
        """The idle GPU that holds the model; of several, the one idle longest."""
        holders = self._idle_holders.get(model)
        return next(iter(holders)) if holders else None

    def earliest_holder(self, model: str) -> GpuState | None:
        """The busy holder of the model with the least estimated finish time (policies with local queues only)."""
        assert self._finish is not None
        return self._finish.earliest(model)

    def first_waiting_hit(self, gpu: GpuState) -> Entry | None:
        """The oldest waiting request whose model is resident on this GPU.

        Linear in the models resident there, or in the models waited for if those are fewer: the heads of their lines
        are compared, not the requests.
        """
        best: Entry | None = None
        residents, lines = gpu.memory.residents, self.queue.models
        if len(lines) < len(residents):
            for model, line in lines.items():
                if model in residents and (best is None or line[0].seq < best.seq):
                    best = line[0]
        else:
            for model in residents:
                waiting = lines.get(model)
                if waiting is not None and (best is None or waiting[0].seq < best.seq):
                    best = waiting[0]
        return best

    def load_s(self, model: str, gpu: GpuState) -> float:
        """Expected seconds to load the model on that GPU."""
        return self.profiles.load_s(model, gpu.kind)

    def inference_s(self, model: str, gpu: GpuState, batch: int = 1) -> float:
        """Expected seconds of one run of that many requests there."""
        return self.profiles.inference_s(model, gpu.kind, batch)

    # What the Scheduler changes

    def join(self, gpu: Gpu) -> GpuState:
        self._joined += 1
        state = GpuState(gpu, self._joined, self.cache.add_gpu(gpu.gpu_id, gpu.memory_bytes))
        self.gpus[gpu.gpu_id] = state
        self._by_index[state.index] = state
        self.set_idle(state)
        return state

    def leave(self, gpu_id: str) -> GpuState:
        gpu = self.gpus.pop(gpu_id)
        del self._by_index[gpu.index]
        if gpu in self.idle:
            self._unlist(gpu)
        self.cache.drop_gpu(gpu_id)
        return gpu

    def set_idle(self, gpu: GpuState) -> None:
        gpu.work = None
        gpu.stamp += 1
        self.idle[gpu] = None
        holders = self._idle_holders
        for model in gpu.memory.residents:
            listed = holders.get(model)
            if listed is None:
                listed = holders[model] = OrderedDict()
            listed[gpu] = None

    def set_busy(self, gpu: GpuState) -> None:
        """Take an idle GPU off the idle lists; the caller gives it work and then calls ``finish_changed``."""
        if gpu in self.idle:
            self._unlist(gpu)

    def finish_changed(self, gpu: GpuState) -> None:
        if self._finish is not None:
            self._finish.update(gpu)

    def drop_resident(self, gpu: GpuState, model: str) -> None:
        """The model left this GPU's memory."""
        listed = self._idle_holders.get(model)
        if listed is not None:
            listed.pop(gpu, None)
            if not listed:
                del self._idle_holders[model]
        self.cache.drop(gpu.memory, model)

    def _unlist(self, gpu: GpuState) -> None:
        del self.idle[gpu]
        for model in gpu.memory.residents:
            listed = self._idle_holders[model]
            del listed[gpu]
            if not listed:
                del self._idle_holders[model]
