"""Requests from arrival to end: who is open, whose deadline passes, who is tried once more, who is told why not."""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush

import msgspec

from hotset.scheduling.actions import Outbox, Reject
from hotset.scheduling.admission import Admission, Refusal
from hotset.scheduling.cluster import Cluster
from hotset.scheduling.journal import Journal
from hotset.scheduling.quarantine import Quarantine
from hotset.scheduling.queue import Entry, Place
from hotset.vocabulary import FailureKind, RejectReason


class Loss(msgspec.Struct, frozen=True, gc=False):
    """How a process was lost, as far as its requests care."""

    kind: FailureKind
    reason: str
    avoid_gpu: str
    """Retries go elsewhere if they can."""
    blame: bool
    """It counts against the model."""


class OpenRequests:
    """Every request that has not ended, wherever it is. The Scheduler owns it and hands over what ends well."""

    def __init__(
        self,
        cluster: Cluster,
        admission: Admission,
        quarantine: Quarantine,
        journal: Journal,
        outbox: Outbox,
        *,
        max_attempts: int,
    ) -> None:
        self._cluster = cluster
        self._admission = admission
        self._quarantine = quarantine
        self._max_attempts = max_attempts
        self._journal = journal
        self._outbox = outbox
        self.entries: dict[int, Entry] = {}
        self.deadlines: list[tuple[float, int, Entry]] = []
        """A heap: deadline, order of arrival, request."""
        self.retries: deque[Entry] = deque()
        """Those whose process died, waiting for another GPU."""

    def add(self, entry: Entry) -> None:
        request = entry.request
        self.entries[request.request_id] = entry
        if request.deadline_s is not None:
            heappush(self.deadlines, (request.deadline_s, entry.seq, entry))

    def next_deadline_s(self) -> float | None:
        """Of those that are open."""
        deadlines = self.deadlines
        while deadlines and deadlines[0][2].request.request_id not in self.entries:
            heappop(deadlines)
        return deadlines[0][0] if deadlines else None

    def expire(self, now_s: float) -> None:
        """End the requests that nothing may start any more."""
        deadlines = self.deadlines
        while deadlines and deadlines[0][0] <= now_s:
            entry = heappop(deadlines)[2]
            if entry.request.request_id in self.entries and not self._is_running(entry):
                self.withdraw(entry)
                self.reject(entry, self._admission.late(entry.request, now_s), now_s)

    def _is_running(self, entry: Entry) -> bool:
        if entry.place is not Place.ASSIGNED:
            return False
        work = self._cluster.gpus[entry.gpu_id].work
        return work is not None and not work.loading

    def withdraw(self, entry: Entry) -> None:
        """Take a request out of wherever it waits; on a GPU it is only marked, and its result goes unread."""
        cluster = self._cluster
        if entry.place is Place.QUEUED:
            cluster.queue.take(entry, Place.ASSIGNED, skips=False)
        elif entry.place is Place.GATHERING:
            cluster.gathering.remove(entry)
        elif entry.place is Place.RETRY:
            self.retries.remove(entry)
        elif entry.place is Place.LOCAL:
            cluster.remove_local(cluster.gpus[entry.gpu_id], entry)
        entry.cancelled = True

    def waiting(self, name: str | None = None) -> list[Entry]:
        """Requests that are on no GPU, of one model or of all. Linear in the open requests, for rare events only."""
        return [
            entry
            for entry in self.entries.values()
            if entry.place is not Place.ASSIGNED and (name is None or entry.model == name)
        ]

    def retry(self, entry: Entry, avoid_gpu: str, now_s: float) -> None:
        """Once more, on another GPU than that one if there is one; not if it is too late to start."""
        if entry.request.deadline_s is not None and entry.request.deadline_s <= now_s:
            self.reject(entry, self._admission.late(entry.request, now_s), now_s)
            return
        entry.avoid_gpu = avoid_gpu
        entry.place = Place.RETRY
        self.retries.append(entry)

    def lost(self, name: str, entries: list[Entry], loss: Loss, now_s: float) -> None:
        """Requests of a model whose process is gone: each is tried once more, or ends with an error; and the model is
        left alone if this has happened too often."""
        quarantined = loss.blame and self._quarantine.failed(name, now_s, loss.reason)
        if quarantined:
            self.reject_quarantined(name, now_s)
        cluster = self._cluster
        again = cluster.models[name].retry and loss.kind is not FailureKind.ERROR
        again = again and not quarantined and name not in cluster.removed
        too_large = cluster.too_large(name)
        for entry in entries:
            if entry.request.request_id not in self.entries:
                continue  # answered, or nobody waits for it
            entry.attempts += 1
            entry.loaded_on = ""
            if too_large:
                self.reject(entry, self._admission.too_large(name), now_s)
            elif again and entry.attempts < self._max_attempts:
                self.retry(entry, loss.avoid_gpu, now_s)
            else:
                self.reject(entry, Refusal(RejectReason.FAILED, loss.reason), now_s)

    # Ends

    def reject(self, entry: Entry, refusal: Refusal, now_s: float) -> None:
        request, reason, message = entry.request, refusal.reason, refusal.message
        self.entries.pop(request.request_id, None)
        if self._journal.capacity:
            self._journal.rejected(request, now_s, reason, message)
        self._outbox.actions.append(Reject(request.request_id, reason, message, refusal.retry_after_s))

    def reject_too_large(self, now_s: float) -> None:
        """Those waiting that no GPU can hold (any more): a size was learned, the largest GPU was lost."""
        for entry in self.waiting():
            if self._cluster.too_large(entry.model):
                self.withdraw(entry)
                self.reject(entry, self._admission.too_large(entry.model), now_s)

    def reject_quarantined(self, name: str, now_s: float) -> None:
        for entry in self.waiting(name):
            self.withdraw(entry)
            self.reject(entry, self._admission.quarantined(name, now_s), now_s)

    def reject_removed(self, name: str, now_s: float) -> None:
        for entry in self.waiting(name):
            self.withdraw(entry)
            message = f"{name} was removed while the request waited"
            self.reject(entry, Refusal(RejectReason.REMOVED, message), now_s)
