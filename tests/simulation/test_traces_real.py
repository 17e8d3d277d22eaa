"""The public traces themselves, where they lie beside the checkout (``shared/traces``); skipped elsewhere."""

from __future__ import annotations

import statistics
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from hotset.simulation.traces import open_trace
from hotset.simulation.traces.gentd26 import GenTD26, Rows
from hotset.simulation.traces.replay import Replay, replay, with_shares_of
from hotset.simulation.traces.trace import Trace, Window
from hotset.simulation.working_set import WorkingSet
from hotset.simulation.workloads import Popularity

CHECKOUT = Path(__file__).parents[2]
AZURE_2019 = "azure2019_500fn_min0480-0839.csv.gz"
AZURE_2021 = "azure2021_998inv.csv.gz"
GENTD26 = "gentd26_requests_2024-11-15_2024-12-01.csv.gz"
AZURE_LLM = "azure_llm_2023_code.csv.gz"


def real_path(name: str) -> Path:
    for folder in (CHECKOUT / "shared" / "traces", CHECKOUT.parent / "shared" / "traces"):
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"{name} is not in shared/traces beside the checkout")


def real(name: str) -> Trace:
    return open_trace(real_path(name))


# Largest, median and smallest function of the first six minutes at 325 requests a minute.
@pytest.mark.parametrize(
    ("choice", "size", "expected"),
    [
        (WorkingSet(), 15, (1317, 30, 9)),
        (WorkingSet(), 25, (1284, 11, 4)),
        (WorkingSet(), 35, (1269, 5, 2)),  # the median's exact quota is 5.47
        (WorkingSet(skip=1), 15, (468, 81, 25)),
        (WorkingSet(skip=1), 25, (436, 32, 11)),
        (WorkingSet(skip=1), 35, (424, 14, 4)),
        (WorkingSet(skip=5), 15, (461, 79, 32)),
        (WorkingSet(skip=5), 25, (414, 35, 13)),
        (WorkingSet(skip=5), 35, (394, 22, 7)),
        (WorkingSet(trigger="http"), 15, (532, 84, 21)),
        (WorkingSet(trigger="http"), 25, (489, 35, 10)),
        (WorkingSet(trigger="http"), 35, (471, 19, 6)),
    ],
)
def test_working_sets_of_azure_2019_scaled_as_in_the_paper(
    choice: WorkingSet, size: int, expected: tuple[int, int, int]
) -> None:
    choice = WorkingSet(size=size, skip=choice.skip, trigger=choice.trigger)
    workload = replay(real(AZURE_2019), Replay(working_set=choice, minutes=6, rate_per_minute=325))
    arrivals = list(workload.arrivals(seed=0))
    counts = Counter(arrival.function for arrival in arrivals)

    assert [max(counts.values()), statistics.median(counts.values()), min(counts.values())] == list(expected)
    assert Counter(int(arrival.time_s // 60) for arrival in arrivals) == dict.fromkeys(range(6), 325)
    assert [name for name, _ in counts.most_common(3)] == list(workload.functions[:3])


def test_azure_2019_as_a_whole() -> None:
    trace = real(AZURE_2019)
    uses = trace.functions(Window(0, 360))

    assert trace.duration_s == 360 * 60
    assert sum(use.total_requests for use in uses) == 2_271_127
    assert sum(use.total_requests > 0 for use in uses) == 481
    assert sum(use.requests for use in uses) == 39_442
    assert sum(use.requests > 0 for use in uses) == 310


def test_azure_2019_lends_its_shares_to_the_preset() -> None:
    workload = with_shares_of(real(AZURE_2019), Replay(working_set=WorkingSet(size=25, trigger="http")))
    counts = Counter(arrival.function for arrival in workload.arrivals(seed=0))

    assert sum(counts.values()) == 1950
    assert counts[workload.functions[0]] == pytest.approx(489, abs=60)


def test_gentd26_as_a_whole() -> None:
    trace = real(GENTD26)
    arrivals = list(replay(trace, Replay(compression=60)).arrivals(seed=0))
    uses = sorted((use.requests for use in trace.functions(Window())), reverse=True)
    changes = sum(earlier.function != later.function for earlier, later in pairwise(arrivals))

    assert len(arrivals) == 15_630
    assert len(uses) == 78
    assert [round(sum(uses[:top]) / 156.30, 1) for top in (1, 5, 15, 25, 35)] == [30.4, 67.1, 90.5, 94.7, 97.1]
    assert changes / (len(arrivals) - 1) == pytest.approx(0.748, abs=0.001)
    assert len({arrival.caller for arrival in arrivals}) == 2_657
    assert sum(use.requests for use in GenTD26(trace.path, Rows.SUCCEEDED).functions(Window())) == 15_362


def test_azure_2021_as_a_whole() -> None:
    arrivals = list(replay(real(AZURE_2021)).arrivals(seed=0))
    durations = sorted(arrival.inference_s or 0 for arrival in arrivals)
    per_minute = Counter(int(arrival.time_s // 60) for arrival in arrivals)

    assert len(arrivals) == 998
    assert len({arrival.function for arrival in arrivals}) == 49
    assert all(earlier.time_s <= later.time_s for earlier, later in pairwise(arrivals))
    assert max(per_minute.values()) == pytest.approx(53, abs=1)
    assert durations[-1] == pytest.approx(405, abs=0.1)


def test_azure_llm_as_a_whole() -> None:
    workload = replay(real(AZURE_LLM), popularity=Popularity.zipf(15))
    arrivals = list(workload.arrivals(seed=0))
    gaps = [later.time_s - earlier.time_s for earlier, later in pairwise(arrivals)]

    assert len(arrivals) == 8_819
    assert workload.duration_s / 60 == pytest.approx(57, abs=0.5)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(13.2, abs=0.1)
