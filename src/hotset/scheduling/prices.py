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
    __slots__ = ("fresh_until_s", "memory", "priced", "utilisation", "version")

    def __init__(self, memory: GpuMemory, utilisation: float, now_s: float) -> None:
        self.memory = memory
        self.version = memory.version
        self.fresh_until_s = now_s + FRESH_S
        self.utilisation = utilisation
        self.priced: dict[str, PricedResident] | None = None


class Prices:
    """Prices of every copy in the cluster; one object, owned by ``Cluster``."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._cache: CacheManager = cluster.cache
        self._rates: ArrivalRates = cluster.rates
        self._gpus: dict[str, _GpuPrices] = {}

    def left(self, gpu_id: str) -> None:
        self._gpus.pop(gpu_id, None)

    def utilisation(self, gpu: GpuState, now_s: float) -> float:
        """The share of its time that requests for its residents take, were each spread evenly over its copies."""
        return self._of(gpu, now_s).utilisation

    def price_s(self, gpu: GpuState, model: str, now_s: float) -> float:
        """What losing the copy of a resident model would cost its callers."""
        return self._priced(gpu, now_s)[model].price_s

    def cheapest_victims(self, gpu: GpuState, missing_bytes: int, now_s: float) -> list[Resident] | None:
        """The residents whose going makes that much room for least; models that somebody waits for only in need.

        Exact for up to ``MOST_COMPARED`` residents; with more, the cheapest ones until there is room, less those that
        prove not to be needed. None: the room cannot be made.
        """
        lines = self._cluster.queue.models
        ranked = [priced for priced in self._priced(gpu, now_s).values() if not priced.resident.in_use]
        unwanted = [priced for priced in ranked if priced.resident.model not in lines]
        for candidates in (unwanted, ranked) if len(unwanted) < len(ranked) else (ranked,):
            if sum(priced.resident.memory_bytes for priced in candidates) >= missing_bytes:
                if len(candidates) <= MOST_COMPARED:
                    return _cheapest(candidates, missing_bytes)
                return _cheap(candidates, missing_bytes)
        return None

    def another_copy_s(self, gpu: GpuState, model: str, now_s: float) -> float:
        """Waiting that one more copy, on that GPU, would save within the horizon. The model has at least one."""
        copies = self._cache.copies(model)
        if copies > MANY_COPIES:
            return 0.0
        all_busy = self._all_busy(model, None, now_s)
        demand = self._rates.per_s(model, now_s) * HORIZON_S * self._cluster.inference_s(model, gpu)
        return demand * (all_busy / copies - all_busy * self.utilisation(gpu, now_s) / (copies + 1))

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

    def _priced(self, gpu: GpuState, now_s: float) -> dict[str, PricedResident]:
        """The GPU's residents by model, cheapest to lose first."""
        prices, copies = self._of(gpu, now_s), self._cache.copies
        priced = prices.priced
        if priced is not None:
            for model, one in priced.items():
                if one.copies != copies(model):
                    break
            else:
                return priced
        ranked = [
            PricedResident(self._loss_s(gpu, model, now_s), resident, copies(model))
            for model, resident in gpu.memory.residents.items()
        ]
        ranked.sort(key=_by_price)
        priced = prices.priced = {one.resident.model: one for one in ranked}
        return priced


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
