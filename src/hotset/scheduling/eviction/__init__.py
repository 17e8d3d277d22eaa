"""Eviction policies: which residents leave a GPU when room is needed. One file each, registered by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hotset.errors import UnknownNameError
from hotset.scheduling.cache import EvictionPolicy
from hotset.scheduling.eviction.gdsf import Gdsf
from hotset.scheduling.eviction.hotset import Hotset
from hotset.scheduling.eviction.lfu import Lfu
from hotset.scheduling.eviction.lru import Lru
from hotset.scheduling.eviction.sieve import Sieve

EVICTIONS: Mapping[str, Callable[[], EvictionPolicy]] = {
    "lru": Lru,
    "hotset": Hotset,
    "lfu": Lfu,
    "gdsf": Gdsf,
    "sieve": Sieve,
}


def make_eviction(name: str) -> EvictionPolicy:
    """A fresh eviction policy; ``UnknownNameError`` lists the known names."""
    try:
        return EVICTIONS[name]()
    except KeyError:
        raise UnknownNameError("eviction policy", name, tuple(sorted(EVICTIONS))) from None
