"""The Open Inference Protocol's routes, as the OpenAPI document describes them; v2/http.py serves them.

Their JSON is the protocol's own (its bodies may go on with binary tensors), so only its outline is told here.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from hotset.gateway.auth import PROTECTED
from hotset.gateway.operations import Answer, Operation, name_parameter
from hotset.gateway.v2.http import Registration

_MODEL = name_parameter("The model: a function's name.", "model")
_VERSION = name_parameter("Its version.", "version")
_REGION = name_parameter("The region.", "region", r"^[^/\\]+$")
_Object = dict[str, Any]
_Settings = Annotated[dict[str, Any], msgspec.Meta(extra_json_schema={"additionalProperties": {"type": "null"}})]
"""What trace settings can be set to: nothing, as tracing is off."""


class _Route(msgspec.Struct, frozen=True):
    method: str
    path: str
    summary: str
    answers_json: bool = True
    takes_json: Any = None
    """Type of its body."""
    required: bool = False


_OF_A_MODEL = (
    _Route("GET", "", "What a model takes and gives"),
    _Route("GET", "/ready", "Whether a model takes calls"),
    _Route("GET", "/config", "A model's configuration"),
    _Route("GET", "/stats", "What a model has done"),
    _Route("POST", "/infer", "Call a model with tensors", takes_json=_Object, required=True),
)
_ROUTES = (
    _Route("GET", "/v2", "Name, version and extensions of the server"),
    _Route("GET", "/v2/health/live", "Whether the server runs"),
    _Route("GET", "/v2/health/ready", "Whether the server can serve"),
    _Route("GET", "/v2/models/stats", "What all models have done"),
    *(
        msgspec.structs.replace(route, path=f"/v2/models/{{model}}{version}{route.path}")
        for version in ("", "/versions/{version}")
        for route in _OF_A_MODEL
    ),
    _Route("GET", "/v2/models/{model}/trace/setting", "Trace settings of a model"),
    _Route("POST", "/v2/models/{model}/trace/setting", "Change them", takes_json=_Settings),
    _Route("GET", "/v2/trace/setting", "Trace settings"),
    _Route("POST", "/v2/trace/setting", "Change them", takes_json=_Settings),
    _Route("POST", "/v2/repository/index", "All models", takes_json=_Object),
    _Route("POST", "/v2/repository/models/{model}/load", "Load a model", answers_json=False, takes_json=_Object),
    _Route("POST", "/v2/repository/models/{model}/unload", "Unload a model", answers_json=False, takes_json=_Object),
    _Route("GET", "/v2/systemsharedmemory/status", "All regions of shared memory"),
    _Route("GET", "/v2/systemsharedmemory/region/{region}/status", "One region"),
    _Route(
        "POST",
        "/v2/systemsharedmemory/region/{region}/register",
        "Make a region known",
        answers_json=False,
        takes_json=Registration,
        required=True,
    ),
    _Route("POST", "/v2/systemsharedmemory/unregister", "Forget all regions", answers_json=False),
    _Route("POST", "/v2/systemsharedmemory/region/{region}/unregister", "Forget a region", answers_json=False),
)


def _operation(route: _Route) -> Operation:
    known = (("{model}", _MODEL), ("{version}", _VERSION), ("{region}", _REGION))
    answer = Answer(text="As the protocol has it.", kind=Any if route.answers_json else None)
    return Operation(
        method=route.method,
        path=route.path,
        handler=None,
        summary=route.summary,
        tag="v2",
        parameters=tuple(parameter for mark, parameter in known if mark in route.path),
        body=route.takes_json,
        body_required=route.required,
        answers={200: answer if route.answers_json else msgspec.structs.replace(answer, media=None)},
        protected=route.path.startswith(PROTECTED),
    )


V2_OPERATIONS = tuple(map(_operation, _ROUTES))
