"""Host memory of an exact size, pinned if the GPU is to read and write it by itself."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys


class Slab:
    """Host memory of exactly one size, which goes back to the system when it is closed.

    torch's own pinned allocator rounds up to a power of two and keeps what it has; this is mapped, and pinned where
    the driver agrees. It is private memory, of which the kernel makes huge pages (of shared memory it does not, as
    distributions set it up): filling takes a third of the time so, giving back next to none. A child of this process
    does not get it: the device would go on writing to pages that are no longer the parent's.
    """

    def __init__(self, size_bytes: int, *, pinned: bool) -> None:
        torch = sys.modules["torch"]
        self._map = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_DONTFORK)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._runtime = torch.cuda.cudart() if pinned else None
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        if self._runtime is not None and int(self._runtime.cudaHostRegister(self._address, size_bytes, 0)):
            self._runtime = None
            forget_last_error()
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)

    @property
    def pinned(self) -> bool:
        return self._runtime is not None

    def close(self) -> None:
        """No copy from or to it may be under way."""
        if self._runtime is not None:
            self._runtime.cudaHostUnregister(self._address)
        del self.tensor
        self._map.close()


def forget_last_error() -> None:
    """What the CUDA runtime refused, it tells the next kernel's caller too, once: a small one takes the blame here."""
    with contextlib.suppress(RuntimeError):
        sys.modules["torch"].ones(1, device="cuda").add_(1)
