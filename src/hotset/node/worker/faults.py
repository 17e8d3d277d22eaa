"""Which exceptions of a function are more than its own affair."""

from __future__ import annotations

from hotset.node.frames import Failed
from hotset.vocabulary import FailureKind

# Texts of the CUDA runtime and its libraries, as PyTorch, ONNX Runtime, JAX and CuPy pass them on. After one of these
# every later CUDA call of the process fails too, or may compute nonsense ("sticky" errors): only a new process helps.
_DEVICE_TEXTS = (
    "cuda error",
    "cuda driver error",
    "cuda failure",
    "cudaerror",
    "cuda_error_",
    "cudnn_status_execution_failed",
    "cudnn_status_internal_error",
    "cublas_status_execution_failed",
    "cublas_status_internal_error",
    "device-side assert",
    "nccl error",
    "hip error",
)
_HARMLESS_TEXTS = (
    "invalid device ordinal",
    "invalid argument",
    "invalid configuration argument",
    "no kernel image is available",
)
"""The call was wrong, or the build is for other GPUs; the process is as good as before."""
_MEMORY_TEXTS = (
    "cuda out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cuda error: out of memory",
    "cuda failure 2:",
    "cuda_error_out_of_memory",
    "cudaerrormemoryallocation",
    "resource_exhausted: out of memory",
    "failed to allocate memory for requested buffer",
)
_DEVICE_CLASSES = ("AcceleratorError", "CudaError")
_FRAMEWORKS = ("torch", "cupy", "cupy_backends", "onnxruntime", "jaxlib")
"""Packages whose exceptions are read even where they are no RuntimeError, as ONNX Runtime's are not."""


def classify(error: BaseException) -> FailureKind | None:
    """OUT_OF_MEMORY or DEVICE for what the GPU reported, looking through causes; None: an ordinary exception."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        kind = _classify_one(link)
        if kind is not None:
            return kind
        link = link.__cause__ or link.__context__
    return None


def _classify_one(error: BaseException) -> FailureKind | None:
    names = {cls.__name__ for cls in type(error).__mro__ if cls.__module__.partition(".")[0] in _FRAMEWORKS}
    text = str(error).lower()
    if "OutOfMemoryError" in names or any(mark in text for mark in _MEMORY_TEXTS):
        return FailureKind.OUT_OF_MEMORY
    if any(mark in text for mark in _HARMLESS_TEXTS):
        return None
    if names.intersection(_DEVICE_CLASSES):
        return FailureKind.DEVICE
    if (names or isinstance(error, RuntimeError)) and any(mark in text for mark in _DEVICE_TEXTS):
        return FailureKind.DEVICE
    return None


def describe(error: BaseException) -> str:
    """``TypeError: the first line of its message``."""
    message = str(error).strip().partition("\n")[0]
    name = type(error).__name__
    return f"{name}: {message}" if message else name


def load_failure(error: BaseException) -> Failed:
    """How a load that raised ``error`` is reported."""
    kind = classify(error) or (FailureKind.OUT_OF_MEMORY if isinstance(error, MemoryError) else FailureKind.ERROR)
    return Failed(kind=kind, reason=describe(error))
