"""Several callers in the simulator, and what a flood by one of them does to the others."""

from __future__ import annotations

import pytest

from hotset.errors import ConfigurationError
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.callers import FLOOD, Flood, Shared
from hotset.simulation.engine import Engine
from hotset.simulation.hardware import PAPER_GPU_MEMORY_BYTES, Hardware, make_gpus, paper_costs
from hotset.simulation.metrics import RunMetrics
from hotset.simulation.sketch import LatencySketch
from hotset.simulation.workloads import Popularity, Process, Synthetic

OTHERS = Synthetic(popularity=Popularity.zipf(35), rate_per_minute=220, minutes=6, process=Process.POISSON)
TEN_TIMES_ITS_SHARE = 560.0
"""Requests a minute that take 12 of 12 GPUs, of which a tenth is one of ten callers' share."""


def play(workload: Shared, policy: str, seed: int) -> RunMetrics:
    hardware = Hardware(gpus=make_gpus(12, PAPER_GPU_MEMORY_BYTES), costs=paper_costs(workload.functions, seed))
    eviction = "hotset" if policy == "hotset" else "lru"
    scheduler = Scheduler(make_policy(policy), make_eviction(eviction), SchedulerConfig(max_queue=2_000))
    return Engine(scheduler, hardware).run(workload.arrivals(seed))


class TestWorkload:
    def test_a_flood_moves_nobody_elses_requests(self):
        alone = Shared(base=OTHERS, callers=9)
        flooded = Shared(base=OTHERS, callers=9, flood=Flood(rate_per_minute=500, own_functions=3))
        arrivals = list(flooded.arrivals(1))
        assert [arrival for arrival in arrivals if arrival.caller != FLOOD] == list(alone.arrivals(1))
        assert [arrival.time_s for arrival in arrivals] == sorted(arrival.time_s for arrival in arrivals)
        of_flood = {arrival.function for arrival in arrivals if arrival.caller == FLOOD}
        assert of_flood == {"flood00", "flood01", "flood02"}
        assert set(of_flood) <= set(flooded.functions)
        assert {arrival.caller for arrival in alone.arrivals(1)} == {f"c{number}" for number in range(9)}
        assert flooded.name == "synthetic, 9 callers, flood of 500 a minute"
        assert (alone.name, alone.duration_s) == ("synthetic, 9 callers", 360.0)

    def test_a_flood_may_call_the_others_functions(self):
        flooded = Shared(base=OTHERS, callers=2, flood=Flood(rate_per_minute=500))
        assert {arrival.function for arrival in flooded.arrivals(0)} <= set(OTHERS.functions)

    def test_numbers_that_mean_nothing_are_refused(self):
        with pytest.raises(ConfigurationError, match="at least 1 caller"):
            Shared(base=OTHERS, callers=0)
        with pytest.raises(ConfigurationError, match="0 or more functions"):
            Flood(rate_per_minute=1.0, own_functions=-1)
        with pytest.raises(ConfigurationError, match="the flood's rate must be a number above 0"):
            Flood(rate_per_minute=0.0)


class TestFlood:
    @pytest.mark.parametrize(("policy", "own"), [("hotset", 0), ("hotset", 10), ("lalb_o3", 0)])
    def test_the_others_p99_is_within_one_and_a_half_times_what_it_is_without_it(self, policy: str, own: int):
        """The bar of fairness: one caller at ten times his share, with the others' functions or with his own."""
        ratios = []
        for seed in (1, 2, 3):
            alone = play(Shared(base=OTHERS, callers=9), policy, seed)
            flood = Flood(rate_per_minute=TEN_TIMES_ITS_SHARE, own_functions=own)
            flooded = play(Shared(base=OTHERS, callers=9, flood=flood), policy, seed)
            assert flooded.others_p99_latency_s is not None
            ratios.append(flooded.others_p99_latency_s / alone.p99_latency_s)
            assert flooded.p99_latency_s > 3 * flooded.others_p99_latency_s, "it is the flood that waits"
        assert sum(ratios) / len(ratios) <= 1.5

    def test_the_figures_are_there_where_there_are_several_callers_only(self):
        shared = play(Shared(base=OTHERS, callers=2), "lalb", 0)
        assert shared.jain_index == pytest.approx(1.0, abs=0.05), "equally busy"
        single = play(Shared(base=OTHERS, callers=1), "lalb", 0)
        assert (single.jain_index, single.others_p99_latency_s) == (None, None)


def test_sketches_add_up():
    parts, whole = [LatencySketch(), LatencySketch(), LatencySketch()], LatencySketch()
    for number in range(1, 2001):
        parts[number % 2].add(number / 100)
        whole.add(number / 100)
    total = LatencySketch()
    for part in parts:
        total.take_in(part)
    assert total.count == whole.count
    assert total.mean == pytest.approx(whole.mean)
    assert total.variance == pytest.approx(whole.variance)
    assert [total.percentile(q) for q in (50, 99, 100)] == [whole.percentile(q) for q in (50, 99, 100)]
