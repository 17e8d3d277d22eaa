"""What a node offers and what it reports: the seam between the control loop and a GPU Manager.

``LocalNode`` (manager.py) and ``FakeNode`` (fake.py) implement ``Node``; the control loop implements ``NodeListener``.
Every method is called on the one event loop that owns both sides, and none of them blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from hotset.node.history import ModelHistory
from hotset.vocabulary import FailureKind, Gpu


class LaunchSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything needed to start the GPU process of one model (one version of one function)."""

    model: str
    """``name@digest``."""
    entry: str
    """``module:Class`` inside ``code_path``."""
    code_path: str
    """Directory of the unpacked bundle, or of the user's own file (``hotset dev``)."""
    python: str
    """Interpreter of the function's environment."""
    env: Mapping[str, str] = msgspec.field(default_factory=dict)
    memory_bytes: int
    """GPU memory the process is expected to take; what it really takes is measured, and may be all that is free."""
    max_batch: int = 1
    frameworks: tuple[str, ...] = ()
    """What its module was seen to import that takes long (``worker/environment.py``)."""
    timeout_s: float = 60.0
    """Longest one run may take before the process counts as hung."""
    load_timeout_s: float = 300.0
    fast_load: bool = True
    """Its loads were not seen to come out wrong when they are made fast (``worker/fast_load.py``)."""


class Call(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request's payload, on its way to a GPU process."""

    request_id: int
    body: bytes | memoryview
    content_type: str = "application/json"
    accept: str = "*/*"


class Answer(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request's result, or one chunk of it.

    A function's own exception is an answer too (status 500, a JSON error), as is a body that does not fit its signature
    (status 400, naming the field).
    """

    request_id: int
    status: int = 200
    content_type: str = "application/json"
    body: bytes | memoryview = b""
    inference_s: float = 0.0
    final: bool = True
    """False: a chunk of a streamed answer; more will come. The last one (``final``) may be empty."""


class ProcessReport(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU process as the operating system and the device see it, now."""

    gpu_id: str
    model: str
    pid: int
    device_bytes: int
    """GPU memory: NVML per process on CUDA; parameters, buffers and workspace on a virtual GPU."""
    private_bytes: int
    """Host memory that it alone has written."""
    shared_bytes: int
    """Its share of what it has mapped with others, weights above all; with ``private_bytes`` its PSS."""


class NodeListener(Protocol):
    """Where a node reports; all methods are cheap and must not raise."""

    def loaded(self, gpu_id: str, model: str, load_s: float, memory_bytes: int | None) -> None:
        """``load_s``: since it was asked for, until whoever was to leave first had left included. That is how long the
        GPU was taken, and what a load is worth avoiding."""

    def load_failed(
        self, gpu_id: str, model: str, kind: FailureKind, reason: str, memory_bytes: int | None = None
    ) -> None:
        """``memory_bytes``: what the load would have taken, where an OUT_OF_MEMORY could be measured."""
        ...

    def offloaded(self, gpu_id: str, model: str, offload_s: float, device_bytes: int, host_bytes: int) -> None:
        """``device_bytes``: what its process still holds of the GPU; ``host_bytes``: what is parked."""
        ...

    def restored(self, gpu_id: str, model: str, restore_s: float, memory_bytes: int | None) -> None: ...

    def measured(self, gpu_id: str, model: str, memory_bytes: int) -> None:
        """After a run, the resident model takes other GPU memory than was last reported."""
        ...

    def answered(self, answer: Answer) -> None: ...

    def run_finished(self, gpu_id: str, model: str, inference_s: float) -> None: ...

    def run_failed(
        self, gpu_id: str, model: str, kind: FailureKind, reason: str, answered: tuple[int, ...]
    ) -> None: ...

    def process_lost(self, gpu_id: str, model: str, reason: str) -> None: ...

    def gpu_lost(self, gpu_id: str, reason: str) -> None: ...

    def logged(self, model: str, line: str) -> None: ...


class Node(Protocol):
    """A machine with GPUs.

    Of one GPU, copies (load, unload, offload, restore) are carried out in the order they are asked for, and so are
    runs. A run goes on beside copies of other models; operations on one model keep their order.
    """

    @property
    def gpus(self) -> Sequence[Gpu]: ...

    async def start(self, listener: NodeListener) -> None:
        """Find the devices and get ready; raises ``NodeError`` with what to do when there is nothing to run on."""
        ...

    async def stop(self) -> None:
        """End every process: SIGTERM, a grace period, SIGKILL; returns when all are reaped."""
        ...

    def prepare(self, spec: LaunchSpec) -> None:
        """This model was deployed: get ready to start its process quickly. Returns at once."""
        ...

    def expect(self, spec: LaunchSpec) -> None:
        """A call of this model waits, and no GPU has it: have its files at hand when it is to be loaded. Returns at
        once; asking again costs nothing."""
        ...

    def load(self, gpu_id: str, spec: LaunchSpec) -> None:
        """Answered by ``loaded`` or ``load_failed``."""
        ...

    def unload(self, gpu_id: str, model: str) -> None:
        """End the model's process; what is asked of this GPU later waits until its memory is free."""
        ...

    def offload(self, gpu_id: str, model: str) -> None:
        """Park the model in host memory; answered by ``offloaded``, or by ``process_lost`` if that fails.

        A model that cannot be parked is unloaded in place of it, and answered by both: ``offloaded`` with all the GPU
        memory it had, which says that parking it is of no use, then ``process_lost``.
        """
        ...

    def restore(self, gpu_id: str, model: str) -> None:
        """Bring a parked model back; answered by ``restored``, or by ``load_failed`` when its process is gone."""
        ...

    def run(self, gpu_id: str, model: str, calls: Sequence[Call]) -> None:
        """Answered by ``answered`` for each call, then ``run_finished``; or by ``run_failed``."""
        ...

    def cancel(self, request_id: int) -> None:
        """The client left: a streaming answer is closed at its next item; anything else runs to its end unread."""
        ...

    def healthy(self) -> bool:
        """Whether a GPU process could be started now."""
        ...

    def processes(self) -> list[ProcessReport]:
        """Those whose model is loading, resident or parked. The one method for another thread: reading the memory of a
        process takes milliseconds, the more the more it has mapped."""
        ...

    def pids(self) -> Mapping[int, str]:
        """Process id -> model, of the same processes; costs nothing."""
        ...

    def history(self) -> Mapping[str, ModelHistory]:
        """Model -> what its transitions cost, as far as it was seen."""
        ...

    def utilisation(self) -> Mapping[str, float]:
        """GPU id -> share of the last second it was computing, 0 to 1."""
        ...
