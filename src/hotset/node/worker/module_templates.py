"""torch's own layers, built once and copied from then on.

Building a layer runs some hundred Python calls, most of them to find out what the layer before it found out already:
thirty layers of a transformer differ in nothing but their weights, which nobody looks at before they are loaded. So
while a function loads, the first layer of a class and arguments is built as ever and noted down as a ``Template``; the
next one is filled in from that.

Only classes of torch's own are copied, and of these only what is seen to be plain: attributes that are numbers, texts,
functions or empty tables, parameters whose initialisation was skipped, small buffers. Anything else is built as ever,
as is everything while a mode, a hook or somebody's patch changes what building means.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable
from types import BuiltinFunctionType, FunctionType
from typing import Any

LAYERS = (
    *("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d"),
    *("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"),
    *("Dropout", "ReLU", "GELU", "SiLU", "Tanh", "Sigmoid", "Identity"),
    *("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"),
)
"""Classes of ``torch.nn`` whose building has no effect but the layer."""
MOST_BUFFER_BYTES = 1 << 20
_PLAIN = frozenset((int, float, bool, str, type(None), FunctionType, BuiltinFunctionType))
_EMPTY = frozenset((dict, OrderedDict, list, set))
_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_global_module_registration_hooks", "_global_parameter_registration_hooks")


class NotPlain(Exception):
    """The layer holds something that a copy could get wrong."""


class Template:
    """What a layer is made of, right after it was built."""

    def __init__(self, layer: Any, was_skipped: Callable[[Any], bool]) -> None:
        """``was_skipped``: whether a parameter's initialisation was. Raises ``NotPlain``."""
        self._kind: type = type(layer)
        self._values: dict[str, Any] = {}
        self._emptied: list[tuple[str, type]] = []
        self._parameters: dict[str, Any] = {}
        self._buffers: dict[str, Any] = {}
        self._layers: dict[str, Template | None] = {}
        for name, value in vars(layer).items():
            if name in _TABLES:
                continue
            if type(value) in _EMPTY and not value:
                self._emptied.append((name, type(value)))
            elif _is_plain(value):
                self._values[name] = value
            else:
                raise NotPlain(name)
        for name, parameter in layer._parameters.items():
            if parameter is not None and not was_skipped(parameter):
                raise NotPlain(name)
            self._parameters[name] = None if parameter is None else _Shape(parameter)
        for name, buffer in layer._buffers.items():
            if buffer is not None and buffer.numel() * buffer.element_size() > MOST_BUFFER_BYTES:
                raise NotPlain(name)
            self._buffers[name] = None if buffer is None else buffer.detach().clone()
        for name, part in layer._modules.items():
            self._layers[name] = None if part is None else Template(part, was_skipped)

    def fill(self, layer: Any, skipped: Callable[[Any], None]) -> None:
        """Make an empty layer of the same class what the template's layer was; ``skipped`` hears of its parameters."""
        state = vars(layer)
        state.update(self._values)
        for name, kind in self._emptied:
            state[name] = kind()
        parameters: dict[str, Any] = {}
        state["_parameters"] = parameters
        for name, shape in self._parameters.items():
            parameters[name] = None
            if shape is not None:
                parameters[name] = parameter = shape.make()
                skipped(parameter)
        state["_buffers"] = {name: None if each is None else each.clone() for name, each in self._buffers.items()}
        layers: dict[str, Any] = {}
        state["_modules"] = layers
        for name, template in self._layers.items():
            layers[name] = None
            if template is not None:
                part: Any = object.__new__(template._kind)
                layers[name] = part
                template.fill(part, skipped)


class _Shape:
    """A parameter but for its values."""

    __slots__ = ("_kind", "_like", "_requires_grad", "_shape")

    def __init__(self, parameter: Any) -> None:
        self._kind = sys.modules["torch"].nn.Parameter
        self._like = parameter.new_empty(0).detach()
        self._shape = parameter.shape
        self._requires_grad = parameter.requires_grad

    def make(self) -> Any:
        return self._kind(self._like.new_empty(self._shape), self._requires_grad)


class Templates:
    """All templates of one load. ``was_skipped`` and ``skipped``: as ``Template`` has them."""

    def __init__(self, was_skipped: Callable[[Any], bool], skipped: Callable[[Any], None]) -> None:
        self._was_skipped = was_skipped
        self._skipped = skipped
        self._known: dict[Hashable, Template | None] = {}
        self._torch = sys.modules["torch"]
        self._register = self._torch.nn.Module.register_parameter

    def build(self, original: Callable[..., None], layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What ``original(layer, *args, **kwargs)`` does, which is the ``__init__`` of the layer's class: by copying
        where that comes to the same."""
        key = self._key(type(layer), args, kwargs)
        template = self._known.get(key)
        if template is not None:
            template.fill(layer, self._skipped)
            return
        original(layer, *args, **kwargs)
        if key is not None and key not in self._known:
            self._known[key] = self._template(layer)

    def _key(self, kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable | None:
        """What decides how a layer comes out; None: more than can be told."""
        torch, module = self._torch, self._torch.nn.modules.module
        if torch._C._len_torch_function_stack() or torch.nn.Module.register_parameter is not self._register:
            return None
        if any(getattr(module, name, None) for name in _HOOKS):
            return None
        values = (*args, *kwargs.values())
        if not all(map(_is_plain, values)):
            return None
        return kind, values, tuple(map(type, values)), len(args), tuple(kwargs), torch.get_default_dtype()

    def _template(self, layer: Any) -> Template | None:
        try:
            return Template(layer, self._was_skipped)
        except NotPlain:
            return None


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind in _PLAIN:
        return True
    if kind is tuple:
        return all(map(_is_plain, value))
    torch = sys.modules["torch"]
    return kind is torch.dtype or kind is torch.device
