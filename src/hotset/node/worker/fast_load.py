"""Loads of torch models without the work that a ``load_state_dict`` makes pointless.

A ``load`` that builds a module and then loads its weights pays four times: for Python that finds out the same for every
layer, for random numbers that nobody will see, for memory to put them in, and for a copy of the weights into that
memory. While a function loads, ``fast_load``

- copies layers that are like one before (``module_templates.py``),
- skips the initialisation of parameters (``torch.nn.init``),
- maps files of tensors in place of reading them (``tensor_files.py``, ``converted.py``), also an ONNX session's
  (``converted_sessions.py``),
- lets ``load_state_dict`` bind the state's own tensors, which are pages of the file that all processes of the machine
  share, in place of copying them,
- and lets ``to`` return at once where all of a module is on the CPU already, and is sent there.

What is replaced for that stays, and does as ever while nothing is loaded.

That is only right if no skipped initialisation shows in the end. So every parameter whose initialisation was skipped is
watched: if one is still alive when ``load`` returns and was not loaded, ``Incomplete`` is raised, and the caller loads
again in the ordinary way. A state of another dtype, shape or device than the module's is copied as usual.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hotset.node.worker.converted import read_twin
from hotset.node.worker.converted_sessions import Made, watched_sessions
from hotset.node.worker.module_templates import LAYERS, Templates
from hotset.node.worker.staging import is_gpu
from hotset.node.worker.tensor_files import MappedFile, Unreadable, is_zip

_INITIALISERS = (
    *("uniform_", "normal_", "trunc_normal_", "constant_", "ones_", "zeros_", "eye_", "dirac_"),
    *("xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "orthogonal_", "sparse_"),
)
_THEIR_USERS = ("torch.nn.init", "torch.nn.modules.activation")
"""Modules whose own names for them are replaced: all that torch's layers call them by."""


class Incomplete(Exception):
    """Parameters were left without values."""


class _Watched:
    """The parameters whose initialisation was skipped and that have not been loaded since."""

    def __init__(self) -> None:
        self._tensors: dict[int, weakref.ref[Any]] = {}

    def skipped(self, tensor: Any) -> None:
        self._tensors[id(tensor)] = weakref.ref(tensor)

    def was_skipped(self, tensor: Any) -> bool:
        reference = self._tensors.get(id(tensor))
        return reference is not None and reference() is tensor

    def loaded(self, tensor: Any) -> None:
        self._tensors.pop(id(tensor), None)

    def alive(self) -> int:
        return sum(reference() is not None for reference in self._tensors.values())


class _Load:
    """The load that is under way."""

    def __init__(self, code_path: str) -> None:
        self.code_path = code_path
        self.watched = _Watched()
        self.templates = Templates(self.watched.was_skipped, self.watched.skipped)


_load: _Load | None = None
"""None: what is replaced does as ever."""
_replaced: set[str] = set()
"""Packages of which everything is replaced that ever is."""


@contextlib.contextmanager
def fast_load(code_path: str = "", sessions_ending: str = "") -> Iterator[list[Made]]:
    """While the context is open, modules and ONNX sessions are built and loaded as described above, where their
    framework is imported; gives the sessions made. ``code_path``: the function's bundle, files of which may have been
    converted; ``sessions_ending``: see ``watched_sessions``. Raises ``Incomplete`` at its end when that left a
    parameter without its values."""
    with watched_sessions(code_path, sessions_ending) as made, _fast_modules(code_path):
        yield made


@contextlib.contextmanager
def _fast_modules(code_path: str) -> Iterator[None]:
    global _load
    if sys.modules.get("torch") is None:
        yield
        return
    prepare()
    load = _load = _Load(code_path)
    try:
        yield
    finally:
        _load = None
    left = load.watched.alive()
    if left:
        raise Incomplete(f"{left} parameters are initialised by the function and not loaded")


def prepare() -> None:
    """Replace what fast loads replace, in as far as its packages are imported and it was not done before.

    It stays: a class that is changed has Python look everything up again in all that are derived from it, which in a
    fork of the zygote is a page fault each. So a process has it done before it knows what it is to load. Whoever
    replaces the same for a while only does so after this, or would take it back with its own.
    """
    torch: Any = sys.modules.get("torch")
    if torch is not None and "torch" not in _replaced:
        _replaced.add("torch")
        for user in filter(None, map(sys.modules.get, _THEIR_USERS)):
            for name in _INITIALISERS:
                if (original := vars(user).get(name)) is not None:
                    setattr(user, name, _skipping(original, torch.nn.Parameter))
        for kind in filter(None, (getattr(torch.nn, name, None) for name in LAYERS)):
            kind.__init__ = _building(kind)
        module = torch.nn.Module
        module.load_state_dict = _binding(module.load_state_dict)
        module.to = _staying(module.to)
        torch.load = _mapping(torch.load)
    safetensors: Any = sys.modules.get("safetensors.torch")
    if safetensors is not None and "safetensors.torch" not in _replaced:
        _replaced.add("safetensors.torch")
        safetensors.safe_open = _opening(safetensors.safe_open)


def _skipping(original: Callable[..., Any], parameter: type) -> Callable[..., Any]:
    """An initialiser that leaves a parameter as it is; anything else is initialised as ever."""

    @functools.wraps(original)
    def initialise(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if _load is None or not isinstance(tensor, parameter):
            return original(tensor, *args, **kwargs)
        _load.watched.skipped(tensor)
        return tensor

    return initialise


def _building(kind: type) -> Callable[..., None]:
    """An ``__init__`` for this class of layers that copies where it can."""
    original: Callable[..., None] = kind.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def build(layer: Any, *args: Any, **kwargs: Any) -> None:
        if _load is None or type(layer) is not kind:
            original(layer, *args, **kwargs)
        else:
            _load.templates.build(original, layer, args, kwargs)

    return build


def _mapping(original: Callable[..., Any]) -> Callable[..., Any]:
    """A ``torch.load`` that maps a file it can map, or what that was converted to, unless it is told whether to; the
    GPU gets its tensors from the pages."""

    @functools.wraps(original)
    def load(f: Any, map_location: Any = None, pickle_module: Any = None, **kwargs: Any) -> Any:
        mappable = is_gpu(map_location) or str(map_location) in ("None", "cpu")
        if _load is not None and mappable and "mmap" not in kwargs:
            device = map_location if is_gpu(map_location) else "cpu"
            with contextlib.suppress(Unreadable):
                return read_twin(f, _load.code_path, anywhere=map_location is not None, device=device)
            if is_zip(f):
                kwargs["mmap"] = True
                if is_gpu(device):
                    map_location = functools.partial(_moved, device)
                elif map_location is None:
                    map_location = _to_where_it_was
        return original(f, map_location, pickle_module, **kwargs)

    return load


def _moved(device: Any, storage: Any, _: str) -> Any:
    """What ``torch.load`` asks for each storage, which it has on the CPU."""
    torch = sys.modules["torch"]
    on_cpu = torch.empty(0, dtype=torch.uint8).set_(storage)
    return on_cpu.to(device).untyped_storage()


def _to_where_it_was(storage: Any, location: str) -> Any:
    """The same for what was saved on the GPU; None: elsewhere, which is torch's to see to."""
    available = is_gpu(location) and sys.modules["torch"].cuda.is_available()
    return _moved(location, storage, location) if available else None


def _opening(original: Callable[..., Any]) -> Callable[..., Any]:
    """A ``safe_open`` that maps the file, and moves from its pages what is to be on the GPU."""

    def safe_open(filename: Any, framework: str, device: Any = "cpu", **kwargs: Any) -> Any:
        mapped = framework == "pt" and kwargs.get("backend", "mmap") == "mmap"
        if _load is not None and mapped and (str(device) == "cpu" or is_gpu(device)):
            with contextlib.suppress(Unreadable, OSError):
                return MappedFile(filename, device)
        return original(filename, framework, device, **kwargs)

    return safe_open


def _binding(original: Callable[..., Any]) -> Callable[..., Any]:
    """A ``load_state_dict`` that binds the state's tensors where they are what the module has but for their values."""
    incompatible = sys.modules["torch"].nn.modules.module._IncompatibleKeys

    @functools.wraps(original)
    def load_state_dict(module: Any, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        if _load is None:
            return original(module, state_dict, strict=strict, assign=assign)
        own = _plain_state(module)
        missing = [] if own is None else [name for name in own if name not in state_dict]
        if own is None or assign or not _binds(own, state_dict) or (missing and strict) or _has_counter(missing):
            own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            alike = all(_alike(own[name], tensor) for name, tensor in state_dict.items() if name in own)
            result = original(module, state_dict, strict=strict, assign=assign or alike)
        else:
            for name, tensor in state_dict.items():
                own[name].data = tensor
            result = incompatible(missing, [])
        for name in state_dict:
            if name in own:
                _load.watched.loaded(own[name])
        return result

    return load_state_dict


def _staying(original: Callable[..., Any]) -> Callable[..., Any]:
    """A ``to`` that looks first: asking every tensor to move costs more, to find each where it is to be."""
    torch = sys.modules["torch"]
    move = torch.nn.Module._apply

    def stays(module: Any) -> bool:
        parts = [module]
        while parts:
            part = parts.pop()
            if part is None:
                continue
            if type(part)._apply is not move or "_apply" in vars(part):
                return False
            for table in (part._parameters, part._buffers):
                for tensor in table.values():
                    if tensor is not None and not tensor.is_cpu:
                        return False
            parts += part._modules.values()
        return True

    @functools.wraps(original)
    def to(module: Any, *args: Any, **kwargs: Any) -> Any:
        only_device = len(args) == 1 and not kwargs and isinstance(args[0], str | torch.device)
        if _load is not None and only_device and str(args[0]) == "cpu" and stays(module):
            return module
        return original(module, *args, **kwargs)

    return to


def _binds(own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> bool:
    return all(name in own and _alike(own[name], tensor) for name, tensor in state_dict.items())


def _has_counter(missing: list[str]) -> bool:
    """Old states have none of a norm layer's counters, which it forgives."""
    return any(name.endswith("num_batches_tracked") for name in missing)


def _plain_state(module: Any) -> dict[str, Any] | None:
    """A module's parameters and persistent buffers, by their names in a state and in its order; None: a part of it has
    its own ways of loading."""
    torch = sys.modules["torch"]
    base, norm = torch.nn.Module, torch.nn.modules.batchnorm._NormBase
    ways = (base._load_from_state_dict, norm._load_from_state_dict)
    plain_kinds: set[type] = set()
    own: dict[str, Any] = {}
    parts = [("", module)]
    while parts:
        prefix, part = parts.pop()
        kind = type(part)
        if kind not in plain_kinds:
            if kind._load_from_state_dict not in ways or kind.set_extra_state is not base.set_extra_state:
                return None
            plain_kinds.add(kind)
        if part._load_state_dict_pre_hooks or part._load_state_dict_post_hooks:
            return None
        for name, tensor in part._parameters.items():
            if tensor is not None:
                own[prefix + name] = tensor
        for name, tensor in part._buffers.items():
            if tensor is not None and name not in part._non_persistent_buffers_set:
                own[prefix + name] = tensor
        if part._modules:
            children = [(f"{prefix}{name}.", child) for name, child in part._modules.items() if child is not None]
            parts.extend(reversed(children))
    return own


def _alike(own: Any, tensor: Any) -> bool:
    return (
        isinstance(tensor, sys.modules["torch"].Tensor)
        and tensor.dtype is own.dtype
        and tensor.shape == own.shape
        and tensor.device == own.device
        and tensor.layout is own.layout
    )
