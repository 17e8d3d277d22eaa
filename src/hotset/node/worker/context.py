"""Open the GPU of a process that waits for its model: what takes a first load most of its time on CUDA."""

from __future__ import annotations

import sys

from hotset.node.worker.staging import process_ring


def open_cuda() -> None:
    """Afterwards torch has opened the process's one GPU, its context is there (the primary one, which all libraries of
    a process share), and so is the staging ring, which is pinned through it. torch holds no memory beyond that.

    Raises what torch raises where the GPU cannot be used, or has no room.
    """
    torch = sys.modules["torch"]
    torch.cuda.init()
    torch.zeros(1, device="cuda")  # the context is made by the first thing that needs it
    process_ring()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
