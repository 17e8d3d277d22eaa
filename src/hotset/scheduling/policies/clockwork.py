"""Clockwork: predictable times, the tightest deadline first, and loads for the models with most demand unmet.

"Serving DNNs like Clockwork: Performance Predictability from the Bottom Up", Gujarati et al., OSDI 2020; the authors'
controller is public. Taken from them: one controller decides everything, by predicted times; of the requests whose
model is on a GPU the one that must start soonest runs first; a request that cannot meet its deadline is refused, not
served late; what is loaded next is the model whose demand most exceeds what the GPUs that hold it can serve.

Where it differs: actions are not sent ahead with windows in which they may start, as here a GPU is asked to work
when it is free to; batches are joined by the core, not searched for among batch sizes; refusals are the core's, for all
policies (``admission.py``). A GPU either loads or runs unless there are two lanes. A holder's time is divided among the
models waited for on it by their demand, over one load's time; which horizon Clockwork takes, and how often it revises
load priorities, could not be confirmed. A load is chosen by a look at each model waited for, and at up to
``MOST_COUNTED`` of the requests for those that may be the one.
"""

from __future__ import annotations

import math
from itertools import islice

from hotset.scheduling.cluster import Cluster, GpuState
from hotset.scheduling.policies.interface import Placement, Rule

MOST_COUNTED = 64


class Clockwork:
    """Earliest required start first among hits; then a load for the model with most unmet demand."""

    name = "clockwork"

    def next_placement(self, cluster: Cluster, now_s: float) -> Placement | None:
        return self._run(cluster) or self._load(cluster, now_s)

    def _run(self, cluster: Cluster) -> Placement | None:
        """The hit that must start soonest; without deadlines, the oldest."""
        best: tuple[float, int] | None = None
        placement = None
        head, lines = cluster.queue.head(), cluster.queue.models
        for model in lines if len(lines) < len(cluster.idle) else cluster.idle_residents():
            line = lines.get(model)
            gpu = cluster.idle_holder(model) if line is not None else None
            if line is None or gpu is None:
                continue
            entry = line[0]
            deadline_s = entry.request.deadline_s
            latest_s = math.inf if deadline_s is None else deadline_s - cluster.inference_s(model, gpu)
            if best is None or (latest_s, entry.seq) < best:
                best = (latest_s, entry.seq)
                placement = Placement(entry, gpu, Rule.SOONEST_DUE, skips=entry is not head)
        return placement

    def _load(self, cluster: Cluster, now_s: float) -> Placement | None:
        """The model whose demand is unmet most, on the GPU idle longest; of equals the one waited for longest."""
        demands, held, longest_run_s = _Demands(cluster, now_s), cluster.cache.held, cluster.profiles.longest_run_s
        chosen, most_s = None, 0.0
        for model, line in cluster.queue.models.items():
            if len(line) * longest_run_s <= most_s and (chosen is not None or model in held):
                continue  # its demand is no more than that
            gpu = cluster.first_idle(model)
            if gpu is None:
                continue
            unmet_s = _unmet_s(cluster, model, gpu, demands, most_s)
            if unmet_s > most_s or (chosen is None and model not in held):
                chosen, most_s = (model, gpu), max(unmet_s, 0.0)
        if chosen is None:
            return None
        model, gpu = chosen
        entry = cluster.queue.models[model][0]
        return Placement(entry, gpu, Rule.MOST_UNMET, skips=entry is not cluster.queue.head())


class _Demands(dict[str, float]):
    """Of each model, once it is asked for: GPU seconds of the waiting requests that a load begun now would still serve
    in time."""

    def __init__(self, cluster: Cluster, now_s: float) -> None:
        self._cluster = cluster
        self._gpu = next(iter(cluster.idle))
        self._now_s = now_s

    def __missing__(self, model: str) -> float:
        cluster, gpu, line = self._cluster, self._gpu, self._cluster.queue.models.get(model)
        demand_s = 0.0
        if line is not None:
            run_s = cluster.inference_s(model, gpu)
            earliest_s = self._now_s + cluster.load_s(model, gpu) + run_s
            deadlines = [entry.request.deadline_s for entry in islice(line, MOST_COUNTED)]
            demand_s = run_s * sum([deadline_s is None or deadline_s >= earliest_s for deadline_s in deadlines])
        self[model] = demand_s
        return demand_s


def _unmet_s(cluster: Cluster, model: str, gpu: GpuState, demands: _Demands, most_s: float) -> float:
    """The model's demand less the GPU seconds that its holders have for it while it would be loaded once more; worked
    out as far as it exceeds ``most_s``."""
    demand_s, load_s, supply_s = demands[model], cluster.load_s(model, gpu), 0.0
    for gpu_id in cluster.cache.holders(model):
        if demand_s - supply_s <= most_s:
            break
        wanted_s = sum([demands[name] for name in cluster.gpus[gpu_id].memory.residents])
        supply_s += load_s * demand_s / wanted_s if wanted_s else load_s
    return demand_s - supply_s
