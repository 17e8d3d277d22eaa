"""The journal: every decision with its alternatives and their estimated costs (``hotset explain``).

A bounded ring of the newest requests. Alternatives are worked out only for decisions that cost something (misses and
waits); a hit on an idle GPU has no cheaper one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import msgspec

from hotset.scheduling.cache import Resident
from hotset.scheduling.cluster import Cluster, GpuState
from hotset.scheduling.policies.interface import Rule
from hotset.vocabulary import RejectReason

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


class Journal:
    """The newest ``capacity`` requests; 0 keeps nothing and costs nothing."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._explanations: OrderedDict[int, Explanation] = OrderedDict()

    def explain(self, request_id: int) -> Explanation | None:
        """What is known of a request; None if it was never decided on, or is too old."""
        return self._explanations.get(request_id)

    def decided(self, request_id: int, model: str, arrival_s: float, decision: Decision) -> None:
        explanation = self._explanations.get(request_id)
        if explanation is None:
            explanation = self._open(request_id, model, arrival_s)
        explanation.decisions.append(decision)

    def started(self, request_id: int, now_s: float) -> None:
        explanation = self._explanations.get(request_id)
        if explanation is not None:
            explanation.started_s = now_s

    def finished(self, request_id: int, now_s: float) -> None:
        explanation = self._explanations.get(request_id)
        if explanation is not None:
            explanation.finished_s = now_s

    def rejected(
        self, request_id: int, model: str, arrival_s: float, now_s: float, reason: RejectReason, note: str
    ) -> None:
        explanation = self._explanations.get(request_id) or self._open(request_id, model, arrival_s)
        explanation.finished_s, explanation.rejected, explanation.note = now_s, reason, note

    def _open(self, request_id: int, model: str, arrival_s: float) -> Explanation:
        explanation = self._explanations[request_id] = Explanation(request_id, model, arrival_s, [])
        if len(self._explanations) > self.capacity:
            self._explanations.popitem(last=False)
        return explanation


def decision(
    cluster: Cluster, model: str, gpu: GpuState, rule: Rule, now_s: float, victims: Iterable[Resident] = ()
) -> Decision:
    """A placement as it looks before it is carried out."""
    chosen = estimate(cluster, model, gpu, now_s)
    hit = not chosen.load_s
    # A hit on an idle GPU has no cheaper alternative: do not pay for listing them on the hot path.
    others = () if hit and not chosen.wait_s else alternatives(cluster, model, gpu, now_s)
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
