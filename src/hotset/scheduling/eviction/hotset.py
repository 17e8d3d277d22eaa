"""Priced: the residents go whose loss costs their callers least (``scheduling/prices.py``; docs/policies.md)."""

from __future__ import annotations

from collections.abc import Iterable

from hotset.scheduling.cache import EvictionPolicy, GpuMemory, Resident


class Hotset(EvictionPolicy):
    """Rarely asked for, quickly loaded, or held elsewhere as well: cheap. Last copies of busy models: dear."""

    name = "hotset"

    def victims(self, memory: GpuMemory, now_s: float) -> Iterable[Resident]:
        return self.choose(memory, memory.capacity_bytes, now_s) or ()

    def choose(self, memory: GpuMemory, missing_bytes: int, now_s: float) -> list[Resident] | None:
        prices, gpu = self.cluster.prices, self.cluster.gpus[memory.gpu_id]
        prices.is_current(gpu)
        room = prices.room(gpu, missing_bytes, now_s, False)
        return room.victims if room is not None else None

    def price_s(self, memory: GpuMemory, missing_bytes: int, now_s: float) -> float | None:
        gpu = self.cluster.gpus[memory.gpu_id]
        room = self.cluster.prices.room(gpu, missing_bytes, now_s, gpu.work is not None)
        return room.price_s if room is not None else None

    def used(self, memory: GpuMemory, resident: Resident) -> None:
        """Prices that are old are worked out anew now: a load that comes to this GPU later has less to wait for."""
        self.cluster.prices.ranked(self.cluster.gpus[memory.gpu_id], resident.last_used_s)
