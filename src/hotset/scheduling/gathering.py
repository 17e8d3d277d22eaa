"""Gathering: requests of a batching model are held back for a moment, so that they run together (``max_batch_wait_s``).

Held back are requests whose model is in some GPU's memory and that nobody waits for yet: a request that must wait for a
load, or stands behind others of its line, is joined there without being held. No policy sees a held request. It enters
the global queue, as if it had just arrived, once its batch is full, its oldest request has been held for as long as the
model says, or the deadline of one leaves no more time; so every bound on waiting holds from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from hotset.scheduling.queue import Entry, Place

if TYPE_CHECKING:
    from hotset.scheduling.cluster import Cluster


class _Batch:
    """Requests of one model that are held back. ``release_s`` only ever gets earlier."""

    __slots__ = ("entries", "release_s")

    def __init__(self, release_s: float) -> None:
        self.entries: list[Entry] = []
        self.release_s = release_s


class Gathering:
    """The batches that are being filled, one a model. Each step is O(log batches)."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._batches: dict[str, _Batch] = {}
        self._agenda: list[tuple[float, int, str, _Batch]] = []
        """A heap of releases; those of batches that are gone, or go earlier, are passed over."""
        self._counter = 0
        self.next_s = math.inf
        """When the next batch is to be released (read only); infinite: none is held."""

    def hold(self, entry: Entry, now_s: float) -> bool:
        """Hold an arriving request back, if there is anything to be gained by it and time for it."""
        cluster, name = self._cluster, entry.model
        model = cluster.models[name]
        batch = self._batches.get(name)
        if batch is None:
            if cluster.queues.waiting_for(name) or not cluster.cache.copies(name):
                return False
            batch = self._batches[name] = _Batch(math.inf)
        batch.entries.append(entry)
        entry.place = Place.GATHERING
        full = len(batch.entries) >= model.max_batch
        release_s = now_s if full else now_s + min(model.max_batch_wait_s, self._slack_s(entry, now_s))
        if release_s < batch.release_s:
            self._release_at(release_s, name, batch)
        return True

    def _release_at(self, release_s: float, name: str, batch: _Batch) -> None:
        batch.release_s = release_s
        self._counter += 1
        heappush(self._agenda, (release_s, self._counter, name, batch))
        self.next_s = min(self.next_s, release_s)

    def let_go(self, name: str, now_s: float) -> None:
        """The model's options changed: whom the old ones held back is held no more."""
        batch = self._batches.get(name)
        if batch is not None:
            self._release_at(now_s, name, batch)

    def _slack_s(self, entry: Entry, now_s: float) -> float:
        """How long the request can wait and a full batch still be done by its deadline."""
        deadline_s = entry.request.deadline_s
        if deadline_s is None:
            return math.inf
        cluster, name = self._cluster, entry.model
        holder = next(iter(cluster.cache.holders(name)), None)
        if holder is None:
            return 0.0  # it has left meanwhile
        run_s = cluster.inference_s(name, cluster.gpus[holder], cluster.models[name].max_batch)
        return max(deadline_s - run_s - now_s, 0.0)

    def release(self, now_s: float, push: Callable[[Entry], None]) -> None:
        """Hand over the requests of every batch that is due."""
        agenda = self._agenda
        while agenda and (agenda[0][0] <= now_s or self._is_stale(agenda[0])):
            due_s, _, name, batch = heappop(agenda)
            if due_s <= now_s and self._batches.get(name) is batch:
                del self._batches[name]
                for entry in batch.entries:
                    push(entry)
        self.next_s = agenda[0][0] if agenda else math.inf

    def _is_stale(self, item: tuple[float, int, str, _Batch]) -> bool:
        due_s, _, name, batch = item
        return self._batches.get(name) is not batch or batch.release_s < due_s

    def take(self, model: str) -> Entry | None:
        """The oldest held request of a model, for a run that starts anyway and has room for it."""
        batch = self._batches.get(model)
        if batch is None:
            return None
        entry = batch.entries[0]
        self.remove(entry)
        return entry

    def remove(self, entry: Entry) -> None:
        """The request is held no more."""
        batch = self._batches[entry.model]
        batch.entries.remove(entry)
        if not batch.entries:
            del self._batches[entry.model]
