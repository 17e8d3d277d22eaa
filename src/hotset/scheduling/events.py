"""What the world tells the scheduler. Each event is handed over with the time it happened: ``handle(event, now_s)``."""

from __future__ import annotations

import msgspec

from hotset.vocabulary import FailureKind, Gpu, Model, Request


class Event(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Base of all events; ``tag=True`` makes a recorded stream of them readable again."""


class ModelAdded(Event, frozen=True):
    """A function version was deployed, or its figures (memory, max_batch) changed."""

    model: Model


class ModelRemoved(Event, frozen=True):
    """A function version is gone: waiting requests end with REMOVED, running ones finish, then it is unloaded."""

    name: str


class GpuJoined(Event, frozen=True):
    """A GPU is ready for work; it starts empty."""

    gpu: Gpu


class GpuLost(Event, frozen=True):
    """A GPU, or its node, is gone with everything on it."""

    gpu_id: str
    reason: str = ""


class RequestArrived(Event, frozen=True):
    """A call was accepted by the gateway."""

    request: Request


class RequestCancelled(Event, frozen=True):
    """The client left. A waiting request is forgotten; a running one finishes unread."""

    request_id: int


class ModelLoaded(Event, frozen=True):
    """A ``Load`` is done: the model is HOT. ``memory_bytes``: what it really takes, if that was measured."""

    gpu_id: str
    model: str
    load_s: float
    memory_bytes: int | None = None


class ModelOffloaded(Event, frozen=True):
    """An ``Offload`` is done: the model is WARM. ``device_bytes``: GPU memory that its process still holds (a context);
    ``host_bytes``: what its parked weights take of the node's host memory."""

    gpu_id: str
    model: str
    offload_s: float
    device_bytes: int
    host_bytes: int


class ModelRestored(Event, frozen=True):
    """A ``Restore`` is done: the model is HOT again. One that failed is a ``LoadFailed``, its process gone."""

    gpu_id: str
    model: str
    restore_s: float
    memory_bytes: int | None = None


class ModelMeasured(Event, frozen=True):
    """A HOT model takes other GPU memory than it was last said to: runs have added to it, or let go of some."""

    gpu_id: str
    model: str
    memory_bytes: int


class LoadFailed(Event, frozen=True):
    """A ``Load`` came to nothing; the GPU's memory is as before it. ``memory_bytes``: what it would have taken."""

    gpu_id: str
    model: str
    kind: FailureKind
    reason: str
    memory_bytes: int | None = None


class RunFinished(Event, frozen=True):
    """A ``Run`` is done: every request in it has its answer (a function's own error is an answer)."""

    gpu_id: str
    model: str
    inference_s: float
    """Duration of the whole run, all its requests together."""


class RunFailed(Event, frozen=True):
    """A ``Run`` ended early and its process is gone; ``answered`` requests had their answer before that."""

    gpu_id: str
    model: str
    kind: FailureKind
    reason: str
    answered: tuple[int, ...] = ()


class ProcessLost(Event, frozen=True):
    """The process of a resident, idle model died: the model is COLD again on that GPU."""

    gpu_id: str
    model: str
    reason: str


class TimeAdvanced(Event, frozen=True):
    """Nothing happened but time: deadlines and held batches are looked at (``Scheduler.next_wakeup_s`` says when)."""
