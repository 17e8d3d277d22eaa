"""The default policy under more models than it looks at in one decision."""

from __future__ import annotations

from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.engine import Engine
from hotset.simulation.hardware import PAPER_GPU_MEMORY_BYTES, Hardware, make_gpus, paper_costs
from hotset.simulation.metrics import RunMetrics
from hotset.simulation.workloads import Popularity, Synthetic


def served(policy: str, eviction: str) -> RunMetrics:
    workload = Synthetic(popularity=Popularity.zipf(100, 0.5), rate_per_minute=325, minutes=4)
    hardware = Hardware(gpus=make_gpus(6, PAPER_GPU_MEMORY_BYTES), costs=paper_costs(workload.functions, 3))
    return Engine(Scheduler(make_policy(policy), make_eviction(eviction)), hardware).run(workload.arrivals(3))


def test_twice_the_load_of_a_hundred_models_is_served_sooner_than_in_order() -> None:
    crowd, plain = served("hotset", "hotset"), served("lb", "lru")
    assert crowd.completed == crowd.requests == 1300
    assert crowd.mean_latency_s < plain.mean_latency_s
    assert crowd.miss_ratio < plain.miss_ratio
