"""SIEVE: one hand, one bit, no list surgery on a hit.

Y. Zhang, J. Yang, Y. Yue, Y. Vigfusson, K. V. Rashmi, "SIEVE is Simpler than LRU: an Efficient Turn-Key Eviction
Algorithm for Web Caches", NSDI 2024. A hand moves over the models in order of their loading, oldest first, and round
again; it passes by what was used since it last came past, taking the mark away, and evicts the first without a mark.

Where it differs: models have sizes, so the hand may take several at once, and those in use are passed by; the run that
a model was loaded for sets no mark, as an object's first request sets none in the original.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

from hotset.scheduling.cache import EvictionPolicy, GpuMemory, Resident


class _Hand:
    """Where one GPU's hand stands, and who is marked."""

    def __init__(self) -> None:
        self.after_s = -1.0
        """It has passed everyone loaded until then."""
        self.marked: set[str] = set()


def _by_loading(resident: Resident) -> float:
    return resident.loaded_s


class Sieve(EvictionPolicy):
    """Victims in the order in which the hand would take them."""

    name = "sieve"

    def __init__(self) -> None:
        self._hands: dict[str, _Hand] = {}

    def victims(self, memory: GpuMemory, now_s: float) -> Iterable[Resident]:
        hand = self._hand(memory)
        ahead = self._from_the_hand(memory, hand)
        unmarked = [resident for resident in ahead if resident.model not in hand.marked]
        return unmarked + [resident for resident in ahead if resident.model in hand.marked]

    def used(self, memory: GpuMemory, resident: Resident) -> None:
        if resident.uses > 1:
            self._hand(memory).marked.add(resident.model)

    def evicted(self, memory: GpuMemory, resident: Resident) -> None:
        hand = self._hand(memory)
        if resident.model in hand.marked:
            hand.marked.clear()  # the hand came round: everyone was passed by once
        for passed in takewhile(lambda one: one is not resident, self._from_the_hand(memory, hand)):
            hand.marked.discard(passed.model)
        hand.marked.intersection_update(memory.residents)
        hand.after_s = resident.loaded_s

    def _from_the_hand(self, memory: GpuMemory, hand: _Hand) -> list[Resident]:
        by_age = sorted(memory.residents.values(), key=_by_loading)
        return [one for one in by_age if one.loaded_s > hand.after_s] + [
            one for one in by_age if one.loaded_s <= hand.after_s
        ]

    def _hand(self, memory: GpuMemory) -> _Hand:
        return self._hands.setdefault(memory.gpu_id, _Hand())
