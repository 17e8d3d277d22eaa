"""Least recently used, one list per GPU (paper, Cache Manager)."""

from __future__ import annotations

from collections.abc import Iterator

from hotset.scheduling.cache import EvictionPolicy, GpuMemory, Resident


class Lru(EvictionPolicy):
    """Victims in order of their last use on that GPU, oldest first."""

    name = "lru"

    def victims(self, memory: GpuMemory, now_s: float) -> Iterator[Resident]:
        return iter(memory.residents.values())  # the Cache Manager keeps them in order of last use
