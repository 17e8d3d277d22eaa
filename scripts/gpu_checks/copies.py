"""Copies between host and device, each beside a plain pinned copy of the same run."""

from __future__ import annotations

from gpu_checks.record import Findings
from gpu_checks.setup import Setup

COPY_MIB = 256
LEAST_SHARE = 0.7
"""Of a plain pinned copy: what parking a model's tensors one by one may cost at most."""
LEAST_OVERLAP = 1.3
"""Copy and compute take about as long as each other: 1 is no overlap, 2 all of it."""


async def bandwidth(setup: Setup, found: Findings) -> None:
    """Pageable, pinned, and a model's tensors to pinned host memory and back."""
    setup.need_cuda()
    async with setup.node() as node:
        spec = setup.probe(entry="Copies")
        await node.load(spec)
        rates = await node.ask(spec, "bandwidth", COPY_MIB)
    offload = rates["offload_gb_per_s"] / rates["to_pinned_gb_per_s"]
    restore = rates["restore_gb_per_s"] / rates["pinned_gb_per_s"]
    found.figures |= rates | {
        "pageable_share": rates["pageable_gb_per_s"] / rates["pinned_gb_per_s"],
        "offload_share": offload,
        "restore_share": restore,
    }
    found.expect(rates["pinned_gb_per_s"] >= rates["pageable_gb_per_s"], "a pinned copy is slower than a pageable one")
    found.expect(offload >= LEAST_SHARE, f"offload reaches {offload:.0%} of a pinned copy")
    found.expect(restore >= LEAST_SHARE, f"restore reaches {restore:.0%} of a pinned copy")


async def overlap(setup: Setup, found: Findings) -> None:
    """A copy on its own stream runs while the default stream computes."""
    setup.need_cuda()
    async with setup.node() as node:
        spec = setup.probe(entry="Copies")
        await node.load(spec)
        found.figures |= await node.ask(spec, "overlap", COPY_MIB)
    ratio = float(found.figures["ratio"])
    found.expect(ratio >= LEAST_OVERLAP, f"one after the other takes only {ratio:.2f} times as long")
