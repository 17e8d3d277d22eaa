"""The protocol's messages as classes, in a descriptor pool of their own.

Other packages in the same process (Triton's client is one) register the same message names in protobuf's default pool,
where a second definition is an error; so this module does not use generated code, which would go there, but reads the
compiled descriptors (``open_inference.binpb``) into a private pool.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
)

_descriptors = descriptor_pb2.FileDescriptorSet.FromString(
    (files(__package__) / "open_inference.binpb").read_bytes(),
)
_pool = descriptor_pool.DescriptorPool()
for _file in _descriptors.file:
    _pool.Add(_file)

SERVICE: Any = _pool.FindServiceByName("inference.GRPCInferenceService")


def message_class(name: str) -> Any:
    """The class of one of the protocol's messages: ``message_class("ModelInferRequest")``."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"inference.{name}"))
