"""The core, driven by the engine, does what an independent and naive reading of the paper does: request by request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Costs, Reference, Served

from hotset.scheduling import holders
from hotset.scheduling.actions import Action, Load, Run, Unload
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import PolicySettings, make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.engine import Engine
from hotset.simulation.hardware import PAPER_GPU_MEMORY_BYTES, PAPER_GPUS, Hardware, ModelCost, make_gpus, paper_costs
from hotset.simulation.workloads import Arrival, Popularity, Process, Synthetic

PAPER_POLICIES = ("lb", "lalb", "lalb_o3")


class Witness(Engine):
    """An engine that notes what becomes of each request."""

    served: dict[int, Served]
    order: list[int]

    def _carry_out(self, actions: list[Action]) -> None:
        evicted: list[str] = []
        for action in actions:
            gpu = int(action.gpu_id.rpartition(":")[2])  # type: ignore[attr-defined]
            match action:
                case Unload():
                    evicted.append(action.model)
                case Load():
                    self._note(action.request_id, gpu, False, evicted)
                    evicted = []
                case Run(hit=True):
                    self._note(action.request_ids[0], gpu, True, evicted)
        super()._carry_out(actions)

    def _note(self, number: int, gpu: int, hit: bool, evicted: Sequence[str]) -> None:
        model = self._open[number].function
        cost = self.costs[model]
        start_s = self.now_s if hit else self.now_s + cost.load_s
        served = self.__dict__.setdefault("served", {})
        assert number not in served, "placed twice"
        served[number] = Served(number, gpu, hit, tuple(evicted), start_s + cost.inference_s)


def by_core(policy: str, hardware: Hardware, arrivals: Sequence[tuple[float, str]], o3_limit: int) -> list[Served]:
    """As ``Reference.simulate``: in the order in which placements on a GPU were decided."""
    engine = Witness(Scheduler(make_policy(policy, PolicySettings(o3_limit=o3_limit)), make_eviction("lru")), hardware)
    metrics = engine.run(Arrival(*arrival) for arrival in arrivals)
    assert metrics.completed == len(arrivals)
    return list(engine.served.values()) if arrivals else []


def by_reference(policy: str, hardware: Hardware, arrivals: Sequence[tuple[float, str]], o3_limit: int) -> list[Served]:
    costs = {name: Costs(cost.memory_bytes, cost.load_s, cost.inference_s) for name, cost in hardware.costs.items()}
    memory_bytes = hardware.gpus[0].memory_bytes
    return Reference(policy, len(hardware.gpus), memory_bytes, costs, o3_limit).simulate(arrivals)


# Multiples of 1/16 s add up exactly in binary floating point, so equal times are equal and ties are real ties.
ticks = st.integers(1, 64).map(lambda tick: tick / 16)
gaps = st.sampled_from((0.0, 0.0, 0.0625, 0.25, 0.5, 1.0, 3.0))


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Hardware, list[tuple[float, str]]]:
    count = draw(st.integers(1, 7))
    costs = {
        name: ModelCost(memory_bytes=draw(st.integers(1, 6)), load_s=draw(ticks) * 2, inference_s=draw(ticks) / 2)
        for name in "abcdefg"[:count]
    }
    hardware = Hardware(gpus=make_gpus(draw(st.integers(1, 5)), draw(st.integers(6, 12))), costs=costs)
    now_s, arrivals = 0.0, []
    for gap_s, name in draw(st.lists(st.tuples(gaps, st.sampled_from(sorted(costs))), max_size=60)):
        now_s += gap_s
        arrivals.append((now_s, name))
    return hardware, arrivals


@pytest.mark.parametrize("policy", PAPER_POLICIES)
@given(workload=workloads(), o3_limit=st.sampled_from((0, 1, 2, 25)))
@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_every_placement_eviction_and_end_is_the_papers(
    policy: str, workload: tuple[Hardware, list[tuple[float, str]]], o3_limit: int
):
    assert by_core(policy, *workload, o3_limit) == by_reference(policy, *workload, o3_limit)


def crowded(functions: int, gpus: int, *, exponent: float, rate: float, process: Process, seed: int) -> tuple:
    """The paper's models on some of its GPUs."""
    workload = Synthetic(
        popularity=Popularity.zipf(functions, exponent), rate_per_minute=rate, minutes=3, process=process
    )
    hardware = Hardware(gpus=make_gpus(gpus, PAPER_GPU_MEMORY_BYTES), costs=paper_costs(workload.functions, seed))
    return hardware, [(arrival.time_s, arrival.function) for arrival in workload.arrivals(seed)]


CASES = [
    {"functions": 35, "gpus": PAPER_GPUS, "exponent": 0.9, "rate": 325.0, "process": Process.EVEN, "seed": 1},
    {"functions": 15, "gpus": PAPER_GPUS, "exponent": 0.9, "rate": 325.0, "process": Process.EVEN, "seed": 2},
    {"functions": 3, "gpus": PAPER_GPUS, "exponent": 1.2, "rate": 450.0, "process": Process.POISSON, "seed": 3},
    {"functions": 12, "gpus": 4, "exponent": 0.5, "rate": 120.0, "process": Process.BURSTS, "seed": 4},
    {"functions": 60, "gpus": 20, "exponent": 1.2, "rate": 600.0, "process": Process.POISSON, "seed": 5},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['functions']}-functions-{case['gpus']}-gpus")
@pytest.mark.parametrize("policy", PAPER_POLICIES)
@pytest.mark.parametrize("many_copies", [0, holders.MANY_COPIES], ids=["indexed", "compared"])
def test_the_papers_cluster_runs_as_the_paper_says(
    case: Mapping[str, object], policy: str, many_copies: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(holders, "MANY_COPIES", many_copies)
    workload = crowded(**case)  # type: ignore[arg-type]
    ours, theirs = by_core(policy, *workload, 25), by_reference(policy, *workload, 25)
    assert ours == theirs


@given(workload=workloads())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_limit_of_no_skips_is_lalb(workload: tuple[Hardware, list[tuple[float, str]]]):
    assert by_core("lalb_o3", *workload, 0) == by_core("lalb", *workload, 0)
