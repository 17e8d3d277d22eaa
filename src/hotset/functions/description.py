"""What importing a function tells: its options, entry and schema. Importing runs the user's code."""

from __future__ import annotations

from typing import Any

import msgspec

from hotset.errors import FunctionError
from hotset.functions.contract import FunctionOptions, options_of
from hotset.functions.inspection import signature_of
from hotset.functions.loading import load_entry
from hotset.functions.v2_types import tensors_of


class Description(msgspec.Struct, frozen=True, kw_only=True, tag="description"):
    entry: str
    """``module:Name``."""
    options: FunctionOptions
    schema: dict[str, Any]
    frameworks: tuple[str, ...] = ()
    """What the import needs that takes long."""


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    """The function breaks the contract."""

    error: str


def describe_entry(code_path: str, entry: str) -> Description | Failure:
    """Import it from there; what its own code raises is raised."""
    try:
        target = load_entry(code_path, entry)
        options = options_of(target)
        assert options is not None
        signature = signature_of(target, options)
    except FunctionError as error:
        return Failure(str(error))
    return Description(
        entry=f"{entry.partition(':')[0]}:{target.__name__}",
        options=options,
        schema=signature.schema() | {"tensors": msgspec.to_builtins(tensors_of(signature))},
    )
