"""What a configuration says of a model's tensors, held against what the file itself says."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from hotset.errors import FunctionError
from hotset.functions.tensors import describe_shape
from hotset.functions.v2_tensors import DTYPES
from hotset.functions.v2_types import TensorMetadata

_POSITION = re.compile(r".+__(\d+)")


class Declared(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One input or output as a configuration has it; ``shape`` without the rows where the model is batched."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    labels: tuple[str, ...] = ()
    """What the classes of an output are called."""


def reconcile(
    kind: str, own: Sequence[TensorMetadata], declared: Sequence[Declared], *, typed: bool, batched: bool
) -> list[TensorMetadata]:
    """The tensors to serve, in the order of the file's own.

    Without a declaration they are the file's. With one, every tensor must be declared and agree: by name, by Triton's
    ``NAME__INDEX``, or, where the file has no names of its own (``typed`` is false), by position. Raises
    ``FunctionError`` for what does not agree.
    """
    if batched and typed:
        for each in own:
            if not each.shape or each.shape[0] >= 0:
                raise FunctionError(
                    f"max_batch_size is set, but {kind} {each.name} has no open first dimension "
                    f"[{describe_shape([None if n < 0 else n for n in each.shape])}]: export it with one, or set 0"
                )
    if not declared:
        return list(own)
    if len(own) != len(declared) and (typed or kind == "input"):
        names = ", ".join(each.name for each in own)
        raise FunctionError(f"{len(declared)} {kind}s are configured, but the model has {len(own)}: {names}")
    places: dict[int, TensorMetadata] = {}
    for index, wanted in enumerate(declared):
        place = _place(kind, own, wanted, index, typed)
        if place in places:
            raise FunctionError(f"{kind} {wanted.name} and {places[place].name} are the same {kind} of the model")
        places[place] = _merge(kind, own[place] if typed else None, wanted, batched)
    return [places[place] for place in sorted(places)]


def _place(kind: str, own: Sequence[TensorMetadata], declared: Declared, index: int, typed: bool) -> int:
    names = [each.name for each in own]
    if declared.name in names:
        return names.index(declared.name)
    numbered = _POSITION.fullmatch(declared.name)
    if numbered is not None and not typed and (kind == "output" or int(numbered[1]) < len(own)):
        return int(numbered[1])
    if not typed and kind == "output":
        return index
    raise FunctionError(f"{kind} {declared.name} is configured, but the model's are: {', '.join(names)}")


def _merge(kind: str, own: TensorMetadata | None, declared: Declared, batched: bool) -> TensorMetadata:
    if declared.datatype not in DTYPES:
        raise FunctionError(f"{kind} {declared.name}: {declared.datatype} is no datatype of the protocol")
    shape = (-1, *declared.shape) if batched else declared.shape
    if any(length < -1 for length in shape):
        raise FunctionError(f"{kind} {declared.name}: dims must be lengths, or -1 where any will do")
    if own is not None:
        fits = len(own.shape) == len(shape) and all(
            -1 in pair or pair[0] == pair[1] for pair in zip(own.shape, shape, strict=True)
        )
        if own.datatype != declared.datatype or not fits:
            raise FunctionError(
                f"{kind} {declared.name} is configured as {declared.datatype} {list(shape)}, but the model has "
                f"{own.datatype} {list(own.shape)}"
            )
        shape = tuple(max(pair) for pair in zip(own.shape, shape, strict=True))
    return TensorMetadata(name=declared.name, datatype=declared.datatype, shape=shape)
