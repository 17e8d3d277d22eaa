"""Of the GPUs that hold a model: which is idle longest, and which busy one is expected to be done first.

For a model that its copy lane is still bringing, a GPU counts as busy, whether it computes or not.

A model on a few GPUs is looked up by comparing them. One on many gets an index of its own, kept up to date from then
on, so that neither question grows with the number of GPUs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

import msgspec

from hotset.scheduling.cache import CacheManager

if TYPE_CHECKING:
    from hotset.scheduling.cluster import GpuState

MANY_COPIES = 8
"""More copies than this are indexed."""


class _Finish(msgspec.Struct, order=True, gc=False):
    finish_s: float
    index: int
    stamp: int
    """The GPU's version when this was written; a GPU that changed since makes it stale."""


class _ManyHolders:
    """The holders of one model with many copies."""

    __slots__ = ("busy", "idle")

    def __init__(self) -> None:
        self.idle: OrderedDict[GpuState, None] = OrderedDict()
        self.busy: list[_Finish] = []


class HolderIndex:
    """Answers for every model; the Cluster tells it of every change."""

    def __init__(self, cache: CacheManager, gpus: Mapping[str, GpuState]) -> None:
        self._cache = cache
        self._gpus = gpus
        self._by_index: dict[int, GpuState] = {}
        self._many: dict[str, _ManyHolders] = {}

    def joined(self, gpu: GpuState) -> None:
        self._by_index[gpu.index] = gpu

    def left(self, gpu: GpuState) -> None:
        del self._by_index[gpu.index]
        for holders in self._many.values():
            holders.idle.pop(gpu, None)

    def became_idle(self, gpu: GpuState) -> None:
        if self._many:
            gpu.stamp += 1
            if gpu.memory.copying is not None:
                self.forget(gpu.memory.copying)
            for model in gpu.memory.residents:
                holders = self._many.get(model)
                if holders is not None:
                    holders.idle[gpu] = None

    def became_busy(self, gpu: GpuState) -> None:
        """It is not idle any more, what it does or holds changed, or its local queue did."""
        if self._many:
            gpu.stamp += 1
            record = _Finish(gpu.finish_s, gpu.index, gpu.stamp)
            for model in gpu.memory.residents:
                holders = self._many.get(model)
                if holders is not None:
                    holders.idle.pop(gpu, None)
                    heappush(holders.busy, record)
                    if len(holders.busy) > 16 * self._cache.copies(model):
                        holders.busy = self._busy(model)

    def forget(self, model: str) -> None:
        """Something about the model changed that no index follows; the next question makes it anew."""
        self._many.pop(model, None)

    def dropped(self, gpu: GpuState, model: str) -> None:
        """The model left that GPU's memory."""
        holders = self._many.get(model) if self._many else None
        if holders is not None:
            holders.idle.pop(gpu, None)

    def idle_longest(self, model: str) -> GpuState | None:
        """The idle holder that has been idle longest."""
        holder_ids = self._cache.holders(model)
        if len(holder_ids) > MANY_COPIES:
            return next(iter(self._indexed(model).idle), None)
        best: GpuState | None = None
        for gpu_id in holder_ids:
            gpu = self._gpus[gpu_id]
            if gpu.work is None and (best is None or gpu.idle_rank < best.idle_rank) and gpu.memory.copying != model:
                best = gpu
        return best

    def earliest(self, model: str) -> GpuState | None:
        """The busy holder with the least estimated finish time.

        Overdue GPUs compare by their overdue estimates: that is as much as anyone knows of them.
        """
        holder_ids = self._cache.holders(model)
        if len(holder_ids) > MANY_COPIES:
            busy = self._indexed(model).busy
            while busy:
                if self._is_current(busy[0], model):
                    return self._by_index[busy[0].index]
                heappop(busy)
            return None
        self._many.pop(model, None)
        best: GpuState | None = None
        for gpu_id in holder_ids:
            gpu = self._gpus[gpu_id]
            if (gpu.work is not None or gpu.memory.copying == model) and (
                best is None or (gpu.finish_s, gpu.index) < (best.finish_s, best.index)
            ):
                best = gpu
        return best

    def _indexed(self, model: str) -> _ManyHolders:
        holders = self._many.get(model)
        if holders is None:
            holders = self._many[model] = _ManyHolders()
            holders.busy = self._busy(model)
            idle = [gpu for gpu in map(self._gpus.__getitem__, self._cache.holders(model)) if not _is_busy(gpu, model)]
            holders.idle = OrderedDict.fromkeys(sorted(idle, key=lambda gpu: gpu.idle_rank))
        return holders

    def _busy(self, model: str) -> list[_Finish]:
        holders = map(self._gpus.__getitem__, self._cache.holders(model))
        heap = [_Finish(gpu.finish_s, gpu.index, gpu.stamp) for gpu in holders if _is_busy(gpu, model)]
        heapify(heap)
        return heap

    def _is_current(self, record: _Finish, model: str) -> bool:
        gpu = self._by_index.get(record.index)
        return gpu is not None and gpu.stamp == record.stamp and _is_busy(gpu, model) and model in gpu.memory.residents


def _is_busy(gpu: GpuState, model: str) -> bool:
    return gpu.work is not None or gpu.memory.copying == model
