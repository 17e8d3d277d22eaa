"""Admission: whether a request may wait at all, and what its caller is told if not."""

from __future__ import annotations

import msgspec

from hotset.scheduling.cluster import Cluster
from hotset.scheduling.quarantine import Quarantine
from hotset.vocabulary import RejectReason, Request

SHORTEST_RETRY_S = 1.0
LONGEST_RETRY_S = 60.0
TRY_SHARE = 0.1
"""Share of a GPU's time for requests whose model's runs have always been too long for them: it may have changed."""


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
        deadline_s = request.deadline_s
        if deadline_s is not None and deadline_s <= now_s:
            return self.late(request, now_s)
        if cluster.too_large(name):
            return self.too_large(name)
        if self._quarantine.remaining_s(name, now_s):
            return self.quarantined(name, now_s)
        if deadline_s is not None:
            need_s = self.least_s(name)
            left_s = deadline_s - now_s
            if need_s > left_s and not (self._leads(name) and self._may_try(name, left_s, now_s)):
                return self.hopeless(request, need_s, now_s)
        waiting = cluster.queues.waiting
        if (self._max_queue is not None and waiting >= self._max_queue) or self.is_line_full(name):
            drain_s = waiting * cluster.profiles.typical_inference_s() / max(len(cluster.gpus), 1)
            return Refusal(
                RejectReason.QUEUE_FULL,
                f"{waiting} requests are waiting already: try again later",
                min(max(drain_s, SHORTEST_RETRY_S), LONGEST_RETRY_S),
            )
        return None

    def is_line_full(self, name: str) -> bool:
        """Whether as many requests wait for that model as may."""
        most = self._max_queue_per_model
        return most is not None and self._cluster.queues.waiting_for(name) >= most

    def late(self, request: Request, now_s: float) -> Refusal:
        """Its deadline passed before its run began."""
        waited_s = now_s - request.arrival_s
        return Refusal(RejectReason.DEADLINE, f"no GPU could start it within its {waited_s:.3g} s deadline")

    def least_s(self, name: str) -> float:
        """The least time that a request for the model takes from now on, by what was measured: a run, and a load where
        no GPU holds the model."""
        least = self._cluster.profiles.least[name]
        return least.run_s if self._cluster.cache.copies(name) else least.run_s + least.load_s

    def _leads(self, name: str) -> bool:
        """Whether a request would be the only one for its model that waits or runs. It is let in whatever is known:
        others will find the model loaded for it, and what was learned may be true no more."""
        cluster = self._cluster
        if cluster.queues.waiting_for(name):
            return False
        works = (cluster.gpus[gpu_id].work for gpu_id in cluster.cache.holders(name))
        return all(work is None or work.model != name for work in works)

    def _may_try(self, name: str, left_s: float, now_s: float) -> bool:
        """Whether it may be found out if a run still takes too long for a request; a load alone is no objection."""
        least = self._cluster.profiles.least[name]
        if least.run_s > left_s:
            if now_s < least.next_try_s:
                return False
            least.next_try_s = now_s + least.run_s / TRY_SHARE
        return True

    def hopeless(self, request: Request, need_s: float, now_s: float) -> Refusal:
        """It could not be answered in time even if it were next."""
        left_s = (request.deadline_s or now_s) - now_s
        message = f"{request.model} takes at least {need_s:.3g} s now and {left_s:.3g} s are left: give it more time"
        return Refusal(RejectReason.HOPELESS, message)

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
