"""Workloads of several callers, one of whom may flood the others."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import msgspec

from hotset.errors import ConfigurationError
from hotset.simulation.workloads import Arrival, Popularity, Process, Synthetic, random_stream, require_positive

FLOOD = "flood"
"""The caller who floods; the others are ``c0``, ``c1``, ..."""


class Flood(msgspec.Struct, frozen=True, kw_only=True):
    """One more caller, beside those who share a workload."""

    rate_per_minute: float
    own_functions: int = 0
    """How many functions, of Zipf popularity, are called by nobody else; 0: the others' are called."""
    begins_s: float = 0.0
    """When its first call may come."""
    weight: float = 1.0
    """Its share of the GPUs' time, relative to that of each other caller."""

    def __post_init__(self) -> None:
        require_positive("the flood's rate", self.rate_per_minute)
        if self.own_functions < 0:
            raise ConfigurationError("a flood has 0 or more functions of its own")


class Shared(msgspec.Struct, frozen=True, kw_only=True):
    """A synthetic workload whose requests come from equally busy callers, drawn independently; and maybe a flood."""

    base: Synthetic
    callers: int
    flood: Flood | None = None

    def __post_init__(self) -> None:
        if self.callers < 1:
            raise ConfigurationError(f"a workload has at least 1 caller, not {self.callers}")

    @property
    def name(self) -> str:
        flood = "" if self.flood is None else f", flood of {self.flood.rate_per_minute:g} a minute"
        return f"{self.base.name}, {self.callers} callers{flood}"

    @property
    def functions(self) -> Sequence[str]:
        own = 0 if self.flood is None else self.flood.own_functions
        return (*self.base.functions, *(f"{FLOOD}{index:02d}" for index in range(own)))

    @property
    def duration_s(self) -> float:
        return self.base.duration_s

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        """The requests in time order; equal seeds give equal streams, and the flood moves nobody else's."""
        others = self._others(seed)
        return others if self.flood is None else heapq.merge(others, self._flood(seed, self.flood), key=_time_s)

    def _others(self, seed: int) -> Iterator[Arrival]:
        draw = random_stream(seed, "callers").randrange
        for arrival in self.base.arrivals(seed):
            yield msgspec.structs.replace(arrival, caller=f"c{draw(self.callers)}")

    def _flood(self, seed: int, flood: Flood) -> Iterator[Arrival]:
        own = tuple(self.functions[len(self.base.functions) :])
        popularity = Popularity(own, Popularity.zipf(len(own)).weights) if own else self.base.popularity
        alone = msgspec.structs.replace(
            self.base, popularity=popularity, rate_per_minute=flood.rate_per_minute, process=Process.POISSON
        )
        # Seeds are whole numbers from 0: its streams are nobody else's.
        for arrival in alone.arrivals(-1 - seed):
            if arrival.time_s >= flood.begins_s:
                yield msgspec.structs.replace(arrival, caller=FLOOD, weight=flood.weight)


def _time_s(arrival: Arrival) -> float:
    return arrival.time_s
