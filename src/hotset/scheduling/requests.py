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
from hotset.vocabulary import FailureKind, RejectReason, Request

PLAY_S = 0.001
"""Estimates are taken to be no better than that when a request is given up."""


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
        """A heap: when a request that has a deadline is looked at next, its id, the request."""
        self.retries: deque[Entry] = deque()
        """Those whose process died, waiting for another GPU."""

    def add(self, entry: Entry) -> None:
        request = entry.request
        self.entries[request.request_id] = entry
        self._cluster.queues.arrived(entry)
        if request.deadline_s is not None:
            # Little is worked out before half of the time is over: most requests have ended by then.
            half_s = (request.arrival_s + request.deadline_s) / 2
            hopeless_s = request.deadline_s - self._cluster.profiles.least[entry.model].run_s + PLAY_S
            self._look_again(entry, max(min(half_s, hopeless_s), request.arrival_s))

    def _look_again(self, entry: Entry, at_s: float) -> None:
        heappush(self.deadlines, (at_s, entry.request.request_id, entry))

    def next_look_s(self) -> float | None:
        """When the next of those that are open is to be looked at for its deadline's sake."""
        deadlines = self.deadlines
        while deadlines and deadlines[0][1] not in self.entries:
            heappop(deadlines)
        return deadlines[0][0] if deadlines else None

    def look(self, now_s: float) -> None:
        """Look at the requests that are due for it: some are to go first from now on, some cannot be met any more."""
        deadlines = self.deadlines
        while deadlines and deadlines[0][0] <= now_s:
            entry = heappop(deadlines)[2]
            if entry.request.request_id in self.entries and not self._is_running(entry):
                self._look_at(entry, now_s)

    def _is_running(self, entry: Entry) -> bool:
        if entry.place is not Place.ASSIGNED:
            return False
        work = self._cluster.gpus[entry.gpu_id].work
        return work is not None and not work.loading

    def _look_at(self, entry: Entry, now_s: float) -> None:
        """The latest moment to begin is the deadline less the least time it takes; it presses for as long before that
        as work of that kind usually takes. Where more is asked for than can be answered in time nothing presses: to
        serve whoever is about to give up is to serve everybody late."""
        deadline_s = entry.request.deadline_s
        assert deadline_s is not None
        if deadline_s <= now_s:
            self.withdraw(entry)
            self.reject(entry, self._admission.late(entry.request, now_s), now_s)
        elif entry.place is Place.ASSIGNED:
            self._look_again(entry, deadline_s)
        else:
            need_s = self._need_s(entry)
            hopeless_s = deadline_s - need_s + PLAY_S
            pressing_s = hopeless_s - need_s - self._cluster.profiles.typical_inference_s()
            if hopeless_s <= now_s:
                self._cluster.overload_until_s = now_s + deadline_s - entry.request.arrival_s
                self.withdraw(entry)
                self.reject(entry, self._admission.hopeless(entry.request, need_s, now_s), now_s)
            elif pressing_s > now_s:
                self._look_again(entry, min(pressing_s, deadline_s))
            else:
                if not entry.pressed and now_s >= self._cluster.overload_until_s:
                    self._cluster.queues.press(entry)
                self._look_again(entry, min(hopeless_s, deadline_s))

    def _need_s(self, entry: Entry) -> float:
        """The least time it takes. A load does not count for the first of a line: it is for those behind it as well."""
        first = self._cluster.queues.first_of(entry.model)
        if first is None or first is entry:
            return self._cluster.profiles.least[entry.model].run_s
        return self._admission.least_s(entry.model)

    def withdraw(self, entry: Entry) -> None:
        """Take a request out of wherever it waits; on a GPU it is only marked, and its result goes unread."""
        cluster = self._cluster
        if entry.place is Place.QUEUED:
            cluster.queues.take(entry, Place.ASSIGNED)
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
        if entry.request.deadline_s is not None:
            self._look_again(entry, (now_s + entry.request.deadline_s) / 2)
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

    def end(self, request_id: int) -> Entry | None:
        """The request is over; None: it has ended already."""
        entry = self.entries.pop(request_id, None)
        if entry is not None:
            self._cluster.queues.ended(entry)
        return entry

    def make_place(self, request: Request, refusal: Refusal, now_s: float) -> bool:
        """Where a request is refused for a full queue: end another, whose caller has taken more than his part of it."""
        if refusal.reason is not RejectReason.QUEUE_FULL:
            return False
        queues, full = self._cluster.queues, self._admission.is_line_full(request.model)
        displaced = queues.displaced_in_line(request) if full else queues.displaced_by(request)
        if displaced is None:
            return False
        self.withdraw(displaced)
        self.reject(displaced, refusal, now_s)
        return True

    def reject(self, entry: Entry, refusal: Refusal, now_s: float) -> None:
        request, reason, message = entry.request, refusal.reason, refusal.message
        self.end(request.request_id)
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
