"""The simulator around the core: virtual time, figures checked by hand, faults."""

from __future__ import annotations

import msgspec
import pytest

from hotset.errors import ConfigurationError, InvariantError
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.engine import Engine, Fault
from hotset.simulation.experiment import ClusterSpec
from hotset.simulation.hardware import (
    PAPER_GPU_MEMORY_BYTES,
    RELOAD_FIXED_S,
    Hardware,
    ModelCost,
    make_gpus,
    paper_costs,
)
from hotset.simulation.metrics import RunMetrics
from hotset.simulation.workloads import Arrival, Popularity, Process, Synthetic
from hotset.vocabulary import Gpu

COST = ModelCost(memory_bytes=1, load_s=4.0, inference_s=1.0)


def engine(
    *faults: Fault, policy: str = "lalb", gpus: int = 1, memory: int = 1, config: SchedulerConfig | None = None
) -> Engine:
    """Models ``a`` to ``d`` take 1 byte, 4 s to load and 1 s to run."""
    hardware = Hardware(gpus=make_gpus(gpus, memory), costs=dict.fromkeys("abcd", COST))
    return Engine(Scheduler(make_policy(policy), make_eviction("lru"), config), hardware, faults)


def play(simulator: Engine, *arrivals: tuple[float, str]) -> RunMetrics:
    return simulator.run(Arrival(time_s, function) for time_s, function in arrivals)


def test_one_request_takes_a_load_and_a_run():
    metrics = play(engine(), (2.0, "a"))
    assert (metrics.requests, metrics.completed) == (1, 1)
    assert metrics.mean_latency_s == 5.0
    assert (metrics.mean_queueing_s, metrics.mean_load_s, metrics.mean_inference_s) == (0.0, 4.0, 1.0)
    assert (metrics.miss_ratio, metrics.evictions) == (1.0, 0)
    assert metrics.makespan_s == 7.0


def test_every_figure_of_a_small_run_is_what_one_works_out_by_hand():
    # g0: a loads 0-4, runs 4-5; b waits, evicts a, loads 5-9, runs 9-10; a again loads 10-14, runs 14-15.
    metrics = play(engine(), (0.0, "a"), (1.0, "b"), (3.0, "a"))
    latencies = (5.0, 9.0, 12.0)
    mean_s = sum(latencies) / 3
    assert metrics.mean_latency_s == pytest.approx(mean_s)
    assert metrics.latency_variance == pytest.approx(sum((value - mean_s) ** 2 for value in latencies) / 3)
    assert metrics.p50_latency_s == pytest.approx(9.0, rel=0.001)
    assert metrics.p99_latency_s == pytest.approx(12.0, rel=0.001)
    assert metrics.mean_queueing_s == pytest.approx(mean_s - 5.0)
    assert metrics.throughput_per_s == pytest.approx(3 / 15)
    assert metrics.miss_ratio == 1.0
    assert metrics.evictions == 2
    assert metrics.gpu_utilisation == pytest.approx(3 / 15)
    assert metrics.gpu_busy == 1.0
    assert metrics.fairness == pytest.approx(9.0 / mean_s)
    assert metrics.top_model_copies == pytest.approx((5.0 + 5.0) / 15), "a is there from 0 to 5 and from 10 to 15"


def test_a_false_miss_is_a_load_of_what_another_gpu_holds():
    metrics = play(engine(policy="lb", gpus=2), (0.0, "a"), (0.0, "a"))
    assert (metrics.miss_ratio, metrics.false_miss_ratio) == (1.0, 0.5)
    assert metrics.top_model_copies == pytest.approx(2.0)


def test_what_ends_at_the_moment_of_an_arrival_has_ended_before_it():
    metrics = play(engine(), (0.0, "a"), (5.0, "a"))
    assert metrics.mean_queueing_s == 0.0
    assert metrics.miss_ratio == 0.5


def test_a_recorded_duration_counts_for_more_than_the_profile():
    recorded = [Arrival(0.0, "a", inference_s=2.5), Arrival(0.0, "a")]
    metrics = engine().run(recorded)
    assert metrics.mean_inference_s == pytest.approx((2.5 + 1.0) / 2)
    assert metrics.makespan_s == 7.5


def test_loads_are_as_slow_as_the_machine_is_when_they_begin():
    # a loads 0-4 and runs 4-5; b waits for the only GPU, loads 5-13 and runs 13-14.
    scheduler = Scheduler(make_policy("lalb"), make_eviction("lru"))
    hardware = Hardware(gpus=make_gpus(1, 1), costs=dict.fromkeys("ab", COST))
    simulator = Engine(scheduler, hardware, load_pace=lambda time_s: 1.0 if time_s < 5.0 else 2.0)

    metrics = play(simulator, (0.0, "a"), (1.0, "b"))

    assert (metrics.makespan_s, metrics.mean_load_s) == (14.0, 6.0)


def test_requests_that_join_a_run_cost_their_share():
    cost = msgspec.structs.replace(COST, batch_marginal=0.25)
    hardware = Hardware(gpus=make_gpus(1, 1), costs={"a": cost})
    config = SchedulerConfig(burst_s=10.0)

    def makespan_s(*arrivals: Arrival) -> float:
        scheduler = Scheduler(make_policy("lb"), make_eviction("lru"), config)
        return Engine(scheduler, hardware).run(arrivals).makespan_s

    assert makespan_s(*[Arrival(0.0, "a")] * 3) == 4.0 + 1.5
    recorded = [Arrival(0.0, "a", inference_s=2.0), Arrival(0.0, "a", inference_s=4.0), Arrival(0.0, "a")]
    assert makespan_s(*recorded) == 4.0 + 2.0 + (4.0 + 1.0) * 0.25


def test_a_refused_request_has_no_latency():
    simulator = engine(config=SchedulerConfig(max_queue=1))
    metrics = play(simulator, (0.0, "a"), (0.0, "a"), (0.0, "a"))
    assert (metrics.requests, metrics.completed) == (3, 2)
    assert simulator.recorder.rejected == 1


def test_no_arrivals_no_figures():
    metrics = play(engine())
    assert (metrics.requests, metrics.mean_latency_s, metrics.fairness) == (0, 0.0, 1.0)


def test_progress_is_heard_of_now_and_then():
    heard: list[float] = []
    engine().run((Arrival(float(second), "a") for second in range(9_000)), heard.append)
    assert heard == [4095.0, 8191.0]


def test_a_workload_that_goes_back_in_time_is_refused():
    with pytest.raises(InvariantError, match=r"goes back in time at 1.0 s"):
        play(engine(), (2.0, "a"), (1.0, "a"))


class TestFaults:
    def test_what_a_lost_gpu_worked_on_is_done_elsewhere(self):
        metrics = play(engine(Fault(2.0, "sim/gpu:0"), gpus=2), (0.0, "a"))
        assert metrics.completed == 1
        assert metrics.mean_latency_s == 2.0 + 4.0 + 1.0
        assert metrics.miss_ratio == 2.0, "two loads for one request"

    def test_a_gpu_comes_back_empty(self):
        metrics = play(engine(Fault(6.0, "sim/gpu:0", back_s=8.0)), (0.0, "a"), (7.0, "a"))
        assert metrics.mean_latency_s == pytest.approx((5.0 + 6.0) / 2)
        assert metrics.top_model_copies == pytest.approx((6.0 + 5.0) / 13)

    def test_it_can_be_lost_in_the_middle_of_a_run(self):
        metrics = play(engine(Fault(4.5, "sim/gpu:0", back_s=20.0)), (0.0, "a"))
        assert metrics.makespan_s == 25.0
        # It loaded 0-4 and ran until 4.5; then 20-25.
        assert metrics.gpu_utilisation == pytest.approx(1.5 / 25)
        assert metrics.gpu_busy == pytest.approx((4.5 + 5.0) / 25)
        assert metrics.mean_inference_s == pytest.approx(1.5)

    def test_what_a_gpu_did_until_it_was_lost_counts_and_no_more(self):
        metrics = play(engine(Fault(3.0, "sim/gpu:0", back_s=20.0)), (0.0, "a"))
        assert metrics.gpu_busy == pytest.approx((3.0 + 5.0) / 25)

    def test_requests_that_nobody_can_serve_any_more_are_an_error(self):
        with pytest.raises(ConfigurationError, match="every GPU failed and 1 requests wait for ever"):
            play(engine(Fault(2.0, "sim/gpu:0")), (0.0, "a"))

    @pytest.mark.parametrize(
        "faults",
        [
            [Fault(1.0, "sim/gpu:9")],
            [Fault(1.0, "sim/gpu:0"), Fault(2.0, "sim/gpu:0")],
            [Fault(5.0, "sim/gpu:0", back_s=7.0), Fault(1.0, "sim/gpu:0", back_s=6.0)],
        ],
        ids=["unknown", "gone for good", "not back yet"],
    )
    def test_only_a_gpu_that_is_there_can_fail(self, faults: list[Fault]):
        with pytest.raises(ConfigurationError, match=r"sim/gpu:\d cannot fail at \d s: it is not there then"):
            engine(*faults)

    @pytest.mark.parametrize("policy", ["lb", "lalb", "lalb_o3"])
    def test_no_request_is_lost_however_many_gpus_are(self, policy: str):
        faults = [
            Fault(10.0 * number + 3.3, f"sim/gpu:{number % 4}", back_s=10.0 * number + 11.0) for number in range(30)
        ]
        workload = Synthetic(popularity=Popularity.zipf(4), rate_per_minute=90.0, minutes=5, process=Process.POISSON)
        costs = dict.fromkeys(workload.functions, COST)
        scheduler = Scheduler(make_policy(policy), make_eviction("lru"), SchedulerConfig(max_attempts=10))
        simulator = Engine(scheduler, Hardware(gpus=make_gpus(4, 2), costs=costs), faults)
        metrics = simulator.run(workload.arrivals(1))
        assert metrics.completed == metrics.requests > 400


class TestDeterminism:
    def run(self, seed: int) -> bytes:
        workload = Synthetic(popularity=Popularity.zipf(20), rate_per_minute=200.0, minutes=2)
        hardware = Hardware(gpus=make_gpus(6, PAPER_GPU_MEMORY_BYTES), costs=paper_costs(workload.functions, seed))
        simulator = Engine(Scheduler(make_policy("lalb_o3"), make_eviction("lru")), hardware)
        return msgspec.json.encode(simulator.run(workload.arrivals(seed)))

    def test_one_seed_one_result_to_the_byte(self):
        assert self.run(7) == self.run(7)

    def test_another_seed_another_result(self):
        assert self.run(7) != self.run(8)


class TestTiers:
    """Loads take 4 s, restores 0.5 s, offloads 0.25 s, runs 1 s; a GPU holds one model."""

    cost = ModelCost(memory_bytes=1, load_s=4.0, inference_s=1.0, restore_s=0.5, offload_s=0.25)

    def engine(self, *faults: Fault, policy: str = "lalb", gpus: int = 1, memory: int = 1, **config: object) -> Engine:
        hardware = Hardware(gpus=make_gpus(gpus, memory), costs=dict.fromkeys("abcd", self.cost))
        settings = SchedulerConfig(**config)  # type: ignore[arg-type]
        return Engine(Scheduler(make_policy(policy), make_eviction("lru"), settings), hardware, faults)

    def test_a_model_comes_back_from_host_memory(self):
        # a loads 0-4, runs 4-5; b: a leaves 5-5.25, loads 5.25-9.25, runs -10.25; a: b leaves, back at 11, runs -12.
        metrics = play(self.engine(host_memory_bytes=9), (0.0, "a"), (5.0, "b"), (10.25, "a"))
        assert metrics.makespan_s == 12.0
        assert (metrics.restores, metrics.offloads, metrics.evictions) == (1, 2, 0)
        assert metrics.miss_ratio == 1.0, "a restore is a miss too"
        assert metrics.mean_load_s == pytest.approx((4.0 + 4.25 + 0.75) / 3)
        assert metrics.top_model_copies == pytest.approx((5.0 + 1.75) / 12.0), "a while it is on the GPU"

    def test_what_finds_no_room_on_the_host_is_unloaded(self):
        metrics = play(
            self.engine(host_memory_bytes=1), *((10.0 * number, name) for number, name in enumerate("abcba"))
        )
        assert (metrics.restores, metrics.offloads) == (1, 3)
        assert metrics.evictions == 2

    def test_without_tiers_nothing_is_said_of_them(self):
        assert b"restores" not in msgspec.json.encode(play(self.engine(), (0.0, "a")))

    def test_a_load_overlaps_with_a_run(self):
        # a loads 0-4 and runs 4-5 and 5-6; b, asked for at 4, loads 4-8 and runs 8-9.
        metrics = play(self.engine(overlap=True, memory=2), (0.0, "a"), (4.5, "a"), (4.5, "b"))
        assert metrics.makespan_s == 4.5 + 4.0 + 1.0
        assert (metrics.prefetches, metrics.useless_prefetches) == (1, 0)

    def test_a_load_is_shorter_where_another_gpu_of_the_node_has_the_model(self):
        cost = msgspec.structs.replace(self.cost, reload_s=1.0)
        gpus = [*make_gpus(2, 1), Gpu(gpu_id="far/gpu:0", memory_bytes=1, node="far")]
        arrivals = (0.0, "a"), (5.0, "a"), (5.0, "a"), (5.0, "a")
        for host_bytes, far, loads in (9, 1, (4.0, 1.0)), (9, 2, (4.0, 1.0, 4.0)), (0, 1, (4.0, 4.0)):
            hardware = Hardware(gpus=gpus[: far + 1], costs={"a": cost if host_bytes else self.cost})
            config = SchedulerConfig(host_memory_bytes=host_bytes)
            simulator = Engine(Scheduler(make_policy("lb"), make_eviction("lru"), config), hardware)
            metrics = play(simulator, *arrivals[: far + 2])
            assert metrics.mean_load_s * metrics.requests == pytest.approx(sum(loads))

    def test_a_load_is_as_long_as_ever_once_nobody_has_the_model(self):
        cost = msgspec.structs.replace(self.cost, reload_s=1.0)
        fault = Fault(8.0, "sim/gpu:0", back_s=9.0)
        hardware = Hardware(gpus=make_gpus(2, 1), costs={"a": cost})
        config = SchedulerConfig(host_memory_bytes=9)
        simulator = Engine(Scheduler(make_policy("lb"), make_eviction("lru"), config), hardware, [fault])
        metrics = play(simulator, (0.0, "a"), (10.0, "a"))
        assert metrics.mean_load_s == 4.0

    def test_a_lost_gpu_forgets_what_was_parked_for_it(self):
        fault = Fault(20.0, "sim/gpu:0", back_s=21.0)
        metrics = play(self.engine(fault, host_memory_bytes=9), (0.0, "a"), (10.0, "b"), (30.0, "a"))
        assert (metrics.restores, metrics.offloads) == (0, 1)

    def test_copies_in_flight_on_a_lost_gpu_never_end(self):
        fault = Fault(10.1, "sim/gpu:0", back_s=11.0)
        metrics = play(self.engine(fault, host_memory_bytes=9), (0.0, "a"), (10.0, "b"))
        assert metrics.completed == 2
        assert metrics.makespan_s == 11.0 + 4.0 + 1.0

    @pytest.mark.parametrize("policy", ["lb", "lalb", "lalb_o3", "hotset"])
    def test_two_runs_are_equal(self, policy: str):
        def run() -> bytes:
            workload = Synthetic(
                popularity=Popularity.zipf(8), rate_per_minute=90.0, minutes=3, process=Process.POISSON
            )
            hardware = Hardware(gpus=make_gpus(2, 2), costs=dict.fromkeys(workload.functions, self.cost))
            config = SchedulerConfig(host_memory_bytes=3, overlap=True)
            scheduler = Scheduler(make_policy(policy), make_eviction("lru"), config)
            return msgspec.json.encode(Engine(scheduler, hardware).run(workload.arrivals(1)))

        assert run() == run()


def test_a_cluster_with_host_memory_knows_what_copies_take():
    cluster = ClusterSpec(gpus=1, gpu_memory_bytes=100, host_memory_bytes=50, copy_bytes_per_s=20.0, models=COST)
    (cost,) = cluster.hardware(["a"], 0).costs.values()
    assert (cost.restore_s, cost.offload_s) == (0.05, 0.05)
    assert cost.reload_s == pytest.approx(0.05 + RELOAD_FIXED_S)
    known = msgspec.structs.replace(COST, restore_s=3.0)
    (cost,) = msgspec.structs.replace(cluster, models=known).hardware(["a"], 0).costs.values()
    assert cost.restore_s == 3.0


def test_copies_are_kept_and_bounded_as_the_cluster_says():
    spec = ClusterSpec(gpus=3, gpu_memory_bytes=2, models=COST, min_copies=1, max_copies=2)
    simulator = Engine(Scheduler(make_policy("lb"), make_eviction("lru")), spec.hardware("ab", 0))
    metrics = play(simulator, *((10.0, "a") for _ in range(9)))
    assert metrics.completed == 9
    assert metrics.miss_ratio == pytest.approx(1 / 9), "one copy was there, one had to be loaded"
    assert simulator.scheduler.cache.copies("a") == 2
    assert simulator.scheduler.cache.copies("b") == 1, "never asked for"
