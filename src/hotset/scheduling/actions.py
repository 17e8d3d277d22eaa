"""What the scheduler wants done. The actions of one event are carried out in order; those of one GPU strictly so."""

from __future__ import annotations

import msgspec

from hotset.vocabulary import RejectReason


class Action(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Base of all actions."""


class Unload(Action, frozen=True):
    """HOT -> COLD: end the model's process on this GPU. Its memory counts as free from here on."""

    gpu_id: str
    model: str


class Load(Action, frozen=True):
    """COLD -> HOT on this GPU; answered by ``ModelLoaded`` or ``LoadFailed``."""

    gpu_id: str
    model: str
    request_id: int | None
    """The request that caused it (a miss); None: the model is to be kept HOT."""
    false_miss: bool
    """Another GPU held the model at that moment (paper, evaluation)."""


class Offload(Action, frozen=True):
    """HOT -> WARM: park the model's weights in host memory, its process stays; answered by ``ModelOffloaded``, or by
    ``ProcessLost`` if that fails."""

    gpu_id: str
    model: str


class Restore(Action, frozen=True):
    """WARM -> HOT on the GPU where it is parked; answered by ``ModelRestored`` or ``LoadFailed``."""

    gpu_id: str
    model: str
    request_id: int | None
    """The request that caused it (a miss, but a cheap one); None: the model is to be kept HOT."""


class Run(Action, frozen=True):
    """Run the model for these requests in one go; answered by ``RunFinished`` or ``RunFailed``.

    With more than one request: one batched call where the function batches (``Model.max_batch``), else one call after
    the other, each answered as it is done.
    """

    gpu_id: str
    model: str
    request_ids: tuple[int, ...]
    hit: bool
    """The model was resident when the run was decided; False: a ``Load`` came first, for the first request."""


class Reject(Action, frozen=True):
    """End a request without a result."""

    request_id: int
    reason: RejectReason
    message: str
    """One sentence for the caller."""
    retry_after_s: float | None = None


class Outbox:
    """The actions of the event that is being handled, in order, as the parts of the Scheduler add to them."""

    __slots__ = ("actions",)

    def __init__(self) -> None:
        self.actions: list[Action] = []
