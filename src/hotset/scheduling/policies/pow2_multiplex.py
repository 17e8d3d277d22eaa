"""Model-aware power of two choices, as Ray Serve routes multiplexed requests.

From Ray Serve's model multiplexing: of the replicas that hold the model two are drawn at random and the one with the
shorter queue takes the request; where none holds it, two of all. A replica evicts by least recent use.

Where it differs: the draw is a hash of the request's number, as the core has no randomness of its own; queues are
compared by their estimated seconds, not by their number of requests; a replica holds as many models as fit, not a fixed
number. Ray Serve looks elsewhere when the holders do not answer in time (some milliseconds, growing); here a request
leaves its model's holders only when every one of them has more than ``PATIENCE_S`` of work before it. It is decided on
when some GPU is idle, as with every policy here, not at once. Linear in the model's copies, or in the GPUs.
"""

from __future__ import annotations

from hotset.scheduling.cluster import Cluster, GpuState
from hotset.scheduling.policies.interface import Placement, Rule

PATIENCE_S = 5.0
_HASH = 2654435761  # Knuth's multiplicative hash


class Pow2Multiplex:
    """Requests in order, each to the less loaded of two GPUs, if possible two that hold its model."""

    name = "pow2_multiplex"

    def next_placement(self, cluster: Cluster, now_s: float) -> Placement | None:
        entry = cluster.queue.head()
        if entry is None or not cluster.idle:
            return None
        holders = [cluster.gpus[gpu_id] for gpu_id in cluster.cache.holders(entry.model)]
        near = [gpu for gpu in holders if _work_s(gpu, now_s) <= PATIENCE_S]
        drawn_from = near or [gpu for gpu in cluster.gpus.values() if cluster.fits(gpu, entry.model)]
        if not drawn_from:
            return None  # as many GPUs as may hold the model do, or pins have all the room: it waits for one of them
        first = entry.seq * _HASH % 2**32
        two = (drawn_from[first % len(drawn_from)], drawn_from[first * _HASH % 2**32 % len(drawn_from)])
        gpu = min(two, key=lambda one: _work_s(one, now_s))
        rule = Rule.DRAWN_HOLDER if near else Rule.DRAWN
        return Placement(entry, gpu, rule, local=gpu.work is not None, waited_s=_work_s(gpu, now_s))


def _work_s(gpu: GpuState, now_s: float) -> float:
    return 0.0 if gpu.work is None else max(gpu.finish_s - now_s, 0.0)
