"""Admission: whether a request may wait at all, and what its caller is told if not."""

from __future__ import annotations

import msgspec

from hotset.scheduling.cluster import Cluster
from hotset.scheduling.quarantine import Quarantine
from hotset.vocabulary import RejectReason, Request

SHORTEST_RETRY_S = 1.0
LONGEST_RETRY_S = 60.0


class Refusal(msgspec.Struct, frozen=True, gc=False):
    """Why a request ends without a result."""

    reason: RejectReason
    message: str
    """One sentence for the caller."""
    retry_after_s: float | None = None


class Admission:
    """Judges requests by what their model needs, how it fared, and how many wait already."""

    def __init__(
        self, cluster: Cluster, quarantine: Quarantine, *, max_queue: int | None, max_queue_per_model: int | None
    ) -> None:
        self._cluster = cluster
        self._quarantine = quarantine
        self._max_queue = max_queue
        self._max_queue_per_model = max_queue_per_model

    def refusal(self, request: Request, now_s: float) -> Refusal | None:
        """Why an arriving request must not wait; None: it may."""
        cluster, name = self._cluster, request.model
        if not cluster.is_deployed(name):
            return Refusal(RejectReason.UNKNOWN_MODEL, f"no model {name!r} is deployed")
        if request.deadline_s is not None and request.deadline_s <= now_s:
            return self.late(request, now_s)
        if cluster.too_large(name):
            return self.too_large(name)
        if self._quarantine.remaining_s(name, now_s):
            return self.quarantined(name, now_s)
        waiting = cluster.queue.waiting
        if (self._max_queue is not None and waiting >= self._max_queue) or (
            self._max_queue_per_model is not None and cluster.queue.waiting_for(name) >= self._max_queue_per_model
        ):
            drain_s = waiting * cluster.profiles.typical_inference_s() / max(len(cluster.gpus), 1)
            return Refusal(
                RejectReason.QUEUE_FULL,
                f"{waiting} requests are waiting already: try again later",
                min(max(drain_s, SHORTEST_RETRY_S), LONGEST_RETRY_S),
            )
        return None

    def late(self, request: Request, now_s: float) -> Refusal:
        """Its deadline passed before its run began."""
        waited_s = now_s - request.arrival_s
        return Refusal(RejectReason.DEADLINE, f"no GPU could start it within its {waited_s:.3g} s deadline")

    def too_large(self, name: str) -> Refusal:
        """No GPU of the cluster can hold its model."""
        need_bytes, largest_bytes = self._cluster.models[name].memory_bytes, self._cluster.largest_bytes
        if any(gpu.memory.pinned for gpu in self._cluster.gpus.values()):
            most = f"no GPU has more than {largest_bytes} beside the models that are kept hot: let go of one"
        else:
            most = f"the largest GPU has {largest_bytes}: use a larger GPU or a smaller model"
        return Refusal(RejectReason.TOO_LARGE, f"{name} needs {need_bytes} bytes of GPU memory and {most}")

    def quarantined(self, name: str, now_s: float) -> Refusal:
        """Its model keeps failing."""
        pause_s = self._quarantine.remaining_s(name, now_s)
        reason = self._quarantine.reason(name)
        return Refusal(
            RejectReason.QUARANTINED,
            f"{name} keeps failing ({reason}) and is left alone for {pause_s:.3g} s more",
            pause_s,
        )
