"""What a copy of a model is worth, in seconds of its callers' waiting. Policy and eviction ``hotset`` trade in it.

Everything is learned: arrival rates, load and inference times, who holds what (docs/policies.md derives each term).
Prices change slowly and are asked for often, so they are worked out once per GPU and kept for ``FRESH_S``, or until the
GPU's residents change.
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

HORIZON_RUNS = 4.6
"""How far ahead the use of a further copy is counted, in typical runs. Beyond it the queue will look different: decide
again then. Counted in runs, so that models of ten milliseconds are treated as those of a second are."""
LAST_HORIZON_RUNS = 9.2
"""The same for a model's last copy."""
LEAST_UTILISATION, MOST_UTILISATION = 0.3, 0.98
"""A GPU is never taken to be free, or busy, for certain."""
FRESH_S = 2.0
MOST_COMPARED = 8
"""Residents of which the cheapest set is searched exactly: at most 2 ** 8 sets, a few in practice."""


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


class _GpuPrices:
    """Prices of one GPU's residents, as long as they are the same and were priced lately."""

    __slots__ = ("fresh_until_s", "memory", "priced", "rooms", "utilisation", "version")

    def __init__(self, memory: GpuMemory, utilisation: float, now_s: float) -> None:
        self.memory = memory
        self.version = memory.version
        self.fresh_until_s = now_s + FRESH_S
        self.utilisation = utilisation
        self.priced: dict[str, PricedResident] | None = None
        self.rooms: dict[int, _Room] = {}
        """By the bytes that were missing, for a GPU that nobody else waits for."""


class _Demand:
    """What one more copy of a model would save."""

    __slots__ = ("copies", "fresh_until_s", "saving_s")

    def __init__(self, copies: int, saving_s: float, now_s: float) -> None:
        self.copies = copies
        self.saving_s = saving_s
        self.fresh_until_s = now_s + FRESH_S


class Prices:
    """Prices of every copy in the cluster; one object, owned by ``Cluster``."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._cache: CacheManager = cluster.cache
        self._rates: ArrivalRates = cluster.rates
        self._gpus: dict[str, _GpuPrices] = {}
        self._demands: dict[str, _Demand] = {}

    def left(self, gpu_id: str) -> None:
        self._gpus.pop(gpu_id, None)

    def utilisation(self, gpu: GpuState, now_s: float) -> float:
        """The share of its time that requests for its residents take, were each spread evenly over its copies."""
        return self._of(gpu, now_s).utilisation

    def price_s(self, gpu: GpuState, victims: Sequence[Resident], now_s: float) -> float:
        """What losing these residents would cost their callers."""
        priced = self._priced(gpu, now_s)
        price_s = 0.0
        for victim in victims:
            price_s += priced[victim.model].price_s
        return price_s

    def room_s(self, gpu: GpuState, missing_bytes: int, now_s: float) -> float | None:
        """The price of ``cheapest_victims``, to compare GPUs by: maybe not the newest (``is_current``).

        Of a busy GPU: what it will be when the model that it runs may go as well.
        """
        prices = self._of(gpu, now_s)
        room = prices.rooms.get(missing_bytes) if gpu.work is None else None
        if room is None:
            room = self._room(gpu, missing_bytes, now_s, ahead=gpu.work is not None)
        return room.price_s if room is not None else None

    def is_current(self, gpu: GpuState) -> bool:
        """Whether the GPU's prices are those of now; where copies have come or gone elsewhere they are forgotten."""
        prices, copies = self._gpus.get(gpu.gpu_id), self._cache.copies
        if prices is not None and prices.priced is not None:
            for model, one in prices.priced.items():
                if one.copies != copies(model):
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
        priced = self._priced(gpu, now_s)
        ranked = [one for one in priced.values() if ahead or not one.resident.in_use]
        lines = self._cluster.queue.models
        unwanted = [one for one in ranked if one.resident.model not in lines]
        for candidates in (unwanted, ranked):
            if sum(one.resident.memory_bytes for one in candidates) >= missing_bytes:
                victims = (_cheapest if len(candidates) <= MOST_COMPARED else _cheap)(candidates, missing_bytes)
                room = _Room([one.resident for one in victims], sum(one.price_s for one in victims))
                if gpu.work is None and len(unwanted) == len(priced):
                    self._gpus[gpu.gpu_id].rooms[missing_bytes] = room
                return room
        return None

    def another_copy_s(self, gpu: GpuState, model: str, now_s: float) -> float:
        """Waiting that one more copy, on a GPU as free as GPUs get, would save within the horizon.

        ``gpu``: one of the kind that would run it. The model has at least one copy.
        """
        copies = self._cache.copies(model)
        demand = self._demands.get(model)
        if demand is None or demand.copies != copies or now_s >= demand.fresh_until_s:
            demand = self._demands[model] = _Demand(copies, self._saving_s(gpu, model, copies, now_s), now_s)
        return demand.saving_s

    def forget(self, model: str) -> None:
        """The model is gone for good."""
        self._demands.pop(model, None)

    def _saving_s(self, gpu: GpuState, model: str, copies: int, now_s: float) -> float:
        if copies > MANY_COPIES:
            return 0.0
        runs_s = self._rates.per_s(model, now_s) * self._horizon_s(HORIZON_RUNS) * self._cluster.inference_s(model, gpu)
        now_busy = self._all_busy(model, None, now_s)
        return runs_s * (now_busy / copies - now_busy * LEAST_UTILISATION / (copies + 1))

    def _loss_s(self, gpu: GpuState, model: str, now_s: float) -> float:
        """The last copy: the next request pays a load, if it comes within the horizon. Another: more waiting."""
        copies = self._cache.copies(model)
        load_s = self._cluster.load_s(model, gpu)
        rate = self._rates.per_s(model, now_s)
        if copies == 1:
            expected = rate * self._horizon_s(LAST_HORIZON_RUNS)
            return load_s * expected / (1.0 + expected)
        if copies > MANY_COPIES:
            return 0.0
        without = self._all_busy(model, gpu, now_s)
        with_it = without * self.utilisation(gpu, now_s)
        runs_s = rate * self._horizon_s(HORIZON_RUNS) * self._cluster.inference_s(model, gpu)
        saved_s = runs_s * (without / (copies - 1) - with_it / copies)
        return min(saved_s, load_s)

    def _horizon_s(self, runs: float) -> float:
        return runs * self._cluster.profiles.typical_inference_s()

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
                rate = self._rates.per_s(name, now_s)
                utilisation += rate * self._cluster.inference_s(name, gpu) / self._cache.copies(name)
            utilisation = min(max(utilisation, LEAST_UTILISATION), MOST_UTILISATION)
            prices = self._gpus[gpu.gpu_id] = _GpuPrices(memory, utilisation, now_s)
        return prices

    def _priced(self, gpu: GpuState, now_s: float) -> dict[str, PricedResident]:
        """The GPU's residents that may be lost, cheapest to lose first."""
        prices = self._of(gpu, now_s)
        if prices.priced is None:
            ranked = [
                PricedResident(self._loss_s(gpu, model, now_s), resident, self._cache.copies(model))
                for model, resident in gpu.memory.residents.items()
                if not resident.pinned
            ]
            ranked.sort(key=_by_price)
            prices.priced = {one.resident.model: one for one in ranked}
        return prices.priced


def _by_price(priced: PricedResident) -> float:
    return priced.price_s


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
