"""Least frequently used: the classic, per GPU, counting the runs of the present stay.

Where it differs from the textbook: nothing is remembered of a model once it is evicted (in-cache LFU), and of equals
the one used longest ago goes first.
"""

from __future__ import annotations

from collections.abc import Iterable

from hotset.scheduling.cache import EvictionPolicy, GpuMemory, Resident


def _by_uses(resident: Resident) -> int:
    return resident.uses


class Lfu(EvictionPolicy):
    """Victims in order of how often they ran since they were loaded, least first."""

    name = "lfu"

    def victims(self, memory: GpuMemory, now_s: float) -> Iterable[Resident]:
        return sorted(memory.residents.values(), key=_by_uses)  # stable, and residents are in order of last use
