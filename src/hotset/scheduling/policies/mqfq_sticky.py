"""MQFQ-Sticky: a fair queue per function, with a preference for what is already in memory.

"MQFQ-Sticky: Fair Queueing For Serverless GPU Functions", arXiv 2507.08954, after Hedayati et al., "Multi-Queue Fair
Queueing", USENIX ATC 2019; the authors' code is public (COS-IN/iluvatar-faas, ``gpu_mqfq.rs``). Taken from that code:
each function is a flow with a virtual start time; a dispatch moves it on by the function's mean service time; a flow
whose start is more than the allowed over-run ahead of the least of all is throttled; of the others, one that is
resident goes first, then the one with the least start; a flow that runs dry keeps its start.

Where it differs: virtual times are given when a decision is made, not at arrival, which is the same as long as a line
is not empty. A flow that ran dry needs no grace period: its start is kept until the others have caught up with it, and
from then on it is as good as new. One request runs on a GPU at a time, so its tokens are the GPUs. Its memory hints to
the driver, and keeping models for the grace period, are left to the eviction policy. As there, service is run time;
loads are not charged. Of the paper only the abstract and the beginning were at hand: they confirm fair queueing joined
with management of GPU memory, and anticipation. Not confirmed: which of the code's variants its figures are from, and
with which settings. The default here (10 s over-run) is the code's; its scripts for experiments set 5 s.

The least start is found by a heap, and hits by what idle GPUs hold, so a decision looks at few of the flows.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush, heapreplace

import msgspec

from hotset.scheduling.cluster import Cluster
from hotset.scheduling.policies.interface import Placement, PolicySettings, Rule
from hotset.scheduling.queue import Entry, GlobalQueue

FORGOTTEN_AT = 64
"""Flows that may be remembered before those are forgotten that are as good as new."""


class _Flow:
    __slots__ = ("line", "ranked", "start_s")

    def __init__(self, start_s: float) -> None:
        self.start_s = start_s
        """Virtual: seconds of service that this flow has had, counted from where it joined the others."""
        self.line: deque[Entry] | None = None
        """Who waited for it when it was looked at last."""
        self.ranked = False
        """It has a place in the ranking."""


class _Place(msgspec.Struct, frozen=True, order=True, gc=False):
    """Of a flow in the ranking: its own, or an earlier one if it was served, or its line's head left, meanwhile."""

    start_s: float
    seq: int
    """Of the first of its line."""
    model: str


class MqfqSticky:
    """The least served function first, among those that need no load if there are any."""

    name = "mqfq_sticky"

    def __init__(self, settings: PolicySettings) -> None:
        self.overrun_s = settings.overrun_s
        self._flows: dict[str, _Flow] = {}
        self._virtual_s = 0.0
        self._queue: GlobalQueue | None = None
        """The queue that is ranked."""
        self._returns = 0
        """Of requests to it, that the ranking knows of."""
        self._ranking: list[_Place] = []
        """A heap of the flows that somebody waits for."""
        self._forget_at = FORGOTTEN_AT

    def next_placement(self, cluster: Cluster, now_s: float) -> Placement | None:
        queue = cluster.queue
        if not cluster.idle or not queue.models:
            return None
        self._rank(queue)
        self._virtual_s = max(self._virtual_s, self._least(queue).start_s)
        placement = self._hit(cluster) or self._miss(cluster)
        if placement is not None:
            model = placement.entry.model
            self._flows[model].start_s += cluster.inference_s(model, placement.gpu)
        return placement

    def _rank(self, queue: GlobalQueue) -> None:
        """Take in the lines that have begun since the last decision: they stand last."""
        if queue is not self._queue or queue.returns != self._returns:
            self._queue, self._returns = queue, queue.returns
            self._ranking = []
            for known in self._flows.values():
                known.line, known.ranked = None, False
        for model, line in reversed(queue.models.items()):
            flow = self._flows.get(model)
            if flow is None:
                flow = self._flows[model] = _Flow(self._virtual_s)
            elif flow.line is line:
                break
            flow.line = line
            flow.start_s = max(flow.start_s, self._virtual_s)
            if not flow.ranked:
                flow.ranked = True
                heappush(self._ranking, _Place(flow.start_s, line[0].seq, model))
        if len(self._flows) > self._forget_at:
            self._forget(queue)

    def _forget(self, queue: GlobalQueue) -> None:
        for model, flow in list(self._flows.items()):
            if not flow.ranked and flow.start_s <= self._virtual_s and model not in queue.models:
                del self._flows[model]
        self._forget_at = 2 * len(self._flows) + FORGOTTEN_AT

    def _least(self, queue: GlobalQueue) -> _Place:
        """The first of the ranking, once those before it that have moved on are where they belong."""
        ranking = self._ranking
        while True:
            first = ranking[0]
            flow, line = self._flows[first.model], queue.models.get(first.model)
            if line is None:
                heappop(ranking)
                flow.ranked = False
            elif first.start_s == flow.start_s and first.seq == line[0].seq:
                return first
            else:
                heapreplace(ranking, _Place(flow.start_s, line[0].seq, first.model))

    def _hit(self, cluster: Cluster) -> Placement | None:
        """Of the flows whose model is on an idle GPU, the one with the least start."""
        lines = cluster.queue.models
        best: _Place | None = None
        for model in lines if len(lines) < len(cluster.idle) else cluster.idle_residents():
            line = lines.get(model)
            if line is not None and not self._is_throttled(model):
                place = _Place(self._flows[model].start_s, line[0].seq, model)
                if (best is None or place < best) and cluster.idle_holder(model) is not None:
                    best = place
        gpu = cluster.idle_holder(best.model) if best is not None else None
        if best is None or gpu is None:
            return None
        entry = lines[best.model][0]
        return Placement(entry, gpu, Rule.FAIR_HIT, skips=entry is not cluster.queue.head())

    def _miss(self, cluster: Cluster) -> Placement | None:
        """The flow with the least start for whose model an idle GPU has room."""
        queue, ranking = cluster.queue, self._ranking
        roomless: list[_Place] = []
        placement: Placement | None = None
        while placement is None and len(roomless) < len(queue.models):
            model = self._least(queue).model
            if self._is_throttled(model):
                break
            gpu = cluster.first_idle(model)
            if gpu is None:
                roomless.append(heappop(ranking))
            else:
                entry = queue.models[model][0]
                placement = Placement(entry, gpu, Rule.FAIR_MISS, skips=entry is not queue.head())
        for place in roomless:
            heappush(ranking, place)
        return placement

    def _is_throttled(self, model: str) -> bool:
        return self._flows[model].start_s - self._virtual_s > self.overrun_s
