"""Simulated hardware: GPUs, and what loads and runs cost on them.

The "paper" table is the calibration profile of the evaluation that hotset's preset reproduces: GPU memory, load time
(process start, framework import and copy) and inference time of 22 torchvision CNNs at batch size 32.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import msgspec

from hotset.errors import ConfigurationError
from hotset.vocabulary import Gpu, Model, Profile

MIB = 1024 * 1024


class ModelCost(msgspec.Struct, frozen=True, kw_only=True):
    """What one model takes and costs."""

    memory_bytes: int
    load_s: float
    inference_s: float
    """One run of one request."""
    batch_marginal: float = 1.0
    """What each further request of a batch adds, as a share of ``inference_s``; 1: batching gains nothing."""
    max_batch: int = 1
    """Most requests that one run may join."""
    max_batch_wait_s: float = 0.0
    """How long requests may be held back to fill a batch."""
    min_copies: int = 0
    """So many are kept in GPU memory, requests or not."""
    max_copies: int | None = None
    """Most GPUs that hold it at once; None: as many as it pays."""
    restore_s: float | None = None
    """From host memory; None: ``copied`` has not been asked, and it takes as long as a load."""
    reload_s: float | None = None
    """A load on a node that has the model on another GPU; None: as any load."""
    offload_s: float = 0.0
    """To host memory."""
    residue_bytes: int = 0
    """GPU memory that the process keeps while its weights are in host memory (a context)."""

    def run_s(self, batch: int) -> float:
        return self.inference_s * (1.0 + (batch - 1) * self.batch_marginal)


def _paper(memory_mib: int, load_s: float, inference_s: float) -> ModelCost:
    return ModelCost(memory_bytes=memory_mib * MIB, load_s=load_s, inference_s=inference_s)


PAPER_MODELS: Mapping[str, ModelCost] = {
    "squeezenet1.1": _paper(1269, 2.41, 1.28),
    "resnet18": _paper(1313, 2.52, 1.25),
    "resnet34": _paper(1357, 2.60, 1.25),
    "squeezenet1.0": _paper(1435, 2.32, 1.33),
    "alexnet": _paper(1437, 2.81, 1.25),
    "resnext50_32x4d": _paper(1555, 2.64, 1.29),
    "densenet121": _paper(1601, 2.49, 1.28),
    "densenet169": _paper(1631, 2.56, 1.30),
    "densenet201": _paper(1665, 2.67, 1.40),
    "resnet50": _paper(1701, 2.67, 1.28),
    "resnet101": _paper(1757, 2.95, 1.30),
    "resnet152": _paper(1827, 3.10, 1.31),
    "densenet161": _paper(1919, 2.75, 1.32),
    "inception_v3": _paper(2157, 4.42, 1.63),
    "resnext101_32x8d": _paper(2191, 3.51, 1.33),
    "vgg11": _paper(2903, 3.94, 1.29),
    "wide_resnet50_2": _paper(3611, 3.16, 1.31),
    "wide_resnet101_2": _paper(3831, 3.91, 1.32),
    "vgg13": _paper(3887, 3.98, 1.29),
    "vgg16": _paper(3907, 4.04, 1.27),
    "vgg16_bn": _paper(3907, 4.03, 1.26),
    "vgg19": _paper(3947, 4.07, 1.33),
}
COPY_BYTES_PER_S = 24e9
"""Between pinned host memory and a GPU: PCIe 4.0 x16, of whose 31.5 GB/s about three quarters are reached."""
RELOAD_FIXED_S = 0.03
"""Of a load whose weights are in host memory: a process from the pool, the function's own code, the first use of the
GPU. On virtual GPUs it is 7 to 13 ms (docs/residency.md, a miss); on CUDA it was not measured."""
PAPER_GPUS = 12
PAPER_GPU_MEMORY_BYTES = 7800 * MIB


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster and the cost of each function's model on it."""

    gpus: Sequence[Gpu]
    costs: Mapping[str, ModelCost]

    def models(self) -> list[Model]:
        """The models as the scheduler is told of them; declared figures are the true ones."""
        return [
            Model(
                name=name,
                memory_bytes=cost.memory_bytes,
                max_batch=cost.max_batch,
                max_batch_wait_s=cost.max_batch_wait_s,
                min_copies=cost.min_copies,
                max_copies=cost.max_copies,
                profile=Profile(
                    load_s=cost.load_s,
                    inference_s=cost.inference_s,
                    restore_s=cost.restore_s,
                    reload_s=cost.reload_s,
                ),
            )
            for name, cost in self.costs.items()
        ]


def make_gpus(count: int, memory_bytes: int) -> list[Gpu]:
    """Equal GPUs ``sim/gpu:0`` ... of one simulated node."""
    if count < 1 or memory_bytes < 1:
        raise ConfigurationError("a simulated cluster needs at least one GPU with some memory")
    return [Gpu(gpu_id=f"sim/gpu:{index}", memory_bytes=memory_bytes, node="sim", kind="sim") for index in range(count)]


def paper_costs(functions: Sequence[str], seed: int, *, load_scale: float = 1.0) -> dict[str, ModelCost]:
    """Give each function one of the 22 architectures: in an order shuffled by the seed, repeating past 22."""
    architectures = list(PAPER_MODELS)
    random.Random(seed).shuffle(architectures)
    return {
        function: scaled(PAPER_MODELS[architectures[index % len(architectures)]], load_scale)
        for index, function in enumerate(functions)
    }


def bandwidth_costs(
    functions: Sequence[str],
    *,
    memory_bytes: int,
    inference_s: float,
    fixed_s: float,
    bandwidth_bytes_per_s: float,
    load_scale: float = 1.0,
) -> dict[str, ModelCost]:
    """Equal models whose load takes ``fixed_s + memory_bytes / bandwidth``."""
    load_s = (fixed_s + memory_bytes / bandwidth_bytes_per_s) * load_scale
    cost = ModelCost(memory_bytes=memory_bytes, load_s=load_s, inference_s=inference_s)
    return dict.fromkeys(functions, cost)


def copied(cost: ModelCost, bandwidth_bytes_per_s: float) -> ModelCost:
    """The same model, moved between host and GPU memory at that bandwidth unless its times are known."""
    if cost.restore_s is not None:
        return cost
    copy_s = cost.memory_bytes / bandwidth_bytes_per_s
    reload_s = min(cost.load_s, RELOAD_FIXED_S + copy_s)
    return msgspec.structs.replace(cost, restore_s=copy_s, reload_s=reload_s, offload_s=copy_s)


def batching(cost: ModelCost, max_batch: int, marginal: float, wait_s: float = 0.0) -> ModelCost:
    """The same model, of which one run takes so many requests, each further one adding that share of the first; held
    back for ``wait_s`` so that there are as many."""
    return msgspec.structs.replace(cost, max_batch=max_batch, batch_marginal=marginal, max_batch_wait_s=wait_s)


def scaled(cost: ModelCost, load_scale: float) -> ModelCost:
    """The same model with loads that much dearer or cheaper."""
    return cost if load_scale == 1.0 else msgspec.structs.replace(cost, load_s=cost.load_s * load_scale)
