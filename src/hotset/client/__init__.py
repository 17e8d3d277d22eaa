"""The Python client: tensors in, tensors out, over the v2 protocol's binary form.

with hotset.Client("http://127.0.0.1:8080") as client:
    scores = client.infer("resnet", {"image": array})["scores"]

``AsyncClient`` has the same methods, to be awaited.
"""

from __future__ import annotations

from hotset.client.asynchronous import AsyncClient
from hotset.client.messages import InferenceError, InferResult, ModelMetadata, ModelStatus, TensorMetadata
from hotset.client.retries import Retries
from hotset.client.synchronous import Client

__all__ = [
    "AsyncClient",
    "Client",
    "InferResult",
    "InferenceError",
    "ModelMetadata",
    "ModelStatus",
    "Retries",
    "TensorMetadata",
]
