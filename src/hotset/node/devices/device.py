"""What a node must know of one device. The work on it is done in the GPU processes, never in the node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from hotset.vocabulary import Gpu


class OpensAhead(msgspec.Struct, frozen=True):
    """How a process opens a device before it knows its model, so that the load need not."""

    framework: str
    """What must be imported for it; who does not use that is served by other processes."""
    opener: str
    """``module:function``, called in the process."""
    memory_bytes: int
    """Device memory that a process which has opened it is assumed to take."""


class Device(Protocol):
    """One GPU, real or virtual, as the node sees it. Nothing here blocks for more than a driver call."""

    @property
    def gpu(self) -> Gpu: ...

    @property
    def device_name(self) -> str:
        """What a function's ``load(device)`` gets."""
        ...

    @property
    def copy_bandwidth(self) -> float | None:
        """Bytes a second of a modelled bus between host and device; None: the real one takes the time it takes."""
        ...

    @property
    def opens_ahead(self) -> OpensAhead | None:
        """None: there is nothing to open."""
        ...

    def environment(self) -> Mapping[str, str]:
        """Variables for the processes of this device, so that they see it and no other."""
        ...

    def defaults(self) -> Mapping[str, str]:
        """Variables for its processes that a function's own override."""
        ...

    def process_bytes(self, pid: int) -> int | None:
        """Device memory a process holds; None where only the process itself can tell."""
        ...

    def free_bytes(self) -> int | None:
        """Device memory that nobody uses now; None: only the node counts."""
        ...

    def utilisation(self) -> float | None:
        """Share of the last second the device computed, 0 to 1; None where only the node can tell."""
        ...

    def lost(self) -> str | None:
        """Why the device cannot be used any more; None: it can."""
        ...

    def close(self) -> None: ...
