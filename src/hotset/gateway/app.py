"""The front door: a bare ASGI callable for ``/function/NAME``, and Starlette for everything else.

The inference path has no framework, no validation and no task of its own per call (uvicorn has made one already): it
reads the body, hands it to the control loop and writes what comes back. Bodies are decoded in the worker. Everyday
calls need not even uvicorn's task: direct.py hands them in and writes their answers, by the same methods.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from hotset.functions.http_envelope import REQUEST
from hotset.functions.media import V2
from hotset.gateway.bodies import Bodies, BodyError
from hotset.gateway.callers import CallerError
from hotset.gateway.calls import CallRecord, Chunks, Deliver, PendingCall, Receive, Result, StreamBroken
from hotset.gateway.control import Control
from hotset.gateway.fronts import Reply
from hotset.gateway.functions import Version
from hotset.gateway.openfaas.invocation import forwarded, is_process, is_response, opened, request_envelope
from hotset.gateway.openfaas.naming import DEFAULT_NAMESPACE
from hotset.gateway.statuses import error_body

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

PREFIX = "/function/"
_NAME_AT = len(PREFIX)
_INTERNAL = (b"x-openfaas-internal", b"hotset")
"""On errors that the platform made: its client's code is not to blame, nor the function's."""
_INTERNAL_LINE = b"%b: %b\r\n" % _INTERNAL
_REPORT = (
    b"content-type: %b\r\n"
    b"x-call-id: %b\r\n"
    b"x-start-time: %d\r\n"
    b"x-hotset-queue-seconds: %.6f\r\n"
    b"x-hotset-load-seconds: %.6f\r\n"
    b"x-hotset-inference-seconds: %.6f\r\n"
    b"x-duration-seconds: %.6f\r\n"
)
_PLACE = b"x-hotset-gpu: %b\r\nx-hotset-cache: %b\r\n"
_HIT, _WARM, _MISS = b"hit", b"warm", b"miss"
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_ALLOW = (b"allow", ", ".join(sorted(METHODS)).encode())


class Gateway:
    """ASGI application. ``rest`` serves what is not a call of a function."""

    def __init__(self, control: Control, rest: Application, bodies: Bodies | None = None) -> None:
        self._control = control
        self._rest = rest
        self._bodies = bodies or Bodies(control)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(PREFIX):
            await self._call(scope, receive, send)
        else:
            await self._rest(scope, receive, send)

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            pending = await self._submit(scope, receive)
        except BodyError as error:
            await _respond(send, error)
            return
        if pending is None:
            return
        try:
            result = await pending.future
            if is_response(pending.version, result):
                await self._pass_on(result, send)
            elif result.chunks is None:
                headers = as_headers(self.head(result))
                await send({"type": "http.response.start", "status": result.record.status, "headers": headers})
                await send({"type": "http.response.body", "body": result.body})
            else:
                await self.stream(result, result.chunks, send)
        except asyncio.CancelledError:
            self._control.cancel(pending)
            raise

    # What a connection asks for itself (fronts.DirectFront)

    def takes(self, path: str) -> bool:
        """Whether a call of this path could be handed in: not where a function speaks HTTP itself."""
        version = self._control.functions.current.get(path[_NAME_AT:])
        return version is not None and not is_process(version)

    def hand_in(self, scope: Scope, body: bytes | memoryview, deliver: Deliver) -> PendingCall | None:
        """Hand in a POST whose body is here; None: it is refused, or not for this way: ``__call__`` answers it."""
        version = self._control.functions.current.get(scope["path"][_NAME_AT:])
        if version is None or is_process(version):
            return None
        try:
            self._bodies.check(len(body))
            return self._hand_in(version, dict(scope["headers"]), body, deliver=deliver)
        except BodyError:
            return None

    def reply(self, result: Result) -> Reply:
        """A whole answer as it is sent."""
        return Reply(result.record.status, self.head(result), result.body)

    async def _submit(self, scope: Scope, receive: Receive) -> PendingCall | None:
        """Read the request and hand it in; None: the client left before it was read."""
        if scope["method"] not in METHODS:
            raise BodyError(405, f"a function cannot be called with {scope['method']}: use POST", _ALLOW)
        control = self._control
        function = scope["path"][_NAME_AT:]
        if function not in control.functions.current:
            function = self._function(function.partition("/")[0])
        headers = dict(scope["headers"])
        body = await self._bodies.read(headers, receive)
        if body is None:
            return None
        version = control.functions.current.get(function)
        if version is None:
            raise _unknown(function)
        if is_process(version):
            headers[b"content-type"] = REQUEST.encode()
            body = self._envelope(scope, body)
        return self._hand_in(version, headers, body, receive=receive)

    def _hand_in(
        self,
        version: Version,
        headers: Mapping[bytes, bytes],
        body: bytes | memoryview,
        *,
        receive: Receive | None = None,
        deliver: Deliver | None = None,
    ) -> PendingCall:
        content_type = headers.get(b"content-type", b"").decode("latin-1")
        if content_type.startswith(V2):
            raise BodyError(415, "inference requests of the v2 protocol go to /v2/models/NAME/infer")
        timeout = headers.get(b"x-hotset-timeout")
        try:
            caller = self._control.callers.of(headers)
        except CallerError as error:
            raise BodyError(400, str(error)) from None
        return self._control.submit(
            version.function,
            body,
            content_type,
            headers.get(b"accept", b"*/*").decode("latin-1"),
            caller=caller,
            timeout_s=None if timeout is None else _seconds(timeout),
            receive=receive,
            deliver=deliver,
        )

    def _envelope(self, scope: Scope, body: bytes) -> bytes:
        """The whole request, for a function that speaks HTTP itself."""
        path = scope.get("raw_path", b"").decode("latin-1").split("/", 3)
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        host = next((value for name, value in headers if name == "host"), "")
        added = forwarded(scope.get("client"), host, self._control.next_call_id, time.time_ns())
        query = scope["query_string"].decode("latin-1")
        rest = f"/{path[3]}" if len(path) > 3 else "/"
        return request_envelope(scope["method"], rest, query, headers, body, added)

    def _function(self, name: str) -> str:
        current = self._control.functions.current
        if name in current:
            return name
        function, _, namespace = name.rpartition(".")
        if namespace == DEFAULT_NAMESPACE and function in current:
            return function
        raise _unknown(name)

    async def _pass_on(self, result: Result, send: Send) -> None:
        """Answer with the response that a process function gave."""
        if result.chunks is None:
            given, body = opened(result.body)
            headers = self._response_headers(result.record, given)
            headers.append((b"content-length", b"%d" % len(body)))
            await send({"type": "http.response.start", "status": result.record.status, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            return
        chunks = aiter(result.chunks)
        try:
            given, body = opened(await anext(chunks))
        except StreamBroken as broken:
            await _respond(send, BodyError(502, str(broken), _INTERNAL))
            return
        headers = self._response_headers(result.record, given)
        await send({"type": "http.response.start", "status": result.record.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        try:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except StreamBroken:
            return  # the connection is closed without the end-of-body mark
        await send({"type": "http.response.body", "body": b""})

    def _response_headers(self, record: CallRecord, given: list[tuple[str, str]]) -> Headers:
        ours = as_headers(self._report(record, ""))[1:]  # the type is the function's
        return [*((name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in given), *ours]

    async def stream(self, result: Result, chunks: Chunks, send: Send) -> None:
        """Pass a streamed answer on; one that breaks off ends with an error item and a closed connection."""
        headers = as_headers(self._report(result.record, result.content_type))
        await send({"type": "http.response.start", "status": result.record.status, "headers": headers})
        try:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except StreamBroken as broken:
            item = _error_item(result.content_type, str(broken))
            await send({"type": "http.response.body", "body": item, "more_body": True})
            return
        await send({"type": "http.response.body", "body": b""})

    def head(self, result: Result) -> bytes:
        """Header lines of an answer that is whole, each with its line end."""
        head = b"%bcontent-length: %d\r\n" % (self._report(result.record, result.content_type), len(result.body))
        if result.retry_after_s is not None:
            head += b"retry-after: %d\r\n" % math.ceil(result.retry_after_s)
        return head + _INTERNAL_LINE if result.internal else head

    def _report(self, record: CallRecord, content_type: str) -> bytes:
        """Header lines that say what happened to the call. An answer's first chunk knows no inference time yet."""
        control = self._control
        lines = _REPORT % (
            content_type.encode("latin-1", "replace"),
            control.ids.public_bytes(record.request_id),
            control.unix_ns(record.arrival_s),
            record.queue_s,
            record.load_s,
            record.inference_s,
            record.duration_s,
        )
        if record.gpu_id:
            return lines + _PLACE % (record.gpu_id.encode(), _HIT if record.hit else _WARM if record.warm else _MISS)
        return lines


def as_headers(lines: bytes) -> Headers:
    """Header lines as ASGI has them."""
    pairs = (line.split(b": ", 1) for line in lines.splitlines())
    return [(name, value) for name, value in pairs]


async def _respond(send: Send, error: BodyError) -> None:
    body = error_body(str(error))
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *error.headers]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _unknown(name: str) -> BodyError:
    return BodyError(404, f"there is no function {name!r}: deploy it, or list them with GET /system/functions")


def _seconds(value: bytes) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds < math.inf:
        raise BodyError(400, "X-Hotset-Timeout must be a number of seconds greater than 0")
    return seconds


def _error_item(content_type: str, message: str) -> bytes:
    body = error_body(message)
    if content_type.startswith("text/event-stream"):
        return b"event: error\ndata: " + body + b"\n\n"
    return body + b"\n"
