"""What a node's models have cost so far: how long each transition took, and where the time of a load went."""

from __future__ import annotations

from collections import OrderedDict, deque
from enum import Enum
from statistics import median

import msgspec

MOST_MODELS = 4096
"""Models that are remembered; those that did nothing for longest are forgotten first."""
_KEPT = 32
"""Durations of one transition that its median is taken of: the newest."""


class Transition(Enum):
    """From one residency to another."""

    LOAD = "load"
    RESTORE = "restore"
    OFFLOAD = "offload"
    UNLOAD = "unload"


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """How long one transition of one model took."""

    count: int
    last_s: float
    median_s: float
    """Of the newest 32."""


class LoadParts(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time of one load went."""

    room_s: float = 0.0
    """Until it was its turn, and whoever was to leave first had left."""
    process_s: float
    """Until the process had its order, and from its report to the node: all that is not the function's."""
    import_s: float
    """The function's module and all that it imports."""
    load_s: float
    """The function's ``load``, and measuring what it took."""
    ahead: bool = False
    """Its process was started, and the function imported, while another model left: the load did not wait for that."""
    first_run_s: float | None = None
    """The run after it, which often pays for what was put off; None: there was none yet."""


class ModelHistory(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one model on one node."""

    memory_bytes: int | None
    """GPU memory as last measured."""
    times: dict[Transition, Times]
    last_load: LoadParts | None


class _Model:
    __slots__ = ("counts", "last_load", "memory_bytes", "seconds")

    def __init__(self) -> None:
        self.memory_bytes: int | None = None
        self.last_load: LoadParts | None = None
        self.seconds: dict[Transition, deque[float]] = {}
        self.counts: dict[Transition, int] = {}


class History:
    """Of all models of one node. Bounded; costs nothing while models only run."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, _Model] = OrderedDict()

    def took(self, model: str, transition: Transition, seconds: float) -> None:
        known = self._model(model)
        known.seconds.setdefault(transition, deque(maxlen=_KEPT)).append(seconds)
        known.counts[transition] = known.counts.get(transition, 0) + 1

    def loaded(self, model: str, parts: LoadParts) -> None:
        self._model(model).last_load = parts

    def first_ran(self, model: str, seconds: float) -> None:
        """The first run after a load."""
        known = self._model(model)
        if known.last_load is not None:
            known.last_load = msgspec.structs.replace(known.last_load, first_run_s=seconds)

    def measured(self, model: str, memory_bytes: int) -> None:
        self._model(model).memory_bytes = memory_bytes

    def memory_bytes(self, model: str) -> int | None:
        """GPU memory the model was last seen to take; None: never seen."""
        known = self._models.get(model)
        return None if known is None else known.memory_bytes

    def report(self) -> dict[str, ModelHistory]:
        return {
            model: ModelHistory(
                memory_bytes=known.memory_bytes,
                times={
                    transition: Times(
                        count=known.counts[transition], last_s=seconds[-1], median_s=median(sorted(seconds))
                    )
                    for transition, seconds in known.seconds.items()
                },
                last_load=known.last_load,
            )
            for model, known in self._models.items()
        }

    def _model(self, model: str) -> _Model:
        known = self._models.get(model)
        if known is None:
            known = self._models[model] = _Model()
            if len(self._models) > MOST_MODELS:
                self._models.popitem(last=False)
        self._models.move_to_end(model)
        return known
