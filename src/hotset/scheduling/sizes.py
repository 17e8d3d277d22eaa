"""What models really take of their GPUs: learned from loads, restores and runs, and what becomes of a GPU outgrown.

A run may leave its model larger than before (workspaces, caches, whatever a function keeps). That cannot be refused, it
has happened: the account then exceeds the GPU's capacity until others leave, as the eviction policy says, or the model
itself once nobody uses it or waits for it. What it took is kept free for its next load.
"""

from __future__ import annotations

from hotset.scheduling.cache import Resident
from hotset.scheduling.cluster import Cluster, GpuState
from hotset.scheduling.events import ModelLoaded, ModelMeasured, ModelRestored
from hotset.scheduling.pins import Pins
from hotset.scheduling.requests import OpenRequests
from hotset.scheduling.transitions import Transitions
from hotset.vocabulary import Residency


class Sizes:
    """Keeps footprints and accounts true."""

    def __init__(self, cluster: Cluster, transitions: Transitions, pins: Pins, requests: OpenRequests) -> None:
        self._cluster = cluster
        self._transitions = transitions
        self._pins = pins
        self._requests = requests
        self.outgrown: dict[GpuState, None] = {}
        """GPUs whose models take more than there is, in the order they were outgrown."""

    def became_hot(self, gpu: GpuState, event: ModelLoaded | ModelRestored) -> Resident:
        """Put it on the account as it is, and beside a load what runs will add to it, so that it is theirs."""
        cluster, model = self._cluster, event.model
        growth_bytes = cluster.profiles.footprints[model].growth_bytes if type(event) is ModelLoaded else 0
        return cluster.cache.loaded(gpu.memory, model, event.memory_bytes, growth_bytes)

    def loaded(self, event: ModelLoaded | ModelRestored, resident: Resident, now_s: float) -> None:
        """What that load, or restore, teaches: not more than the account has for it, as no load may take more."""
        if event.memory_bytes is not None:
            taken_bytes = min(event.memory_bytes, resident.memory_bytes)
            self.learn(event.model, taken_bytes, now_s, again=type(event) is ModelRestored)

    def measured(self, event: ModelMeasured, now_s: float) -> None:
        """Some time after a run: the model may have left that GPU since, or be on its way back."""
        cluster, model = self._cluster, event.model
        gpu = cluster.gpus.get(event.gpu_id)
        if gpu is None or model not in cluster.models:
            return
        resident = gpu.memory.residents.get(model)
        if resident is None or resident.state is not Residency.HOT:
            self.learn(model, event.memory_bytes, now_s, again=True)
            return
        cluster.cache.measured(gpu.memory, resident, event.memory_bytes)
        self._pins.changed(model)
        if gpu.memory.free_bytes < 0:
            self.outgrown[gpu] = None
        self.learn(model, event.memory_bytes, now_s, again=True, first_run=resident.uses <= 1)

    def learn(
        self, model: str, memory_bytes: int, now_s: float, *, again: bool = False, first_run: bool = False
    ) -> None:
        """A load took this much, or would have; ``again``: what was loaded before does now, after ``first_run``. Pins
        may need other room then, and some who wait may have none any more."""
        known = self._cluster.profiles.footprints[model]
        if again:
            known.observe_again(memory_bytes, first_run=first_run)
        else:
            known.observe(memory_bytes)
        if self._cluster.size(model):
            self._pins.changed(model)
            self._requests.reject_too_large(now_s)

    def settle(self, now_s: float) -> None:
        """Have models leave the GPUs that were outgrown, as soon as there is one that may."""
        for gpu in list(self.outgrown):
            here = self._cluster.gpus.get(gpu.gpu_id) is gpu
            if not here or gpu.memory.free_bytes >= 0:
                del self.outgrown[gpu]
            elif self._transitions.relieve(gpu, now_s):
                del self.outgrown[gpu]
                if self._pins.models():
                    self._pins.plan()  # a copy that had outgrown its place, and left, may have one again
