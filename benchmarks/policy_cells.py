"""The cells of the policy grid (policy_grid.py): kinds of load, each with the paper's cluster.

12 GPUs of 7800 MiB, the 22 CNNs of the paper's table, 325 requests a minute for 6 minutes unless a cell says otherwise.
Traces are those that docs/traces.md reads, in choices that do not flatter a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from hotset.simulation.engine import Fault
from hotset.simulation.traces import open_trace
from hotset.simulation.traces.replay import Replay, replay, with_shares_of
from hotset.simulation.working_set import WorkingSet
from hotset.simulation.workloads import Popularity, Process, Synthetic, Workload

WORKING_SETS = (15, 25, 35, 50, 70, 100)
LOAD_SCALES = (1.0, 0.3, 0.05)
EXPONENTS = (0.9, 0.5, 1.2)
AZURE_2019 = "azure2019_500fn_min0480-0839.csv.gz"
AZURE_2021 = "azure2021_998inv.csv.gz"
AZURE_LLM = "azure_llm_2023_code.csv.gz"
GENTD = "gentd26_requests_2024-11-15_2024-12-01.csv.gz"
LOST = (Fault(90.0, "sim/gpu:3", 210.0), Fault(150.0, "sim/gpu:7", None), Fault(150.0, "sim/gpu:8", 240.0))


class Cell(msgspec.Struct, frozen=True):
    """One kind of load."""

    name: str
    workload: Workload
    load_scale: float = 1.0
    faults: tuple[Fault, ...] = ()
    deadline_s: float | None = None
    """Within which each request must be answered; None: whenever."""


def cells(traces: Path | None) -> Iterator[Cell]:
    """All of them; those of real traces only where their folder is given."""
    for exponent in EXPONENTS:
        for scale in LOAD_SCALES:
            for size in WORKING_SETS:
                name = f"{size} functions, Zipf {exponent:g}, loads x{scale:g}"
                yield Cell(name, Synthetic(popularity=Popularity.zipf(size, exponent)), scale)
    for size in (25, 50):
        bursts = Synthetic(popularity=Popularity.zipf(size, 0.9), process=Process.BURSTS)
        yield Cell(f"{size} functions, bursts", bursts)
    for size in (25, 35, 70):
        yield Cell(f"{size} functions, GPUs lost", Synthetic(popularity=Popularity.zipf(size, 0.9)), faults=LOST)
    for size in (35, 100):
        calls = Synthetic(popularity=Popularity.zipf(size, 0.9))
        yield Cell(f"{size} functions, deadline 10 s", calls, deadline_s=10.0)
    if traces is not None:
        yield from _azure_2019(traces)
        # The others are slow in real time; compressed, their busiest minutes are about as busy as the paper's.
        yield Cell("azure2021, 30 times as fast", replay(open_trace(traces / AZURE_2021), Replay(compression=30.0)))
        how = Replay(compression=60.0, minutes=60.0)
        yield Cell("gentd26, 60 times as fast", replay(open_trace(traces / GENTD), how))
        llm = replay(open_trace(traces / AZURE_LLM), Replay(minutes=20.0), Popularity.zipf(35, 0.9))
        yield Cell("azure_llm's arrivals, 35 functions", llm)


def _azure_2019(traces: Path) -> Iterator[Cell]:
    trace = open_trace(traces / AZURE_2019)
    choices = {
        "all": WorkingSet(),
        "without the first": WorkingSet(skip=1),
        "without the first 5": WorkingSet(skip=5),
        "http": WorkingSet(trigger="http"),
    }
    for label, choice in choices.items():
        for size in (15, 25, 35):
            how = Replay(working_set=msgspec.structs.replace(choice, size=size), minutes=6.0, rate_per_minute=325.0)
            yield Cell(f"azure2019 {label}, top {size}", replay(trace, how))
        yield Cell(f"azure2019 shares, {label}, top 35", with_shares_of(trace, how))
