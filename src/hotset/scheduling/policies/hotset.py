"""The default policy: hits first, and a miss only where it pays (docs/policies.md derives and measures every term)."""

from __future__ import annotations

from itertools import islice

import msgspec

from hotset.scheduling.cluster import Cluster, GpuState
from hotset.scheduling.policies.interface import Placement, PolicySettings, Rule
from hotset.scheduling.queue import Entry

MOST_GPUS = 16
"""Idle GPUs compared for one load."""
MOST_LINES = 64
"""Models waited for that are compared for one load; lines are in order of their beginning, about oldest first."""
MOST_DEFERRED = 4
"""Models whose load may be put off in one decision before the rest waits for the next event."""
HEAD_START_S = 2.0
"""Added to a line's age: a young line of many requests is worth a load before an old line of one."""
GPU_TIME_PRICE = 0.4
"""Waiting that a second of an idle GPU's time, spent on a load that could be done without, causes elsewhere."""
CROWDING = 4.0
"""How much less a load is put off for each request, per GPU, that waits for a model that is nowhere."""


class _Load(msgspec.Struct, frozen=True, gc=False):
    """Where a model could be loaded now, and what its victims' callers would pay."""

    gpu: GpuState
    price_s: float


class Hotset:
    """Late binding: a request is bound to a GPU only when that GPU starts on it.

    In this order: the oldest request whose model is on an idle GPU; a load for a model that no GPU holds; a further
    copy of one whose holders cannot drain its line. The oldest request goes first regardless once it was passed over
    ``max_skips`` times or has waited ``max_wait_s``.
    """

    name = "hotset"

    def __init__(self, settings: PolicySettings) -> None:
        self.most_skips = settings.max_skips
        self.longest_wait_s = settings.max_wait_s

    def next_placement(self, cluster: Cluster, now_s: float) -> Placement | None:
        queue = cluster.queue
        head = queue.head()
        if head is None or not cluster.idle:
            return None
        if queue.skips_of_head >= self.most_skips or now_s - head.request.arrival_s >= self.longest_wait_s:
            return self._in_order(cluster, now_s)
        return self._hit(cluster, head, now_s) or self._miss(cluster, head, now_s) or self._copy(cluster, head, now_s)

    def _in_order(self, cluster: Cluster, now_s: float) -> Placement | None:
        """The oldest request that fits on an idle GPU: where its model is, else where room is cheapest."""
        for entry in cluster.queue.in_order():
            gpu = cluster.idle_holder(entry.model)
            if gpu is None:
                load = self._cheapest_load(cluster, entry.model, now_s)
                gpu = load.gpu if load is not None else None
            if gpu is not None:
                return Placement(entry, gpu, Rule.OLDEST_FIRST)
        return None

    def _hit(self, cluster: Cluster, head: Entry, now_s: float) -> Placement | None:
        """The oldest request that needs no load, on the holder that the others' models can best spare."""
        best: Entry | None = None
        lines = cluster.queue.models
        if len(lines) < len(cluster.idle):
            for model, line in lines.items():
                if (best is None or line[0].seq < best.seq) and cluster.idle_holder(model) is not None:
                    best = line[0]
        else:
            for gpu in cluster.idle:
                entry = cluster.first_waiting_hit(gpu)
                if entry is not None and (best is None or entry.seq < best.seq):
                    best = entry
        if best is None:
            return None
        rule = Rule.HIT_ELSEWHERE if best is head else Rule.OUT_OF_ORDER_HIT
        return Placement(best, _most_spare_holder(cluster, best.model, now_s), rule, skips=best is not head)

    def _miss(self, cluster: Cluster, head: Entry, now_s: float) -> Placement | None:
        """Load a model that no GPU holds: the one with the most waiting to end per second of GPU time."""
        nowhere: list[tuple[float, str]] = []
        copies, gpu = cluster.cache.copies, next(iter(cluster.idle))
        waiting = 0
        for model, line in islice(cluster.queue.models.items(), MOST_LINES):
            if not copies(model):
                count = len(line)
                waiting += count
                age_s = now_s - line[0].request.arrival_s + HEAD_START_S
                gpu_s = cluster.load_s(model, gpu) + count * cluster.inference_s(model, gpu)
                nowhere.append((-count * age_s / gpu_s, model))
        nowhere.sort()
        crowding = 1.0 + CROWDING * waiting / len(cluster.gpus)
        for _, model in nowhere[:MOST_DEFERRED]:
            load = self._cheapest_load(cluster, model, now_s)
            if load is not None and not self._worth_putting_off(cluster, model, load, crowding, now_s):
                entry = cluster.queue.models[model][0]
                return Placement(entry, load.gpu, Rule.CHEAPEST_ROOM, skips=entry is not head)
        return None

    def _worth_putting_off(self, cluster: Cluster, model: str, load: _Load, crowding: float, now_s: float) -> bool:
        """Whether a GPU that is busy now will soon make room for so much less that waiting for it is cheaper."""
        if not load.price_s:
            return False
        need_bytes = cluster.models[model].memory_bytes
        for gpu in islice(cluster.gpus.values(), MOST_GPUS):
            if gpu.work is None or gpu.memory.capacity_bytes < need_bytes:
                continue
            wait_s = max(gpu.busy_until_s - now_s, 0.0) * crowding
            if wait_s < load.price_s:
                price_s = _room_price_s(cluster, gpu, need_bytes, now_s)
                if price_s is not None and wait_s + price_s < load.price_s:
                    return True
        return False

    def _copy(self, cluster: Cluster, head: Entry, now_s: float) -> Placement | None:
        """Load one more copy of a model, for the first of its line whom no holder can start before the load is done."""
        best: Placement | None = None
        best_gain = 0.0
        prices, first = cluster.prices, next(iter(cluster.idle))
        for model, line in islice(cluster.queue.models.items(), MOST_LINES):
            holder = cluster.earliest_holder(model)
            if holder is None:
                continue
            load_s, inference_s = cluster.load_s(model, first), cluster.inference_s(model, first)
            wait_s = max(holder.busy_until_s - now_s, 0.0)
            # Its holders start its line one by one, this far apart; a further copy helps those that start after it.
            apart_s = inference_s / cluster.cache.copies(model)
            late_s = wait_s + (len(line) - 1) * apart_s - load_s
            gain_s = -GPU_TIME_PRICE * load_s
            helped = 0
            if late_s > 0:
                helped = min(int(late_s / apart_s) + 1, len(line)) if apart_s else len(line)
                gain_s += (helped * late_s - helped * (helped - 1) / 2 * apart_s) / (cluster.cache.copies(model) + 1)
            if gain_s + prices.another_copy_s(first, model, now_s) <= best_gain * load_s:
                continue
            load = self._cheapest_load(cluster, model, now_s)
            if load is None:
                continue
            gain_s += prices.another_copy_s(load.gpu, model, now_s) - load.price_s
            if gain_s > best_gain * load_s:
                best_gain = gain_s / load_s
                entry = line[len(line) - max(helped, 1)]
                best = Placement(entry, load.gpu, Rule.EXTRA_COPY, skips=entry is not head, waited_s=wait_s)
        return best

    def _cheapest_load(self, cluster: Cluster, model: str, now_s: float) -> _Load | None:
        """The idle GPU on which room for the model costs least; the one idle longest of equals."""
        need_bytes = cluster.models[model].memory_bytes
        best: _Load | None = None
        for gpu in islice(cluster.idle, MOST_GPUS):
            if gpu.memory.capacity_bytes >= need_bytes:
                price_s = _room_price_s(cluster, gpu, need_bytes, now_s)
                if price_s is not None and (best is None or price_s < best.price_s):
                    best = _Load(gpu, price_s)
                    if not price_s:
                        break
        return best


def _room_price_s(cluster: Cluster, gpu: GpuState, need_bytes: int, now_s: float) -> float | None:
    """What the callers of the evicted models would pay for room on that GPU; None: it cannot be made."""
    victims = cluster.cache.choose_victims(gpu.memory, need_bytes, now_s)
    if victims is None:
        return None
    return sum(cluster.prices.price_s(gpu, victim.model, now_s) for victim in victims)


def _most_spare_holder(cluster: Cluster, model: str, now_s: float) -> GpuState:
    """Of the idle holders the one whose models are asked for least, so that the others stay free for theirs."""
    best = cluster.idle_holder(model)
    assert best is not None
    least = cluster.prices.utilisation(best, now_s)
    for gpu_id in islice(cluster.cache.holders(model), MOST_GPUS):
        gpu = cluster.gpus[gpu_id]
        if gpu.work is None and cluster.prices.utilisation(gpu, now_s) < least:
            best, least = gpu, cluster.prices.utilisation(gpu, now_s)
    return best
