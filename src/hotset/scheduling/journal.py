"""The journal: every decision with its alternatives and their estimated costs (``hotset explain``).

Alternatives are worked out only for decisions that cost something (misses and waits); a hit on an idle GPU has no
cheaper one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

from hotset.scheduling.cache import Resident
from hotset.scheduling.cluster import Cluster, GpuState
from hotset.scheduling.policies.interface import Rule
from hotset.scheduling.queue import Entry
from hotset.vocabulary import RejectReason, Request

MOST_ALTERNATIVES = 8


class Alternative(msgspec.Struct, frozen=True, gc=False):
    """Where else the request could have gone, as estimated at that moment."""

    gpu_id: str
    wait_s: float
    """Until the GPU is free."""
    load_s: float
    """0 where the model is resident."""
    inference_s: float

    @property
    def total_s(self) -> float:
        return self.wait_s + self.load_s + self.inference_s


class Decision(msgspec.Struct, frozen=True):
    """One placement of one request."""

    time_s: float
    gpu_id: str
    rule: Rule
    hit: bool
    wait_s: float
    load_s: float
    inference_s: float
    """Estimates for the chosen GPU."""
    evicted: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = ()


class Explanation(msgspec.Struct):
    """All that happened to one request."""

    request_id: int
    model: str
    arrival_s: float
    decisions: list[Decision]
    started_s: float | None = None
    """When its run began (after the load, on a miss)."""
    finished_s: float | None = None
    rejected: RejectReason | None = None
    note: str = ""


class _Decided(msgspec.Struct, frozen=True, gc=False):
    request: Request
    decision: Decision


class _Rejected(msgspec.Struct, frozen=True, gc=False):
    request: Request
    time_s: float
    reason: RejectReason
    note: str


class Started(msgspec.Struct, gc=False):
    """A run: what there is to say of its requests is worked out when somebody asks."""

    entries: list[Entry]
    gpu_id: str
    rule: Rule | None
    """Why the first of them is here, a hit on an idle GPU; None: its load was decided, and noted, before."""
    time_s: float
    inference_s: float
    """As estimated, of the whole run."""
    finished_s: float | None = None


class Journal:
    """The decisions on the newest requests, about ``capacity`` of them; 0 keeps nothing and costs nothing.

    Notes are plain records, one for a whole run and its requests; reading one request's story goes through them all.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._notes: deque[_Decided | Started | _Rejected] = deque()
        self._kept = 0

    def decided(self, request: Request, decision: Decision) -> None:
        """A decision that is more than a hit on an idle GPU."""
        self._keep(_Decided(request, decision), 1)

    def started(
        self, entries: list[Entry], gpu_id: str, rule: Rule | None, now_s: float, inference_s: float
    ) -> Started:
        """A run begins; the caller fills in when it ends."""
        note = Started(entries, gpu_id, rule, now_s, inference_s)
        self._keep(note, _weight(note))
        return note

    def rejected(self, request: Request, now_s: float, reason: RejectReason, message: str) -> None:
        self._keep(_Rejected(request, now_s, reason, message), 1)

    def _keep(self, note: _Decided | Started | _Rejected, weight: int) -> None:
        self._notes.append(note)
        self._kept += weight
        while self._kept > self.capacity:
            self._kept -= _weight(self._notes.popleft())

    def explain(self, request_id: int) -> Explanation | None:
        """What is known of a request; None if it was never decided on, or is too old."""
        found: Explanation | None = None
        for note in self._notes:
            if isinstance(note, Started):
                found = _story_of_run(note, request_id, found)
            elif note.request.request_id == request_id:
                if found is None:
                    found = _opened(note.request)
                if isinstance(note, _Decided):
                    found.decisions.append(note.decision)
                else:
                    found.finished_s, found.rejected, found.note = note.time_s, note.reason, note.note
        return found


def _weight(note: _Decided | Started | _Rejected) -> int:
    """Of how many requests this is the first note."""
    return len(note.entries) - (note.rule is None) if isinstance(note, Started) else 1


def _story_of_run(note: Started, request_id: int, found: Explanation | None) -> Explanation | None:
    for place, entry in enumerate(note.entries):
        if entry.request.request_id == request_id:
            rule = Rule.JOINED if place else note.rule
            if rule is not None:
                found = found or _opened(entry.request)
                found.decisions.append(Decision(note.time_s, note.gpu_id, rule, True, 0.0, 0.0, note.inference_s))
            if found is not None:
                found.started_s, found.finished_s = note.time_s, note.finished_s
    return found


def _opened(request: Request) -> Explanation:
    return Explanation(request.request_id, request.model, request.arrival_s, [])


def decision(
    cluster: Cluster, model: str, gpu: GpuState, rule: Rule, now_s: float, victims: Iterable[Resident] = ()
) -> Decision:
    """A placement as it looks before it is carried out."""
    chosen = estimate(cluster, model, gpu, now_s)
    hit = not chosen.load_s
    others = alternatives(cluster, model, gpu, now_s)
    evicted = tuple([victim.model for victim in victims])
    return Decision(now_s, gpu.gpu_id, rule, hit, chosen.wait_s, chosen.load_s, chosen.inference_s, evicted, others)


def estimate(cluster: Cluster, model: str, gpu: GpuState, now_s: float) -> Alternative:
    """What running the model next on that GPU would cost."""
    wait_s = 0.0 if gpu.work is None else max(gpu.busy_until_s - now_s, 0.0) + gpu.local_backlog_s
    load_s = 0.0 if model in gpu.memory.residents else cluster.load_s(model, gpu)
    return Alternative(gpu.gpu_id, wait_s, load_s, cluster.inference_s(model, gpu))


def alternatives(cluster: Cluster, model: str, chosen: GpuState, now_s: float) -> tuple[Alternative, ...]:
    """The holders of the model, then the GPUs idle longest, without the chosen one: ``MOST_ALTERNATIVES`` at most."""
    found: dict[str, Alternative] = {}
    for gpu_id in cluster.cache.holders(model):
        if len(found) == MOST_ALTERNATIVES:
            break
        if gpu_id != chosen.gpu_id:
            found[gpu_id] = estimate(cluster, model, cluster.gpus[gpu_id], now_s)
    for gpu in cluster.idle:
        if len(found) >= MOST_ALTERNATIVES:
            break
        if gpu is not chosen and gpu.gpu_id not in found:
            found[gpu.gpu_id] = estimate(cluster, model, gpu, now_s)
    return tuple(found.values())
