"""Prefetch: load the model of a waiting request on a GPU that still computes for somebody else (two lanes a GPU).

No policy has a part in it: it acts only when none of the GPUs that a policy could have chosen is left, for models that
no GPU holds. The request stays in the global queue and is an ordinary hit once its model is HOT and a GPU is free.
"""

from __future__ import annotations

from itertools import islice

import msgspec

from hotset.scheduling.cluster import Cluster, GpuState
from hotset.scheduling.parking import Room
from hotset.scheduling.queue import Entry
from hotset.scheduling.transitions import Transitions

MOST_LINES = 64
"""Models waited for that are looked at; lines are in order of their beginning, about oldest first."""


class LoadAhead(msgspec.Struct, frozen=True, gc=False):
    """A load, or a restore, that may start now though its GPU computes."""

    entry: Entry
    """The oldest request that waits for it."""
    gpu: GpuState
    room: Room


class Prefetcher:
    """Chooses what to load ahead. Linear in GPUs, while all of them are taken and somebody waits for a cold model.

    At most one model on each GPU is loaded ahead and not used yet, so there are never more useless prefetches than
    loads that requests were bound to.
    """

    def __init__(self, cluster: Cluster, transitions: Transitions) -> None:
        self._cluster = cluster
        self._transitions = transitions

    def next_load(self, now_s: float) -> LoadAhead | None:
        """The next one, or None when there is nothing more to load ahead; called again after each was started."""
        cluster = self._cluster
        if any(gpu.memory.copying is None for gpu in cluster.idle):
            return None  # the policy had its choice
        lines, copies = cluster.queue.models, cluster.cache.copies
        wanted = [model for model in islice(lines, MOST_LINES) if not copies(model)]
        if not wanted:
            return None
        free = [gpu for gpu in cluster.gpus.values() if gpu.memory.copying is None and not _has_unused(gpu)]
        free.sort(key=lambda gpu: (gpu.finish_s, gpu.index))
        for model in wanted:
            warm = cluster.cache.parked_on(model)
            # Where it is WARM it is back soonest; else where its run can begin soonest.
            for gpu in sorted(free, key=lambda gpu: gpu.gpu_id not in warm) if warm else free:
                if cluster.fits(gpu, model):
                    room = self._transitions.room(gpu, model, now_s, spared=self._about_to_run(gpu))
                    if room is not None:
                        return LoadAhead(lines[model][0], gpu, room)
        return None

    def _about_to_run(self, gpu: GpuState) -> frozenset[str]:
        """Models that are waited for: loading one and evicting the other would be thrash."""
        return frozenset(self._cluster.queue.models).union(entry.model for entry in gpu.local_queue)


def _has_unused(gpu: GpuState) -> bool:
    return any(resident.ahead for resident in gpu.memory.residents.values())
