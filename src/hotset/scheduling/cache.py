"""The Cache Manager: which model is in which GPU's memory, and who must go to make room.

It owns every GPU's memory account. A model's bytes are reserved when its load is decided and given back when its unload
is decided, so the account never exceeds the capacity, whatever the world does meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hotset.errors import InvariantError
from hotset.vocabulary import Residency

if TYPE_CHECKING:
    from hotset.scheduling.cluster import Cluster


class Resident:
    """One model on one GPU."""

    __slots__ = ("in_use", "last_used_s", "loaded_s", "memory_bytes", "model", "state", "uses")

    def __init__(self, model: str, memory_bytes: int, now_s: float) -> None:
        self.model = model
        self.memory_bytes = memory_bytes
        self.state = Residency.LOADING
        self.in_use = False
        """Loading or running: never a victim."""
        self.loaded_s = now_s
        self.last_used_s = now_s
        self.uses = 0


@dataclass(slots=True, eq=False)
class GpuMemory:
    """The account of one GPU's memory. ``residents`` is in order of last use, oldest first (the paper's LRU list)."""

    gpu_id: str
    capacity_bytes: int
    used_bytes: int = 0
    residents: OrderedDict[str, Resident] = field(default_factory=OrderedDict)
    version: int = 0
    """Changes whenever the residents do."""

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self.used_bytes


class EvictionPolicy:
    """Which residents leave when room is needed. An own policy says in which order (``victims``); no more is asked.

    Policies compare GPUs, so most of its answers are not acted on: what it learns, it learns from ``used`` and
    ``evicted``.
    """

    name: str
    cluster: Cluster
    """Everything there is to know; set before the first question."""

    def victims(self, memory: GpuMemory, now_s: float) -> Iterable[Resident]:
        """Residents in the order they should go; those in use may be yielded, they are passed over."""
        raise NotImplementedError

    def choose(self, memory: GpuMemory, missing_bytes: int, now_s: float) -> list[Resident] | None:
        """Residents, none of them in use, that make room for ``missing_bytes`` (> 0); None if that cannot be."""
        victims: list[Resident] = []
        for resident in self.victims(memory, now_s):
            if resident.in_use:
                continue
            victims.append(resident)
            missing_bytes -= resident.memory_bytes
            if missing_bytes <= 0:
                return victims
        return None

    def used(self, memory: GpuMemory, resident: Resident) -> None:
        """A run of it starts."""

    def evicted(self, memory: GpuMemory, resident: Resident) -> None:
        """It left to make room."""


class CacheManager:
    """Residency of all GPUs (paper, Cache Manager): hit or miss, victims, accounts."""

    def __init__(self, eviction: EvictionPolicy) -> None:
        self.eviction = eviction
        self._memories: dict[str, GpuMemory] = {}
        self._holders: dict[str, dict[str, None]] = {}
        self.evictions = 0

    def add_gpu(self, gpu_id: str, capacity_bytes: int) -> GpuMemory:
        memory = self._memories[gpu_id] = GpuMemory(gpu_id, capacity_bytes)
        return memory

    def drop_gpu(self, gpu_id: str) -> list[str]:
        """Forget a lost GPU; returns the models that were on it."""
        models = list(self._memories.pop(gpu_id).residents)
        for model in models:
            self._forget_holder(model, gpu_id)
        return models

    def memory(self, gpu_id: str) -> GpuMemory:
        return self._memories[gpu_id]

    def is_resident(self, gpu_id: str, model: str) -> bool:
        return model in self._memories[gpu_id].residents

    def holders(self, model: str) -> Collection[str]:
        """GPU ids that hold the model (HOT or LOADING), in the order they got it."""
        return self._holders.get(model, ())

    def copies(self, model: str) -> int:
        """How many GPUs hold the model."""
        held = self._holders.get(model)
        return len(held) if held is not None else 0

    def choose_victims(self, memory: GpuMemory, need_bytes: int, now_s: float) -> list[Resident] | None:
        """Residents to evict so that ``need_bytes`` fit, in the eviction policy's order; None if that cannot be."""
        missing = need_bytes - memory.free_bytes
        if missing <= 0:
            return []
        return self.eviction.choose(memory, missing, now_s)

    def reserve(self, memory: GpuMemory, model: str, memory_bytes: int, now_s: float) -> Resident:
        """Account for a load that is about to start."""
        if model in memory.residents or memory_bytes > memory.free_bytes:
            raise InvariantError(f"{model} cannot be reserved on {memory.gpu_id}: it is there, or there is no room")
        resident = memory.residents[model] = Resident(model, memory_bytes, now_s)
        memory.used_bytes += memory_bytes
        memory.version += 1
        self._holders.setdefault(model, {})[memory.gpu_id] = None
        return resident

    def loaded(self, memory: GpuMemory, model: str, memory_bytes: int | None) -> Resident:
        """LOADING -> HOT. A measured size replaces the reserved one if the account allows it."""
        resident = memory.residents[model]
        resident.state = Residency.HOT
        if memory_bytes is not None:
            # A node lets no process grow past its reservation, so this only ever gives memory back.
            measured = min(memory_bytes, resident.memory_bytes + memory.free_bytes)
            memory.used_bytes += measured - resident.memory_bytes
            resident.memory_bytes = measured
        return resident

    def use(self, memory: GpuMemory, model: str, now_s: float) -> Resident:
        """A run starts: the model becomes the most recently used of its GPU."""
        residents = memory.residents
        resident = residents[model]
        residents.move_to_end(model)
        resident.in_use = True
        resident.last_used_s = now_s
        resident.uses += 1
        self.eviction.used(memory, resident)
        return resident

    def release(self, memory: GpuMemory, model: str) -> None:
        """The run is over."""
        memory.residents[model].in_use = False

    def drop(self, memory: GpuMemory, model: str) -> None:
        """The model is no longer on the GPU: evicted, unloaded, or its process died."""
        resident = memory.residents.pop(model)
        memory.used_bytes -= resident.memory_bytes
        memory.version += 1
        self._forget_holder(model, memory.gpu_id)

    def evict(self, memory: GpuMemory, resident: Resident) -> None:
        """Count a resident that leaves to make room, just before it is dropped."""
        self.evictions += 1
        self.eviction.evicted(memory, resident)

    def _forget_holder(self, model: str, gpu_id: str) -> None:
        held = self._holders[model]
        del held[gpu_id]
        if not held:
            del self._holders[model]
