"""GreedyDual-Size-Frequency: what is dear to load, small and often used stays.

L. Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Laboratories
report HPL-98-69R1, 1998. Priority = clock + frequency x cost / size; the least goes, and the clock moves on to its
priority, so that what was popular long ago ages. FaasCache (Fuerst and Sharma, ASPLOS 2021) keeps containers warm by
the same rule.

Where it differs: the cost is the learned load time; one clock per GPU, as each GPU is a cache of its own; the frequency
counts the runs of the present stay, as in FaasCache (a model that is evicted starts from nothing).
"""

from __future__ import annotations

from collections.abc import Iterable

from hotset.scheduling.cache import EvictionPolicy, GpuMemory, Resident


class _Ranking:
    """One GPU's clock and priorities."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.priorities: dict[str, float] = {}

    def of(self, resident: Resident) -> float:
        return self.priorities.get(resident.model, self.clock)


class Gdsf(EvictionPolicy):
    """Victims in order of priority, least first; of equals the one used longest ago."""

    name = "gdsf"

    def __init__(self) -> None:
        self._rankings: dict[str, _Ranking] = {}

    def victims(self, memory: GpuMemory, now_s: float) -> Iterable[Resident]:
        return sorted(memory.residents.values(), key=self._ranking(memory).of)

    def used(self, memory: GpuMemory, resident: Resident) -> None:
        ranking = self._ranking(memory)
        load_s = self.cluster.load_s(resident.model, self.cluster.gpus[memory.gpu_id])
        ranking.priorities[resident.model] = ranking.clock + resident.uses * load_s / max(resident.memory_bytes, 1)

    def evicted(self, memory: GpuMemory, resident: Resident) -> None:
        ranking = self._ranking(memory)
        ranking.clock = max(ranking.clock, ranking.of(resident))
        ranking.priorities = {
            model: priority
            for model, priority in ranking.priorities.items()
            if model in memory.residents and model != resident.model
        }

    def _ranking(self, memory: GpuMemory) -> _Ranking:
        return self._rankings.setdefault(memory.gpu_id, _Ranking())
