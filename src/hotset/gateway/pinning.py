"""Copies of a function's model that are kept HOT: what its deployment asks for, or what somebody asked for since."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from hotset.errors import ConfigurationError
from hotset.gateway.functions import Functions, Version
from hotset.scheduling.events import Event, ModelAdded
from hotset.scheduling.scheduler import Scheduler
from hotset.vocabulary import Model


class Pinning:
    """Part of the control loop: what is asked for here holds for whichever version of the function is in service."""

    def __init__(self, scheduler: Scheduler, functions: Functions, handle: Callable[[Event], None]) -> None:
        self._scheduler = scheduler
        self._functions = functions
        self._handle = handle
        self._asked: dict[str, int] = {}
        """Function -> copies, where somebody asked for another number than its deployment does."""

    def pin(self, function: str, copies: int) -> None:
        """Keep so many copies HOT until the function is removed; 0: none.

        Raises ``ConfigurationError`` when there is no room for them beside what is kept already, ``KeyError`` when
        there is no such function. A plain function needs no GPU: nothing happens.
        """
        model = self._model(self._functions.current[function])
        if model is None:
            return
        wanted = msgspec.structs.replace(model, min_copies=copies)
        if copies > model.min_copies and not self._scheduler.pins.can_keep(wanted):
            many = "a copy" if copies == 1 else f"{copies} copies"
            raise ConfigurationError(
                f"there is no room to keep {many} of {function} hot: one takes {model.memory_bytes} bytes of a GPU, "
                "beside what is kept there already: let go of another model, or add a GPU"
            )
        self._asked[function] = copies
        if copies != model.min_copies:
            self._handle(ModelAdded(wanted))

    def as_deployed(self, function: str) -> None:
        """Forget what was asked for: as many are kept as its deployment says, as far as there is room."""
        version = self._functions.current.get(function)
        if self._asked.pop(function, None) is None or version is None or version.spec.scheduled is None:
            return
        model, wanted = self._model(version), version.spec.scheduled.min_copies
        if model is not None and model.min_copies != wanted:
            self._handle(ModelAdded(msgspec.structs.replace(model, min_copies=wanted)))

    def copies(self, function: str) -> int:
        """How many are to be kept HOT."""
        version = self._functions.current.get(function)
        model = None if version is None else self._model(version)
        return 0 if model is None else model.min_copies

    # What the control loop tells it

    def scheduled(self, function: str, model: Model) -> Model:
        """A version that goes into service, as the scheduler shall see it."""
        copies = self._asked.get(function, model.min_copies)
        return model if copies == model.min_copies else msgspec.structs.replace(model, min_copies=copies)

    def retired(self, version: Version) -> None:
        """Another version took over: this one's calls end, but its copies need not stay."""
        model = self._model(version)
        if model is not None and model.min_copies:
            self._handle(ModelAdded(msgspec.structs.replace(model, min_copies=0)))

    def removed(self, version: Version) -> None:
        """The function was taken out of service."""
        self._asked.pop(version.function, None)
        self.retired(version)

    def _model(self, version: Version) -> Model | None:
        return self._scheduler.cluster.models.get(version.model)
