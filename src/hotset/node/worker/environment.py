"""A function's environment variables, set in a process that runs already, and what follows from them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

FRAMEWORKS = (
    *("torch", "transformers", "safetensors", "safetensors.torch", "onnxruntime", "numpy", "PIL", "scipy"),
    *("tokenizers", "jax"),
)
"""What takes long to import: a zygote has them imported already for whoever needs them."""


def apply(env: Mapping[str, str]) -> None:
    """Set the variables; torch, if it is imported, is told its number of threads, which it reads only once."""
    os.environ.update(env)
    torch = sys.modules.get("torch")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if torch is not None and threads.isdecimal() and int(threads) > 0:
        torch.set_num_threads(int(threads))


def imported_frameworks() -> tuple[str, ...]:
    """Those this process has imported, in the order of ``FRAMEWORKS``."""
    return tuple(name for name in FRAMEWORKS if name in sys.modules)
