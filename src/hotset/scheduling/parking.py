"""Host memory as a second level: models whose weights left a GPU but are still parked on its node (WARM).

A parked model belongs to the GPU it left: its process is alive there and holds a residue of device memory (a context).
So it is on two accounts, its GPU's and its node's; the Cache Manager owns both.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from hotset.scheduling.cache import GpuMemory, Resident


class ParkedSize(msgspec.Struct, frozen=True, gc=False):
    """What a model takes while it is parked, as a node measured it."""

    device_bytes: int
    host_bytes: int


class HostMemory:
    """The account of one node's host memory for parked models."""

    __slots__ = ("capacity_bytes", "parked", "used_bytes")

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        """Of parked models, and of those on their way back: their host memory is free once they are HOT."""
        self.parked: OrderedDict[Resident, GpuMemory] = OrderedDict()
        """Parked models and the GPU that each left, in the order they were parked."""

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self.used_bytes


class Room(msgspec.Struct, gc=False):
    """How room for a model is made on a GPU: decided, not yet carried out.

    Order of carrying out: ``forgotten`` leave the host, ``unloaded`` and ``offloaded`` leave the GPU.
    """

    victims: list[Resident]
    """HOT models that leave the GPU, in the eviction policy's order: each is in one of the next two lists."""
    offloaded: list[Resident]
    unloaded: list[Resident]
    forgotten: list[Resident]
    """Parked models that become COLD, for the room they take on the host or on the GPU."""
