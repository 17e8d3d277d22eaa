"""How many CPU threads the processes of a device compute with."""

from __future__ import annotations

import os

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def share_of_cores(devices: int) -> int:
    """Devices compute at the same time, so each takes its share of the cores that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // devices) if devices else 1


def thread_variables(threads: int) -> dict[str, str]:
    """So many, unless the server's own environment says otherwise. (A zygote's forks would have one: it has to have
    one thread itself.)"""
    return {name: os.environ.get(name, str(threads)) for name in VARIABLES}
