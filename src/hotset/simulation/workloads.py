"""What the simulator and the load generator replay: arrivals, who makes them and when.

A workload is read as a stream: its memory grows with the number of functions, never with the number of requests. The
same seed gives the same arrivals, to the byte; arrival times and the choice of functions come from separate random
streams, so that another popularity does not move a request in time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from itertools import accumulate, islice
from typing import Protocol

import msgspec

from hotset.errors import ConfigurationError
from hotset.vocabulary import NORMAL_PRIORITY

_CHUNK = 4096
"""Functions are drawn this many at a time: drawing them singly takes three times as long."""


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """One request of a workload, before anything has decided about it."""

    time_s: float
    """Seconds after the workload's start."""
    function: str
    inference_s: float | None = None
    """How long its run took when it was recorded; None: not known, the simulator asks its hardware profile."""
    caller: str = ""
    """Who made it (a user, a tenant); empty: nobody in particular."""
    weight: float = 1.0
    """The caller's share of the GPUs' time, relative to the other callers'."""
    priority: int = NORMAL_PRIORITY


class Workload(Protocol):
    """A finite stream of requests that can be read again and again."""

    @property
    def name(self) -> str:
        """For tables and file names' titles: what this is, in a few words."""
        ...

    @property
    def functions(self) -> Sequence[str]:
        """Every function that may be called, most popular first."""
        ...

    @property
    def duration_s(self) -> float | None:
        """Nothing arrives after this time; None: not known before the stream ends."""
        ...

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        """The requests in time order; equal seeds give equal streams."""
        ...


class Popularity(msgspec.Struct, frozen=True):
    """Functions, most popular first, and the relative weight with which each is called."""

    names: tuple[str, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.names or len(self.names) != len(self.weights):
            raise ConfigurationError("give at least one function, and one weight for each")
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights) or not any(self.weights):
            raise ConfigurationError("weights must be finite and not negative, and one at least above zero")

    @classmethod
    def zipf(cls, count: int, exponent: float = 0.9) -> Popularity:
        """``count`` functions; the weight of the k-th is ``k ** -exponent`` (0.9: the paper preset; 0: uniform)."""
        if not 0 <= exponent < math.inf:
            raise ConfigurationError(f"a Zipf exponent must be 0 or more, not {exponent:g}")
        return cls(function_names(count), tuple(rank**-exponent for rank in range(1, count + 1)))

    @classmethod
    def uniform(cls, count: int) -> Popularity:
        """``count`` functions, all called equally often."""
        return cls.zipf(count, 0.0)

    def draw(self, times: Iterable[float], rng: random.Random) -> Iterator[Arrival]:
        """An arrival at each time, its function drawn independently."""
        cumulative = list(accumulate(self.weights))
        stream = iter(times)
        while chunk := list(islice(stream, _CHUNK)):
            yield from map(Arrival, chunk, rng.choices(self.names, cum_weights=cumulative, k=len(chunk)))


class Process(Enum):
    """How requests follow one another in time."""

    EVEN = "even"
    """Request i arrives at i * 60 / rate: the same distance everywhere (the paper preset)."""
    POISSON = "poisson"
    """Independent of one another: exponential gaps."""
    BURSTS = "bursts"
    """A two-state Markov-modulated Poisson process: calm most of the time, now and then a burst (``Bursts``)."""


class Bursts(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of ``Process.BURSTS``. The workload's rate is the mean over calm and burst together."""

    intensity: float = 10.0
    """Rate during a burst over the rate between bursts."""
    length_s: float = 5.0
    """Mean length of a burst; lengths are exponential, as the state changes are Markov."""
    share: float = 0.1
    """Part of all time spent in bursts."""

    def __post_init__(self) -> None:
        if not (self.intensity >= 1 and self.length_s > 0 and 0 < self.share < 1):
            raise ConfigurationError("bursts need an intensity of at least 1, a length above 0 and a share in (0, 1)")


class Synthetic(msgspec.Struct, frozen=True, kw_only=True):
    """A workload made from a popularity, a rate and an arrival process. The defaults are the paper preset's."""

    popularity: Popularity
    rate_per_minute: float = 325.0
    minutes: float = 6.0
    process: Process = Process.EVEN
    bursts: Bursts = Bursts()
    name: str = "synthetic"

    def __post_init__(self) -> None:
        require_positive("rate", self.rate_per_minute)
        require_positive("minutes", self.minutes)

    @property
    def functions(self) -> Sequence[str]:
        return self.popularity.names

    @property
    def duration_s(self) -> float:
        return self.minutes * 60

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        """The requests in time order; equal seeds give equal streams."""
        return self.popularity.draw(self._times(random_stream(seed, "times")), random_stream(seed, "functions"))

    def _times(self, rng: random.Random) -> Iterator[float]:
        rate_per_s = self.rate_per_minute / 60
        match self.process:
            case Process.EVEN:
                return even_times(self.rate_per_minute, self.minutes)
            case Process.POISSON:
                return _poisson_times(rate_per_s, 0.0, self.duration_s, rng)
            case Process.BURSTS:
                return _burst_times(rate_per_s, self.bursts, self.duration_s, rng)


def function_names(count: int) -> tuple[str, ...]:
    """``f00``, ``f01``, ...: as many digits as the last one needs, two at least, so that they sort by popularity."""
    if count < 1:
        raise ConfigurationError(f"a workload needs at least 1 function, not {count}")
    digits = max(2, len(str(count - 1)))
    return tuple(f"f{index:0{digits}d}" for index in range(count))


def random_stream(seed: int, purpose: str) -> random.Random:
    """An own generator for each purpose of one seed, so that drawing more for one leaves the others as they are."""
    return random.Random(f"{seed}/{purpose}")


def require_positive(what: str, value: float) -> None:
    """Raise ``ConfigurationError`` unless ``value`` is finite and above zero."""
    if not (math.isfinite(value) and value > 0):
        raise ConfigurationError(f"{what} must be a number above 0, not {value:g}")


def even_times(rate_per_minute: float, minutes: float) -> Iterator[float]:
    """Request i at i * 60 / rate: with a whole rate, exactly that many in each minute, the first at its start."""
    return (index * 60 / rate_per_minute for index in range(math.ceil(rate_per_minute * minutes)))


def _poisson_times(rate_per_s: float, start_s: float, end_s: float, rng: random.Random) -> Iterator[float]:
    draw, log, now_s = rng.random, math.log, start_s
    while (now_s := now_s - log(1.0 - draw()) / rate_per_s) < end_s:
        yield now_s


def _burst_times(mean_rate_per_s: float, bursts: Bursts, end_s: float, rng: random.Random) -> Iterator[float]:
    calm_rate_per_s = mean_rate_per_s / (bursts.share * bursts.intensity + 1 - bursts.share)
    calm_length_s = bursts.length_s * (1 - bursts.share) / bursts.share
    bursting = rng.random() < bursts.share
    now_s = 0.0
    while now_s < end_s:
        mean_length_s = bursts.length_s if bursting else calm_length_s
        next_s = min(end_s, now_s + rng.expovariate(1 / mean_length_s))
        yield from _poisson_times(calm_rate_per_s * (bursts.intensity if bursting else 1), now_s, next_s, rng)
        now_s, bursting = next_s, not bursting
