"""Copies between host and device, each beside a plain pinned copy of the same run."""

from __future__ import annotations

from statistics import median
from typing import Any

from gpu_checks.memory import SLACK_MIB, used_mib
from gpu_checks.record import Findings
from gpu_checks.setup import MIB, Setup

COPY_MIB = 256
ROUNDS = 5
LEAST_SHARE = 0.7
"""Of the slower of a plain pinned copy and memcpy: what parking a model's tensors one by one may cost at most."""
LEAST_LOAD_SHARE = 0.8
"""Of a plain pinned copy: what a load through the ring has to reach."""
LEAST_OVERLAP = 1.3
"""Copy and compute take about as long as each other: 1 is no overlap, 2 all of it."""


async def bandwidth(setup: Setup, found: Findings) -> None:
    """Pageable, pinned, and a model's tensors to the host memory they are parked in and back."""
    rates = await _measured(setup, "bandwidth")
    # The GPU copies from and to the ring; the CPU between the ring and memory that is fresh when a model is parked.
    offload = rates["offload_gb_per_s"] / min(rates["to_pinned_gb_per_s"], rates["to_fresh_gb_per_s"])
    restore = rates["restore_gb_per_s"] / min(rates["pinned_gb_per_s"], rates["memcpy_gb_per_s"])
    found.figures |= rates | {
        "pageable_share": rates["pageable_gb_per_s"] / rates["pinned_gb_per_s"],
        "offload_share": offload,
        "restore_share": restore,
    }
    found.expect(rates["pinned_bytes"] > 0, "the driver would not pin the ring that copies go through")
    found.expect(rates["pinned_gb_per_s"] >= rates["pageable_gb_per_s"], "a pinned copy is slower than a pageable one")
    found.expect(offload >= LEAST_SHARE, f"offload reaches {offload:.0%} of the slower of a pinned copy and memcpy")
    found.expect(restore >= LEAST_SHARE, f"restore reaches {restore:.0%} of the slower of a pinned copy and memcpy")


async def staging(setup: Setup, found: Findings) -> None:
    """Weights in a file's mapped pages get to the GPU nearly as fast as from pinned memory, and no more is pinned."""
    rates = await _measured(setup, "staging")
    share = rates["load_gb_per_s"] / rates["pinned_gb_per_s"]
    found.figures |= rates | {"load_share": share, "mapped_share": rates["mapped_gb_per_s"] / rates["pinned_gb_per_s"]}
    memcpy = f"memcpy {rates['memcpy_gb_per_s']:.3g} GB/s"
    found.expect(share >= LEAST_LOAD_SHARE, f"a load reaches {share:.0%} of a pinned copy ({memcpy})")
    found.expect(rates["equal"] == 1, "what came through the ring is not what was sent")
    found.expect(rates["pins"] == 0, f"memory was pinned {rates['pins']:g} times by later loads and transitions")
    found.expect(rates["pinned_changed_bytes"] == 0, "the ring changed its size")


async def _measured(setup: Setup, what: str) -> dict[str, Any]:
    setup.need_cuda()
    async with setup.node() as node:
        spec = setup.probe(entry="Copies")
        await node.load(spec)
        return await node.ask(spec, what, COPY_MIB)


async def parking(setup: Setup, found: Findings) -> None:
    """The node parks a model in host memory and brings it back: same process, same answers, memory free in between."""
    async with setup.node() as node:
        spec = setup.probe(3)
        loaded = await node.load(spec)
        pid = node.report(spec).pid
        offload_s, restore_s = [], []
        for _ in range(ROUNDS):
            hot_mib = used_mib(setup.nvml) if setup.nvml else 0.0
            parked = await node.offload(spec)
            freed_mib = hot_mib - used_mib(setup.nvml) if setup.nvml else setup.model_mib - parked.device_bytes / MIB
            found.expect(freed_mib >= setup.model_mib - SLACK_MIB, f"an offload freed {freed_mib:.0f} MiB")
            restored = await node.restore(spec)
            answer = await node.ask(spec, "scale", 7.0)
            found.expect(answer["value"] == 21.0, f"3 times 7 was {answer['value']} after a restore")
            offload_s.append(parked.offload_s)
            restore_s.append(restored.load_s)
        found.expect(node.report(spec).pid == pid, "its process is another one")
    found.figures |= {
        "load_s": loaded.load_s,
        "offload_s": median(offload_s),
        "restore_s": median(restore_s),
        "freed_mib": freed_mib,
        "parked_mib": parked.host_bytes / MIB,
    }
    if setup.virtual:
        found.note = "a virtual GPU's memory is host memory: nothing is copied"
    else:
        found.figures["restore_gb_per_s"] = setup.model_bytes / median(restore_s) / 1e9


async def tensors(setup: Setup, found: Findings) -> None:
    """Tied weights, views, buffers and a cache made in inference mode come back as they were; a model with a CUDA
    graph, which remembers addresses, is not parked; and pinning that was refused leaves no error behind."""
    async with setup.node() as node:
        spec = setup.probe(entry="Keeper")
        await node.load(spec)
        for number in range(1, ROUNDS + 1):
            answer = await node.ask(spec, "state")
            found.expect(answer["calls"] == number, f"call {number} found its cache at {answer['calls']:g}")
            found.expect(answer["same"] == 1, f"other values after {number - 1} restores")
            found.expect(answer["shared"] == 1, f"what shared memory does not any more after {number - 1} restores")
            await node.offload(spec)
            await node.restore(spec)
        found.figures["rounds"] = ROUNDS
        if setup.virtual:
            found.note = "a virtual GPU's memory is host memory: nothing is copied, and there are no graphs"
            return
        refused = await node.ask(spec, "refused")
        found.figures["refusal_code"] = refused["code"]
        found.expect(refused["code"] != 0, "memory was pinned twice")
        found.expect(refused["value"] == 8.0, "a kernel after a refusal computed wrongly")
        await node.ask(spec, "capture")
        parked = await node.offload(spec)
        found.expect(parked.host_bytes == 0, "a model with a CUDA graph was parked")


async def overlap(setup: Setup, found: Findings) -> None:
    """A copy on its own stream runs while the default stream computes."""
    found.figures |= await _measured(setup, "overlap")
    ratio = float(found.figures["ratio"])
    found.expect(ratio >= LEAST_OVERLAP, f"one after the other takes only {ratio:.2f} times as long")
