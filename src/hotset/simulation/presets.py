"""Ready-made experiments, and the workloads that options describe."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

import msgspec

from hotset.errors import ConfigurationError, UnknownNameError
from hotset.simulation.experiment import ClusterSpec
from hotset.simulation.traces.replay import Replay, Timing, replay, with_shares_of
from hotset.simulation.traces.trace import Trace
from hotset.simulation.working_set import WorkingSet
from hotset.simulation.workloads import Popularity, Process, Synthetic, Workload


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    """What an experiment takes where nothing else is said. The defaults are the paper's evaluation."""

    cluster: ClusterSpec = ClusterSpec()
    working_sets: tuple[int, ...] = (15, 25, 35)
    policies: tuple[str, ...] = ("lb", "lalb", "lalb_o3")
    rate_per_minute: float = 325.0
    minutes: float = 6.0
    zipf: float = 0.9


PRESETS: Mapping[str, Preset] = {"paper": Preset()}
"""Presets by name."""


def preset(name: str) -> Preset:
    """A preset; ``UnknownNameError`` lists the known names."""
    try:
        return PRESETS[name]
    except KeyError:
        raise UnknownNameError("preset", name, tuple(PRESETS)) from None


class TraceMode(Enum):
    """What of a trace is used."""

    REPLAY = "replay"
    """Its own requests, in their own order."""
    SHARES = "shares"
    """Only how popular its functions are: functions are drawn independently, as in the synthetic workload."""


class TraceUse(msgspec.Struct, frozen=True, kw_only=True):
    """How a workload is made of a trace."""

    mode: TraceMode = TraceMode.REPLAY
    choice: WorkingSet = WorkingSet()
    """Which functions; its size is set for each working set."""
    start_minute: float = 0.0
    minutes: float | None = None
    """None: to the trace's end."""
    rate_per_minute: float | None = None
    """None: as many requests as the trace has."""
    compression: float = 1.0
    timing: Timing | None = None
    process: Process = Process.EVEN
    """Of ``SHARES``."""
    zipf: float = 0.9
    """Popularity of functions where the trace names none."""


def synthetic(size: int, base: Preset, zipf: float | None = None, process: Process = Process.EVEN) -> Synthetic:
    """``size`` functions with Zipf popularity at the preset's rate."""
    exponent = base.zipf if zipf is None else zipf
    return Synthetic(
        popularity=Popularity.zipf(size, exponent),
        rate_per_minute=base.rate_per_minute,
        minutes=base.minutes,
        process=process,
        name=f"Zipf {exponent:g}",
    )


def from_trace(trace: Trace, use: TraceUse, size: int | None) -> Workload:
    """The ``size`` busiest of the chosen functions of a trace (None: all). Raises what ``replay`` raises."""
    how = Replay(
        working_set=msgspec.structs.replace(use.choice, size=size),
        start_minute=use.start_minute,
        minutes=use.minutes,
        compression=use.compression,
        rate_per_minute=use.rate_per_minute,
        timing=use.timing,
    )
    if use.mode is TraceMode.SHARES:
        if use.compression != 1 or use.timing is not None:
            raise ConfigurationError("shares of a trace have no times of their own; leave compression and timing out")
        return with_shares_of(trace, how, process=use.process)
    popularity = None
    if not trace.names_functions:
        if size is None:
            raise ConfigurationError(f"the {trace.format} trace names no functions; say how large the working set is")
        popularity = Popularity.zipf(size, use.zipf)
    return replay(trace, how, popularity)
