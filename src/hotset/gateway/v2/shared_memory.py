"""The system shared memory extension: tensors in POSIX shared memory of this machine.

Regions are read and written with ``pread`` and ``pwrite``, never mapped: a client that shrinks its region gets a 400,
where a mapping would give the whole server a SIGBUS.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from hotset.gateway.v2.refusal import Refusal

FOLDER = "/dev/shm"
MAX_REGIONS = 1024
"""Each holds a file descriptor of the server's."""
_OPEN_TO_ALL = stat.S_IROTH | stat.S_IWOTH
_NAME = re.compile(r"[^/\x00-\x1f\x7f]{1,255}")


class RegionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A registered region as the protocol describes it."""

    name: str
    key: str
    """Name of the shared-memory object, with or without its leading slash."""
    offset: int
    byte_size: int


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where in a region a tensor is, or is to be put."""

    region: str
    offset: int
    byte_size: int


class _Region:
    def __init__(self, status: RegionStatus, descriptor: int) -> None:
        self.status = status
        self.descriptor = descriptor
        self.users = 0


class Regions:
    """The regions of one server. ``folder`` is where the system keeps shared-memory objects."""

    def __init__(self, folder: str = FOLDER) -> None:
        self._folder = folder
        self._regions: dict[str, _Region] = {}

    def status(self, name: str = "") -> list[RegionStatus]:
        """All regions, or the one named; raises ``Refusal`` when there is none of that name."""
        if name:
            return [self._region(name).status]
        return [region.status for region in self._regions.values()]

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Open a shared-memory object; raises ``Refusal`` (400) with what to do.

        Only one that the server's own user made, or that is open to everybody: a client must not reach through the
        server what it could not reach itself.
        """
        _check_name(name)
        if name in self._regions:
            raise Refusal(400, f"shared memory region {name!r} is registered already: unregister it first")
        if len(self._regions) >= MAX_REGIONS:
            raise Refusal(400, f"{MAX_REGIONS} shared memory regions are registered already: unregister one first")
        object_name = key.removeprefix("/")
        if not _NAME.fullmatch(object_name) or object_name in (".", ".."):
            raise Refusal(400, f"key {key[:80]!r} is no name of a shared memory object: use one such as /tensors")
        if offset < 0 or byte_size <= 0:
            raise Refusal(400, "offset must not be negative, and byte_size must be more than 0")
        try:
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            descriptor = os.open(os.path.join(self._folder, object_name), flags)
        except OSError as error:
            raise Refusal(400, f"shared memory object {key!r} cannot be opened: {error.strerror}") from None
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() and found.st_mode & _OPEN_TO_ALL != _OPEN_TO_ALL:
            os.close(descriptor)
            raise Refusal(
                400,
                f"shared memory object {key!r} is another user's: create it as the user that runs the server, or let "
                "everybody read and write it",
            )
        if not stat.S_ISREG(found.st_mode) or offset + byte_size > found.st_size:
            os.close(descriptor)
            raise Refusal(400, f"shared memory object {key!r} has fewer than {offset + byte_size} bytes")
        status = RegionStatus(name=name, key=key, offset=offset, byte_size=byte_size)
        self._regions[name] = _Region(status, descriptor)

    def unregister(self, name: str = "") -> None:
        """Forget one region, or all; raises ``Refusal`` (400) while a request uses it. One that is not there is fine,
        as the protocol wants it."""
        if name:
            _check_name(name)
        chosen = [region for region in self._regions.values() if not name or region.status.name == name]
        for region in chosen:
            if region.users:
                raise Refusal(400, f"shared memory region {region.status.name!r} is in use: wait for its requests")
        for region in chosen:
            del self._regions[region.status.name]
            os.close(region.descriptor)

    def close(self) -> None:
        for region in self._regions.values():
            os.close(region.descriptor)
        self._regions.clear()

    def read(self, place: Place) -> bytearray:
        """The bytes there; raises ``Refusal`` (400) when the region does not have them."""
        region, at = self._locate(place)
        if place.byte_size > os.fstat(region.descriptor).st_size - at:
            raise _shrunk(place)
        data = bytearray(place.byte_size)
        if os.preadv(region.descriptor, [data], at) != place.byte_size:
            raise _shrunk(place)
        return data

    def write(self, place: Place, data: bytes | memoryview) -> None:
        """Put an output there; raises ``Refusal`` (400) when it does not fit."""
        region, at = self._locate(place)
        if len(data) > place.byte_size:
            raise Refusal(
                400, f"an output of {len(data)} bytes does not fit the {place.byte_size} given in {place.region!r}"
            )
        if at + len(data) > os.fstat(region.descriptor).st_size:
            raise _shrunk(place)
        os.pwrite(region.descriptor, data, at)

    @contextmanager
    def used(self, places: list[Place]) -> Iterator[None]:
        """Keep the regions from being unregistered; raises ``Refusal`` (400) for a place outside its region."""
        regions = [self._locate(place)[0] for place in places]
        for region in regions:
            region.users += 1
        try:
            yield
        finally:
            for region in regions:
                region.users -= 1

    def _region(self, name: str) -> _Region:
        _check_name(name)
        region = self._regions.get(name)
        if region is None:
            raise Refusal(400, f"there is no shared memory region {name!r}: register it first")
        return region

    def _locate(self, place: Place) -> tuple[_Region, int]:
        """The region, and where in its object the place begins."""
        region = self._region(place.region)
        status = region.status
        if place.offset < 0 or place.byte_size < 0 or place.offset + place.byte_size > status.byte_size:
            raise Refusal(
                400,
                f"offset {place.offset} and {place.byte_size} bytes lie outside the region {place.region!r}, which has "
                f"{status.byte_size} bytes",
            )
        return region, status.offset + place.offset


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise Refusal(400, f"shared memory region {name[:80]!r} has no usable name: leave out slashes")


def _shrunk(place: Place) -> Refusal:
    return Refusal(400, f"the shared memory object of region {place.region!r} is smaller than it was: register it anew")
