"""hotset: Function-as-a-Service for ML inference on GPUs. Many models, few GPUs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hotset import testing as testing
    from hotset.client import AsyncClient as AsyncClient
    from hotset.client import Client as Client
    from hotset.errors import FunctionError as FunctionError
    from hotset.errors import HotsetError as HotsetError
    from hotset.errors import InputError as InputError
    from hotset.functions.contract import function as function
    from hotset.functions.tensors import Tensor as Tensor

__version__ = "0.1.0"

# Looked up on first use: `import hotset` must stay cheap for the command line and for every GPU process.
_HOMES = {
    "AsyncClient": "hotset.client",
    "Client": "hotset.client",
    "FunctionError": "hotset.errors",
    "HotsetError": "hotset.errors",
    "InputError": "hotset.errors",
    "Tensor": "hotset.functions.tensors",
    "function": "hotset.functions.contract",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "testing":
        return importlib.import_module("hotset.testing")
    raise AttributeError(f"module 'hotset' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "testing"])
