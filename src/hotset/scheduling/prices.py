"""What a copy of a model is worth, in seconds of its callers' waiting. Policy and eviction ``hotset`` trade in it.

Everything is learned: arrival rates, load and inference times, who holds what (docs/policies.md derives each term).
Prices change slowly and are asked for often, so they are worked out once per model and per GPU, and kept for
``FRESH_SHARE`` of the rates' history, or until the model's copies, or the GPU's residents, change. Old ones are renewed
where there is time for it, as a request arrives or a run starts: a decision to load then finds most of them ready.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

import msgspec

from hotset.scheduling.cache import CacheManager, Resident
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
MOST_HELPED = 16
"""Requests of one line for which the use of a further copy is worked out."""
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
    """From host memory, if some GPU's node has it there already."""
    run_s: float
    parked_s: float
    """What leaving a GPU for host memory and coming back would take; infinite where there is none."""
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


class PricedRoom(msgspec.Struct, frozen=True, gc=False):
    """The cheapest way to make room on a GPU."""

    victims: list[Resident]
    price_s: float


class GpuPrices(msgspec.Struct, gc=False):
    """Prices of one GPU's residents, as long as they are the same and were priced lately."""

    version: int
    """Of its memory."""
    utilisation: float
    fresh_until_s: float
    changes: int
    """``CacheManager.changes`` when the copies that the ranks rest on were last found to be the same."""
    is_ranked: bool = False
    ranked: list[PricedResident] = []
    """Cheapest to lose first."""
    rooms: dict[tuple[int, int], PricedRoom | None] = {}
    """By the bytes that were missing, and the ranks (as bits) of those who may not go."""


class Prices:
    """Prices of every copy in the cluster; one object, owned by ``Cluster``."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._cache: CacheManager = cluster.cache
        self._rates: ArrivalRates = cluster.rates
        self.known: dict[str, Outlook] = {}
        """What ``outlook`` last said of each model (read only): for loops in which a call each is too dear."""

    def forget(self, model: str) -> None:
        """The model is gone."""
        self.known.pop(model, None)

    def moved(self, model: str) -> None:
        """Its load was measured, or its weights came to host memory, or left it: what was expected may hold no more."""
        outlook = self.known.get(model)
        near = self._cache.is_near(model)
        if outlook is not None and outlook.load_s != self._cluster.profiles.load_s(model, outlook.kind, near=near):
            del self.known[model]

    def arrived(self, model: str, now_s: float) -> None:
        """A request came: what is expected of its model is brought up to date now, not while a load is decided."""
        outlook = self.known.get(model)
        if outlook is not None and now_s >= outlook.fresh_until_s:
            self._look_out(model, outlook.kind, now_s)

    def outlook(self, model: str, gpu: GpuState, now_s: float) -> Outlook:
        """What is expected of the model, on GPUs of that one's kind; maybe a little old."""
        outlook = self.known.get(model)
        if outlook is None or now_s >= outlook.fresh_until_s or outlook.kind != gpu.kind:
            return self._look_out(model, gpu.kind, now_s)
        holders = self._cache.held.get(model)
        copies = len(holders) if holders is not None else 0
        if outlook.copies != copies:
            outlook.copies = copies
            outlook.share = outlook.per_s * outlook.run_s / copies if copies else 0.0
            outlook.another_copy_s = None
        return outlook

    def _look_out(self, model: str, kind: str, now_s: float) -> Outlook:
        profiles, rates, cache = self._cluster.profiles, self._rates, self._cache
        per_s, run_s = rates.per_s(model, now_s), profiles.inference_s(model, kind)
        if cache.host_memory_bytes:
            load_s = profiles.load_s(model, kind, near=cache.is_near(model))
            parked_s = profiles.offload_s(model, kind) + profiles.restore_s(model, kind)
        else:
            load_s, parked_s = profiles.load_s(model, kind), math.inf
        expected = per_s * HORIZON_LOADS * profiles.typical_load_s()
        holders = cache.held.get(model)
        copies = len(holders) if holders is not None else 0
        outlook = self.known[model] = Outlook(
            model,
            kind,
            per_s,
            load_s,
            run_s,
            parked_s,
            expected / (1.0 + expected),
            self._cluster.models[model].max_batch > 1,
            now_s + FRESH_SHARE * rates.history_s(now_s),
            copies,
            per_s * run_s / copies if copies else 0.0,
        )
        return outlook

    def _outlooks(self, gpu: GpuState, now_s: float) -> list[Outlook]:
        """Of its residents, in their order."""
        known, held, kind, outlooks = self.known, self._cache.held, gpu.kind, list[Outlook]()
        for model in gpu.memory.residents:
            outlook = known.get(model)
            if outlook is None or now_s >= outlook.fresh_until_s or outlook.kind != kind:
                outlook = self._look_out(model, kind, now_s)
            elif outlook.copies != len(held[model]):
                outlook = self.outlook(model, gpu, now_s)
            outlooks.append(outlook)
        return outlooks

    def utilisation(self, gpu: GpuState, now_s: float) -> float:
        """The share of its time that requests for its residents take, were each spread evenly over its copies."""
        prices = gpu.prices
        if prices is None or prices.version != gpu.memory.version or now_s >= prices.fresh_until_s:
            prices = self._price(gpu, self._outlooks(gpu, now_s), now_s)
        return prices.utilisation

    def price_s(self, gpu: GpuState, victims: Sequence[Resident], now_s: float) -> float:
        """What losing these residents would cost their callers."""
        return sum(self._loss_s(gpu, self.outlook(victim.model, gpu, now_s), now_s) for victim in victims)

    def is_current(self, gpu: GpuState) -> bool:
        """Whether the GPU's prices are those of now; where copies have come or gone elsewhere they are forgotten."""
        prices, cache = gpu.prices, self._cache
        if prices is not None and prices.changes != cache.changes:
            for one in prices.ranked:
                if one.copies != len(cache.held.get(one.resident.model, ())):
                    gpu.prices = None
                    return False
            prices.changes = cache.changes
        return True

    def room(self, gpu: GpuState, missing_bytes: int, now_s: float, ahead: bool) -> PricedRoom | None:
        """The residents whose going makes that much room for least; models that somebody waits for only in need. Its
        price is maybe not the newest (``is_current``). None: the room cannot be made.

        Exact for up to ``MOST_COMPARED`` residents; with more, the cheapest ones until there is room, less those that
        prove not to be needed. ``ahead``: once the models in use may go as well.
        """
        prices, memory = gpu.prices, gpu.memory
        if prices is None or prices.version != memory.version or now_s >= prices.fresh_until_s or not prices.is_ranked:
            prices = self.ranked(gpu, now_s)
        queues = self._cluster.queues
        lines = queues.wanted() if queues.several else queues.main.models.keys()
        ranked, staying = prices.ranked, 0
        all_spare = ahead or (gpu.work is None and memory.copying is None and not memory.spares)
        if not all_spare or not lines.isdisjoint(memory.residents):
            left_bytes = missing_bytes
            for rank, one in enumerate(ranked):
                if one.resident.model in lines or (one.resident.in_use and not ahead):
                    staying |= 1 << rank
                else:
                    left_bytes -= one.resident.memory_bytes
            if staying and left_bytes > 0:  # then those too that somebody waits for
                return _cheapest_room([one for one in ranked if ahead or not one.resident.in_use], missing_bytes)
        rooms, asked = prices.rooms, (missing_bytes, staying)
        if asked in rooms:
            return rooms[asked]
        spare = ranked if not staying else [one for rank, one in enumerate(ranked) if not staying >> rank & 1]
        room = rooms[asked] = _cheapest_room(spare, missing_bytes)
        return room

    def ranked(self, gpu: GpuState, now_s: float) -> GpuPrices:
        """Its prices, with its residents ranked."""
        prices, outlooks = gpu.prices, None
        if prices is None or prices.version != gpu.memory.version or now_s >= prices.fresh_until_s:
            outlooks = self._outlooks(gpu, now_s)
            prices = self._price(gpu, outlooks, now_s)
        if not prices.is_ranked:
            prices.ranked, prices.is_ranked = self._rank(gpu, outlooks or self._outlooks(gpu, now_s), now_s), True
        return prices

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

    def _loss_s(self, gpu: GpuState, outlook: Outlook, now_s: float) -> float:
        """The last copy: the next request pays a load, if it comes within the horizon. Another: more waiting."""
        copies, back_s = outlook.copies, outlook.load_s
        if self._cache.host_memory_bytes:
            back_s = self._back_s(gpu, outlook)
        if copies == 1:
            return outlook.wanted * back_s
        if copies > MANY_COPIES:
            return 0.0
        without = self._all_busy(outlook.model, gpu, now_s)
        with_it = without * self.utilisation(gpu, now_s)
        saved_s = self._runs_s(outlook) * (without / (copies - 1) - with_it / copies)
        return min(saved_s, back_s)

    def _back_s(self, gpu: GpuState, outlook: Outlook) -> float:
        """Seconds until a model that leaves this GPU would be back: a load, from host memory if another GPU has it, or
        a restore, unless a parked model had to go for it."""
        model, memory = outlook.model, gpu.memory
        near = self._cache.is_near(model, memory)
        load_s = self._cluster.profiles.load_s(model, outlook.kind, near=near)
        return (
            load_s if memory.host.free_bytes < memory.residents[model].memory_bytes else min(load_s, outlook.parked_s)
        )

    def _runs_s(self, outlook: Outlook) -> float:
        """Seconds of running expected of a model within a copy's horizon."""
        return outlook.per_s * HORIZON_RUNS * self._cluster.profiles.typical_inference_s() * outlook.run_s

    def _all_busy(self, model: str, but: GpuState | None, now_s: float) -> float:
        """Probability that every holder is busy, were they independent."""
        gpus, product = self._cluster.gpus, 1.0
        for gpu_id in self._cache.holders(model):
            gpu = gpus[gpu_id]
            if gpu is not but:
                product *= self.utilisation(gpu, now_s)
        return product

    def _price(self, gpu: GpuState, outlooks: Sequence[Outlook], now_s: float) -> GpuPrices:
        """Prices of what it holds now. Its residents are ranked once somebody asks for room."""
        utilisation = 0.0
        for outlook in outlooks:
            utilisation += outlook.share
        prices = gpu.prices = GpuPrices(
            gpu.memory.version,
            min(max(utilisation, LEAST_UTILISATION), MOST_UTILISATION),
            now_s + FRESH_SHARE * self._rates.history_s(now_s),
            self._cache.changes,
        )
        return prices

    def _rank(self, gpu: GpuState, outlooks: Sequence[Outlook], now_s: float) -> list[PricedResident]:
        """The GPU's residents that may be lost, cheapest to lose first."""
        ranked, parks = list[PricedResident](), self._cache.host_memory_bytes > 0
        for resident, outlook in zip(gpu.memory.residents.values(), outlooks, strict=True):
            if not resident.pinned:
                copies = outlook.copies
                if copies == 1 and not parks:
                    price_s = outlook.wanted * outlook.load_s
                else:
                    price_s = self._loss_s(gpu, outlook, now_s)
                ranked.append(PricedResident(price_s, resident, copies))
        if len(ranked) > 1:
            ranked.sort(key=_by_price)
        return ranked


def saved_by_copy(count: int, wait_s: float, load_s: float, inference_s: float, copies: int) -> tuple[float, int]:
    """What one more copy saves a line of ``count`` requests: seconds of waiting in all, and how many it helps.

    The holders start the line one by one, ``inference_s / copies`` apart, the first after ``wait_s``. From ``load_s``
    on the new copy takes its turns among them.
    """
    apart_s = inference_s / copies
    late_s = wait_s + (count - 1) * apart_s - load_s
    if late_s <= 0.0:
        return 0.0, 1
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


_by_price = attrgetter("price_s")


def _cheapest_room(ranked: Sequence[PricedResident], missing_bytes: int) -> PricedRoom | None:
    """The cheapest way to make room of these residents; None if they are too small."""
    if ranked and (first := ranked[0]).resident.memory_bytes >= missing_bytes:
        return PricedRoom([first.resident], first.price_s)  # as any search would find
    held_bytes = 0
    for one in ranked:
        held_bytes += one.resident.memory_bytes
    if held_bytes < missing_bytes:
        return None
    victims = (_cheapest if len(ranked) <= MOST_COMPARED else _cheap)(ranked, missing_bytes)
    price_s = 0.0
    for one in victims:
        price_s += one.price_s
    return PricedRoom([one.resident for one in victims], price_s)


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
    best_s, price_s, index = math.inf, 0.0, 0
    chosen: list[PricedResident] = []
    before: list[tuple[int, int, float]] = []  # each choice: its index, what was missing, and the price without it
    while True:
        if index < len(ranked) and (total_s := price_s + (one := ranked[index]).price_s) < best_s:
            if one.resident.memory_bytes < missing_bytes:
                chosen.append(one)
                before.append((index, missing_bytes, price_s))
                missing_bytes -= one.resident.memory_bytes
                price_s, index = total_s, index + 1
                continue
            best, best_s = [*chosen, one], total_s
        if not chosen:  # what comes after is at least as dear
            return best
        chosen.pop()
        index, missing_bytes, price_s = before.pop()
        index += 1
