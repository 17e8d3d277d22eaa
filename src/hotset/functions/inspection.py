"""Reads the signature of a decorated class or function, and says what breaks the contract."""

from __future__ import annotations

import collections.abc
import inspect
import typing
from collections.abc import Callable
from typing import Any

import msgspec

from hotset.errors import FunctionError
from hotset.functions.annotations import codec_of, decode_hook, schema_hook, translate
from hotset.functions.contract import FunctionOptions, options_of
from hotset.functions.signature import Parameter, Signature

SIGNATURE_ATTRIBUTE = "__hotset_signature__"
"""Where a class that has no typed ``predict`` (a model file's) keeps a function that makes its signature."""

_STREAMS = frozenset({collections.abc.Iterator, collections.abc.Iterable, collections.abc.Generator})


class UnresolvedError(FunctionError):
    """An annotation names something that is not defined (yet)."""


def signature_of(target: Callable[..., Any], options: FunctionOptions | None = None) -> Signature:
    """The signature of a decorated class or function (``options``: what its decorator attached).

    Raises ``FunctionError`` that says what the contract asks for (docs/functions.md).
    """
    made = getattr(target, SIGNATURE_ATTRIBUTE, None)
    if made is not None:
        signature: Signature = made()
        return signature
    options = options or options_of(target)
    owner = getattr(target, "__name__", repr(target))
    if options is None:
        raise FunctionError(f"{owner} is no function yet; put @hotset.function above it")
    predict, parameters = _predict_of(target, owner)
    try:
        return _read(predict, parameters, target, owner, options)
    except NameError as error:
        raise UnresolvedError(f"{owner}: an annotation cannot be resolved: {error}; define or import it") from None


def _predict_of(target: Callable[..., Any], owner: str) -> tuple[Callable[..., Any], list[inspect.Parameter]]:
    """The function whose signature counts, and its parameters without ``self``."""
    if not inspect.isclass(target):
        if not inspect.isfunction(target):
            raise FunctionError(f"{owner}: @hotset.function belongs above a class or a plain function")
        return target, list(inspect.signature(target).parameters.values())
    held = inspect.getattr_static(target, "predict", None)
    predict = getattr(target, "predict", None)
    if held is None or not callable(predict):
        raise FunctionError(f"{owner} has no predict; add a method such as predict(self, text: str) -> list[float]")
    for method in ("load", "unload"):
        _check_hook(target, owner, method)
    parameters = list(inspect.signature(predict).parameters.values())
    return predict, parameters if isinstance(held, staticmethod | classmethod) else parameters[1:]


def _check_hook(target: type, owner: str, method: str) -> None:
    hook = getattr(target, method, None)
    if hook is None:
        return
    usage = "load(self, device: str)" if method == "load" else "unload(self)"
    if not inspect.isfunction(hook) or inspect.iscoroutinefunction(hook):
        raise FunctionError(f"{owner}.{method} must be a plain method, {usage}")
    try:
        inspect.signature(hook).bind(*(["self", "cpu"] if method == "load" else ["self"]))
    except TypeError:
        raise FunctionError(f"{owner}.{method} must be callable as {usage}") from None


def _read(
    predict: Callable[..., Any],
    parameters: list[inspect.Parameter],
    target: Callable[..., Any],
    owner: str,
    options: FunctionOptions,
) -> Signature:
    label = f"{owner}.predict" if inspect.isclass(target) else owner
    if inspect.iscoroutinefunction(predict) or inspect.isasyncgenfunction(predict):
        raise FunctionError(f"{label} is async; write it as a plain def (its process serves one run at a time)")
    try:
        hints = typing.get_type_hints(predict, include_extras=True)
    except (TypeError, SyntaxError, AttributeError) as error:
        raise FunctionError(f"{label}: an annotation cannot be resolved: {error}") from None
    returns = hints.get("return", Any)
    streaming = inspect.isgeneratorfunction(predict) or typing.get_origin(returns) in _STREAMS or returns in _STREAMS
    batched = options.max_batch > 1
    if batched and streaming:
        raise FunctionError(f"{label} yields its results and cannot join requests; leave max_batch at 1")
    if batched and not (_is_list(returns) and parameters):
        raise FunctionError(
            f"{label} must take lists and return a list because max_batch is {options.max_batch}: "
            f"predict(self, texts: list[str]) -> list[...], one entry per request"
        )
    if batched or streaming:
        returns = next(iter(typing.get_args(returns)), Any)
    fields = [_parameter(parameter, hints, label, batched) for parameter in parameters]
    own_text = inspect.getdoc(target) if inspect.isclass(target) else None
    texts = (own_text, inspect.getdoc(predict))
    try:
        translated = translate(returns, label)
    except FunctionError:
        translated = Any
    return Signature(
        name=options.name,
        parameters=sorted(fields, key=lambda field: field.keyword_only),
        returns=translated,
        description="\n\n".join(text for text in texts if text),
        batched=batched,
        streaming=streaming,
    )


def _parameter(parameter: inspect.Parameter, hints: dict[str, Any], label: str, batched: bool) -> Parameter:
    name = parameter.name
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise FunctionError(f"{label} takes {parameter}; name every parameter and give its type")
    if name not in hints:
        raise FunctionError(f"{label}: parameter {name!r} has no type; write {name}: str, or whatever it is")
    annotation = hints[name]
    required = parameter.default is parameter.empty
    if batched:
        if not _is_list(annotation) or not typing.get_args(annotation):
            raise FunctionError(
                f"{label}: parameter {name!r} must be a list because requests are joined (max_batch); "
                f"write {name}: list[...] with the type that one request sends"
            )
        if not required:
            raise FunctionError(f"{label}: parameter {name!r} has a default, which a joined call cannot use; remove it")
        (annotation,) = typing.get_args(annotation)
    owner = f"{label}: parameter {name!r}"
    translated = translate(annotation, owner)
    _check_readable(translated, annotation, owner)
    return Parameter(
        name=name,
        annotation=translated,
        codec=codec_of(annotation),
        required=required,
        default=None if required else parameter.default,
        keyword_only=parameter.kind is parameter.KEYWORD_ONLY,
    )


def _is_list(annotation: Any) -> bool:
    return annotation is list or typing.get_origin(annotation) in (list, collections.abc.Sequence)


def _check_readable(translated: Any, annotation: Any, owner: str) -> None:
    try:
        msgspec.json.Decoder(translated, dec_hook=decode_hook)
        msgspec.json.schema_components([translated], schema_hook=schema_hook)
    except (TypeError, ValueError, RuntimeError) as error:
        # msgspec raises several kinds; only those about unions say more than that the type is unknown.
        reason = f" ({error})" if "union" in str(error) else ""
        raise FunctionError(
            f"{owner} has the type {inspect.formatannotation(annotation)}, which cannot be read from a request; "
            f"use JSON types, dataclasses, bytes, numpy.ndarray, torch.Tensor or PIL.Image.Image{reason}"
        ) from None
