"""Changes of residency: load, restore, offload, unload. Each is accounted for at once and sent as an action."""

from __future__ import annotations

from hotset.scheduling.actions import Load, Offload, Outbox, Restore, Unload
from hotset.scheduling.cluster import Cluster, GpuState
from hotset.scheduling.parking import Room
from hotset.scheduling.queue import Entry


class Transitions:
    """Brings models to GPUs and makes room for them."""

    def __init__(self, cluster: Cluster, outbox: Outbox) -> None:
        self._cluster = cluster
        self._cache = cluster.cache
        self._outbox = outbox

    def room(self, gpu: GpuState, model: str, now_s: float, spared: frozenset[str] = frozenset()) -> Room | None:
        """How room for the model can be made there without touching the ``spared`` ones; None if it cannot be now."""
        cache, need_bytes = self._cache, self._cluster.models[model].memory_bytes
        victims = cache.choose_victims(gpu.memory, need_bytes, now_s, spared)
        return cache.room_for(gpu.memory, model, need_bytes, victims) if victims is not None else None

    def bring(self, gpu: GpuState, model: str, room: Room, payer: Entry | None, now_s: float) -> float:
        """Make the room and start the load, or the restore; returns the seconds all of it is expected to take."""
        cluster, cache, memory = self._cluster, self._cache, gpu.memory
        self._forget_all(gpu, room)
        load_s, near = cluster.load_s(model, gpu), cache.host_memory_bytes > 0 and cache.is_near(model, memory)
        if room.victims:
            cluster.thrash.swapped(load_s, now_s)
        expected_s = self._clear(gpu, room, payer)
        request_id = None if payer is None else payer.request.request_id
        if model in memory.parked:
            self._outbox.actions.append(Restore(gpu.gpu_id, model, request_id))
        else:
            self._outbox.actions.append(Load(gpu.gpu_id, model, request_id, model in cache.held))
        resident = cache.reserve(memory, model, cluster.models[model].memory_bytes, now_s)
        resident.in_use, resident.payer, resident.near = True, payer, near
        return expected_s + load_s

    def relieve(self, gpu: GpuState, now_s: float) -> bool:
        """Have models leave a GPU until the others fit, none of them one that is about to run there. False: not now."""
        memory = gpu.memory
        spared = frozenset(self._cluster.queues.models()).union(entry.model for entry in gpu.local_queue)
        victims = self._cache.choose_victims(memory, 0, now_s, spared)
        if victims is None:
            return False
        spare_bytes = memory.free_bytes + memory.parked_bytes + sum(victim.memory_bytes for victim in victims)
        for victim in list(victims):
            if victim.memory_bytes <= spare_bytes:  # one that had to go as well is large enough: what has grown, often
                spare_bytes -= victim.memory_bytes
                victims.remove(victim)
        room = self._cache.room_for(memory, None, 0, victims)
        self._forget_all(gpu, room)
        self._clear(gpu, room, None)
        return True

    def _forget_all(self, gpu: GpuState, room: Room) -> None:
        for parked in room.forgotten:
            self.forget(self._cluster.gpus[gpu.memory.host.parked[parked].gpu_id], parked.model)

    def _clear(self, gpu: GpuState, room: Room, payer: Entry | None) -> float:
        """Have the victims leave; returns the seconds that a load has to wait for them."""
        cluster, cache, memory = self._cluster, self._cache, gpu.memory
        for victim in room.victims:
            cache.evict(memory, victim)
            if payer is not None and cache.copies(victim.model) == 1:
                cache.evictors[victim.model] = payer
        for victim in room.unloaded:
            self.unload(gpu, victim.model)
        for victim in room.offloaded:
            cluster.drop_resident(gpu, victim.model)
        expected_s = 0.0
        for victim in room.offloaded:
            expected_s += cluster.profiles.offload_s(victim.model, gpu.kind)
            cache.park(memory, victim)
            self._outbox.actions.append(Offload(gpu.gpu_id, victim.model))
        return expected_s

    def unload(self, gpu: GpuState, model: str) -> None:
        """HOT -> COLD."""
        self._cluster.drop_resident(gpu, model)
        self._outbox.actions.append(Unload(gpu.gpu_id, model))

    def forget(self, gpu: GpuState, model: str) -> None:
        """WARM -> COLD."""
        self._cache.unpark(gpu.memory, model)
        self._cluster.prices.moved(model)
        self._outbox.actions.append(Unload(gpu.gpu_id, model))
