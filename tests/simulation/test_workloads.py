"""Synthetic workloads: the paper's preset and its variations, reproducible, in order, lazily made."""

from __future__ import annotations

import statistics
from collections import Counter
from itertools import islice, pairwise

import pytest

from hotset.errors import ConfigurationError
from hotset.simulation.workloads import Arrival, Bursts, Popularity, Process, Synthetic, function_names


def synthetic(process: Process = Process.EVEN, **changes: object) -> Synthetic:
    return Synthetic(**{"popularity": Popularity.zipf(35), "process": process, **changes})  # type: ignore[arg-type]


def test_the_papers_preset_spaces_325_requests_evenly_in_each_of_six_minutes() -> None:
    workload = synthetic()
    arrivals = list(workload.arrivals(seed=0))

    assert Counter(int(arrival.time_s // 60) for arrival in arrivals) == dict.fromkeys(range(6), 325)
    assert [arrival.time_s for arrival in arrivals] == [index * 60 / 325 for index in range(1950)]
    assert workload.duration_s == 360
    assert workload.functions == tuple(f"f{index:02d}" for index in range(35))
    assert {arrival.inference_s for arrival in arrivals} == {None}


@pytest.mark.parametrize("process", list(Process))
def test_a_seed_gives_the_same_arrivals_and_another_seed_gives_others(process: Process) -> None:
    workload = synthetic(process)

    assert list(workload.arrivals(seed=3)) == list(workload.arrivals(seed=3))
    assert list(workload.arrivals(seed=3)) != list(workload.arrivals(seed=4))


@pytest.mark.parametrize("process", list(Process))
def test_arrivals_come_in_time_order_at_the_mean_rate_and_end_with_the_duration(process: Process) -> None:
    workload = synthetic(process, rate_per_minute=120, minutes=400)
    times = [arrival.time_s for arrival in workload.arrivals(seed=1)]

    assert all(earlier <= later for earlier, later in pairwise(times))
    assert times[0] >= 0
    assert times[-1] < workload.duration_s
    assert len(times) == pytest.approx(120 * 400, rel=0.08)


def test_bursts_vary_more_than_poisson_and_poisson_more_than_even_spacing() -> None:
    def variation(process: Process) -> float:
        times = [arrival.time_s for arrival in synthetic(process, minutes=60).arrivals(seed=5)]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        return statistics.pstdev(gaps) / statistics.fmean(gaps)

    assert variation(Process.EVEN) == pytest.approx(0, abs=1e-6)
    assert variation(Process.POISSON) == pytest.approx(1, abs=0.05)
    assert variation(Process.BURSTS) > 1.3


def test_zipf_shares_fall_with_rank_and_uniform_ones_do_not() -> None:
    def counts(popularity: Popularity) -> list[int]:
        drawn = Counter(a.function for a in synthetic(popularity=popularity, minutes=200).arrivals(seed=2))
        return [drawn[name] for name in popularity.names]

    skewed, flat = counts(Popularity.zipf(10, exponent=1.0)), counts(Popularity.uniform(10))

    harmonic = sum(1 / rank for rank in range(1, 11))
    assert [count / 65_000 for count in skewed] == pytest.approx(
        [1 / rank / harmonic for rank in range(1, 11)], abs=0.006
    )
    assert [count / 65_000 for count in flat] == pytest.approx([0.1] * 10, abs=0.006)


def test_another_popularity_moves_no_request_in_time() -> None:
    flat = synthetic(Process.POISSON, popularity=Popularity.uniform(100))

    assert [a.time_s for a in flat.arrivals(seed=9)] == [a.time_s for a in synthetic(Process.POISSON).arrivals(seed=9)]


def test_a_year_of_requests_to_ten_thousand_functions_starts_at_once() -> None:
    workload = synthetic(popularity=Popularity.zipf(10_000), rate_per_minute=300_000, minutes=525_600)

    first = list(islice(workload.arrivals(seed=0), 10))

    assert first[0] == Arrival(0.0, first[0].function)
    assert first[9].time_s == pytest.approx(9 / 5000)
    assert workload.functions[-1] == "f9999"


def test_names_sort_by_popularity_whatever_their_number() -> None:
    assert function_names(2) == ("f00", "f01")
    assert function_names(101)[-1] == "f100"
    assert list(function_names(1234)) == sorted(function_names(1234))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: synthetic(rate_per_minute=0), "rate must be a number above 0"),
        (lambda: synthetic(minutes=float("nan")), "minutes must be a number above 0"),
        (lambda: Popularity.zipf(0), "at least 1 function"),
        (lambda: Popularity.zipf(5, exponent=-1), "exponent must be 0 or more"),
        (lambda: Popularity(("a",), (1.0, 2.0)), "one weight for each"),
        (lambda: Popularity(("a", "b"), (0.0, 0.0)), "one at least above zero"),
        (lambda: Bursts(share=1.0), "a share in (0, 1)"),
    ],
)
def test_a_workload_that_cannot_be_says_why(make: object, said: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        make()  # type: ignore[operator]
    assert said in str(raised.value)
