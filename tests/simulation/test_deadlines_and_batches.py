"""Deadlines and batches in the simulator, worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from hotset.errors import ConfigurationError
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.engine import Engine, Fault
from hotset.simulation.experiment import ClusterSpec, ExperimentSpec, run_experiment
from hotset.simulation.hardware import MIB, Hardware, ModelCost, batching, make_gpus
from hotset.simulation.metrics import RunMetrics
from hotset.simulation.workloads import Arrival, Popularity, Synthetic

COST = ModelCost(memory_bytes=1, load_s=4.0, inference_s=1.0)
"""One model fits on a GPU."""


def play(
    arrivals: Sequence[tuple[float, str]],
    *faults: Fault,
    deadline_s: float | None = None,
    cost: ModelCost = COST,
) -> RunMetrics:
    """On one GPU, under LALB."""
    hardware = Hardware(gpus=make_gpus(1, 1), costs=dict.fromkeys("ab", cost))
    engine = Engine(Scheduler(make_policy("lalb"), make_eviction("lru")), hardware, faults, deadline_s=deadline_s)
    return engine.run(Arrival(time_s, function) for time_s, function in arrivals)


class TestDeadlines:
    def test_whoever_cannot_be_done_in_time_is_rejected(self) -> None:
        """a loads 0-4 and runs 4-5. The second and the third, of time 0, could not end before 6: at 4.5 that is known.
        The fourth, of time 5, runs 5-6."""
        metrics = play([(0.0, "a"), (0.0, "a"), (0.0, "a"), (5.0, "a")], deadline_s=5.5)

        assert (metrics.requests, metrics.completed, metrics.rejected) == (4, 2, 2)
        assert metrics.deadline_misses == 2
        assert metrics.makespan_s == 6.0
        assert metrics.goodput_per_s == metrics.throughput_per_s == pytest.approx(2 / 6)
        assert metrics.mean_latency_s == pytest.approx((5 + 1) / 2)

    def test_whoever_ends_too_late_is_no_goodput(self) -> None:
        """Runs take a second, this one took two when it was recorded."""
        hardware = Hardware(gpus=make_gpus(1, 1), costs={"a": COST})
        engine = Engine(Scheduler(make_policy("lalb"), make_eviction("lru")), hardware, deadline_s=5.5)
        metrics = engine.run([Arrival(0.0, "a", inference_s=2.0)])

        assert (metrics.completed, metrics.rejected, metrics.deadline_misses) == (1, 0, 1)
        assert metrics.goodput_per_s == 0.0

    def test_without_deadlines_all_throughput_is_good(self) -> None:
        metrics = play([(0.0, "a"), (0.0, "b")])

        assert (metrics.deadline_misses, metrics.rejected) == (0, 0)
        assert metrics.goodput_per_s == metrics.throughput_per_s

    def test_just_in_time_is_in_time(self) -> None:
        assert play([(0.0, "a")], deadline_s=5.0).deadline_misses == 0

    def test_when_every_gpu_is_lost_what_waits_expires_instead_of_waiting_for_ever(self) -> None:
        metrics = play([(0.0, "a"), (1.0, "b")], Fault(2.0, "sim/gpu:0"), deadline_s=10.0)

        assert (metrics.completed, metrics.rejected, metrics.deadline_misses) == (0, 2, 2)
        assert metrics.goodput_per_s == 0.0
        with pytest.raises(ConfigurationError, match="every GPU failed"):
            play([(0.0, "a"), (1.0, "b")], Fault(2.0, "sim/gpu:0"))

    def test_an_experiment_hands_its_deadline_to_every_run(self) -> None:
        spec = ExperimentSpec(
            workloads=[Synthetic(popularity=Popularity.zipf(6), rate_per_minute=120, minutes=1)],
            policies=["lb", "lalb_o3"],
            cluster=ClusterSpec(gpus=2, models=ModelCost(memory_bytes=3000 * MIB, load_s=3.0, inference_s=0.5)),
            deadline_s=6.0,
        )
        lb, o3 = run_experiment(spec, jobs=1)

        for run in (lb, o3):
            assert run.completed + run.rejected == run.requests
            assert run.deadline_misses >= run.rejected
        assert o3.goodput_per_s > lb.goodput_per_s
        with pytest.raises(ConfigurationError, match="a deadline must be above 0"):
            msgspec.structs.replace(spec, deadline_s=0.0)


class TestBatches:
    def test_waiting_requests_share_a_run(self) -> None:
        """Four at once, three in the first run: 4 + 1 x (1 + 2 x 0.25) = 5.5, the fourth alone until 6.5."""
        metrics = play([(0.0, "a")] * 4, cost=batching(COST, 3, 0.25))

        assert metrics.makespan_s == pytest.approx(6.5)
        assert metrics.mean_latency_s == pytest.approx((3 * 5.5 + 6.5) / 4)
        assert metrics.gpu_utilisation == pytest.approx(2.5 / 6.5)

    def test_a_request_is_held_back_for_others_while_its_model_is_resident(self) -> None:
        """The first runs 4-5. Of two at 10 and 10.25 the first is held until 10.5; both are done 1.25 s later."""
        cost = batching(COST, 3, 0.25, wait_s=0.5)
        metrics = play([(0.0, "a"), (10.0, "a"), (10.25, "a")], cost=cost)

        assert metrics.mean_latency_s == pytest.approx((5.0 + 1.75 + 1.5) / 3)
        assert metrics.makespan_s == pytest.approx(11.75)

    def test_a_full_batch_is_not_held(self) -> None:
        cost = batching(COST, 2, 0.25, wait_s=0.5)
        metrics = play([(0.0, "a"), (10.0, "a"), (10.125, "a")], cost=cost)

        assert metrics.makespan_s == pytest.approx(11.375)

    def test_others_do_not_join(self) -> None:
        metrics = play([(0.0, "a"), (0.0, "b")], cost=batching(COST, 3, 0.25))

        assert metrics.makespan_s == pytest.approx(10.0)

    def test_a_cluster_makes_all_its_models_batch(self) -> None:
        cluster = ClusterSpec(
            gpus=1, models=COST, gpu_memory_bytes=1, max_batch=8, batch_marginal=0.1, max_batch_wait_s=0.5
        )
        cost = cluster.hardware(["a"], seed=0).costs["a"]

        assert cost.max_batch == 8
        assert cost.run_s(8) == pytest.approx(1.7)
        (model,) = cluster.hardware(["a"], seed=0).models()
        assert (model.max_batch, model.max_batch_wait_s) == (8, 0.5)
