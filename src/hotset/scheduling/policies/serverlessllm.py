"""ServerlessLLM: every request to the GPU on which it is expected to start first, loads and queues included.

"ServerlessLLM: Low-Latency Serverless Inference for Large Language Models", Fu et al., OSDI 2024. Taken from it:
requests are placed one by one, each where its estimated start-up time is least; that is the time until the GPU is free
plus the time to load the model from the nearest tier that has it (GPU memory: none; the node's host memory; disk).

Where it differs: the load time is the one that was learned per model, kind of GPU and tier, not size over bandwidth; a
GPU's time until free includes what was sent to it before; live migration of a running inference, to free the GPU where
the model is near, has no counterpart here; and a request is decided on when some GPU is idle, as with every policy
here, not at once. Not confirmed, as the paper's text was not at hand: how it breaks ties, and what it evicts. Where no
GPU that holds the model is free before a load would be done, all GPUs are looked at.
"""

from __future__ import annotations

import math
from itertools import chain

from hotset.scheduling.cluster import Cluster, GpuState
from hotset.scheduling.policies.interface import Placement, Rule
from hotset.scheduling.queue import Entry


class ServerlessLlm:
    """Requests in order, each to the GPU with the least estimated time until its run can begin."""

    name = "serverlessllm"
    most_skips = 0

    def next_placement(self, cluster: Cluster, now_s: float) -> Placement | None:
        for entry in cluster.queue.in_order():
            gpu = _soonest(cluster, entry, now_s)
            if gpu is not None:
                waited_s = _free_in_s(gpu, now_s)
                return Placement(entry, gpu, Rule.LEAST_START, local=gpu.work is not None, waited_s=waited_s)
        return None


def _soonest(cluster: Cluster, entry: Entry, now_s: float) -> GpuState | None:
    """Of those that can hold the model; of equals the one that joined first."""
    model, gpus, cache = entry.model, cluster.gpus, cluster.cache
    best, least = None, (math.inf, 0)
    for gpu in map(gpus.__getitem__, chain(cache.holders(model), cache.parked_on(model))):
        start_s = _start_in_s(cluster, gpu, model, now_s)
        if (start_s, gpu.index) < least:
            best, least = gpu, (start_s, gpu.index)
    quickest_s = min([_quickest_load_s(cluster, model, kind) for kind in cluster.kinds])
    if quickest_s > least[0]:
        return best  # before its load could be done anywhere else
    for gpu in gpus.values():
        free_s = 0.0 if gpu.work is None else gpu.busy_until_s + gpu.local_backlog_s - now_s
        earliest_s = free_s + quickest_s
        if earliest_s <= least[0] and (earliest_s, gpu.index) < least:
            start_s = _start_in_s(cluster, gpu, model, now_s)
            if (start_s, gpu.index) < least:
                best, least = gpu, (start_s, gpu.index)
    return best


def _start_in_s(cluster: Cluster, gpu: GpuState, model: str, now_s: float) -> float:
    """Expected seconds until a run could begin there; infinite where the model cannot be held, or brought now."""
    if not (cluster.fits(gpu, model) if gpu.work is not None else cluster.can_start(gpu, model)):
        return math.inf
    load_s = 0.0 if model in gpu.memory.residents else cluster.load_s(model, gpu)
    return _free_in_s(gpu, now_s) + load_s


def _quickest_load_s(cluster: Cluster, model: str, kind: str) -> float:
    """The least that a load on a GPU of this kind may take."""
    load_s = cluster.profiles.load_s(model, kind)
    return min(load_s, cluster.profiles.load_s(model, kind, near=True)) if cluster.cache.host_memory_bytes else load_s


def _free_in_s(gpu: GpuState, now_s: float) -> float:
    return 0.0 if gpu.work is None else max(gpu.finish_s - now_s, 0.0)
