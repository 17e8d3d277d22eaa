"""Experiments: what is run, that it comes out the same however it is run, and that the bounds are bounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import msgspec
import pytest

from hotset.errors import ConfigurationError, InvariantError, TraceError, UnknownNameError
from hotset.simulation import experiment
from hotset.simulation.engine import Fault
from hotset.simulation.experiment import (
    FIGURES,
    ClusterSpec,
    ExperimentSpec,
    RunResult,
    Variant,
    expected_requests,
    has_o3_limit,
    run_experiment,
    run_experiments,
)
from hotset.simulation.hardware import MIB, ModelCost
from hotset.simulation.presets import preset, synthetic
from hotset.simulation.statistics import confidence_interval
from hotset.simulation.workloads import Arrival, Popularity, Synthetic

PAPER = preset("paper")
SMALL = Synthetic(popularity=Popularity.zipf(8), rate_per_minute=60, minutes=1)
TWO_GPUS = ClusterSpec(gpus=2, models=ModelCost(memory_bytes=2000 * MIB, load_s=3.0, inference_s=1.0))


def small(**changes: object) -> ExperimentSpec:
    values = {"workloads": [SMALL], "policies": ["lb", "lalb", "lalb_o3"], "cluster": TWO_GPUS, "seeds": 2}
    return ExperimentSpec(**{**values, **changes})  # type: ignore[arg-type]


class Story:
    """A workload told by hand."""

    name = "story"
    duration_s = None

    def __init__(self, *arrivals: Arrival) -> None:
        self.told = arrivals
        self.functions = tuple(dict.fromkeys(arrival.function for arrival in arrivals))

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        return iter(self.told)


def test_two_requests_on_one_gpu_come_out_as_on_paper() -> None:
    cluster = ClusterSpec(gpus=1, models=ModelCost(memory_bytes=2000 * MIB, load_s=3.0, inference_s=1.0))
    workload = Story(Arrival(0.0, "a"), Arrival(1.0, "a"))

    (run,) = run_experiment(ExperimentSpec(workloads=[workload], policies=["lb"], cluster=cluster))

    # The first loads for 3 s and runs for 1 s; the second waits for 3 s and runs.
    assert run.mean_latency_s == 4.0
    assert (run.mean_queueing_s, run.mean_load_s, run.mean_inference_s) == (1.5, 1.5, 1.0)
    assert (run.requests, run.completed, run.miss_ratio, run.evictions) == (2, 2, 0.5, 0)
    assert (run.makespan_s, run.throughput_per_s) == (5.0, 0.4)
    assert (run.gpu_utilisation, run.gpu_busy, run.top_model_copies) == (0.4, 1.0, 1.0)
    # Were the model there already, both would take 1 s; the first use of a model is a miss even for a clairvoyant.
    assert (run.ideal_mean_latency_s, run.clairvoyant_miss_ratio) == (1.0, 0.5)


def test_a_reduction_compares_with_lb_on_the_same_arrivals_and_models() -> None:
    lb, _, o3 = run_experiment(small())

    assert o3.vs_lb is not None
    assert o3.vs_lb.latency_reduction == pytest.approx(1 - o3.mean_latency_s / lb.mean_latency_s)
    assert o3.vs_lb.miss_reduction == pytest.approx(1 - o3.miss_ratio / lb.miss_ratio)
    assert o3.vs_lb.speedup == pytest.approx(lb.mean_latency_s / o3.mean_latency_s)
    assert o3.vs_lb.speedup > 1
    assert lb.vs_lb is not None
    assert (lb.vs_lb.latency_reduction, lb.vs_lb.miss_reduction, lb.vs_lb.speedup) == (0, 0, 1)


def test_lb_is_run_quietly_for_comparison_unless_told_not_to() -> None:
    full = run_experiment(small())
    alone = run_experiment(small(policies=["lalb_o3"]))
    without = run_experiment(small(policies=["lalb_o3"], baseline=False))

    assert alone == full[2:]
    assert without == [msgspec.structs.replace(full[2], vs_lb=None)]


def test_a_policy_without_an_o3_limit_is_run_once_for_all_limits() -> None:
    spec = small(o3_limits=(0, 25), load_scales=(1.0, 0.1))

    assert not has_o3_limit("lalb")
    assert has_o3_limit("lalb_o3")
    assert [(each.policy, each.o3_limit, each.load_scale) for each in spec.variants()] == [
        ("lb", None, 1.0),
        ("lb", None, 0.1),
        ("lalb", None, 1.0),
        ("lalb", None, 0.1),
        ("lalb_o3", 0, 1.0),
        ("lalb_o3", 0, 0.1),
        ("lalb_o3", 25, 1.0),
        ("lalb_o3", 25, 0.1),
    ]


def test_without_overtaking_lalb_o3_is_lalb() -> None:
    lalb, limit_0 = run_experiment(small(policies=["lalb", "lalb_o3"], o3_limits=[0]))

    for figure in FIGURES:
        assert getattr(limit_0, figure) == getattr(lalb, figure)


def test_one_seed_gives_the_same_bytes_and_another_seed_gives_others() -> None:
    first, again, other = (
        msgspec.json.encode(run_experiment(small(seeds=1, first_seed=seed)), order="sorted") for seed in (3, 3, 4)
    )

    assert first == again
    assert first != other


def test_processes_change_nothing_but_the_time_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small(policies=["lalb_o3"])
    shares: list[float] = []
    alone = run_experiment(spec, jobs=1)
    monkeypatch.setattr(experiment, "_WORTH_PROCESSES", 0)

    assert run_experiment(spec, shares.append, jobs=2) == alone
    assert shares == [0.5, 1.0]


def test_an_error_in_another_process_is_told_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "_WORTH_PROCESSES", 0)
    back_in_time = Story(Arrival(1.0, "a"), Arrival(0.5, "a"))

    with pytest.raises(InvariantError, match="goes back in time"):
        run_experiment(small(workloads=[back_in_time], policies=["lb"]), jobs=2)


def test_a_bad_trace_found_by_another_process_still_names_file_and_line() -> None:
    class Broken(Story):
        def arrivals(self, seed: int) -> Iterator[Arrival]:
            raise TraceError("calls.csv", 7, "expected a number")

    (case,) = experiment._cases(small(workloads=[Broken(Arrival(0.0, "a"))], policies=["lb"], seeds=1))

    with pytest.raises(ConfigurationError, match=r"^calls\.csv, line 7: expected a number$"):
        experiment._play_elsewhere(case)


def test_several_experiments_give_what_each_gives_alone() -> None:
    specs = [small(policies=["lalb"]), small(policies=["lb"], seeds=1)]

    assert run_experiments(specs, jobs=1) == [run_experiment(spec, jobs=1) for spec in specs]


def test_progress_goes_from_nothing_to_all() -> None:
    shares: list[float] = []
    run_experiment(small(), shares.append, jobs=1)

    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_workload_too_long_to_keep_is_read_anew_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = run_experiment(small(seeds=1))
    monkeypatch.setattr(experiment, "_KEEP_ARRIVALS", 10)

    assert run_experiment(small(seeds=1)) == kept


def test_figures_are_means_over_seeds_with_students_t_intervals() -> None:
    (run,) = run_experiment(small(policies=["lalb"], seeds=3))
    latencies = [each.mean_latency_s for each in run.per_seed]

    assert [each.seed for each in run.per_seed] == [0, 1, 2]
    assert run.mean_latency_s == pytest.approx(statistics.fmean(latencies))
    assert run.ci95 is not None
    low, high = run.ci95["mean_latency_s"]
    # t for 2 degrees of freedom and 95 % is 4.3027.
    assert high - run.mean_latency_s == pytest.approx(4.302653 * statistics.stdev(latencies) / math.sqrt(3))
    assert run.mean_latency_s - low == pytest.approx(high - run.mean_latency_s)


def test_of_one_seed_no_interval_is_claimed() -> None:
    (run,) = run_experiment(small(policies=["lalb"], seeds=1))

    assert run.ci95 is None
    assert run.vs_lb is not None
    assert run.vs_lb.ci95 is None
    assert confidence_interval([1.0]) is None
    assert confidence_interval([2.0, 2.0]) == (2.0, 2.0)


@pytest.fixture(scope="module")
def papers() -> Sequence[RunResult]:
    """The paper's preset with two seeds."""
    workloads = [synthetic(size, PAPER) for size in PAPER.working_sets]
    return run_experiment(ExperimentSpec(workloads=workloads, policies=PAPER.policies, seeds=2), jobs=1)


def test_the_papers_results_come_out_of_the_rules(papers: Sequence[RunResult]) -> None:
    found = {(run.policy, run.working_set): run.vs_lb for run in papers}

    for size in (15, 25):
        assert found["lalb", size].latency_reduction >= 0.97  # type: ignore[union-attr]
    lalb, o3 = found["lalb", 35], found["lalb_o3", 35]
    assert lalb is not None
    assert o3 is not None
    assert lalb.latency_reduction >= 0.79
    assert 0.55 <= lalb.miss_reduction <= 0.80
    assert o3.latency_reduction >= 0.965
    assert o3.miss_reduction >= 0.65
    assert max(versus.speedup for versus in found.values() if versus) >= 45


def test_no_policy_beats_the_bounds(papers: Sequence[RunResult]) -> None:
    for run in papers:
        for seed in run.per_seed:
            assert seed.mean_latency_s >= seed.ideal_mean_latency_s
            assert seed.miss_ratio >= seed.clairvoyant_miss_ratio


def test_the_parts_of_latency_add_up_and_every_request_ends(papers: Sequence[RunResult]) -> None:
    for run in papers:
        assert run.mean_queueing_s + run.mean_load_s + run.mean_inference_s == pytest.approx(run.mean_latency_s)
        assert run.completed == run.requests == 1950
        assert run.p50_latency_s <= run.p95_latency_s <= run.p99_latency_s
        assert run.false_miss_ratio <= run.miss_ratio
        assert run.gpu_utilisation <= run.gpu_busy <= 1
        assert run.fairness >= 1


def test_a_lost_gpu_makes_everything_slower_and_loses_no_request() -> None:
    (whole,) = run_experiment(small(policies=["lalb_o3"]))
    faults = [Fault(time_s=10.0, gpu_id="sim/gpu:0", back_s=30.0)]
    (hurt,) = run_experiment(small(policies=["lalb_o3"], faults=faults))

    assert hurt.mean_latency_s > whole.mean_latency_s
    assert hurt.completed == hurt.requests == whole.requests


def test_a_cluster_that_never_comes_back_is_an_error_of_the_experiment() -> None:
    faults = [Fault(time_s=5.0, gpu_id=f"sim/gpu:{number}") for number in range(2)]

    with pytest.raises(ConfigurationError, match=r"every GPU failed and \d+ requests wait for ever"):
        run_experiment(small(policies=["lb"], seeds=1, faults=faults))


def test_a_model_larger_than_a_gpu_is_rejected_and_the_others_run() -> None:
    costs = {
        name: ModelCost(memory_bytes=memory * MIB, load_s=1.0, inference_s=0.5)
        for name, memory in {"fits": 1000, "too large": 9000}.items()
    }
    workload = Story(Arrival(0.0, "fits"), Arrival(1.0, "too large"), Arrival(2.0, "fits"))
    cluster = ClusterSpec(gpus=1, models=costs)

    (run,) = run_experiment(ExperimentSpec(workloads=[workload], policies=["lalb"], cluster=cluster))
    assert (run.requests, run.completed) == (3, 2)

    only_large = Story(Arrival(0.0, "too large"))
    with pytest.raises(ConfigurationError, match="no model fits"):
        run_experiment(ExperimentSpec(workloads=[only_large], policies=["lalb"], cluster=cluster))
    with pytest.raises(ConfigurationError, match="no row for function 'new'"):
        cluster.hardware(["fits", "new"], 0)


def test_where_nothing_ran_there_is_nothing_to_compare() -> None:
    costs = {
        "never called": ModelCost(memory_bytes=MIB, load_s=1.0, inference_s=0.5),
        "too large": ModelCost(memory_bytes=9000 * MIB, load_s=1.0, inference_s=0.5),
    }
    workload = Story(Arrival(0.0, "too large"))
    workload.functions = tuple(costs)

    (run,) = run_experiment(
        ExperimentSpec(workloads=[workload], policies=["lalb"], cluster=ClusterSpec(gpus=1, models=costs))
    )
    assert (run.completed, run.vs_lb) == (0, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "at least 1 seed"),
        ({"policies": []}, "at least one workload, policy"),
        ({"o3_limits": [-1]}, "must be 0 or more"),
        ({"load_scales": [-0.5]}, "must be 0 or more"),
    ],
)
def test_an_impossible_experiment_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        small(**changes)


def test_unknown_names_are_refused_before_anything_runs() -> None:
    with pytest.raises(UnknownNameError, match="unknown policy 'fifo'"):
        run_experiment(small(policies=["fifo"]))
    with pytest.raises(UnknownNameError, match="unknown eviction policy 'mru'"):
        run_experiment(small(evictions=["mru"]))
    with pytest.raises(UnknownNameError, match="unknown preset"):
        preset("other")


def test_how_long_a_workload_is_expected_to_be() -> None:
    assert expected_requests(SMALL) == 60
    assert expected_requests(Story(Arrival(0.0, "a"))) == math.inf


def test_variants_are_told_apart_by_what_they_run() -> None:
    assert Variant(policy="lb") == Variant(policy="lb", eviction="lru", o3_limit=None, load_scale=1.0)
    assert Variant(policy="lb") != Variant(policy="lb", load_scale=0.5)
