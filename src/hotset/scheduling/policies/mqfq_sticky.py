"""MQFQ-Sticky: a fair queue per function, with a preference for what is already in memory.

"MQFQ-Sticky: Fair Queueing For Serverless GPU Functions", arXiv 2507.08954, after Hedayati et al., "Multi-Queue Fair
Queueing", USENIX ATC 2019; the authors' code is public (COS-IN/iluvatar-faas, ``gpu_mqfq.rs``). Taken from that code:
each function is a flow with a virtual start time; a dispatch moves it on by the function's mean service time; a flow
whose start is more than the allowed over-run ahead of the least of all is throttled; of the others, one that is
resident goes first, then the one with the least start; a flow that runs dry keeps its place for a grace period.

Where it differs: virtual times are given when a decision is made, not at arrival, which is the same as long as a line
is not empty. One request runs on a GPU at a time, so its tokens are the GPUs. Its memory hints to the driver, and
keeping models for the grace period, are left to the eviction policy. As there, service is run time; loads are not
charged. Not confirmed, as the paper's text was not at hand: which of that code's variants its figures are from, and
with which settings; the defaults here (10 s over-run, 2 s grace) are the code's. Linear in the models waited for.
"""

from __future__ import annotations

from hotset.scheduling.cluster import Cluster, GpuState
from hotset.scheduling.policies.interface import Placement, PolicySettings, Rule


class _Flow:
    __slots__ = ("last_s", "start_s")

    def __init__(self, start_s: float, now_s: float) -> None:
        self.start_s = start_s
        """Virtual: seconds of service that this flow has had, counted from where it joined the others."""
        self.last_s = now_s
        """When it last waited for something or was served."""


class MqfqSticky:
    """The least served function first, among those that need no load if there are any."""

    name = "mqfq_sticky"

    def __init__(self, settings: PolicySettings) -> None:
        self.overrun_s = settings.overrun_s
        self.grace_s = settings.grace_s
        self._flows: dict[str, _Flow] = {}
        self._virtual_s = 0.0

    def next_placement(self, cluster: Cluster, now_s: float) -> Placement | None:
        lines = cluster.queue.models
        if not cluster.idle or not lines:
            return None
        self._update(list(lines), now_s)
        best: tuple[bool, float, int] | None = None
        chosen, place = "", None
        for model, line in lines.items():
            flow = self._flows[model]
            if flow.start_s - self._virtual_s > self.overrun_s:
                continue
            gpu: GpuState | None = cluster.idle_holder(model)
            rank = (gpu is None, flow.start_s, line[0].seq)
            if best is None or rank < best:
                gpu = gpu or cluster.first_idle(model)
                if gpu is not None:
                    best, chosen, place = rank, model, gpu
        if best is None or place is None:
            return None
        entry = lines[chosen][0]
        self._flows[chosen].start_s += cluster.inference_s(chosen, place)
        missing, _, _ = best
        rule = Rule.FAIR_MISS if missing else Rule.FAIR_HIT
        return Placement(entry, place, rule, skips=entry is not cluster.queue.head())

    def _update(self, waiting: list[str], now_s: float) -> None:
        flows = self._flows
        for model in waiting:
            flow = flows.get(model)
            if flow is None:
                flows[model] = _Flow(self._virtual_s, now_s)
            else:
                flow.start_s = max(flow.start_s, self._virtual_s)
                flow.last_s = now_s
        self._virtual_s = max(self._virtual_s, min(flows[model].start_s for model in waiting))
        for model in [name for name, flow in flows.items() if now_s - flow.last_s > self.grace_s]:
            if flows[model].start_s <= self._virtual_s:
                del flows[model]
