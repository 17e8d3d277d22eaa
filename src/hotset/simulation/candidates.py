"""What ``hotset tune`` tries: ways to run the scheduler, and their variations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.policies.interface import PolicySettings

SETTINGS: Mapping[str, Sequence[float]] = {
    "o3_limit": (0, 5, 10, 50, 100, 400),
    "max_skips": (100, 1_000),
    "max_wait_s": (10.0, 30.0, 300.0),
    "overrun_s": (1.0, 3.0, 30.0),
}
"""What is tried of each of ``PolicySettings`` beside its default, one at a time, with the policies that heed it."""
_DEFAULTS = PolicySettings()


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run the scheduler."""

    policy: str
    eviction: str
    settings: PolicySettings = _DEFAULTS
    overlap: bool = False
    prefetch_recurring: bool = False
    """Only with overlap."""
    host_memory_bytes: int = 0
    """Of each node, for models that left a GPU."""

    def changed(self) -> dict[str, float]:
        """The policy's settings that are not at their default."""
        return {
            name: getattr(self.settings, name)
            for name in SETTINGS
            if getattr(self.settings, name) != getattr(_DEFAULTS, name)
        }

    def applied_to(self, config: SchedulerConfig) -> SchedulerConfig:
        """The same scheduler, run this way."""
        return msgspec.structs.replace(
            config,
            settings=self.settings,
            overlap=self.overlap,
            prefetch_recurring=self.prefetch_recurring,
            host_memory_bytes=self.host_memory_bytes,
        )


def heeds(policy: str, setting: str) -> bool:
    """Whether a policy reads a setting: made with two values of it, it differs. Raises ``UnknownNameError``."""
    one, other = (
        make_policy(policy, msgspec.structs.replace(_DEFAULTS, **{setting: value})) for value in SETTINGS[setting][:2]
    )
    return vars(one) != vars(other)


def pairs(current: Candidate, policies: Iterable[str], evictions: Iterable[str]) -> list[Candidate]:
    """Every policy with every eviction, with default settings, on a machine that is used as now.

    Raises ``UnknownNameError``.
    """
    known = [(make_policy(policy).name, make_eviction(eviction).name) for policy in policies for eviction in evictions]
    return [
        msgspec.structs.replace(current, policy=policy, eviction=eviction, settings=_DEFAULTS)
        for policy, eviction in known
    ]


def other_settings(candidate: Candidate) -> list[Candidate]:
    """Each setting that the policy heeds changed alone."""
    return [
        msgspec.structs.replace(candidate, settings=msgspec.structs.replace(candidate.settings, **{name: value}))
        for name, values in SETTINGS.items()
        if heeds(candidate.policy, name)
        for value in values
    ]


def other_tiers(candidate: Candidate, most_host_bytes: int) -> list[Candidate]:
    """Loads before or beside runs, or even before calls that recur, each with no host memory for models, half of the
    most, and all of it."""
    return [
        msgspec.structs.replace(candidate, overlap=overlap, prefetch_recurring=prefetch, host_memory_bytes=host_bytes)
        for overlap, prefetch in ((False, False), (True, False), (True, True))
        for host_bytes in dict.fromkeys((0, most_host_bytes // 2, most_host_bytes))
    ]
