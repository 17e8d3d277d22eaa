"""Tuning finds what is better, says how sure it is, and stays where nothing is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import msgspec
import pytest

from hotset.errors import ConfigurationError, UnknownNameError
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.policies.interface import PolicySettings
from hotset.simulation import tuning
from hotset.simulation.candidates import SETTINGS, Candidate, heeds, other_settings, other_tiers, pairs
from hotset.simulation.hardware import MIB, Hardware, ModelCost, make_gpus
from hotset.simulation.tuning import Objective, Problem, Tuning, tune
from hotset.simulation.workloads import Arrival, Popularity, Process, Synthetic

LB = Candidate(policy="lb", eviction="lru")
LALB = Candidate(policy="lalb", eviction="lru")
O3 = Candidate(policy="lalb_o3", eviction="lru")
COST = ModelCost(memory_bytes=100 * MIB, load_s=2.0, inference_s=0.5)


class Written(msgspec.Struct, frozen=True):
    """A workload that is the same for every seed."""

    calls: Sequence[Arrival]
    name: str = "written"
    duration_s: float | None = None

    @property
    def functions(self) -> Sequence[str]:
        return list(dict.fromkeys(arrival.function for arrival in self.calls))

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        return iter(self.calls)


def machine(functions: Sequence[str], gpus: int = 2, models: int = 2) -> Hardware:
    """GPUs that hold so many models each."""
    return Hardware(gpus=make_gpus(gpus, models * COST.memory_bytes), costs=dict.fromkeys(functions, COST))


def crowded(requests: int = 400) -> Problem:
    """Six functions in turn on two GPUs that hold two models each: order and placement matter."""
    calls = [Arrival(index * 0.45, f"f{index * 7 % 6}") for index in range(requests)]
    workload = Written(calls)
    return Problem(workload=workload, hardware=lambda _: machine(workload.functions))


def drawn(minutes: float = 1.0) -> Problem:
    """Synthetic requests: the seed matters."""
    workload = Synthetic(popularity=Popularity.zipf(8), rate_per_minute=120, minutes=minutes, process=Process.POISSON)
    return Problem(workload=workload, hardware=lambda _: machine(workload.functions))


def test_the_better_policy_is_found_and_its_gain_is_of_other_seeds() -> None:
    result = tune(drawn(), LB, [LALB, O3], seeds=3)

    assert result.best in (LALB, O3)
    assert result.choice == result.best
    assert result.worthwhile
    assert result.seeded
    assert result.complete
    assert result.gain.values == 3
    assert result.gain.ci95 is not None
    assert 0 < result.gain.ci95[0] < result.gain.mean < result.gain.ci95[1]
    assert [score.candidate for score in result.scores][-1] == LB
    assert result.scores[0].objective == result.scores[0].mean_latency_s < result.scores[-1].mean_latency_s


def test_a_trace_that_no_seed_changes_is_judged_on_its_second_half() -> None:
    result = tune(crowded(), LB, [O3], seeds=5)

    assert not result.seeded
    assert result.best == O3
    assert result.scores[0].requests == 200
    assert result.gain.values == tuning.BLOCKS
    assert result.worthwhile


def test_a_gain_of_the_first_half_alone_is_noise() -> None:
    """Thrash while choosing, then one function alone: whatever was chosen, nothing is left to be gained."""
    busy = [Arrival(index * 0.45, f"f{index * 7 % 6}") for index in range(200)]
    calm = [Arrival(1000.0 + index * 2.0, "f0") for index in range(200)]
    workload = Written([*busy, *calm])
    result = tune(Problem(workload=workload, hardware=lambda _: machine(workload.functions)), LB, [O3])

    assert result.best == O3
    assert result.gain.ci95 is not None
    assert result.gain.ci95[0] <= 0
    assert not result.worthwhile
    assert result.choice == LB


def test_the_current_setting_stays_when_it_is_the_best() -> None:
    result = tune(drawn(), O3, [LB], seeds=2)

    assert result.best == result.choice == O3
    assert (result.gain.mean, result.gain.ci95) == (0.0, (0.0, 0.0))


def test_of_one_seed_nothing_is_known() -> None:
    result = tune(drawn(), LB, [O3], seeds=1)

    assert result.gain.mean > 0
    assert result.gain.ci95 is None
    assert not result.worthwhile


def test_equal_arguments_give_equal_results() -> None:
    first, second = (tune(drawn(0.5), LB, pairs(LB, ["lalb", "lalb_o3"], ["lru", "lfu"]), seeds=2) for _ in range(2))

    assert first == second
    assert first != tune(drawn(0.5), LB, pairs(LB, ["lalb", "lalb_o3"], ["lru", "lfu"]), seeds=2, first_seed=7)


@pytest.mark.parametrize("objective", [Objective.P99, Objective.GOODPUT])
def test_other_objectives(objective: Objective) -> None:
    deadline_s = 5.0 if objective is Objective.GOODPUT else None
    problem = msgspec.structs.replace(crowded(), deadline_s=deadline_s)
    result = tune(problem, LB, [O3], objective)

    assert result.best == O3
    assert result.worthwhile
    best, worst = result.scores
    if objective is Objective.P99:
        assert best.objective == best.p99_latency_s < worst.objective
    else:
        assert 1 >= best.objective > worst.objective >= 0
        assert result.gain.mean == pytest.approx(best.objective - worst.objective, abs=0.3)


def test_goodput_needs_a_deadline() -> None:
    with pytest.raises(ConfigurationError, match="goodput counts answers within a deadline"):
        tune(crowded(), LB, [], Objective.GOODPUT)


def test_a_workload_without_requests_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no request in this workload"):
        tune(Problem(workload=Written([]), hardware=lambda _: machine(["f0"])), LB, [])


def test_a_single_request_says_nothing() -> None:
    workload = Written([Arrival(0.0, "f0")])
    result = tune(Problem(workload=workload, hardware=lambda _: machine(["f0"])), LB, [O3])

    assert result.gain.values == 0
    assert result.choice == LB


@pytest.fixture
def short_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "FIRST_PREFIX", 20)


def halved(**how: object) -> Tuning:
    """LB against many on 400 requests, of which 200 are for choosing."""
    o3 = pairs(LB, ["lalb_o3"], ["lru", "hotset"])
    tried = [*pairs(LB, ["lalb"], ["lru", "hotset"]), *o3, *(each for one in o3 for each in other_settings(one))]
    return tune(crowded(), LB, tried, **how)  # type: ignore[arg-type]


@pytest.mark.usefixtures("short_prefixes")
def test_the_worse_half_is_given_up_after_each_prefix_but_never_the_current() -> None:
    heard: list[float] = []
    result = halved(progress=heard.append)

    lengths = [score.requests for score in result.scores]
    assert lengths == sorted(lengths, reverse=True)
    assert set(lengths) == {20, 60, 180, 200}
    assert lengths.count(200) == tuning.FINALISTS
    (current,) = (score for score in result.scores if score.candidate == LB)
    assert current.requests == 200
    assert heard == sorted(heard)
    assert heard[-1] <= 1


@pytest.mark.usefixtures("short_prefixes")
def test_when_time_is_up_the_longest_finished_comparison_counts() -> None:
    """The clock goes on by a second with every look: the first comparison takes longer than there is."""
    clock = itertools.count()
    result = halved(seconds=10, clock=lambda: float(next(clock)))

    assert not result.complete
    assert {score.requests for score in result.scores} == {20}
    assert result.gain.values == tuning.BLOCKS


@pytest.mark.usefixtures("short_prefixes")
def test_the_best_are_refined_one_kind_of_setting_after_the_other() -> None:
    """Loads that overlap with runs beat any policy; the policy's settings are tried on top of that."""
    result = halved(refine=[lambda best: other_tiers(best, 0), other_settings])

    assert result.best.overlap
    assert result.best.policy != "lb"
    assert result.worthwhile
    assert result.complete
    refined = [score.candidate for score in result.scores if score.candidate.overlap and score.candidate.changed()]
    assert refined
    assert {score.requests for score in result.scores if score.candidate == result.best} == {200}


@pytest.mark.usefixtures("short_prefixes")
def test_a_refinement_for_which_there_is_no_time_changes_nothing() -> None:
    looks = itertools.count()
    tune(crowded(), LB, [O3], clock=lambda: float(next(looks)))
    clock = itertools.count()
    enough_s = next(looks) / tuning.CHOOSING_SHARE * 2
    result = tune(crowded(), LB, [O3], refine=[other_settings], seconds=enough_s, clock=lambda: float(next(clock)))

    assert not result.complete
    assert result.best == O3


def test_every_policy_meets_every_eviction_on_the_machine_as_it_is_used_now() -> None:
    current = Candidate(policy="lb", eviction="lru", settings=PolicySettings(o3_limit=1), overlap=True)
    tried = pairs(current, ["lalb", "lalb_o3"], ["lru", "lfu"])

    assert [(each.policy, each.eviction) for each in tried] == [
        ("lalb", "lru"),
        ("lalb", "lfu"),
        ("lalb_o3", "lru"),
        ("lalb_o3", "lfu"),
    ]
    assert all(each.overlap and not each.changed() for each in tried)


def test_settings_are_tried_with_the_policies_that_heed_them() -> None:
    assert heeds("lalb_o3", "o3_limit")
    assert not heeds("lalb", "o3_limit")
    assert heeds("mqfq_sticky", "overrun_s")
    assert not heeds("hotset", "overrun_s")
    assert other_settings(LALB) == []
    assert [each.changed()["o3_limit"] for each in other_settings(O3)] == list(SETTINGS["o3_limit"])
    assert Candidate(policy="lb", eviction="lru", settings=PolicySettings(max_wait_s=1.0)).changed() == {
        "max_wait_s": 1.0
    }


def test_tiers_are_tried_together() -> None:
    tried = {(each.overlap, each.prefetch_recurring, each.host_memory_bytes) for each in other_tiers(LB, 100)}

    lanes = ((False, False), (True, False), (True, True))
    assert tried == {(*each, size) for each in lanes for size in (0, 50, 100)}
    assert len(other_tiers(LB, 0)) == 3
    config = Candidate(policy="lb", eviction="lru", overlap=True, host_memory_bytes=7).applied_to(
        SchedulerConfig(burst_s=0.5)
    )
    assert (config.burst_s, config.overlap, config.host_memory_bytes) == (0.5, True, 7)


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="lalb_o3"):
        pairs(LB, ["nobody"], ["lru"])
    with pytest.raises(UnknownNameError, match="lru"):
        pairs(LB, ["lb"], ["nobody"])
