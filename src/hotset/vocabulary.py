"""The nouns every part of hotset shares. Small, no behaviour.

Names are the paper's where it has one, else OpenFaaS's or the Open Inference Protocol's. Sizes are bytes, times are
seconds; a field that is neither says so in its name.
"""

from __future__ import annotations

from enum import Enum

import msgspec


class Residency(Enum):
    """Where a model's weights are, for one GPU."""

    COLD = "cold"
    """On disk only."""
    WARM = "warm"
    """Parked in host memory, its process alive."""
    LOADING = "loading"
    """On its way into GPU memory: the memory is reserved, the model cannot run yet."""
    HOT = "hot"
    """In GPU memory, ready to run."""


class FailureKind(Enum):
    """Why a GPU process could not finish a load or a run. All but ERROR end the process."""

    CRASH = "crash"
    """The process died."""
    HANG = "hang"
    """The process was killed because it ran past the function's timeout."""
    OUT_OF_MEMORY = "out_of_memory"
    """The device had no room for the load or the run."""
    DEVICE = "device"
    """The GPU reported a sticky error: its context is poisoned (CUDA)."""
    ERROR = "error"
    """The function's own ``load`` raised."""


class RejectReason(Enum):
    """Why a request ended without running; each has its HTTP status (gateway/statuses)."""

    UNKNOWN_MODEL = "unknown_model"
    QUEUE_FULL = "queue_full"
    DEADLINE = "deadline"
    """Its deadline passed before its run began."""
    HOPELESS = "hopeless"
    """Its deadline was yet to come, but could not be met any more."""
    TOO_LARGE = "too_large"
    QUARANTINED = "quarantined"
    FAILED = "failed"
    NO_GPU = "no_gpu"
    REMOVED = "removed"
    SHUTTING_DOWN = "shutting_down"


LOWEST_PRIORITY, NORMAL_PRIORITY, HIGHEST_PRIORITY = -2, 0, 2
"""Of requests: the higher goes first."""


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU, real or virtual. ``gpu_id`` is unique in the cluster: ``node/device`` (``local/cuda:0``)."""

    gpu_id: str
    memory_bytes: int
    """What models may use: the device's memory less what contexts and other programs hold."""
    node: str = "local"
    kind: str = "virtual"
    """Device model; learned load and inference times are kept per kind."""


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a model's cost before it has been measured; None: not known, learn it."""

    load_s: float | None = None
    inference_s: float | None = None
    restore_s: float | None = None
    """From WARM to HOT."""
    reload_s: float | None = None
    """A load on a node that has the model, HOT or WARM, on another GPU: its host memory has the weights (LIMITS 3)."""
    sizes_bytes: tuple[int, ...] = ()
    """GPU memory that its newest loads took, oldest first."""
    growth_bytes: int = 0
    """The most that runs added to one of these."""


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler must know of one version of one function.

    A redeployed function is a new model (``name@digest``), so that calls in flight finish on the old one.
    """

    name: str
    memory_bytes: int
    """GPU memory to keep free for a load; declared at first, then learned (``scheduling/profiles.py``, Footprint)."""
    max_batch: int = 1
    """Most requests that one run may join."""
    max_batch_wait_s: float = 0.0
    """How long a request for it may be held back, while it is resident, until so many are together."""
    retry: bool = True
    """Whether a request whose process died may run once more."""
    profile: Profile = Profile()
    min_copies: int = 0
    """So many copies are kept HOT, calls or no calls (``scheduling/pins.py``); less where there is no room."""
    max_copies: int | None = None
    """Most GPUs that hold it at once; its requests wait for one of them. None: as many as it pays. Pins come first."""


class Request(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One call, as the scheduler sees it: no payload."""

    request_id: int
    model: str
    arrival_s: float
    deadline_s: float | None = None
    """Absolute time by which it is to be answered; None: whenever."""
    caller: str = ""
    """Who pays for it (an API key's name, a tenant); empty: nobody in particular."""
    weight: float = 1.0
    """The caller's share of the GPUs' time, relative to the other callers'."""
    priority: int = NORMAL_PRIORITY
    """``LOWEST_PRIORITY`` to ``HIGHEST_PRIORITY``."""
