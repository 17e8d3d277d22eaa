"""Prefetch: load a model on a GPU that still computes for somebody else, or for nobody yet (two lanes a GPU).

For requests that wait: no policy has a part in it. It acts only when none of the GPUs that a policy could have chosen
is left, for models that no GPU holds. The request stays in the global queue and is an ordinary hit once its model is
HOT and a GPU is free. For requests that are expected (``recurrence.py``): only while nobody waits for a model that no
GPU holds, in free memory or in place of what is worth less than the guess. For models that run now, while their holders
are busy and there is room to park them: on GPUs that compute and on which they are not WARM yet, as all later calls can
have them back there by a restore.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain, islice

import msgspec

from hotset.scheduling.cluster import Cluster, GpuState
from hotset.scheduling.parking import Room
from hotset.scheduling.queue import Entry
from hotset.scheduling.recurrence import Recurrence
from hotset.scheduling.transitions import Transitions

MOST_LINES = 64
"""Models waited for that are looked at; lines are in order of their beginning, about oldest first."""
MOST_GPUS = 16
"""GPUs that are compared for one guess, those idle longest first."""
TRY_AGAIN_S = 0.25
"""After a guess, or a foothold, found no place."""
LANE_PRICE = 0.1
"""Waiting that a second of a copy lane, spent on what nobody waits for, causes elsewhere."""


class LoadAhead(msgspec.Struct, frozen=True, gc=False):
    """A load, or a restore, that may start now though its GPU computes."""

    model: str
    entry: Entry | None
    """The oldest request that waits for it; None: it is not for those that wait."""
    gpu: GpuState
    room: Room


class Prefetcher:
    """Chooses what to load ahead. Linear in GPUs, while all of them are taken and somebody waits for a cold model.

    On each GPU at most one model was loaded ahead for requests that wait, and one for later ones, and not used yet; so
    there are never more useless prefetches than loads that requests were bound to, guesses and footholds.
    """

    def __init__(self, cluster: Cluster, transitions: Transitions, recurrence: Recurrence | None = None) -> None:
        self._cluster = cluster
        self._transitions = transitions
        self._recurrence = recurrence
        self._try_s = 0.0
        """When guesses are looked at next."""
        self._try_foothold_s = 0.0
        """The same for footholds."""

    def next_load(self, now_s: float) -> LoadAhead | None:
        """The next one, or None when there is nothing more to load ahead; called again after each was started."""
        cluster = self._cluster
        if self._recurrence is not None:
            self._recurrence.advance(now_s)
        if cluster.queues.sparing:
            return None
        if any(gpu.memory.copying is None for gpu in cluster.idle):
            return self._next_unasked(now_s)  # the policy had its choice
        wanted = self._cold()
        if not wanted:
            return self._next_unasked(now_s)
        free = [gpu for gpu in cluster.gpus.values() if gpu.memory.copying is None and not _has_unused(gpu)]
        free.sort(key=lambda gpu: (gpu.finish_s, gpu.index))
        for model in wanted:
            warm = cluster.cache.parked_on(model)
            # Where it is WARM it is back soonest; else where its run can begin soonest.
            for gpu in sorted(free, key=lambda gpu: gpu.gpu_id not in warm) if warm else free:
                if cluster.fits(gpu, model):
                    room = self._transitions.room(gpu, model, now_s, spared=self._about_to_run(gpu))
                    if room is not None:
                        return LoadAhead(model, cluster.queue.first_of(model), gpu, room)
        return None

    def _cold(self) -> list[str]:
        """Models that somebody waits for and no GPU holds."""
        copies = self._cluster.cache.copies
        return [model for model in islice(self._cluster.queue.models, MOST_LINES) if not copies(model)]

    def _next_unasked(self, now_s: float) -> LoadAhead | None:
        """What nobody waits for, while nobody waits for a model that no GPU holds."""
        may_guess = self._recurrence is not None and self._recurrence.expected and now_s >= self._try_s
        may_settle = self._cluster.cache.host_memory_bytes and now_s >= self._try_foothold_s
        if not (may_guess or may_settle) or self._cold():
            return None
        guess = self._next_guess(now_s) if may_guess else None
        return guess or (self._next_foothold(now_s) if may_settle else None)

    def _next_foothold(self, now_s: float) -> LoadAhead | None:
        """Of the models that run, the one that most wants one GPU more to be quickly back on, and the cheapest."""
        cluster, best, most = self._cluster, None, LANE_PRICE
        busy = list(islice((gpu for gpu in cluster.gpus.values() if gpu.work is not None), MOST_GPUS))
        free = [gpu for gpu in busy if gpu.memory.copying is None and not _has_guess(gpu)]
        for model in dict.fromkeys(gpu.work.model for gpu in busy if gpu.work is not None) if free else ():
            load_s = cluster.profiles.load_s(model, free[0].kind)
            if load_s and model not in cluster.removed and not self._is_coming(model):
                worth = cluster.prices.foothold_s(free[0], model, now_s) / load_s
                if worth > most:
                    best, most = model, worth
        if best is not None:
            warm = {*cluster.cache.holders(best), *cluster.cache.parked_on(best)}
            ahead = self._cheapest(best, [gpu for gpu in free if gpu.gpu_id not in warm], most - LANE_PRICE, now_s)
            if ahead is not None:
                return ahead
        self._try_foothold_s = now_s + TRY_AGAIN_S
        return None

    def _is_coming(self, model: str) -> bool:
        gpus = self._cluster.gpus
        return any(gpus[gpu_id].memory.copying == model for gpu_id in self._cluster.cache.holders(model))

    def _next_guess(self, now_s: float) -> LoadAhead | None:
        recurrence = self._recurrence
        assert recurrence is not None
        gpus = list(islice(chain(self._cluster.idle, self._cluster.gpus.values()), MOST_GPUS))
        for model, expected in recurrence.expected.items():
            ahead = self._cheapest(model, gpus, expected.likely, now_s)
            if ahead is not None:
                recurrence.guessed(model)
                return ahead
        self._try_s = now_s + TRY_AGAIN_S
        return None

    def _cheapest(self, model: str, gpus: Iterable[GpuState], worth: float, now_s: float) -> LoadAhead | None:
        """Where the load costs others least; None: nowhere less than it is worth, per second of it."""
        cluster = self._cluster
        best: LoadAhead | None = None
        least_s = math.inf
        for gpu in gpus:
            if gpu.memory.copying is not None or not cluster.fits(gpu, model) or _has_guess(gpu):
                continue
            room = self._transitions.room(gpu, model, now_s, spared=self._about_to_run(gpu))
            if room is None:
                continue
            price_s = cluster.prices.price_s(gpu, room.victims, now_s) if room.victims else 0.0
            if price_s < min(least_s, worth * cluster.load_s(model, gpu)):
                best, least_s = LoadAhead(model, None, gpu, room), price_s
        return best

    def _about_to_run(self, gpu: GpuState) -> frozenset[str]:
        """Models that are waited for: loading one and evicting the other would be thrash."""
        return frozenset(self._cluster.queues.models()).union(entry.model for entry in gpu.local_queue)


def _has_unused(gpu: GpuState) -> bool:
    return any(resident.ahead for resident in gpu.memory.residents.values())


def _has_guess(gpu: GpuState) -> bool:
    return any(resident.guessed for resident in gpu.memory.residents.values())
