"""Two ways to make a workload of a trace: replay its own requests, or lend its popularity to the paper's preset."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import Enum

import msgspec

from hotset.errors import ConfigurationError
from hotset.simulation.traces.trace import Selection, Trace, Window
from hotset.simulation.working_set import FunctionUse, Scaling, WorkingSet, apportion
from hotset.simulation.workloads import (
    Arrival,
    Popularity,
    Process,
    Synthetic,
    even_times,
    random_stream,
    require_positive,
)


class Timing(Enum):
    """When the replayed requests arrive."""

    OWN = "own"
    """When the trace says; a scaled rate is the mean over the window, bursts stay bursts."""
    EVEN = "even"
    """In the trace's order but evenly spaced, the same number in each minute: the paper's normalisation."""


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """How to replay a trace.

    ``rate_per_minute`` scales by functions: each keeps its share of the window's requests (``apportion``). A rate above
    the trace's own repeats requests, which makes a cache look better than it is: compress time first.
    """

    working_set: WorkingSet = WorkingSet()
    start_minute: float = 0.0
    """Where the window starts, in minutes of the trace's time."""
    minutes: float | None = None
    """Length of the workload, in minutes after compression; None: to the trace's end."""
    compression: float = 1.0
    """How many times faster time passes than in the trace. Run times are not compressed."""
    rate_per_minute: float | None = None
    """Requests of all chosen functions together, after compression; None: as many as the trace has."""
    timing: Timing | None = None
    """None: EVEN when a per-minute trace is scaled to a rate, else OWN."""

    def __post_init__(self) -> None:
        require_positive("time compression", self.compression)
        if self.minutes is not None:
            require_positive("minutes", self.minutes)
        if self.rate_per_minute is not None:
            require_positive("rate", self.rate_per_minute)
        if not 0 <= self.start_minute < math.inf:
            raise ConfigurationError("the start minute must be 0 or later")
        if self.timing is Timing.EVEN and self.rate_per_minute is None:
            raise ConfigurationError("even timing needs a rate: say how many requests a minute")


class ReplayedTrace(msgspec.Struct, frozen=True, kw_only=True):
    """A trace as a workload; made by ``replay``."""

    name: str
    trace: Trace
    window: Window
    uses: tuple[FunctionUse, ...]
    """The chosen functions, most popular first; one without a name where the trace names none."""
    requests: tuple[int, ...]
    """How many requests of each the workload has: exact, whatever the seed."""
    minutes: float
    compression: float
    even_rate_per_minute: float | None
    """Set: arrivals are evenly spaced at this rate."""
    popularity: Popularity | None
    """Set: functions are drawn from it, as the trace names none."""

    @property
    def functions(self) -> Sequence[str]:
        return self.popularity.names if self.popularity else tuple(use.name for use in self.uses)

    @property
    def duration_s(self) -> float:
        return self.minutes * 60

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        """The requests in time order; equal seeds give equal streams."""
        recorded = [use.requests for use in self.uses]
        phases = random_stream(seed, "phases")
        scaling = Scaling(recorded, self.requests, [phases.random() for _ in recorded])
        selection = Selection({use.name: place for place, use in enumerate(self.uses)}, scaling)
        stream = self._timed(self.trace.arrivals(self.window, selection, seed))
        if self.popularity is None:
            return stream
        return self.popularity.draw((arrival.time_s for arrival in stream), random_stream(seed, "functions"))

    def _timed(self, stream: Iterator[Arrival]) -> Iterator[Arrival]:
        if self.even_rate_per_minute is not None:
            times = even_times(self.even_rate_per_minute, self.minutes)
            # zip asks for the arrival first: with times first, it would take one time too many at the end.
            return (
                Arrival(time_s, arrival.function, arrival.inference_s, arrival.caller)
                for arrival, time_s in zip(stream, times, strict=False)
            )
        if self.compression == 1:
            return stream
        return (
            Arrival(arrival.time_s / self.compression, arrival.function, arrival.inference_s, arrival.caller)
            for arrival in stream
        )


def replay(trace: Trace, how: Replay | None = None, popularity: Popularity | None = None) -> ReplayedTrace:
    """A workload of a trace's own requests. ``popularity`` is for, and required by, a trace that names no functions.

    Reads the trace once or twice to count. Raises ``TraceError`` for a bad row and ``ConfigurationError`` for a choice
    that the trace cannot serve.
    """
    how = how or Replay()
    if trace.names_functions == (popularity is not None):
        raise ConfigurationError(
            f"the {trace.format} trace names its own functions; leave the popularity out"
            if trace.names_functions
            else f"the {trace.format} trace names no functions; give a popularity to draw them from"
        )
    window, minutes = _window(trace, how)
    chosen = (how.working_set if popularity is None else WorkingSet()).choose(trace.functions(window))
    recorded = [use.requests for use in chosen]
    if how.rate_per_minute is None:
        requests, even_rate = recorded, None
    else:
        if minutes == 0:
            raise ConfigurationError("the trace has no length to scale to a rate: all its requests come at one moment")
        requests = apportion(recorded, math.ceil(how.rate_per_minute * minutes))
        even = trace.per_minute if how.timing is None else how.timing is Timing.EVEN
        even_rate = how.rate_per_minute if even else None
    return ReplayedTrace(
        name=f"{trace.format} replayed",
        trace=trace,
        window=window,
        uses=tuple(chosen),
        requests=tuple(requests),
        minutes=minutes,
        compression=how.compression,
        even_rate_per_minute=even_rate,
        popularity=popularity,
    )


def with_shares_of(
    trace: Trace,
    how: Replay | None = None,
    *,
    process: Process = Process.EVEN,
) -> Synthetic:
    """The paper's preset with the trace's popularity in place of Zipf's: functions drawn independently by their shares.

    Of ``how``, the working set, the window and the rate (325 a minute by default, for 6 minutes) are used. Raises like
    ``replay``.
    """
    how = how or Replay()
    if not trace.names_functions:
        raise ConfigurationError(f"the {trace.format} trace names no functions; replay its arrivals instead")
    how = msgspec.structs.replace(how, minutes=how.minutes or 6.0)
    window, minutes = _window(trace, how)
    chosen = how.working_set.choose(trace.functions(window))
    return Synthetic(
        popularity=Popularity(tuple(use.name for use in chosen), tuple(float(use.requests) for use in chosen)),
        rate_per_minute=how.rate_per_minute or 325.0,
        minutes=minutes,
        process=process,
        name=f"{trace.format} shares",
    )


def _window(trace: Trace, how: Replay) -> tuple[Window, float]:
    """The part of the trace's time to replay, and how many minutes that makes after compression."""
    start_s = how.start_minute * 60
    rest_s = trace.duration_s - start_s
    if rest_s < 0:
        raise ConfigurationError(
            f"the trace is only {trace.duration_s / 60:.1f} minutes long; start before minute {how.start_minute:g}"
        )
    if how.minutes is None:
        return Window(start_s), rest_s / 60 / how.compression
    if how.minutes * 60 * how.compression > rest_s + 60:
        raise ConfigurationError(
            f"the trace has {rest_s / 60 / how.compression:.1f} minutes from there on, not {how.minutes:g}; "
            "ask for less, or compress time less"
        )
    return Window(start_s, start_s + how.minutes * 60 * how.compression), how.minutes
