"""What must outlive the server: the records, and the interface of whatever keeps them.

A deployed version is three things in three places: its bundle (a folder named by its content), its environment (a
folder named by its requirements) and its ``FunctionRecord``. The record is written last, in one transaction, so a crash
at any point of a deploy leaves the version before it in service and at most an unused folder behind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar

import msgspec

from hotset.functions.contract import FunctionOptions, LoadCheck

VERSION_DIGITS = 12
"""Hexadecimal digits of a version: enough that two versions of one function never meet."""


class BundleRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One bundle that is unpacked and ready to be run from."""

    digest: str
    """SHA-256 of its content (``bundles.content_digest``), hexadecimal."""
    size_bytes: int
    """All its files together, unpacked."""
    files: int
    created_at_s: float
    """Unix time."""


class ClientFields(msgspec.Struct, frozen=True, kw_only=True):
    """What a deployment said that hotset keeps as it is, so that its client reads back what it wrote."""

    env_process: str | None = None
    env_vars: Mapping[str, str] = msgspec.field(default_factory=dict)
    constraints: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    limits: Mapping[str, str] | None = None
    requests: Mapping[str, str] | None = None
    read_only_root_filesystem: bool = False
    gpu_request: str | None = None
    """Which way of asking for GPU memory counted."""


class FunctionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The current version of one function: all that is needed to start it again after a restart."""

    options: FunctionOptions
    """How it is run: the decorator's options, overridden by those of the deployment. Its name is ``options.name``."""
    entry: str
    """``module:Class`` inside the bundle."""
    bundle: str
    """Digest of its bundle."""
    requirements: tuple[str, ...] = ()
    """What it imports, normalised (``Requirements.lines``)."""
    version: str
    """``version_of`` these four."""
    frameworks: tuple[str, ...] = ()
    """Slow imports of its module, to have done before its process is needed."""
    labels: Mapping[str, str] = msgspec.field(default_factory=dict)
    annotations: Mapping[str, str] = msgspec.field(default_factory=dict)
    image: str = ""
    """What OpenFaaS clients call the image; kept so that they read back what they wrote."""
    schema: Mapping[str, Any] = msgspec.field(default_factory=dict)
    """JSON schema of its input and output, from the signature."""
    client: ClientFields = ClientFields()
    load_check: LoadCheck | None = None
    """None: its loads are not checked (yet)."""
    created_at_s: float
    """Unix time at which this version was deployed."""

    @property
    def name(self) -> str:
        return self.options.name

    @property
    def model(self) -> str:
        """The version's name everywhere else: ``name@version``."""
        return f"{self.options.name}@{self.version}"


class NamedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the small records that are found by their name alone."""

    name: str


class ImageRecord(NamedRecord, frozen=True, kw_only=True):
    """A name under which a bundle was pushed: ``repository:tag``."""

    digest: str
    pushed_at_s: float
    """Unix time."""


class NamespaceRecord(NamedRecord, frozen=True, kw_only=True):
    """A namespace beside the default one."""

    labels: Mapping[str, str] = msgspec.field(default_factory=dict)
    annotations: Mapping[str, str] = msgspec.field(default_factory=dict)


class ApiKeyRecord(NamedRecord, frozen=True, kw_only=True):
    """A key that calls of one function may show; a function with keys answers nobody else."""

    function: str
    digest: str
    """SHA-256 of the key, hexadecimal: the key itself is shown once and kept nowhere."""
    created_at_s: float
    """Unix time."""
    weight: float = 1.0
    """Of its caller's share of the GPUs' time."""
    priority: int = 0
    """Of calls that show it, and the most that they may ask for."""


Named = TypeVar("Named", bound=NamedRecord)


class ProfileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What was learned of one model on one kind of GPU; None: not measured yet."""

    model: str
    """``name@version``."""
    gpu_kind: str
    load_s: float | None = None
    """Mean of its loads."""
    loads: int = 0
    restore_s: float | None = None
    """Mean of its restores."""
    restores: int = 0
    reload_s: float | None = None
    """Of its loads that found the weights in host memory."""
    inference_s: float | None = None
    """Mean of its runs, for one request."""
    runs: int = 0
    memory_bytes: int | None = None
    """Most GPU memory that it lately took."""
    sizes_bytes: tuple[int, ...] = ()
    """GPU memory that its newest loads took, on whatever kind, oldest first."""
    growth_bytes: int = 0
    """The most that runs added to one of these."""


class Datastore(Protocol):
    """Keeps the records. Raises ``StoreError``.

    Every method blocks, a writing one for about one disk flush, and may be called from any thread; the gateway calls
    the writing ones through ``asyncio.to_thread``. What was written when a method returned survives a power cut.
    """

    def deploy(self, function: FunctionRecord, bundle: BundleRecord) -> None:
        """Record the bundle and make this the current version of the function: both or neither."""
        ...

    def function(self, name: str) -> FunctionRecord | None: ...

    def functions(self) -> list[FunctionRecord]:
        """All, ordered by name."""
        ...

    def remove_function(self, name: str) -> bool:
        """Forget the function and its learned profiles; False: there was none of that name."""
        ...

    def bundles(self) -> list[BundleRecord]: ...

    def forget_unused_bundles(self) -> list[str]:
        """Drop the records of bundles no function runs from and no image names; returns the digests that remain."""
        ...

    def name_image(self, image: ImageRecord, bundle: BundleRecord) -> None:
        """Record the bundle and give it this name, which may have been another's: both or neither."""
        ...

    def save_named(self, record: NamedRecord) -> None:
        """Write it in place of the one of its kind and name."""
        ...

    def named(self, kind: type[Named]) -> list[Named]:
        """All of this kind, ordered by name."""
        ...

    def remove_named(self, kind: type[NamedRecord], name: str) -> bool:
        """False: there was none of that name."""
        ...

    def save_profiles(self, profiles: Iterable[ProfileRecord]) -> None:
        """Write all in one transaction; each replaces what was known of its model and GPU kind."""
        ...

    def profiles(self) -> list[ProfileRecord]: ...

    def close(self) -> None: ...


def version_of(options: FunctionOptions, entry: str, bundle: str, requirements: tuple[str, ...]) -> str:
    """The version these four make: a change of any is a new version, a change of labels is not."""
    content = msgspec.json.encode([options, entry, bundle, requirements], order="deterministic")
    return hashlib.sha256(content).hexdigest()[:VERSION_DIGITS]
