"""ServerlessLLM: every request to the GPU on which it is expected to start first, loads and queues included.

"ServerlessLLM: Low-Latency Serverless Inference for Large Language Models", Fu et al., OSDI 2024. Taken from it:
requests are placed one by one, each where its estimated start-up time is least; that is the time until the GPU is free
plus the time to load the model from the nearest tier that has it (GPU memory: none; the node's host memory; disk).

Where it differs: the load time is the one that was learned per model, kind of GPU and tier, not size over bandwidth; a
GPU's time until free includes what was sent to it before; live migration of a running inference, to free the GPU where
the model is near, has no counterpart here; and a request is decided on when some GPU is idle, as with every policy
here, not at once. Not confirmed, as the paper's text was not at hand: how it breaks ties, and what it evicts. Linear in
the GPUs.
"""

from __future__ import annotations

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
    best, least_s = None, 0.0
    for gpu in cluster.gpus.values():
        if not (cluster.fits(gpu, entry.model) if gpu.work is not None else cluster.can_start(gpu, entry.model)):
            continue
        load_s = 0.0 if entry.model in gpu.memory.residents else cluster.load_s(entry.model, gpu)
        start_s = _free_in_s(gpu, now_s) + load_s
        if best is None or start_s < least_s:
            best, least_s = gpu, start_s
    return best


def _free_in_s(gpu: GpuState, now_s: float) -> float:
    return 0.0 if gpu.work is None else max(gpu.finish_s - now_s, 0.0)
