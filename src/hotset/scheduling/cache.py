"""The Cache Manager: which model is in which GPU's memory, and who must go to make room.

It owns every GPU's memory account, and each node's account of parked models (``scheduling/parking.py``). A model's
bytes are reserved when its load is decided and given back when its unload is decided, so no decision ever makes an
account exceed its capacity. Only a model that takes more in its runs does (``scheduling/sizes.py``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from hotset.errors import InvariantError
from hotset.scheduling.parking import HostMemory, ParkedSize, Room
from hotset.vocabulary import Residency

if TYPE_CHECKING:
    from hotset.scheduling.cluster import Cluster
    from hotset.scheduling.queue import Entry


class Resident(msgspec.Struct, gc=False, eq=False):
    """One model on one GPU."""

    model: str
    memory_bytes: int
    loaded_s: float
    """When its load, or restore, was decided."""
    last_used_s: float = 0.0
    uses: int = 0
    state: Residency = Residency.LOADING
    in_use: bool = False
    """Loading or running: never a victim."""
    near: bool = False
    """Its weights were in the node's host memory when its load began."""
    payer: Entry | None = None
    """The request that it was loaded or restored for; None once that is done and paid for."""
    pinned: bool = False
    """One of the copies that its model keeps HOT: never a victim."""
    ahead: bool = False
    """Loaded before a request was bound to it, and not used since."""
    guessed: bool = False
    """Loaded because it was expected to be called, and not used since."""
    host_bytes: int = 0
    """Host memory on its node's account: while WARM, and until a restore is done."""
    device_bytes: int = 0
    """GPU memory that its process holds while WARM."""
    kept_bytes: int = 0
    """Its account is never less than this: it takes less, but runs of it were seen to need that."""


@dataclass(slots=True, eq=False)
class GpuMemory:
    """The account of one GPU's memory. ``residents`` is in order of last use, oldest first (the paper's LRU list)."""

    gpu_id: str
    capacity_bytes: int
    host: HostMemory
    """Of its node."""
    used_bytes: int = 0
    residents: OrderedDict[str, Resident] = field(default_factory=OrderedDict)
    """LOADING or HOT."""
    version: int = 0
    """Changes whenever the residents do."""
    parked: dict[str, Resident] = field(default_factory=dict)
    """WARM models: not resident, but quickly back on this GPU."""
    parked_bytes: int = 0
    """What their processes hold of this GPU's memory; part of ``used_bytes``."""
    pinned: dict[str, int] = field(default_factory=dict)
    """Models that have a pin here (``scheduling/pins.py``), resident yet or not, and the bytes set aside for each."""
    unpinned_bytes: int = 0
    """What is left of the capacity for all others."""
    spares: bool = False
    """Residents that nobody uses are marked as in use: they are to be spared, for the moment."""
    copying: str | None = None
    """The model whose load or restore is in flight on the copy lane (``SchedulerConfig.overlap``)."""

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self.used_bytes

    def can_hold(self, model: str, memory_bytes: int) -> bool:
        """Whether the model fits beside what is pinned here, were nothing else there."""
        return memory_bytes <= self.unpinned_bytes + (self.pinned.get(model, 0) if self.pinned else 0)


class EvictionPolicy:
    """Which residents leave when room is needed. An own policy says in which order (``victims``); no more is asked.

    Policies compare GPUs, so most of its answers are not acted on: what it learns, it learns from ``used`` and
    ``evicted``.
    """

    name: str
    cluster: Cluster
    """Everything there is to know; set before the first question."""

    def victims(self, memory: GpuMemory, now_s: float) -> Iterable[Resident]:
        """Residents in the order they should go; those in use or pinned may be yielded, they are passed over."""
        raise NotImplementedError

    def choose(self, memory: GpuMemory, missing_bytes: int, now_s: float) -> list[Resident] | None:
        """Residents, none of them in use or pinned, that make room for ``missing_bytes`` (> 0), or None."""
        victims: list[Resident] = []
        for resident in self.victims(memory, now_s):
            if resident.in_use or resident.pinned:
                continue
            victims.append(resident)
            missing_bytes -= resident.memory_bytes
            if missing_bytes <= 0:
                return victims
        return None

    def price_s(self, memory: GpuMemory, missing_bytes: int, now_s: float) -> float | None:
        """About what the callers of ``choose``'s victims would pay, in seconds of waiting; None if there are none."""
        victims = self.choose(memory, missing_bytes, now_s)
        if victims is None:
            return None
        return self.cluster.prices.price_s(self.cluster.gpus[memory.gpu_id], victims, now_s)

    def used(self, memory: GpuMemory, resident: Resident) -> None:
        """A run of it starts."""

    def evicted(self, memory: GpuMemory, resident: Resident) -> None:
        """It left to make room."""


class CacheManager:
    """Residency of all GPUs (paper, Cache Manager): hit or miss, victims, accounts.

    ``host_memory_bytes``: what parked models may take on each node; 0: none is ever parked.
    """

    def __init__(self, eviction: EvictionPolicy, host_memory_bytes: int = 0) -> None:
        self.eviction = eviction
        self.host_memory_bytes = host_memory_bytes
        self.changes = 0
        """How often a GPU got or lost a copy."""
        self.evictions = 0
        self.useful_prefetches = 0
        """Models that were loaded ahead and ran."""
        self.useless_prefetches = 0
        """Models that were loaded ahead and left without a run."""
        self._memories: dict[str, GpuMemory] = {}
        self._hosts: dict[str, HostMemory] = {}
        self._holders: dict[str, dict[str, None]] = {}
        self.held: Mapping[str, Collection[str]] = self._holders
        """Model -> GPU ids, of all that some GPU holds (read only): for loops in which a call each is too dear."""
        self._parked_on: dict[str, dict[str, None]] = {}
        self._sizes: dict[str, ParkedSize] = {}
        self.evictors: dict[str, Entry] = {}
        """Model -> the request for which its last copy had to go."""

    def add_gpu(self, gpu_id: str, capacity_bytes: int, node: str = "local") -> GpuMemory:
        host = self._hosts.get(node)
        if host is None:
            host = self._hosts[node] = HostMemory(self.host_memory_bytes)
        memory = self._memories[gpu_id] = GpuMemory(gpu_id, capacity_bytes, host, unpinned_bytes=capacity_bytes)
        return memory

    def drop_gpu(self, gpu_id: str) -> None:
        """Forget a lost GPU with all that was on it or parked for it."""
        memory = self._memories.pop(gpu_id)
        for model in list(memory.parked):
            self.unpark(memory, model)
        for model, resident in memory.residents.items():
            memory.host.used_bytes -= resident.host_bytes
            self._forget_holder(model, gpu_id)
        if all(other.host is not memory.host for other in self._memories.values()):
            self._hosts = {node: host for node, host in self._hosts.items() if host is not memory.host}

    def memory(self, gpu_id: str) -> GpuMemory:
        return self._memories[gpu_id]

    def is_resident(self, gpu_id: str, model: str) -> bool:
        return model in self._memories[gpu_id].residents

    def holders(self, model: str) -> Collection[str]:
        """GPU ids that hold the model (HOT or LOADING), in the order they got it."""
        return self._holders.get(model, ())

    def parked_on(self, model: str) -> Collection[str]:
        """GPU ids where the model is WARM, in the order it was parked there."""
        return self._parked_on.get(model, ())

    def is_near(self, model: str, here: GpuMemory | None = None) -> bool:
        """Whether a load of the model finds its weights in host memory: another GPU of that one's node has it, HOT or
        WARM, and GPUs of a node share the pages of what one of them has read. Without ``here``: whether any GPU has it.

        False while no host memory is accounted for. Linear in the model's copies.
        """
        if not self.host_memory_bytes:
            return False
        for gpu_id in (*self.parked_on(model), *self.holders(model)):
            memory = self._memories[gpu_id]
            resident = memory.residents.get(model)
            if (resident is None or resident.state is Residency.HOT) and (
                here is None or (memory.host is here.host and memory is not here)
            ):
                return True
        return False

    def residue_bytes(self, model: str) -> int:
        """GPU memory that the model's process holds while it is parked, as last measured; 0 before it ever was."""
        size = self._sizes.get(model)
        return 0 if size is None else size.device_bytes

    def copies(self, model: str) -> int:
        """How many GPUs hold the model."""
        held = self._holders.get(model)
        return len(held) if held is not None else 0

    # Room

    def pin(self, memory: GpuMemory, pins: dict[str, int]) -> None:
        """Set these bytes aside for these models; nothing is evicted, or loaded, for it here."""
        if pins != memory.pinned:
            memory.pinned = pins
            memory.unpinned_bytes = memory.capacity_bytes - sum(pins.values())
            memory.version += 1
            for model, resident in memory.residents.items():
                resident.pinned = model in pins

    def choose_victims(
        self, memory: GpuMemory, need_bytes: int, now_s: float, spared: Collection[str] = ()
    ) -> list[Resident] | None:
        """Residents to evict so that ``need_bytes`` fit, in the eviction policy's order; None if that cannot be now.

        What parked models hold of the GPU counts as free: they go before anyone who is HOT. ``spared``: models to leave
        alone, as if they were in use.
        """
        if memory.copying is not None:
            return None
        missing = need_bytes - memory.capacity_bytes + memory.used_bytes - memory.parked_bytes
        if missing <= 0:
            return []
        if not spared:
            return self.eviction.choose(memory, missing, now_s)
        shielded = [resident for model, resident in memory.residents.items() if model in spared and not resident.in_use]
        memory.spares = True
        for resident in shielded:
            resident.in_use = True  # all that an eviction policy knows of being spared
        victims = self.eviction.choose(memory, missing, now_s)
        for resident in shielded:
            resident.in_use = False
        memory.spares = False
        return victims

    def room_for(self, memory: GpuMemory, model: str | None, need_bytes: int, victims: list[Resident]) -> Room:
        """How these victims make the room for which they were chosen: each is offloaded if that is worth it. ``model``:
        the one that comes."""
        if not self.host_memory_bytes:
            return Room(victims, [], victims, [])
        own = memory.parked.get(model) if model is not None else None
        room = Room(victims, [], [], [])
        missing = need_bytes - memory.free_bytes - (own.device_bytes if own is not None else 0)
        host_free_bytes = memory.host.free_bytes
        for victim in victims:
            missing -= victim.memory_bytes
            size = self._parked_size(victim)
            leaving: list[Resident] | None = None
            if self._worth_parking(memory, victim, size):
                leaving = self._host_room(memory.host, victim, size.host_bytes - host_free_bytes, room.forgotten, own)
            if leaving is None:
                room.unloaded.append(victim)
                continue
            room.forgotten += leaving
            room.offloaded.append(victim)
            host_free_bytes += sum(parked.host_bytes for parked in leaving) - size.host_bytes
            missing += size.device_bytes
            missing -= sum(parked.device_bytes for parked in leaving if parked.model in memory.parked)
        if missing > 0:
            self._reclaim(memory, room, own, missing)
        return room

    def _worth_parking(self, memory: GpuMemory, victim: Resident, size: ParkedSize) -> bool:
        """It frees something, and leaving and coming back takes less time than being loaded anew."""
        if size.host_bytes > memory.host.capacity_bytes or size.device_bytes >= victim.memory_bytes:
            return False
        cluster = self.eviction.cluster
        profiles, kind = cluster.profiles, cluster.gpus[memory.gpu_id].kind
        back_s = profiles.offload_s(victim.model, kind) + profiles.restore_s(victim.model, kind)
        return back_s < profiles.load_s(victim.model, kind, near=self.is_near(victim.model, memory))

    def _host_room(
        self, host: HostMemory, victim: Resident, missing: int, gone: list[Resident], own: Resident | None
    ) -> list[Resident] | None:
        """Parked models to forget so that the victim can be parked; None: all there are are worth more than it.

        Models that somebody waits for are worth most, then those that are on no other GPU, then those used last.
        """
        if missing <= 0:
            return []
        ranked = sorted((parked for parked in host.parked if parked is not own and parked not in gone), key=self._worth)
        worth, leaving = self._worth(victim), list[Resident]()
        for parked in ranked:
            if self._worth(parked) > worth:
                return None
            leaving.append(parked)
            missing -= parked.host_bytes
            if missing <= 0:
                return leaving
        return None

    def _worth(self, resident: Resident) -> tuple[bool, bool, float]:
        model = resident.model
        elsewhere = self.copies(model) + len(self.parked_on(model)) > 1
        return model in self.eviction.cluster.queues.models(), not elsewhere, resident.last_used_s

    def _reclaim(self, memory: GpuMemory, room: Room, own: Resident | None, missing: int) -> None:
        """Take back what parked processes hold of the GPU, longest parked first; then park fewer of the victims."""
        parked = [each for each in memory.parked.values() if each is not own and each not in room.forgotten]
        holding = [each for each in reversed(parked) if each.device_bytes]
        while missing > 0 and holding:
            room.forgotten.append(holding.pop())
            missing -= room.forgotten[-1].device_bytes
        while missing > 0:
            victim = room.offloaded.pop()
            room.unloaded.append(victim)
            missing -= self._parked_size(victim).device_bytes

    def _parked_size(self, resident: Resident) -> ParkedSize:
        return self._sizes.get(resident.model) or ParkedSize(device_bytes=0, host_bytes=resident.memory_bytes)

    # Changes

    def reserve(self, memory: GpuMemory, model: str, memory_bytes: int, now_s: float) -> Resident:
        """Account for a load or a restore that is about to start."""
        resident = memory.parked.get(model)
        held_bytes = resident.device_bytes if resident is not None else 0
        if model in memory.residents or memory_bytes > memory.capacity_bytes - memory.used_bytes + held_bytes:
            raise InvariantError(f"{model} cannot be reserved on {memory.gpu_id}: it is there, or there is no room")
        if resident is None:
            resident = Resident(model, memory_bytes, now_s, now_s)
        else:
            host_bytes = resident.host_bytes
            self.unpark(memory, model)
            resident.host_bytes = host_bytes
            memory.host.used_bytes += host_bytes
            resident.memory_bytes = memory_bytes
            resident.state = Residency.LOADING
            resident.loaded_s = now_s
        resident.pinned = model in memory.pinned
        memory.residents[model] = resident
        memory.used_bytes += memory_bytes
        memory.version += 1
        held = self._holders.get(model)
        if held is None:
            self._holders[model] = {memory.gpu_id: None}
        else:
            held[memory.gpu_id] = None
        self.changes += 1
        return resident

    def loading_ahead(self, memory: GpuMemory, model: str, *, guessed: bool) -> None:
        """The load or restore that has just started is bound to no request: some wait, or may come."""
        resident = memory.residents[model]
        resident.ahead, resident.guessed = not guessed, guessed

    def loaded(self, memory: GpuMemory, model: str, memory_bytes: int | None, growth_bytes: int = 0) -> Resident:
        """LOADING -> HOT. A measured size replaces the reserved one if the account allows it. ``growth_bytes``: what is
        kept beside it, as far as it goes, for what runs will add."""
        resident = memory.residents[model]
        resident.state = Residency.HOT
        memory.host.used_bytes -= resident.host_bytes
        resident.host_bytes = 0
        if memory_bytes is not None:
            # A node lets no load take more than it has, so this only ever gives memory back.
            most_bytes = resident.memory_bytes + max(0, memory.free_bytes)
            if growth_bytes:
                resident.kept_bytes = min(memory_bytes + growth_bytes, most_bytes)
            self._resize(memory, resident, min(max(memory_bytes, resident.kept_bytes), most_bytes))
        return resident

    def measured(self, memory: GpuMemory, resident: Resident, memory_bytes: int) -> None:
        """A HOT model takes this much by now. It has it already, so the account may exceed the GPU's capacity."""
        parked, before_bytes = self._sizes.get(resident.model), resident.memory_bytes
        self._resize(memory, resident, max(memory_bytes, resident.kept_bytes))
        if parked is not None:  # what was added will be parked as well
            host_bytes = max(0, parked.host_bytes + resident.memory_bytes - before_bytes)
            self._sizes[resident.model] = ParkedSize(parked.device_bytes, host_bytes)

    def _resize(self, memory: GpuMemory, resident: Resident, memory_bytes: int) -> None:
        memory.used_bytes += memory_bytes - resident.memory_bytes
        memory.version += memory_bytes != resident.memory_bytes
        resident.memory_bytes = memory_bytes

    def use(self, memory: GpuMemory, model: str, now_s: float) -> Resident:
        """A run starts: the model becomes the most recently used of its GPU."""
        residents = memory.residents
        resident = residents[model]
        residents.move_to_end(model)
        resident.in_use = True
        if resident.ahead or resident.guessed:
            resident.ahead = resident.guessed = False
            self.useful_prefetches += 1
        resident.last_used_s = now_s
        resident.uses += 1
        self.eviction.used(memory, resident)
        return resident

    def release(self, memory: GpuMemory, model: str) -> None:
        """The run is over."""
        memory.residents[model].in_use = False

    def drop(self, memory: GpuMemory, model: str) -> Resident:
        """The model is no longer in the GPU's memory: evicted, unloaded, or its process died."""
        resident = memory.residents.pop(model)
        resident.pinned = False
        memory.used_bytes -= resident.memory_bytes
        memory.version += 1
        memory.host.used_bytes -= resident.host_bytes
        resident.host_bytes = 0
        self.useless_prefetches += resident.ahead or resident.guessed
        resident.ahead = resident.guessed = False
        self._forget_holder(model, memory.gpu_id)
        return resident

    def evict(self, memory: GpuMemory, resident: Resident) -> None:
        """Count a resident that leaves to make room, just before it is dropped."""
        self.evictions += 1
        self.eviction.evicted(memory, resident)

    def park(self, memory: GpuMemory, resident: Resident) -> None:
        """Account for an offload that is about to start, of a model that was just dropped."""
        size = self._parked_size(resident)
        resident.state = Residency.WARM
        resident.device_bytes, resident.host_bytes = size.device_bytes, size.host_bytes
        memory.parked[resident.model] = resident
        memory.parked_bytes += size.device_bytes
        memory.used_bytes += size.device_bytes
        memory.host.parked[resident] = memory
        memory.host.used_bytes += size.host_bytes
        if memory.used_bytes > memory.capacity_bytes or memory.host.used_bytes > memory.host.capacity_bytes:
            raise InvariantError(f"{resident.model} cannot be parked for {memory.gpu_id}: there is no room")
        self._parked_on.setdefault(resident.model, {})[memory.gpu_id] = None

    def offloaded(self, memory: GpuMemory, model: str, size: ParkedSize) -> bool:
        """An offload is done and measured; False: it takes more than there is, and must go."""
        self._sizes[model] = size
        resident = memory.parked.get(model)
        if resident is None:
            return True  # it is on its way back already, or gone
        device_bytes, host_bytes = size.device_bytes - resident.device_bytes, size.host_bytes - resident.host_bytes
        if device_bytes > max(0, memory.free_bytes) or host_bytes > memory.host.free_bytes:
            return False
        resident.device_bytes, resident.host_bytes = size.device_bytes, size.host_bytes
        memory.parked_bytes += device_bytes
        memory.used_bytes += device_bytes
        memory.host.used_bytes += host_bytes
        return True

    def unpark(self, memory: GpuMemory, model: str) -> None:
        """The model is no longer WARM: it comes back, was forgotten, or its process died."""
        resident = memory.parked.pop(model)
        del memory.host.parked[resident]
        memory.parked_bytes -= resident.device_bytes
        memory.used_bytes -= resident.device_bytes
        memory.host.used_bytes -= resident.host_bytes
        resident.host_bytes = resident.device_bytes = 0
        held = self._parked_on[model]
        del held[memory.gpu_id]
        if not held:
            del self._parked_on[model]

    def forget(self, model: str) -> None:
        """Nobody will ask for the model again."""
        self._sizes.pop(model, None)
        self.evictors.pop(model, None)

    def _forget_holder(self, model: str, gpu_id: str) -> None:
        self.changes += 1
        held = self._holders[model]
        del held[gpu_id]
        if not held:
            del self._holders[model]
