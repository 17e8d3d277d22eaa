"""A GPU's copy engine that makes every copy as late as it may, with host memory in the GPU's place.

What has not been waited for is not there yet, and a buffer that is used again too early is seen in what arrives.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch

from hotset.node.worker.slab import Slab


class LateStream:
    """A ``CopyStream``. ``calls``: what was asked of it; ``on_device``: the addresses of what it made."""

    def __init__(self, *, pins: bool = True) -> None:
        self.calls: list[str] = []
        self.on_device: set[int] = set()
        self._pins = pins
        self._waiting: list[tuple[Any, Any]] = []
        self._given = self._done = 0
        self._lock = threading.Lock()

    def pinned(self, size_bytes: int) -> Slab | None:
        self.calls.append(f"pin {size_bytes}")
        return Slab(size_bytes, pinned=False) if self._pins else None

    def like(self, tensor: Any) -> Any:
        made = torch.empty_like(tensor)
        self.on_device.add(made.data_ptr())
        return made

    def after_current(self) -> None:
        self.calls.append("after current")

    def before_current(self) -> None:
        self.calls.append("before current")

    def copy(self, destination: Any, source: Any) -> None:
        self.calls.append("copy")
        self._waiting.append((destination, source))
        self._given += 1

    def event(self) -> LateEvent:
        return LateEvent(self, self._given)

    def synchronize(self) -> None:
        self.calls.append("synchronize")
        self.copy_until(self._given)

    @property
    def unfinished(self) -> int:
        """Copies that nobody has waited for."""
        return len(self._waiting)

    def copy_until(self, count: int) -> None:
        with self._lock:
            while self._done < count:
                destination, source = self._waiting.pop(0)
                ctypes.memmove(destination.data_ptr(), source.data_ptr(), len(source))  # torch may be staged
                self._done += 1


class LateEvent:
    def __init__(self, stream: LateStream, count: int) -> None:
        self._stream = stream
        self._count = count

    def synchronize(self) -> None:
        self._stream.calls.append(f"event {self._count}")
        self._stream.copy_until(self._count)
