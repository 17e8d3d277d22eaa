"""Pins: copies that models keep HOT (``Model.min_copies``), where they are, and which of them have to be loaded.

A pin is a place on one GPU. From the moment it is given, its bytes are out of bounds for every other model there: a
pinned copy is no victim, and what fits on no GPU beside the pins is refused instead of waiting for ever. Pins stay
where they are as long as they can; GPUs that come, go or prove too small make them move.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from hotset.scheduling.cluster import Cluster, GpuState
from hotset.scheduling.parking import Room
from hotset.scheduling.quarantine import Quarantine
from hotset.scheduling.transitions import Transitions
from hotset.vocabulary import Model


class PinnedLoad(msgspec.Struct, frozen=True, gc=False):
    """A load, or a restore, that a pin asks for and that can start now."""

    gpu: GpuState
    model: str
    room: Room


class Pins:
    """Gives pins their GPUs and says what to load for them. Linear in GPUs and pins, at rare events only."""

    def __init__(self, cluster: Cluster, transitions: Transitions, quarantine: Quarantine) -> None:
        self._cluster = cluster
        self._transitions = transitions
        self._quarantine = quarantine
        self._pinned: dict[str, None] = {}
        """The models that ask for it, in the order they did."""
        self.unsettled = False
        """A pinned copy may be missing: ``next_load`` should be asked."""
        self._moved = False
        self.wakeup_s: float | None = None
        """When a model that failed to load may be tried again."""

    def can_keep(self, model: Model, instead_of: str | None = None) -> bool:
        """Whether ``min_copies`` of the model would all get a place, were those of ``instead_of`` given up."""
        wanted = {name: wish for name, wish in self._wanted().items() if name != instead_of} | {model.name: model}
        return sum(model.name in pins for pins in self._plan(wanted).values()) == model.min_copies

    def placed(self, model: str) -> int:
        """How many copies have a place, loaded yet or not."""
        return sum(model in gpu.memory.pinned for gpu in self._cluster.gpus.values())

    def want(self, model: str, copies: int) -> None:
        """Keep so many copies of a model from now on, as far as there is room for them."""
        if copies:
            self._pinned[model] = None
            self.plan()
        elif model in self._pinned:
            del self._pinned[model]
            self.plan()

    def changed(self, model: str) -> None:
        """The model's size is known better, or a copy of it left: its pins may need other room, or find it, and so may
        the loads of others' pins."""
        if model in self._pinned:
            self.plan()
        else:
            self.unsettled = bool(self._pinned)

    def plan(self) -> None:
        """Place the pins anew: wishes, sizes or GPUs changed."""
        cluster = self._cluster
        for gpu_id, pins in self._plan(self._wanted()).items():
            cluster.cache.pin(cluster.gpus[gpu_id].memory, pins)
        cluster.measure_room()
        self._moved = True
        self.unsettled, self.wakeup_s = bool(self._pinned), None

    def take_moved(self) -> bool:
        """Whether pins were placed anew since this was last asked: some models may fit nowhere any more."""
        moved, self._moved = self._moved, False
        return moved

    def models(self) -> list[str]:
        """Those that copies are kept of."""
        return list(self._pinned)

    def next_load(self, now_s: float) -> PinnedLoad | None:
        """The next load that a missing copy asks for and its GPU can begin; called again after each was started."""
        cluster, self.unsettled, self.wakeup_s = self._cluster, False, None
        for gpu in cluster.gpus.values():
            memory = gpu.memory
            for model in memory.pinned:
                if model in memory.residents:
                    continue
                self.unsettled = True
                known = cluster.models[model]
                most = known.max_copies
                if most is not None and cluster.cache.copies(model) >= max(most, known.min_copies):
                    continue  # a copy elsewhere, which is in use, has to leave first
                pause_s = self._quarantine.remaining_s(model, now_s)
                if pause_s:
                    again_s = now_s + pause_s
                    self.wakeup_s = again_s if self.wakeup_s is None else min(self.wakeup_s, again_s)
                elif memory.copying is None and (cluster.overlap or gpu.work is None):
                    room = self._transitions.room(gpu, model, now_s)
                    if room is not None:
                        return PinnedLoad(gpu, model, room)
        return None

    def _wanted(self) -> dict[str, Model]:
        return {name: self._cluster.models[name] for name in self._pinned}

    def _plan(self, wanted: Mapping[str, Model]) -> dict[str, dict[str, int]]:
        """GPU id -> model -> bytes: first what is pinned there, then the rest where it is resident or most is free."""
        gpus = self._cluster.gpus
        plan: dict[str, dict[str, int]] = {gpu_id: {} for gpu_id in gpus}
        left = {gpu_id: gpu.memory.capacity_bytes for gpu_id, gpu in gpus.items()}

        def place(name: str, gpu: GpuState) -> None:
            need_bytes = wanted[name].memory_bytes
            resident = gpu.memory.residents.get(name)
            if resident is not None:
                need_bytes = max(need_bytes, resident.memory_bytes)
            if need_bytes <= left[gpu.gpu_id]:
                plan[gpu.gpu_id][name] = need_bytes
                left[gpu.gpu_id] -= need_bytes

        for name, model in wanted.items():
            held = [gpu for gpu in gpus.values() if name in gpu.memory.pinned]
            held.sort(key=lambda gpu: name not in gpu.memory.residents)
            for gpu in held[: model.min_copies]:
                place(name, gpu)
        for name, model in wanted.items():
            missing = model.min_copies - sum(name in pins for pins in plan.values())
            for gpu in sorted(gpus.values(), key=lambda gpu: _distance(gpu, name, left[gpu.gpu_id])):
                if missing and name not in plan[gpu.gpu_id]:
                    place(name, gpu)
                    missing -= name in plan[gpu.gpu_id]
        return plan


def _distance(gpu: GpuState, model: str, left_bytes: int) -> tuple[bool, bool, int, int]:
    """How little a GPU suggests itself for a pin."""
    return (model not in gpu.memory.residents, model not in gpu.memory.parked, -left_bytes, gpu.index)
