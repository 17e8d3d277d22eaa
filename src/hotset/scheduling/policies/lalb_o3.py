"""LALB+O3: LALB with out-of-order dispatch (paper)."""

from __future__ import annotations

from hotset.scheduling.cluster import Cluster
from hotset.scheduling.policies.interface import Placement, PolicySettings, Rule
from hotset.scheduling.policies.lalb import Lalb


class LalbO3(Lalb):
    """Before the oldest request is placed, the idle GPU takes the first waiting request whose model it holds.

    Each such dispatch skips every older request, so the oldest one always has the most skips and only its count is
    looked at: once it reaches ``o3_limit``, it is placed by LALB's own rules before anyone is taken out of order again.
    A limit of 0 is LALB.
    """

    name = "lalb_o3"

    def __init__(self, settings: PolicySettings) -> None:
        self.most_skips = settings.o3_limit

    def next_placement(self, cluster: Cluster, now_s: float) -> Placement | None:
        gpu = cluster.first_idle()
        if gpu is None:
            return None
        queue = cluster.queue
        if queue.skips_of_head < self.most_skips:
            entry = cluster.first_waiting_hit(gpu)
            if entry is not None:
                out_of_order = entry is not queue.head()
                return Placement(
                    entry, gpu, Rule.OUT_OF_ORDER_HIT if out_of_order else Rule.HIT_HERE, skips=out_of_order
                )
        return super().next_placement(cluster, now_s)
