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

HORIZON_S = 8.0
"""How far ahead the use of a further copy is counted. Beyond it the queue will look different: decide again then."""
LAST_HORIZON_S = 12.0
"""The same for a model's last copy."""
LEAST_UTILISATION, MOST_UTILISATION = 0.3, 0.98
"""A GPU is never taken to be free, or busy, for certain."""
FRESH_S = 1.0
MOST_COMPARED = 8
"""Residents of which the cheapest set is searched exactly: at most 2 ** 8 sets, a few in practice."""


class PricedResident(msgspec.Struct, frozen=True, gc=False):
    """A copy and what losing it would cost."""

    price_s: float
    resident: Resident
    copies: int
    """How many there were when it was priced; with another number the price is void."""


class _GpuPrices:
    """Prices of one GPU's residents, as long as they are the same and were priced lately."""

    __slots__ = ("checked", "fresh_until_s", "memory", "priced", "utilisation", "version", "victims")

    def __init__(self, memory: GpuMemory, utilisation: float, now_s: float) -> None:
        self.memory = memory
        self.version = memory.version
        self.fresh_until_s = now_s + FRESH_S
        self.utilisation = utilisation
        self.checked = -1
        """Version of the cluster's residency for which ``priced`` is known to hold."""
        self.priced: dict[str, PricedResident] = {}
        self.victims: dict[int, list[Resident]] = {}
        """Cheapest victims by the bytes they had to free."""


class _Demand:
    """What a model's callers wait for its holders, within the horizon."""

    __slots__ = ("copies", "fresh_until_s", "waiting_s")

    def __init__(self, copies: int, waiting_s: float, now_s: float) -> None:
        self.copies = copies
        self.waiting_s = waiting_s
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
        priced = self._priced(gpu, now_s).priced
        price_s = 0.0
        for victim in victims:
            price_s += priced[victim.model].price_s
        return price_s

    def cheapest_victims(self, gpu: GpuState, missing_bytes: int, now_s: float) -> list[Resident] | None:
        """The residents whose going makes that much room for least; models that somebody waits for only in need.

        Exact for up to ``MOST_COMPARED`` residents; with more, the cheapest ones until there is room, less those that
        prove not to be needed. None: the room cannot be made.
        """
        prices = self._priced(gpu, now_s)
        lines, residents = self._cluster.queue.models, gpu.memory.residents
        usual = gpu.work is None and (not lines or lines.keys().isdisjoint(residents))
        if usual:
            known = prices.victims.get(missing_bytes)
            if known is not None:
                return known
        ranked = [priced for priced in prices.priced.values() if not priced.resident.in_use]
        unwanted = ranked if usual else [priced for priced in ranked if priced.resident.model not in lines]
        for candidates in (unwanted, ranked):
            if sum(priced.resident.memory_bytes for priced in candidates) >= missing_bytes:
                victims = (_cheapest if len(candidates) <= MOST_COMPARED else _cheap)(candidates, missing_bytes)
                if usual:
                    prices.victims[missing_bytes] = victims
                return victims
        return None

    def another_copy_s(self, gpu: GpuState, model: str, now_s: float) -> float:
        """Waiting that one more copy, on that GPU, would save within the horizon. The model has at least one."""
        demand = self._demand(gpu, model, now_s)
        return demand.waiting_s * (1.0 - self.utilisation(gpu, now_s) * demand.copies / (demand.copies + 1))

    def forget(self, model: str) -> None:
        """The model is gone for good."""
        self._demands.pop(model, None)

    def _demand(self, gpu: GpuState, model: str, now_s: float) -> _Demand:
        copies = self._cache.copies(model)
        demand = self._demands.get(model)
        if demand is None or demand.copies != copies or now_s >= demand.fresh_until_s:
            waiting_s = 0.0
            if copies <= MANY_COPIES:
                runs_s = self._rates.per_s(model, now_s) * HORIZON_S * self._cluster.inference_s(model, gpu)
                waiting_s = runs_s * self._all_busy(model, None, now_s) / copies
            demand = self._demands[model] = _Demand(copies, waiting_s, now_s)
        return demand

    def _loss_s(self, gpu: GpuState, model: str, now_s: float) -> float:
        """The last copy: the next request pays a load, if it comes within the horizon. Another: more waiting."""
        copies = self._cache.copies(model)
        load_s = self._cluster.load_s(model, gpu)
        rate = self._rates.per_s(model, now_s)
        if copies == 1:
            expected = rate * LAST_HORIZON_S
            return load_s * expected / (1.0 + expected)
        if copies > MANY_COPIES:
            return 0.0
        without = self._all_busy(model, gpu, now_s)
        with_it = without * self.utilisation(gpu, now_s)
        saved_s = rate * HORIZON_S * self._cluster.inference_s(model, gpu) * (without / (copies - 1) - with_it / copies)
        return min(saved_s, load_s)

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

    def _priced(self, gpu: GpuState, now_s: float) -> _GpuPrices:
        """The GPU's prices, with its residents in order, cheapest to lose first."""
        prices = self._of(gpu, now_s)
        version = self._cache.version
        if prices.checked != version:
            copies = self._cache.copies
            if prices.checked < 0 or any(one.copies != copies(model) for model, one in prices.priced.items()):
                ranked = [
                    PricedResident(self._loss_s(gpu, model, now_s), resident, copies(model))
                    for model, resident in gpu.memory.residents.items()
                ]
                ranked.sort(key=_by_price)
                prices.priced = {one.resident.model: one for one in ranked}
                prices.victims = {}
            prices.checked = version
        return prices


def _by_price(priced: PricedResident) -> float:
    return priced.price_s


def _cheap(ranked: Sequence[PricedResident], missing_bytes: int) -> list[Resident]:
    """From the cheapest on until there is room, less those that prove not to be needed, the dearest first."""
    chosen: list[Resident] = []
    for priced in ranked:
        chosen.append(priced.resident)
        missing_bytes -= priced.resident.memory_bytes
        if missing_bytes <= 0:
            break
    for resident in chosen[-2::-1]:
        if missing_bytes + resident.memory_bytes <= 0:
            chosen.remove(resident)
            missing_bytes += resident.memory_bytes
    return chosen


def _cheapest(ranked: Sequence[PricedResident], missing_bytes: int) -> list[Resident]:
    """The set of least price that makes the room, by depth-first search: the cheapest first, so bounds bite early."""
    best: list[Resident] = []
    best_s = math.inf

    def extend(start: int, missing: int, price_s: float, chosen: list[Resident]) -> None:
        nonlocal best, best_s
        for index in range(start, len(ranked)):
            priced = ranked[index]
            total_s = price_s + priced.price_s
            if total_s >= best_s:
                return  # the rest is at least as dear
            if priced.resident.memory_bytes >= missing:
                best, best_s = [*chosen, priced.resident], total_s
                return
            extend(index + 1, missing - priced.resident.memory_bytes, total_s, [*chosen, priced.resident])

    extend(0, missing_bytes, 0.0, [])
    return best
