"""Where the weights of a process's model are: in device memory (HOT) or parked in host memory (WARM).

``offload`` copies every tensor's storage into one slab of host memory and leaves each tensor empty; ``restore`` puts
the very same bytes back into the very same tensor objects. So whoever holds a tensor, tied weights, views of one
storage and modules that were compiled eagerly keep working, and the function's ``load`` is not called again. CUDA
graphs remember addresses: a process that captured one is not parked unless its function has hooks of its own.

A function may define ``offload(self)`` and ``restore(self, device)``; they are called instead.

The memory of a virtual GPU is host memory, so nothing is copied there, and a model of any library can stay as it is;
if its bus has a modelled bandwidth, the copy's time passes all the same.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from time import perf_counter, sleep
from typing import Any

import msgspec

from hotset.node.frames import Moved
from hotset.node.worker.memory import cuda_bytes, reachable, trim_heap
from hotset.node.worker.slab import Slab
from hotset.node.worker.staging import ALIGNMENT, Copy, StagingRing, process_ring, whole, why_not_plain


class CannotPark(Exception):
    """The model has nothing that could be copied."""


class Weights:
    """The tensors of a model on one device, as distinct storages; several tensors may share one."""

    def __init__(self, tensors: Sequence[Any]) -> None:
        """Raises ``CannotPark`` for a tensor that is more than a strided view of plain memory."""
        self._bound: list[_Bound] = []
        self._storages: dict[int, _Stored] = {}
        self.size_bytes = 0
        for tensor in tensors:
            if (reason := why_not_plain(tensor)) is not None:
                raise CannotPark(reason)
            storage = tensor.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            if not size:
                continue
            if key not in self._storages:
                self._storages[key] = _Stored(self.size_bytes, size)
                self.size_bytes += -(-size // ALIGNMENT) * ALIGNMENT
            elif self._storages[key].size_bytes != size:
                raise CannotPark("two tensors take the same memory for storages of different sizes")
            view = _Bound(tensor, key, tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.is_inference())
            self._bound.append(view)

    def leave(self, slab: Any, ring: StagingRing) -> None:
        """Copy all storages to ``slab`` (uint8, ``size_bytes`` long) and let go of them."""
        torch = sys.modules["torch"]
        tensors = {bound.key: bound.tensor for bound in self._bound}
        with torch.no_grad():
            ring.copy_out([Copy(slab[each.span], whole(tensors[key])) for key, each in self._storages.items()])
            # All copies are there before the first storage goes.
            for bound in self._bound:
                bound.tensor.data = torch.empty(0, dtype=bound.tensor.dtype, device=bound.tensor.device)

    def come_back(self, slab: Any, ring: StagingRing) -> None:
        """The opposite of ``leave``. Raises what the device's allocator raises when there is no room."""
        torch = sys.modules["torch"]
        device = self._bound[0].tensor.device
        with torch.no_grad():
            flats = {
                key: torch.empty(stored.size_bytes, dtype=torch.uint8, device=device)
                for key, stored in self._storages.items()
            }
            ring.copy_in([Copy(flats[key], slab[stored.span]) for key, stored in self._storages.items()])
            ring.synchronize()
            for bound in self._bound:
                tensor, storage = bound.tensor, flats[bound.key].untyped_storage()
                # What predict made in inference mode may only be changed in place there if it stays what it is.
                with torch.inference_mode(bound.inference):
                    back = torch.empty(0, dtype=tensor.dtype, device=device)
                    tensor.data = back.set_(storage, bound.offset, bound.size, bound.stride)


class _Stored(msgspec.Struct, frozen=True):
    """Where in the slab one storage is."""

    offset: int
    size_bytes: int

    @property
    def span(self) -> slice:
        return slice(self.offset, self.offset + self.size_bytes)


class _Bound(msgspec.Struct, frozen=True):
    """How one tensor sees its storage."""

    tensor: Any
    key: int
    offset: int
    """In elements, as ``size`` and ``stride``."""
    size: Any
    stride: Any
    inference: bool


class Residency:
    """The weights of one loaded function object. ``memory_bytes``: what it takes, as last measured.

    ``bandwidth``: bytes a second of a virtual GPU's modelled bus; None: copies there take no time.
    """

    def __init__(self, instance: Any, device: str, memory_bytes: int, bandwidth: float | None = None) -> None:
        self._instance = instance
        self._device = device
        self.memory_bytes = memory_bytes
        self._bandwidth = bandwidth
        self._on_cuda = device.startswith("cuda")
        self._hooked = all(callable(getattr(instance, name, None)) for name in ("offload", "restore"))
        self._parked: tuple[Weights, Slab] | None = None

    def offload(self) -> Moved:
        """Free the device's memory. Raises ``CannotPark`` when that would take more than the process can do, and
        whatever the function's own ``offload`` raises."""
        begin_s = perf_counter()
        host_bytes = self.memory_bytes
        if self._hooked:
            self._instance.offload()
        elif self._on_cuda:
            host_bytes = self._park()
        pace(begin_s, self.memory_bytes, self._bandwidth)
        if not self._on_cuda:
            return Moved(device_bytes=0, host_bytes=host_bytes)
        trim_heap()
        return Moved(device_bytes=cuda_bytes(emptied=True) or 0, host_bytes=host_bytes)

    def restore(self) -> Moved:
        """Take the device's memory again; ``device_bytes`` of the answer is what the model takes now."""
        begin_s = perf_counter()
        if self._hooked:
            self._instance.restore(self._device)
        elif self._parked is not None:
            weights, slab = self._parked
            weights.come_back(slab.tensor, process_ring())
            slab.close()
            self._parked = None
        pace(begin_s, self.memory_bytes, self._bandwidth)
        return Moved(device_bytes=(cuda_bytes() if self._on_cuda else None) or self.memory_bytes, host_bytes=0)

    def _park(self) -> int:
        """Copy what is on the GPU to host memory; the bytes it takes there."""
        tensors = [tensor for tensor in reachable(self._instance).tensors if tensor.is_cuda]
        if not tensors:
            raise CannotPark("it holds no torch tensors on the GPU: give its class offload and restore methods")
        if _has_graphs():
            raise CannotPark(
                "its CUDA graphs remember where the weights are: give its class offload and restore methods"
            )
        weights = Weights(tensors)
        if not weights.size_bytes:
            raise CannotPark("its tensors on the GPU are empty: give its class offload and restore methods")
        sys.modules["torch"].cuda.synchronize()  # whatever computes with them, on whichever stream
        ring, slab = process_ring(), Slab(weights.size_bytes, pinned=False)
        weights.leave(slab.tensor, ring)
        self._parked = weights, slab
        return weights.size_bytes + ring.pinned_bytes


def _has_graphs() -> bool:
    """Whether a CUDA graph was captured and is kept, by the function or by ``torch.compile``. They hide in closures."""
    graph = sys.modules["torch"].cuda.CUDAGraph
    return any(issubclass(type(each), graph) for each in gc.get_objects())


def pace(begin_s: float, size_bytes: int, bandwidth: float | None) -> None:
    """Wait until a copy of ``size_bytes`` that began at ``begin_s`` (``perf_counter``) would be done."""
    if bandwidth is not None:
        left_s = begin_s + size_bytes / bandwidth - perf_counter()
        if left_s > 0:
            sleep(left_s)
