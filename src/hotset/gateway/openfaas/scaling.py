"""How many replicas a function is wanted to have, and when it leaves memory because nobody calls it.

Replicas are what OpenFaaS clients see and set. hotset's scheduler makes copies of a model where calls need them,
between ``scale.min`` and ``scale.max``; here the number follows OpenFaaS's rules: ``scale.min`` to begin with, one step
more for each alert or for load above the target, back to ``scale.min`` when it is over. A number of 0, asked for or
reached by ``scale.zero-duration``, takes the model out of GPU memory, copies that are kept too; the next call brings
them back.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from hotset.errors import ConfigurationError
from hotset.gateway.control import Control
from hotset.gateway.openfaas.labels import ScaleType, Scaling, read_scaling
from hotset.gateway.openfaas.types import AlertNotification, AlertStatus, ScaleServiceRequest
from hotset.gateway.operations import ACCEPTED, NAMESPACE, Answer, Operation, name_parameter
from hotset.gateway.statuses import error_body
from hotset.gateway.web import JSON, accepted, read_json
from hotset.store.datastore import FunctionRecord

TICK_S = 2.0
"""How often load is looked at."""
WINDOW_S = 10.0
"""Over how long it is taken."""
ALERT_RPS = 5.0
"""OpenFaaS's own rule: more good calls a second than this ask for one step more."""


class _Sample(msgspec.Struct, frozen=True):
    at_s: float
    good: int


class _Function:
    """What is remembered of one function between two looks."""

    def __init__(self, version: str, scaling: Scaling) -> None:
        self.version = version
        self.scaling = scaling
        self.wanted = scaling.minimum
        self.samples: deque[_Sample] = deque()
        self.recommended: deque[tuple[float, int]] = deque()
        self.total = 0
        self.used_s: float | None = None
        self.raised = False
        """Load asked for more, and has not gone since."""


class Replicas:
    """The wanted number for every function. ``records``: what is deployed, by key."""

    def __init__(self, control: Control, records: dict[str, FunctionRecord]) -> None:
        self._control = control
        self._records = records
        self._functions: dict[str, _Function] = {}

    def wanted(self, record: FunctionRecord) -> int:
        """The number as of now: a function at 0 that was called since is at its floor again."""
        function = self._function(record)
        if function.wanted == 0 and self._was_called(record.name, function):
            function.wanted = max(1, function.scaling.minimum)
            self._control.pinning.as_deployed(record.name)
        return function.wanted

    def scaling(self, record: FunctionRecord) -> Scaling:
        """What its labels say."""
        return self._function(record).scaling

    def scale(self, record: FunctionRecord, replicas: int) -> None:
        """Set it; 400 above ``scale.max``. 0 evicts the model as soon as it is idle."""
        function = self._function(record)
        if replicas > function.scaling.maximum:
            raise HTTPException(
                400,
                f"{record.name} may have {function.scaling.maximum} replicas at most: raise its label "
                f"com.openfaas.scale.max",
            )
        was, function.wanted = function.wanted, replicas
        if replicas == 0:
            self._to_zero(record.name, function)
        elif was == 0:
            self._control.pinning.as_deployed(record.name)

    def alert(self, record: FunctionRecord, status: AlertStatus) -> None:
        """What AlertManager says: one step more, or back to the floor."""
        function = self._function(record)
        if status is AlertStatus.FIRING:
            function.wanted = min(function.scaling.maximum, self.wanted(record) + function.scaling.step)
        else:
            function.wanted = function.scaling.minimum

    def tick(self) -> None:
        """Look at the load of every function; called every ``TICK_S``."""
        now_s = self._control.now_s()
        for gone in self._functions.keys() - self._records.keys():
            del self._functions[gone]
        for record in list(self._records.values()):
            function = self._function(record)
            self.wanted(record)
            self._follow_load(record.name, function, now_s)
            self._look_for_idle(record.name, function, now_s)

    # Inside

    def _function(self, record: FunctionRecord) -> _Function:
        function = self._functions.get(record.name)
        mark = f"{record.version} {record.created_at_s}"
        if function is None or function.version != mark:
            scaling = _scaling_of(record)
            if function is not None and function.wanted == 0:
                self._control.pinning.as_deployed(record.name)
            self._functions[record.name] = function = _Function(mark, scaling)
            function.total = self._total(record.name)
        return function

    def _total(self, key: str) -> int:
        version = self._control.functions.current.get(key)
        return 0 if version is None else version.metrics.total

    def _open_calls(self, key: str) -> int:
        version = self._control.functions.current.get(key)
        return 0 if version is None else version.calls

    def _was_called(self, key: str, function: _Function) -> bool:
        return self._open_calls(key) > 0 or self._total(key) != function.total

    def _follow_load(self, key: str, function: _Function, now_s: float) -> None:
        scaling = function.scaling
        version = self._control.functions.current.get(key)
        if version is None or scaling.fixed or function.wanted == 0:
            return
        samples = function.samples
        samples.append(_Sample(now_s, version.metrics.good))
        while len(samples) > 1 and now_s - samples[1].at_s >= WINDOW_S:
            samples.popleft()
        passed_s = max(now_s - samples[0].at_s, TICK_S)
        good_per_s = (samples[-1].good - samples[0].good) / passed_s
        if scaling.kind is None:
            if good_per_s > ALERT_RPS:
                function.wanted = min(scaling.maximum, function.wanted + scaling.step)
                function.raised = True
            elif function.raised:  # what somebody asked for stays
                function.wanted = scaling.minimum
                function.raised = False
            return
        load = good_per_s if scaling.kind is ScaleType.RPS else float(version.calls)
        replicas = math.ceil(load / (scaling.target * scaling.target_proportion))
        floor = scaling.minimum if scaling.zero else max(1, scaling.minimum)
        recommended = min(scaling.maximum, max(floor, replicas, 1))
        history = function.recommended
        history.append((now_s, recommended))
        while now_s - history[0][0] > scaling.down_window_s:
            history.popleft()
        function.wanted = max(each for _, each in history)

    def _look_for_idle(self, key: str, function: _Function, now_s: float) -> None:
        if function.used_s is None or self._was_called(key, function):
            function.used_s = now_s
            function.total = self._total(key)
        elif function.scaling.zero and function.wanted and now_s - function.used_s >= function.scaling.zero_after_s:
            function.wanted = 0
            self._to_zero(key, function)

    def _to_zero(self, key: str, function: _Function) -> None:
        function.total = self._total(key)
        function.samples.clear()
        if key in self._control.functions.current:
            self._control.pinning.pin(key, 0)
            self._control.evict(key)


def _scaling_of(record: FunctionRecord) -> Scaling:
    try:
        return read_scaling(record.labels, record.annotations)
    except ConfigurationError:  # deployed before such labels were checked
        return Scaling()


class ScalingApi:
    def __init__(self, replicas: Replicas, find: Callable[[str, Sequence[str | None]], FunctionRecord]) -> None:
        """``find``: a function by its name and the namespaces given beside it; raises a 404."""
        self._replicas = replicas
        self._find = find

    def operations(self) -> list[Operation]:
        return [
            Operation(
                method="POST",
                path="/system/scale-function/{name}",
                handler=self.scale,
                summary="Set the number of replicas; 0 takes the model out of GPU memory",
                tag="functions",
                parameters=(name_parameter("The function."), NAMESPACE),
                body=ScaleServiceRequest,
                answers=ACCEPTED,
            ),
            Operation(
                method="POST",
                path="/system/alert",
                handler=self.alert,
                summary="Take an AlertManager notification: a firing alert asks for more replicas",
                tag="functions",
                body=AlertNotification,
                answers={200: Answer(text="Taken.", media=None)},
            ),
        ]

    async def scale(self, request: Request) -> Response:
        wanted = await read_json(request, ScaleServiceRequest)
        given = (wanted.namespace, request.query_params.get("namespace"))
        self._replicas.scale(self._find(request.path_params["name"], given), wanted.replicas)
        return accepted()

    async def alert(self, request: Request) -> Response:
        notification = await read_json(request, AlertNotification)
        errors = []
        for alert in notification.alerts:
            try:
                self._replicas.alert(self._find(alert.labels.function_name, ()), alert.status)
            except HTTPException as error:
                errors.append(error.detail)
        if errors:
            # Not a 5xx, after which AlertManager would send the same again.
            return Response(error_body("; ".join(errors[:10])), status_code=404, media_type=JSON)
        return Response(status_code=200)
