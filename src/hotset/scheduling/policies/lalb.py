"""LALB, the paper's locality-aware load balancing."""

from __future__ import annotations

from collections.abc import Collection

from hotset.scheduling.cluster import Cluster
from hotset.scheduling.policies.interface import Placement, Rule
from hotset.scheduling.queue import Entry


def place_in_order(cluster: Cluster, entry: Entry, now_s: float, awaited: Collection[str] = ()) -> Placement | None:
    """Step 2 of LALB for one request; None when it fits on no idle GPU. One whose model may have no further copy waits
    for the holder that is done first.

    2a its model is on the GPU idle longest: run there; 2b it is nowhere: run there, a miss; 2c it is on another idle
    GPU: run on that one; 2d it is only on busy GPUs: wait for the one that is done first if that is shorter than a
    load, else load another copy. O(log copies).

    ``awaited``: models of older requests that fit on no idle GPU. They wait for a GPU that can hold them, which
    therefore takes no more into its local queue.
    """
    model = entry.model
    holder = cluster.idle_holder(model)
    here = cluster.first_idle(model)
    if holder is not None:
        if here is not None and model in here.memory.residents:
            return Placement(entry, here, Rule.HIT_HERE)
        return Placement(entry, holder, Rule.HIT_ELSEWHERE)
    busy = cluster.earliest_holder(model)
    if busy is None:
        return None if here is None else Placement(entry, here, Rule.NOWHERE)
    wait_s = max(busy.busy_until_s - now_s, 0.0) + busy.local_backlog_s
    if here is None:
        if cluster.is_spread(model) and not any(cluster.fits(busy, other) for other in awaited):
            return Placement(entry, busy, Rule.NO_MORE_COPIES, local=True, waited_s=wait_s)
        return None
    if wait_s < cluster.load_s(model, here):
        if not any(cluster.fits(busy, other) for other in awaited):
            return Placement(entry, busy, Rule.WAIT_FOR_HOLDER, local=True, waited_s=wait_s)
        return Placement(entry, here, Rule.HOLDER_AWAITED, waited_s=wait_s)
    return Placement(entry, here, Rule.LOAD_IS_SHORTER, waited_s=wait_s)


class Lalb:
    """Locality-aware load balancing: requests in order, each where its model is, unless that costs more than a load.

    Where GPUs differ in size, a request that fits on no idle GPU is passed by.
    """

    name = "lalb"
    most_skips = 0

    def next_placement(self, cluster: Cluster, now_s: float) -> Placement | None:
        if not cluster.idle:
            return None
        awaited: set[str] = set()
        for entry in cluster.queue.in_order():
            placement = place_in_order(cluster, entry, now_s, awaited)
            if placement is not None:
                return placement
            awaited.add(entry.model)
        return None
