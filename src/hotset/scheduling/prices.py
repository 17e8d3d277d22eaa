"""What a copy of a model is worth, in seconds of its callers' waiting. Policy and eviction ``hotset`` trade in it.

Everything is learned: arrival rates, load and inference times, who holds what (docs/policies.md derives each term).
Prices change slowly and are asked for often, so they are worked out once per model and per GPU, and kept for
``FRESH_SHARE`` of the rates' history, or until the model's copies, or the GPU's residents, change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from hotset.scheduling.cache import CacheManager, GpuMemory, Resident
from hotset.scheduling.holders import MANY_COPIES
from hotset.scheduling.rates import ArrivalRates

if TYPE_CHECKING:
    from hotset.scheduling.cluster import Cluster, GpuState

HORIZON_RUNS = 4.2
"""How far ahead the use of a further copy is counted, in typical runs. Beyond it the queue will look different: decide
again then. In runs, so that models of ten milliseconds are treated as those of a second are."""
HORIZON_LOADS = 4.3
"""The same for a model's last copy, in typical loads: what is lost is a load."""
HORIZON_PARKED_S = 12.0
"""The same for one GPU more that a model can be back on by a restore: it stays parked there whatever comes next."""
LEAST_UTILISATION, MOST_UTILISATION = 0.3, 0.98
"""A GPU is never taken to be free, or busy, for certain."""
FRESH_SHARE = 0.05
"""How long a price is kept, as a share of the time that rates are learned from: they hardly change meanwhile."""
MOST_COMPARED = 8
"""Residents of which the cheapest set is searched exactly: at most 2 ** 8 sets, a few in practice."""


class Outlook(msgspec.Struct, gc=False):
    """What is expected of one model."""

    model: str
    kind: str
    """Of the GPUs that the times are for."""
    per_s: float
    """Requests expected per second."""
    load_s: float
    run_s: float
    back_s: float
    """What leaving a GPU and coming back would take: less than a load where it would be parked meanwhile."""
    wanted: float
    """How likely somebody asks for it within the horizon, 0 to 1."""
    batches: bool
    """One run may serve several of its requests."""
    fresh_until_s: float
    copies: int = 0
    share: float = 0.0
    """Of a holder's time, were its requests spread evenly over its copies."""
    another_copy_s: float | None = None
    """Waiting that one more copy would save; None: not asked yet."""


class PricedResident(msgspec.Struct, frozen=True, gc=False):
    """A copy and what losing it would cost."""

    price_s: float
    resident: Resident
    copies: int
    """How many there were when it was priced; with another number the price is void."""


class _Room(msgspec.Struct, frozen=True, gc=False):
    """The cheapest way to make room."""

    victims: list[Resident]
    price_s: float


class _GpuPrices(msgspec.Struct, gc=False):
    """Prices of one GPU's residents, as long as they are the same and were priced lately."""

    memory: GpuMemory
    version: int
    utilisation: float
    fresh_until_s: float
    ranked: list[PricedResident] | None = None
    """Cheapest to lose first."""
    rooms: dict[int, _Room] = {}
    """By the bytes that were missing, for a GPU that nobody else waits for."""


class Prices:
    """Prices of every copy in the cluster; one object, owned by ``Cluster``."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._cache: CacheManager = cluster.cache
        self._rates: ArrivalRates = cluster.rates
        self._gpus: dict[str, _GpuPrices] = {}
        self._outlooks: dict[str, Outlook] = {}

    def left(self, gpu_id: str) -> None:
        self._gpus.pop(gpu_id, None)

    def forget(self, model: str) -> None:
        """What was expected of the model holds no more: it is gone, or its load was measured."""
        self._outlooks.pop(model, None)

    def outlook(self, model: str, gpu: GpuState, now_s: float) -> Outlook:
        """What is expected of the model, on GPUs of that one's kind; maybe a little old."""
        outlook = self._outlooks.get(model)
        if outlook is None or now_s >= outlook.fresh_until_s or outlook.kind != gpu.kind:
            outlook = self._look_out(model, gpu.kind, now_s)
        holders = self._cache.held.get(model)
        copies = len(holders) if holders is not None else 0
        if outlook.copies != copies:
            outlook.copies = copies
            outlook.share = outlook.per_s * outlook.run_s / copies if copies else 0.0
            outlook.another_copy_s = None
        return outlook

    def outlooks_of(self, models: Sequence[str], gpu: GpuState, now_s: float) -> list[Outlook]:
        """The same for several models that no GPU holds."""
        known, kind, outlooks = self._outlooks, gpu.kind, list[Outlook]()
        for model in models:
            outlook = known.get(model)
            if outlook is None or now_s >= outlook.fresh_until_s or outlook.kind != kind:
                outlook = self._look_out(model, kind, now_s)
            outlooks.append(outlook)
        return outlooks

    def _look_out(self, model: str, kind: str, now_s: float) -> Outlook:
        profiles, rates = self._cluster.profiles, self._rates
        per_s, load_s = rates.per_s(model, now_s), profiles.load_s(model, kind)
        expected = per_s * HORIZON_LOADS * profiles.typical_load_s()
        back_s = load_s
        if self._cache.host_memory_bytes:
            back_s = min(load_s, profiles.offload_s(model, kind) + profiles.restore_s(model, kind))
        outlook = self._outlooks[model] = Outlook(
            model,
            kind,
            per_s,
            load_s,
            profiles.inference_s(model, kind),
            back_s,
            expected / (1.0 + expected),
            self._cluster.models[model].max_batch > 1,
            now_s + FRESH_SHARE * rates.history_s(now_s),
        )
        return outlook

    def utilisation(self, gpu: GpuState, now_s: float) -> float:
        """The share of its time that requests for its residents take, were each spread evenly over its copies."""
        return self._of(gpu, now_s).utilisation

    def price_s(self, gpu: GpuState, victims: Sequence[Resident], now_s: float) -> float:
        """What losing these residents would cost their callers."""
        return sum(self._loss_s(gpu, victim.model, now_s) for victim in victims)

    def room_s(self, gpu: GpuState, missing_bytes: int, now_s: float) -> float | None:
        """The price of ``cheapest_victims``, to compare GPUs by: maybe not the newest (``is_current``).

        Of a busy GPU: what it will be when the model that it runs may go as well.
        """
        room = self._room(gpu, missing_bytes, now_s, ahead=gpu.work is not None)
        return room.price_s if room is not None else None

    def is_current(self, gpu: GpuState) -> bool:
        """Whether the GPU's prices are those of now; where copies have come or gone elsewhere they are forgotten."""
        prices, copies = self._gpus.get(gpu.gpu_id), self._cache.copies
        if prices is not None and prices.ranked is not None:
            for one in prices.ranked:
                if one.copies != copies(one.resident.model):
                    del self._gpus[gpu.gpu_id]
                    return False
        return True

    def cheapest_victims(self, gpu: GpuState, missing_bytes: int, now_s: float) -> list[Resident] | None:
        """The residents whose going makes that much room for least; models that somebody waits for only in need.

        Exact for up to ``MOST_COMPARED`` residents; with more, the cheapest ones until there is room, less those that
        prove not to be needed. None: the room cannot be made.
        """
        self.is_current(gpu)
        room = self._room(gpu, missing_bytes, now_s, ahead=False)
        return room.victims if room is not None else None

    def _room(self, gpu: GpuState, missing_bytes: int, now_s: float, *, ahead: bool) -> _Room | None:
        prices = self._of(gpu, now_s)
        ranked, lines = prices.ranked, self._cluster.queues.wanted()
        if ranked is None:
            ranked = prices.ranked = self._rank(gpu, now_s)
        unwanted = ranked
        for one in ranked:
            if one.resident.in_use or one.resident.model in lines:
                able = ranked if ahead else [one for one in ranked if not one.resident.in_use]
                unwanted = [one for one in able if one.resident.model not in lines]
                if sum([one.resident.memory_bytes for one in unwanted]) < missing_bytes:
                    unwanted = able
                return _cheapest_room(unwanted, missing_bytes)
        room = prices.rooms.get(missing_bytes)
        if room is None:
            room = _cheapest_room(ranked, missing_bytes)
            if room is not None:
                prices.rooms[missing_bytes] = room
        return room

    def another_copy_s(self, gpu: GpuState, model: str, now_s: float) -> float:
        """Waiting that one more copy, on a GPU as free as GPUs get, would save within the horizon.

        ``gpu``: one of the kind that would run it. The model has at least one copy.
        """
        outlook = self.outlook(model, gpu, now_s)
        if outlook.another_copy_s is None:
            outlook.another_copy_s = self._saving_s(outlook, model, now_s)
        return outlook.another_copy_s

    def foothold_s(self, gpu: GpuState, model: str, now_s: float) -> float:
        """Waiting that one GPU more, on which the model is HOT or WARM, would save within the horizon; 0 where there is
        no room to park it.

        Who finds all of them busy waits for half a run on average, or for a load elsewhere.
        """
        cache = self._cache
        if gpu.memory.host.free_bytes < self._cluster.models[model].memory_bytes:
            return 0.0
        places = {*cache.holders(model), *cache.parked_on(model)}
        if len(places) > MANY_COPIES:
            return 0.0
        outlook = self.outlook(model, gpu, now_s)
        gpus, waiting_s = self._cluster.gpus, min(outlook.load_s, outlook.run_s / 2)
        for gpu_id in places:
            waiting_s *= self.utilisation(gpus[gpu_id], now_s)
        return outlook.per_s * HORIZON_PARKED_S * waiting_s

    def _saving_s(self, outlook: Outlook, model: str, now_s: float) -> float:
        copies = outlook.copies
        if copies > MANY_COPIES:
            return 0.0
        now_busy = self._all_busy(model, None, now_s)
        return self._runs_s(outlook) * (now_busy / copies - now_busy * LEAST_UTILISATION / (copies + 1))

    def _loss_s(self, gpu: GpuState, model: str, now_s: float) -> float:
        """The last copy: the next request pays a load, if it comes within the horizon. Another: more waiting."""
        outlook = self.outlook(model, gpu, now_s)
        copies, back_s = outlook.copies, outlook.back_s
        if back_s < outlook.load_s and gpu.memory.host.free_bytes < gpu.memory.residents[model].memory_bytes:
            back_s = outlook.load_s  # a parked one would have to go for it
        if copies == 1:
            return outlook.wanted * back_s
        if copies > MANY_COPIES:
            return 0.0
        without = self._all_busy(model, gpu, now_s)
        with_it = without * self.utilisation(gpu, now_s)
        saved_s = self._runs_s(outlook) * (without / (copies - 1) - with_it / copies)
        return min(saved_s, back_s)

    def _runs_s(self, outlook: Outlook) -> float:
        """Seconds of running expected of a model within a copy's horizon."""
        return outlook.per_s * HORIZON_RUNS * self._cluster.profiles.typical_inference_s() * outlook.run_s

    def _all_busy(self, model: str, but: GpuState | None, now_s: float) -> float:
        """Probability that every holder is busy, were they independent."""
        gpus, product = self._cluster.gpus, 1.0
        for gpu_id in self._cache.holders(model):
            gpu = gpus[gpu_id]
            if gpu is not but:
                product *= self._of(gpu, now_s).utilisation
        return product

    def _of(self, gpu: GpuState, now_s: float) -> _GpuPrices:
        prices = self._gpus.get(gpu.gpu_id)
        memory = gpu.memory
        if (
            prices is None
            or prices.version != memory.version
            or now_s >= prices.fresh_until_s
            or prices.memory is not memory
        ):
            utilisation = 0.0
            for name in memory.residents:
                utilisation += self.outlook(name, gpu, now_s).share
            utilisation = min(max(utilisation, LEAST_UTILISATION), MOST_UTILISATION)
            fresh_until_s = now_s + FRESH_SHARE * self._rates.history_s(now_s)
            prices = self._gpus[gpu.gpu_id] = _GpuPrices(memory, memory.version, utilisation, fresh_until_s)
        return prices

    def _rank(self, gpu: GpuState, now_s: float) -> list[PricedResident]:
        """The GPU's residents that may be lost, cheapest to lose first."""
        copies = self._cache.copies
        ranked = [
            PricedResident(self._loss_s(gpu, model, now_s), resident, copies(model))
            for model, resident in gpu.memory.residents.items()
            if not resident.pinned
        ]
        if len(ranked) > 1:
            ranked.sort(key=_by_price)
        return ranked


def _by_price(priced: PricedResident) -> float:
    return priced.price_s


def _cheapest_room(ranked: Sequence[PricedResident], missing_bytes: int) -> _Room | None:
    """The cheapest way to make room of these residents; None if they are too small."""
    held_bytes = 0
    for one in ranked:
        held_bytes += one.resident.memory_bytes
    if held_bytes < missing_bytes:
        return None
    if ranked[0].resident.memory_bytes >= missing_bytes:
        return _Room([ranked[0].resident], ranked[0].price_s)  # as any search would find
    victims = (_cheapest if len(ranked) <= MOST_COMPARED else _cheap)(ranked, missing_bytes)
    price_s = 0.0
    for one in victims:
        price_s += one.price_s
    return _Room([one.resident for one in victims], price_s)


def _cheap(ranked: Sequence[PricedResident], missing_bytes: int) -> list[PricedResident]:
    """From the cheapest on until there is room, less those that prove not to be needed, the dearest first."""
    chosen: list[PricedResident] = []
    cheapest = iter(ranked)
    while missing_bytes > 0:
        chosen.append(next(cheapest))
        missing_bytes -= chosen[-1].resident.memory_bytes
    for one in chosen[-2::-1]:
        if missing_bytes + one.resident.memory_bytes <= 0:
            chosen.remove(one)
            missing_bytes += one.resident.memory_bytes
    return chosen


def _cheapest(ranked: Sequence[PricedResident], missing_bytes: int) -> list[PricedResident]:
    """The set of least price that makes the room, by depth-first search: the cheapest first, so bounds bite early."""
    best: list[PricedResident] = []
    best_s = math.inf

    def extend(start: int, missing: int, price_s: float, chosen: list[PricedResident]) -> None:
        nonlocal best, best_s
        for index in range(start, len(ranked)):
            one = ranked[index]
            total_s = price_s + one.price_s
            if total_s >= best_s:
                return  # the rest is at least as dear
            if one.resident.memory_bytes >= missing:
                best, best_s = [*chosen, one], total_s
                return
            extend(index + 1, missing - one.resident.memory_bytes, total_s, [*chosen, one])

    extend(0, missing_bytes, 0.0, [])
    return best
