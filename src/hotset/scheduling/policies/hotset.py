"""The default policy: hits first, and a miss only where it pays (docs/policies.md derives and measures every term)."""

from __future__ import annotations

import math
from itertools import islice

import msgspec

from hotset.scheduling.cluster import Cluster, GpuState
from hotset.scheduling.policies.interface import Placement, PolicySettings, Rule
from hotset.scheduling.queue import Entry

MOST_GPUS = 16
"""GPUs compared for one load."""
MOST_LINES = 64
"""Models waited for that are compared for one load; lines are in order of their beginning, about oldest first."""
MOST_COPIED = 12
"""Models waited for that are considered for a further copy."""
MOST_DEFERRED = 4
"""Models whose load may be put off in one decision before the rest waits for the next event."""
MOST_HELPED = 16
"""Requests of one line for which the use of a further copy is worked out."""
HEAD_START_S = 2.0
"""Added to a line's age: a young line of many requests is worth a load before an old line of one."""
GPU_TIME_PRICE = 0.4
"""Waiting that a second of an idle GPU's time, spent on a load that could be done without, causes elsewhere."""
CROWDING = 8.0
"""How much dearer that time gets for each request, per GPU, that waits for a model that no GPU holds."""


class _Load(msgspec.Struct, frozen=True, gc=False):
    """Where a model could be loaded."""

    gpu: GpuState
    price_s: float
    """What its victims' callers would pay."""
    blocking_s: float
    """What the callers of the other residents would pay, as the GPU is not theirs meanwhile."""

    @property
    def total_s(self) -> float:
        return self.price_s + self.blocking_s


class _Nowhere(msgspec.Struct, frozen=True, gc=False, order=True):
    """A model that is waited for and that no GPU holds; the one that most deserves a load sorts first."""

    rank: float
    model: str


class _Copy(msgspec.Struct, frozen=True, gc=False, order=True):
    """A model that is worth a further copy, if room for it is cheap enough; the worthiest sorts first."""

    rank: float
    model: str
    gain_s: float
    helped: int
    wait_s: float


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
        hit = self._hit(cluster, head, now_s)
        if hit is not None:
            return hit
        nowhere, waiting = _lines_of_no_holder(cluster, now_s)
        miss = self._miss(cluster, head, nowhere, now_s)
        if miss is not None:
            return miss
        gpu_time_price = GPU_TIME_PRICE * (1.0 + CROWDING * waiting / len(cluster.gpus))
        return self._copy(cluster, head, gpu_time_price, now_s)

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

    def _miss(self, cluster: Cluster, head: Entry, nowhere: list[_Nowhere], now_s: float) -> Placement | None:
        """Load a model that no GPU holds, unless a better place for it is about to be free."""
        for candidate in nowhere[:MOST_DEFERRED]:
            load = self._cheapest_load(cluster, candidate.model, now_s)
            if load is not None and not self._worth_putting_off(cluster, candidate.model, load, now_s):
                entry = cluster.queue.models[candidate.model][0]
                return Placement(entry, load.gpu, Rule.CHEAPEST_ROOM, skips=entry is not head)
        return None

    def _worth_putting_off(self, cluster: Cluster, model: str, load: _Load, now_s: float) -> bool:
        """Whether a busy GPU will soon make room for so much less that waiting for it is cheaper.

        One that others already wait for does not count: it will be theirs.
        """
        if not load.price_s:
            return False
        need_bytes, lines = cluster.models[model].memory_bytes, cluster.queue.models
        for gpu in islice(cluster.gpus.values(), MOST_GPUS):
            if gpu.work is None or gpu.memory.capacity_bytes < need_bytes:
                continue
            wait_s = max(gpu.busy_until_s - now_s, 0.0)
            if wait_s < load.total_s and lines.keys().isdisjoint(gpu.memory.residents):
                other = _load_on(cluster, gpu, model, now_s)
                if other is not None and wait_s + other.total_s < load.total_s:
                    return True
        return False

    def _copy(self, cluster: Cluster, head: Entry, gpu_time_price: float, now_s: float) -> Placement | None:
        """Load one more copy of a model, for the first of its line whom no holder can start before the load is done."""
        candidates: list[_Copy] = []
        prices, gpu = cluster.prices, next(iter(cluster.idle))
        for model, line in islice(cluster.queue.models.items(), MOST_COPIED):
            holder = cluster.earliest_holder(model)
            if holder is not None:
                load_s = cluster.load_s(model, gpu)
                wait_s = _wait_for(cluster, holder, model, line[0], now_s)
                saved_s, helped = _saved(
                    len(line), wait_s, load_s, cluster.inference_s(model, gpu), cluster.cache.copies(model)
                )
                gain_s = saved_s + prices.another_copy_s(gpu, model, now_s) - gpu_time_price * load_s
                if gain_s > 0.0:
                    candidates.append(_Copy(-gain_s / load_s if load_s else -math.inf, model, gain_s, helped, wait_s))
        candidates.sort()
        for copy in candidates[:MOST_DEFERRED]:
            load = self._cheapest_load(cluster, copy.model, now_s)
            if load is not None and load.price_s < copy.gain_s:
                entry = cluster.queue.models[copy.model][-max(copy.helped, 1)]
                return Placement(entry, load.gpu, Rule.EXTRA_COPY, skips=entry is not head, waited_s=copy.wait_s)
        return None

    def _cheapest_load(self, cluster: Cluster, model: str, now_s: float) -> _Load | None:
        """The idle GPU on which room for the model costs least; the one idle longest of equals."""
        need_bytes = cluster.models[model].memory_bytes
        best: _Load | None = None
        for gpu in islice(cluster.idle, MOST_GPUS):
            if gpu.memory.capacity_bytes >= need_bytes:
                load = _load_on(cluster, gpu, model, now_s)
                if load is not None and (best is None or load.total_s < best.total_s):
                    best = load
        return best


def _load_on(cluster: Cluster, gpu: GpuState, model: str, now_s: float) -> _Load | None:
    """What a load on that GPU would cost others; None: there is no way to make room."""
    victims = cluster.cache.choose_victims(gpu.memory, cluster.models[model].memory_bytes, now_s)
    if victims is None:
        return None
    prices = cluster.prices
    price_s = prices.price_s(gpu, victims, now_s) if victims else 0.0
    # Whoever asks for the other residents meanwhile waits for half of the time, on average.
    busy_s = cluster.load_s(model, gpu) + cluster.inference_s(model, gpu)
    return _Load(gpu, price_s, prices.utilisation(gpu, now_s) * busy_s / 2)


def _lines_of_no_holder(cluster: Cluster, now_s: float) -> tuple[list[_Nowhere], int]:
    """Models waited for that no GPU holds, and how many requests wait for them.

    Best first: the one with the most waiting to end per second of GPU time.
    """
    nowhere: list[_Nowhere] = []
    copies, gpu = cluster.cache.copies, next(iter(cluster.idle))
    waiting = 0
    for model, line in islice(cluster.queue.models.items(), MOST_LINES):
        if not copies(model):
            count = len(line)
            waiting += count
            age_s = now_s - line[0].request.arrival_s + HEAD_START_S
            gpu_s = cluster.load_s(model, gpu) + count * cluster.inference_s(model, gpu)
            nowhere.append(_Nowhere(-count * age_s / gpu_s if gpu_s else -math.inf, model))
    nowhere.sort()
    return nowhere, waiting


def _wait_for(cluster: Cluster, holder: GpuState, model: str, entry: Entry, now_s: float) -> float:
    """Until a busy holder can start the request: what it does now, and older requests that it may be given first."""
    lines, copies = cluster.queue.models, cluster.cache.copies
    wait_s = max(holder.busy_until_s - now_s, 0.0)
    for other in holder.memory.residents:
        line = lines.get(other)
        if line is not None and other != model and line[0].seq < entry.seq:
            wait_s += cluster.inference_s(other, holder) / copies(other)
    return wait_s


def _saved(count: int, wait_s: float, load_s: float, inference_s: float, copies: int) -> tuple[float, int]:
    """What one more copy saves a line of ``count`` requests: seconds of waiting in all, and how many it helps.

    The holders start the line one by one, ``inference_s / copies`` apart, the first after ``wait_s``. From ``load_s``
    on the new copy takes its turns among them.
    """
    apart_s = inference_s / copies
    late_s = wait_s + (count - 1) * apart_s - load_s
    if late_s <= 0.0:
        return 0.0, 0
    helped = min(int(late_s / apart_s) + 1, count, MOST_HELPED) if apart_s else 1
    saved_s, unhelped_s = 0.0, load_s + late_s - (helped - 1) * apart_s
    new_s, old_s = load_s, unhelped_s
    for _ in range(helped):
        if new_s <= old_s:
            saved_s += unhelped_s - new_s
            new_s += inference_s
        else:
            saved_s += unhelped_s - old_s
            old_s += apart_s
        unhelped_s += apart_s
    return saved_s, helped


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
