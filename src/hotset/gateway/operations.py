"""One table for the routes and for their description: a route that is not described cannot be served."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hotset.gateway.web import JSON

Handler = Callable[[Request], Awaitable[Response]]


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """A parameter of the path, the query or the headers."""

    name: str
    where: str = "query"
    text: str = ""
    schema: Mapping[str, Any] = msgspec.field(default_factory=lambda: {"type": "string"})
    required: bool = False


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One answer that is no error."""

    text: str
    kind: Any = None
    """Type of its body, or a tuple of those it may have; None: nothing is said of it."""
    media: str | None = JSON
    """None: the body is empty."""


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one path. Errors are not listed: all are ``{"error": "one sentence"}``."""

    method: str
    path: str
    handler: Handler | None
    """None: served outside Starlette."""
    summary: str
    tag: str
    parameters: tuple[Parameter, ...] = ()
    body: Any = None
    """Type of a JSON body; None: it takes none."""
    body_required: bool = True
    raw_body: str | None = None
    """Media type of a body that is no JSON document."""
    answers: Mapping[int, Answer] = msgspec.field(default_factory=lambda: {200: Answer(text="It is in the body.")})
    protected: bool = True
    """Asks for credentials when the server has any."""


NAMESPACE = Parameter(
    name="namespace",
    text="Where to look; the default namespace when it is left out.",
    schema={"type": "string", "pattern": "^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)?$"},
)


def name_parameter(text: str, name: str = "name", pattern: str = "^[-a-zA-Z_0-9.]+$") -> Parameter:
    return Parameter(
        name=name, where="path", text=text, required=True, schema={"type": "string", "pattern": pattern, "minLength": 1}
    )


ACCEPTED: Mapping[int, Answer] = {202: Answer(text="It is done.", media=None)}


def routes(operations: Iterable[Operation]) -> list[Route]:
    """Starlette's routes; methods of one path share one, so that a 405 lists them all."""
    by_path: dict[str, dict[str, Handler]] = {}
    for operation in operations:
        if operation.handler is not None:
            by_path.setdefault(operation.path, {})[operation.method] = operation.handler
    return [Route(path, _by_method(handlers), methods=list(handlers)) for path, handlers in by_path.items()]


def _by_method(handlers: Mapping[str, Handler]) -> Handler:
    if len(handlers) == 1:
        return next(iter(handlers.values()))

    async def handle(request: Request) -> Response:
        method = "GET" if request.method == "HEAD" and "HEAD" not in handlers else request.method
        return await handlers[method](request)

    return handle
