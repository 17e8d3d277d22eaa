"""The functions as the gateway knows them: which version takes new calls, and which old ones still finish theirs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import msgspec

from hotset.gateway.metrics import FunctionMetrics
from hotset.node.interface import LaunchSpec
from hotset.scheduling.profiles import Profiles
from hotset.vocabulary import Model, Profile


class VersionSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One installed version of one function, ready to be started."""

    function: str
    launch: LaunchSpec
    """``launch.model`` is the version's name everywhere: ``function@digest``."""
    scheduled: Model | None
    """How the scheduler sees it; None: a plain function, which runs on the CPU pool and needs no GPU."""
    patience_s: float = 360.0
    """Longest a call may wait for its run to begin (a load and a run of its model's, say); callers may ask for less."""


class Learned(msgspec.Struct):
    """How often a version was loaded, restored and run on one kind of GPU."""

    loads: int = 0
    restores: int = 0
    runs: int = 0


class Version:
    """A version some calls are bound to."""

    __slots__ = ("calls", "function", "learned", "metrics", "model", "retired", "spec")

    def __init__(self, spec: VersionSpec, metrics: FunctionMetrics) -> None:
        self.spec = spec
        self.function = spec.function
        self.model = spec.launch.model
        self.metrics = metrics
        self.learned: defaultdict[str, Learned] = defaultdict(Learned)
        """By kind of GPU, since the server's start."""
        self.calls = 0
        """Calls that have not ended."""
        self.retired = False
        """A newer version took over, or the function was removed: it goes when its calls have."""

    def profile(self, profiles: Profiles) -> Profile | None:
        """What it was seen to cost on the kind of GPU that loaded it most; None: it was never loaded."""
        kind, known = max(self.learned.items(), key=lambda each: each[1].loads, default=("", Learned()))
        if not known.loads:
            return None
        return Profile(
            load_s=profiles.load_s(self.model, kind),
            restore_s=profiles.restore_s(self.model, kind) if known.restores else None,
            reload_s=profiles.reload_s(self.model, kind),
            inference_s=profiles.inference_s(self.model, kind),
            sizes_bytes=profiles.footprints[self.model].sizes_bytes,
            growth_bytes=profiles.footprints[self.model].growth_bytes,
        )


class Functions:
    """Name -> current version, and model -> version for all that are not gone yet. Pure bookkeeping."""

    def __init__(self) -> None:
        self.current: dict[str, Version] = {}
        self.versions: dict[str, Version] = {}
        self._metrics: dict[str, FunctionMetrics] = {}

    def install(self, spec: VersionSpec) -> tuple[Version, Version | None]:
        """Make it the version that takes new calls; also returns the one it replaces, now retired.

        A version that is still draining and comes back (deploy A, B, A) is taken into service again.
        """
        metrics = self._metrics.setdefault(spec.function, FunctionMetrics(spec.function))
        replaced = self.current.get(spec.function)
        version = self.versions.get(spec.launch.model)
        if version is None:
            version = Version(spec, metrics)
        version.spec = spec
        version.retired = False
        self.current[spec.function] = version
        self.versions[version.model] = version
        if replaced is version:
            return version, None
        if replaced is not None:
            replaced.retired = True
        return version, replaced

    def retire(self, function: str) -> Version | None:
        """Take the function out of service; None: there is none of that name."""
        version = self.current.pop(function, None)
        if version is not None:
            version.retired = True
        return version

    def forget(self, version: Version) -> None:
        """The version's last call has ended."""
        self.versions.pop(version.model, None)

    def metrics(self) -> Iterator[FunctionMetrics]:
        """Counters of every function seen since the start, removed ones too: counters never go back."""
        return iter(self._metrics.values())
