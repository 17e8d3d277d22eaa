"""LB, the paper's baseline: requests in order, each to the GPU that has been idle longest. A hit is luck."""

from __future__ import annotations

from hotset.scheduling.cluster import Cluster
from hotset.scheduling.policies.interface import Placement, Rule


class Lb:
    """Plain load balancing. O(1), but for requests too large for every idle GPU, which are passed by."""

    name = "lb"
    most_skips = 0

    def next_placement(self, cluster: Cluster, now_s: float) -> Placement | None:
        if not cluster.idle:
            return None
        for entry in cluster.queue.in_order():
            # Where no further copy may be, or none fits, the copies there are serve on: a model may have grown since.
            gpu = cluster.first_idle(entry.model) or cluster.idle_holder(entry.model)
            if gpu is not None:
                return Placement(entry, gpu, Rule.NEXT_IDLE)
        return None
