"""The calls themselves, as the OpenAPI document describes them; app.py serves them."""

from __future__ import annotations

from hotset.gateway.operations import Answer, Operation, Parameter, name_parameter

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
"""OPTIONS and HEAD are taken too."""

_NAME = name_parameter("The function: NAME or NAME.NAMESPACE.")
_REST = name_parameter("What the function sees as its path.", "rest", "^.*$")
_TIMEOUT = Parameter(
    name="X-Hotset-Timeout",
    where="header",
    text="Seconds the caller gives the call.",
    schema={"type": "number", "exclusiveMinimum": 0},
)
_ANSWER = {200: Answer(text="The function's answer, of whatever type it is.", media="*/*")}

CALLS = tuple(
    Operation(
        method=method,
        path=path,
        handler=None,
        summary="Call a function",
        tag="calls",
        parameters=(*parameters, _TIMEOUT),
        raw_body="*/*" if method in ("POST", "PUT", "PATCH") else None,
        answers=_ANSWER,
        protected=False,
    )
    for path, parameters in (("/function/{name}", (_NAME,)), ("/function/{name}/{rest}", (_NAME, _REST)))
    for method in METHODS
)
