"""The thrash guard's promise: under any overload the default policy's goodput is at least plain FIFO's (``lb``)."""

from __future__ import annotations

import math

import pytest

from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.engine import Engine
from hotset.simulation.hardware import PAPER_GPU_MEMORY_BYTES, PAPER_GPUS, Hardware, make_gpus, paper_costs
from hotset.simulation.metrics import RunMetrics
from hotset.simulation.workloads import Popularity, Process, Synthetic

SEED = 1
PATIENCE_S = 10.0


def overloaded(functions: int, times: float) -> Synthetic:
    """So many times the requests that the paper's 12 GPUs could run if nothing ever had to be loaded."""
    popularity = Popularity.zipf(functions)
    costs = paper_costs(popularity.names, SEED)
    named = zip(popularity.names, popularity.weights, strict=True)
    mean_run_s = sum(weight * costs[name].inference_s for name, weight in named) / sum(popularity.weights)
    rate_per_minute = times * 60 * PAPER_GPUS / mean_run_s
    return Synthetic(popularity=popularity, rate_per_minute=rate_per_minute, minutes=2, process=Process.POISSON)


def play(policy: str, eviction: str, workload: Synthetic, *, told_s: float | None, patience_s: float) -> RunMetrics:
    """``told_s``: the deadline that the scheduler knows of; ``patience_s``: within which an answer is good."""
    hardware = Hardware(gpus=make_gpus(PAPER_GPUS, PAPER_GPU_MEMORY_BYTES), costs=paper_costs(workload.functions, SEED))
    engine = Engine(Scheduler(make_policy(policy), make_eviction(eviction)), hardware, deadline_s=told_s)
    engine.recorder.deadline_s = patience_s
    return engine.run(workload.arrivals(SEED))


@pytest.mark.parametrize("functions", [35, 100])
@pytest.mark.parametrize("times", [1.2, 2.0, 3.0])
@pytest.mark.parametrize(
    ("told_s", "patience_s"),
    [
        pytest.param(None, math.inf, id="no deadline"),
        pytest.param(None, PATIENCE_S, id="deadline nobody tells"),
        pytest.param(PATIENCE_S, PATIENCE_S, id="deadline, hopeless ones refused"),
    ],
)
def test_goodput_is_never_below_that_of_order_of_arrival(
    functions: int, times: float, told_s: float | None, patience_s: float
) -> None:
    workload = overloaded(functions, times)
    fifo = play("lb", "lru", workload, told_s=told_s, patience_s=patience_s)
    ours = play("hotset", "hotset", workload, told_s=told_s, patience_s=patience_s)

    assert fifo.makespan_s > 1.5 * workload.duration_s or fifo.rejected > fifo.requests / 2, "FIFO is overloaded"
    assert ours.goodput_per_s >= fifo.goodput_per_s
    good, fifos_good = (run.goodput_per_s * run.makespan_s for run in (ours, fifo))
    assert good >= fifos_good, "in number too, not just sooner"
