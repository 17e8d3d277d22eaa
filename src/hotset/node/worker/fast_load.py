"""Loads of torch models without the work that a ``load_state_dict`` makes pointless.

A ``load`` that builds a module and then loads its weights pays three times: for random numbers that nobody will see,
for memory to put them in, and for a copy of the weights into that memory. While a function loads, ``fast_load`` skips
the initialisation of parameters (``torch.nn.init``) and lets ``load_state_dict`` take the state's own tensors in place
of copying them; with safetensors those are pages of the file itself, shared by all processes of the machine.

That is only right if no skipped initialisation shows in the end. So every parameter whose initialisation was skipped is
watched: if one is still alive when ``load`` returns and was not loaded, ``Incomplete`` is raised, and the caller loads
again in the ordinary way. A state of another dtype, shape or device than the module's is copied as usual.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_INITIALISERS = (
    "uniform_",
    "normal_",
    "trunc_normal_",
    "constant_",
    "ones_",
    "zeros_",
    "eye_",
    "dirac_",
    "xavier_uniform_",
    "xavier_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "orthogonal_",
    "sparse_",
)


class Incomplete(Exception):
    """Parameters were left without values."""


class _Watched:
    """The parameters whose initialisation was skipped and that have not been loaded since."""

    def __init__(self) -> None:
        self._tensors: dict[int, weakref.ref[Any]] = {}

    def skipped(self, tensor: Any) -> None:
        self._tensors[id(tensor)] = weakref.ref(tensor)

    def loaded(self, tensor: Any) -> None:
        self._tensors.pop(id(tensor), None)

    def alive(self) -> int:
        return sum(reference() is not None for reference in self._tensors.values())


@contextlib.contextmanager
def fast_load() -> Iterator[None]:
    """While the context is open, modules are built and loaded as described above; does nothing where torch is not
    imported. Raises ``Incomplete`` at its end when that left a parameter without its values."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    watched = _Watched()
    with contextlib.ExitStack() as patches:
        for name in _INITIALISERS:
            original = getattr(torch.nn.init, name, None)
            if original is not None:
                patches.enter_context(_replaced(torch.nn.init, name, _skipping(original, torch.nn.Parameter, watched)))
        module = torch.nn.Module
        patches.enter_context(_replaced(module, "load_state_dict", _binding(module.load_state_dict, watched)))
        yield
    left = watched.alive()
    if left:
        raise Incomplete(f"{left} parameters are initialised by the function and not loaded")


@contextlib.contextmanager
def _replaced(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _skipping(original: Callable[..., Any], parameter: type, watched: _Watched) -> Callable[..., Any]:
    """An initialiser that leaves a parameter as it is; anything else is initialised as ever."""

    def initialise(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(tensor, parameter):
            return original(tensor, *args, **kwargs)
        watched.skipped(tensor)
        return tensor

    return initialise


def _binding(original: Callable[..., Any], watched: _Watched) -> Callable[..., Any]:
    """A ``load_state_dict`` that binds the state's tensors where they are what the module has but for their values."""

    def load_state_dict(module: Any, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        alike = all(_alike(own[name], tensor) for name, tensor in state_dict.items() if name in own)
        result = original(module, state_dict, strict=strict, assign=assign or alike)
        for name in state_dict:
            if name in own:
                watched.loaded(own[name])
        return result

    return load_state_dict


def _alike(own: Any, tensor: Any) -> bool:
    kinds = [getattr(each, name, None) for each in (own, tensor) for name in ("dtype", "shape", "device", "layout")]
    return kinds[:4] == kinds[4:]
