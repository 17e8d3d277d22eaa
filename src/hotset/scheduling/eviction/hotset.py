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
        cluster = self.cluster
        return cluster.prices.cheapest_victims(cluster.gpus[memory.gpu_id], missing_bytes, now_s)

    def price_s(self, memory: GpuMemory, missing_bytes: int, now_s: float) -> float | None:
        return self.cluster.prices.room_s(self.cluster.gpus[memory.gpu_id], missing_bytes, now_s)

    def used(self, memory: GpuMemory, resident: Resident) -> None:
        """Prices that are old are worked out anew now: a load that comes to this GPU later has less to wait for."""
        self.cluster.prices.ranked(self.cluster.gpus[memory.gpu_id], resident.last_used_s)
