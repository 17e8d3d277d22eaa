"""How a Scheduler is set up."""

from __future__ import annotations

import msgspec

from hotset.errors import ConfigurationError
from hotset.scheduling.policies.interface import PolicySettings
from hotset.scheduling.quarantine import QuarantineSettings


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds and switches. The defaults are the paper's system: unbounded queue, one request a run, no journal."""

    max_queue: int | None = None
    """Most requests that may wait; one more is rejected with QUEUE_FULL."""
    max_queue_per_model: int | None = None
    burst_s: float = 0.0
    """Waiting requests of one model join a run while the run stays shorter than this, even if the model does not batch:
    they run one after the other, and a decision is paid once for all of them. 0: never."""
    max_burst: int = 64
    max_attempts: int = 2
    """Times a request may be tried when processes or GPUs are lost."""
    journal_capacity: int = 0
    host_memory_bytes: int = 0
    """Of each node, for models that left a GPU but may come back (WARM); 0: they are unloaded (the paper)."""
    overlap: bool = False
    """Models are loaded while their GPU computes for others, some of them ahead; False: one thing at a time (paper)."""
    prefetch_recurring: bool = False
    """With overlap: also load models that are about to be called, as the past has it (``recurrence.py``)."""
    settings: PolicySettings = PolicySettings()
    """What the policy was made with: whoever tells how a server was run needs it too."""
    quarantine: QuarantineSettings = QuarantineSettings()

    def __post_init__(self) -> None:
        if self.prefetch_recurring and not self.overlap:
            raise ConfigurationError(
                "models can only be prefetched where loads overlap with runs: set overlap too (--overlap)"
            )
