"""The Open Inference Protocol v2 over HTTP: a bare ASGI application, like the front door for functions.

Inference requests are forwarded unread (inference.py); all else is small JSON, answered from ``V2Service``.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from hotset.functions.v2 import header_bytes
from hotset.gateway.app import Application, Scope, Send, as_headers
from hotset.gateway.bodies import Bodies, BodyError
from hotset.gateway.calls import CallRecord, Chunks, Deliver, PendingCall, Receive, Result
from hotset.gateway.fronts import Reply
from hotset.gateway.v2.compression import asked_for, compress, decompress
from hotset.gateway.v2.inference import Response, no_streams
from hotset.gateway.v2.models import error_text
from hotset.gateway.v2.refusal import Refusal
from hotset.gateway.v2.service import NO_CUDA_REGIONS, V2Service

PREFIX = "/v2"
INFER_PREFIX = "/v2/models/"
MAX_JSON_BYTES = 1 << 20
"""Body of any request but an inference."""

_JSON = b"application/json"
_OCTETS = b"application/octet-stream"
_LENGTH = b"inference-header-content-length"
_REPORT = (
    b"content-type: %b\r\n"
    b"x-call-id: %b\r\n"
    b"x-hotset-queue-seconds: %.6f\r\n"
    b"x-hotset-load-seconds: %.6f\r\n"
    b"x-hotset-inference-seconds: %.6f\r\n"
)
_PLACE = b"x-hotset-gpu: %b\r\nx-hotset-cache: %b\r\n"
_encode = msgspec.json.Encoder().encode

Methods = tuple[str, ...]
GET: Methods = ("GET",)
POST: Methods = ("POST",)
GET_OR_POST = (*GET, *POST)

Handler = Callable[[list[str], bytes], Awaitable[Any]]
"""Gets the variable parts of the path and the body; returns what is sent as JSON (None: nothing)."""


class V2Http:
    """ASGI application for ``/v2``; ``rest`` serves every other path."""

    def __init__(self, service: V2Service, rest: Application, bodies: Bodies) -> None:
        self._service = service
        self._rest = rest
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if scope["type"] != "http" or not path.startswith(PREFIX) or path[3:4] not in ("", "/"):
            await self._rest(scope, receive, send)
            return
        try:
            parts = path[4:].rstrip("/").split("/")
            if parts[-1] == "infer" and parts[0] == "models" and scope["method"] == "POST":
                await self._infer(parts[1:-1], scope, receive, send)
            else:
                await self._answer(parts, scope, receive, send)
        except Refusal as refusal:
            await _refuse(send, refusal)
        except BodyError as error:
            await _respond(send, error.status, _encode({"error": str(error)}), list(error.headers))

    # Inference

    async def _infer(self, parts: list[str], scope: Scope, receive: Receive, send: Send) -> None:
        name, version = _model(parts)
        headers: dict[bytes, bytes] = dict(scope["headers"])
        body = await self._bodies.read(headers, receive)
        if body is None:
            return
        body = await decompress(body, _encoding(headers), self._bodies.max_body_bytes)
        json_bytes = _json_bytes(headers.get(_LENGTH), len(body))
        answer = await self._service.inference.infer(
            name,
            version,
            body if json_bytes == len(body) else body[:json_bytes],
            memoryview(body)[json_bytes:],
            timeout_s=_seconds(headers.get(b"x-hotset-timeout")),
            caller=self._service.caller(headers),
            receive=receive,
        )
        await self._send(answer, asked_for(headers.get(b"accept-encoding", b"").decode("latin-1")), send)

    # The same without an ASGI application (fronts.DirectFront)

    def takes(self, path: str) -> bool:
        """Whether an inference request for this path could be handed in."""
        parts = path[4:].split("/")
        try:
            return parts[-1] == "infer" and self._service.models.is_ready(*_model(parts[1:-1]))
        except Refusal:
            return False

    def hand_in(self, scope: Scope, body: bytes | memoryview, deliver: Deliver) -> PendingCall | None:
        """Hand in an inference request whose body is here; None: it is refused, or not an everyday one."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if _encoding(headers) or asked_for(headers.get(b"accept-encoding", b"").decode("latin-1")):
            return None
        try:
            self._bodies.check(len(body))
            name, version = _model(scope["path"][4:].split("/")[1:-1])
            json_bytes = _json_bytes(headers.get(_LENGTH), len(body))
            return self._service.inference.hand_in(
                name,
                version,
                bytes(body[:json_bytes]),
                memoryview(body)[json_bytes:],
                timeout_s=_seconds(headers.get(b"x-hotset-timeout")),
                caller=self._service.caller(headers),
                deliver=deliver,
            )
        except (Refusal, BodyError):
            return None

    def reply(self, result: Result) -> Reply:
        """A whole answer as it is sent."""
        record, body = result.record, result.body
        if record.status != 200:
            body = _encode({"error": error_text(body)})
            head = b"content-type: %b\r\ncontent-length: %d\r\n" % (_JSON, len(body))
            if result.retry_after_s is not None:
                head += b"retry-after: %d\r\n" % math.ceil(result.retry_after_s)
            return Reply(record.status, head, body)
        report = self._report(record, header_bytes(result.content_type))
        return Reply(200, b"%bcontent-length: %d\r\n" % (report, len(body)), body)

    async def stream(self, result: Result, chunks: Chunks, send: Send) -> None:
        """What streams is not for HTTP."""
        await _refuse(send, no_streams(result.record.function))

    def _report(self, record: CallRecord, json_bytes: int | None) -> bytes:
        """Header lines of a good answer, but for its length."""
        lines = _REPORT % (
            _JSON if json_bytes is None else _OCTETS,
            self._service.control.ids.public_bytes(record.request_id),
            record.queue_s,
            record.load_s,
            record.inference_s,
        )
        if record.gpu_id:
            cache = b"hit" if record.hit else b"warm" if record.warm else b"miss"
            lines += _PLACE % (record.gpu_id.encode(), cache)
        return lines if json_bytes is None else b"%b%b: %d\r\n" % (lines, _LENGTH, json_bytes)

    async def _send(self, answer: Response, encoding: str | None, send: Send) -> None:
        headers = as_headers(self._report(answer.record, None if answer.whole else len(answer.header)))
        parts = [answer.header, answer.binary] if not answer.whole else [answer.header]
        if encoding is not None:
            parts = [await compress(b"".join(parts), encoding)]
            headers.append((b"content-encoding", encoding.encode()))
        headers.append((b"content-length", b"%d" % sum(map(len, parts))))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in parts[:-1]:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": parts[-1]})

    # Everything else

    async def _answer(self, parts: list[str], scope: Scope, receive: Receive, send: Send) -> None:
        handler, methods, variables = self._find(parts)
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if method not in methods:
            raise Refusal(405, f"{scope['path'][:200]} takes {' or '.join(methods)}", allow=methods)
        body = b""
        if method == "POST":
            headers = dict(scope["headers"])
            read = await self._bodies.read(headers, receive, MAX_JSON_BYTES)
            if read is None:
                return
            body = await decompress(read, _encoding(headers), MAX_JSON_BYTES)
        answer = await handler(variables, body)
        content = b"" if answer is None else _encode(answer)
        await _respond(send, 200, content)

    def _find(self, parts: list[str]) -> tuple[Handler, Methods, list[str]]:
        """The handler of a path, the methods it takes, and the variable parts; raises ``Refusal`` (404)."""
        match parts:
            case [""]:
                return self._server, GET, []
            case ["health", ("live" | "ready") as what]:
                return self._health, GET, [what]
            case ["models", "stats"]:
                return self._statistics, GET, []
            case ["models", *rest, ("ready" | "config" | "stats") as what] if rest:
                return getattr(self, f"_model_{what}"), GET, list(_model(rest))
            case ["models", name, "trace", "setting"]:
                return self._trace, GET_OR_POST, [name]
            case ["models", *rest]:
                return self._metadata, GET, list(_model(rest))
            case ["repository", "index"]:
                return self._index, POST, []
            case ["repository", "models", name, ("load" | "unload") as what]:
                return getattr(self, f"_{what}"), POST, [name]
            case ["trace", "setting"]:
                return self._trace, GET_OR_POST, []
            case [("systemsharedmemory" | "cudasharedmemory") as kind, *rest]:
                return self._shared_memory(kind.removesuffix("sharedmemory"), rest)
        raise Refusal(404, "there is nothing at this path: GET /v2 lists what this server speaks")

    def _shared_memory(self, kind: str, rest: list[str]) -> tuple[Handler, Methods, list[str]]:
        what = rest[-1] if rest else ""
        region = "/".join(rest[1:-1]) if rest[:1] == ["region"] else ""
        methods = {"status": GET, "register": POST, "unregister": POST}.get(what)
        if methods is None or (rest[0] != "region" and len(rest) > 1) or (what == "register" and not region):
            raise Refusal(404, "there is nothing at this path: use status, region/NAME/register or unregister")
        return getattr(self, f"_{kind}_{what}"), methods, [region]

    async def _server(self, variables: list[str], body: bytes) -> Any:
        return self._service.server_metadata()

    async def _health(self, variables: list[str], body: bytes) -> Any:
        if variables == ["ready"] and (problem := self._service.problem()) is not None:
            raise Refusal(503, problem)
        return {variables[0]: True}

    async def _metadata(self, variables: list[str], body: bytes) -> Any:
        return self._service.models.metadata(*variables)

    async def _model_ready(self, variables: list[str], body: bytes) -> Any:
        return {"name": self._service.models.find(*variables).name, "ready": True}

    async def _model_config(self, variables: list[str], body: bytes) -> Any:
        return self._service.models.configuration(*variables)

    async def _model_stats(self, variables: list[str], body: bytes) -> Any:
        return self._service.model_statistics(*variables)

    async def _statistics(self, variables: list[str], body: bytes) -> Any:
        return self._service.model_statistics()

    async def _trace(self, variables: list[str], body: bytes) -> Any:
        return self._service.trace_settings(_object(body), *variables)

    async def _index(self, variables: list[str], body: bytes) -> Any:
        return self._service.index(_object(body).get("ready") is True)

    async def _load(self, variables: list[str], body: bytes) -> None:
        await self._service.models.load(variables[0], _parameters(body))

    async def _unload(self, variables: list[str], body: bytes) -> None:
        _parameters(body)  # unload_dependents is all the protocol has, and no model here depends on another
        self._service.models.unload(variables[0])

    async def _system_status(self, variables: list[str], body: bytes) -> Any:
        return self._service.regions.status(*variables)

    async def _system_register(self, variables: list[str], body: bytes) -> None:
        try:
            wanted = msgspec.convert(_object(body), Registration)
        except msgspec.ValidationError as error:
            raise Refusal(400, f"the registration cannot be read: {error}") from None
        self._service.regions.register(variables[0], wanted.key, wanted.offset, wanted.byte_size)

    async def _system_unregister(self, variables: list[str], body: bytes) -> None:
        self._service.regions.unregister(*variables)

    async def _cuda_status(self, variables: list[str], body: bytes) -> Any:
        return []

    async def _cuda_register(self, variables: list[str], body: bytes) -> None:
        raise Refusal(400, NO_CUDA_REGIONS)

    async def _cuda_unregister(self, variables: list[str], body: bytes) -> None:
        """There is none, so none is left: what the protocol asks for."""


class Registration(msgspec.Struct, frozen=True):
    key: str
    byte_size: int
    offset: int = 0


def _model(parts: list[str]) -> tuple[str, str]:
    """``NAME`` or ``NAME/versions/V``."""
    match parts:
        case [name] if name:
            return name, ""
        case [name, "versions", version] if name and version:
            return name, version
    raise Refusal(404, "there is no such model path: use /v2/models/NAME or /v2/models/NAME/versions/VERSION")


def _json_bytes(declared: bytes | None, size: int) -> int:
    """How much of the body is JSON, as the client says; all of it when it does not say."""
    if declared is None:
        return size
    if not declared.isdigit() or len(declared) > 18 or int(declared) > size:
        shown = declared[:40].decode("latin-1")
        raise Refusal(400, f"Inference-Header-Content-Length {shown!r} is not a length within the body of {size} bytes")
    return int(declared)


def _encoding(headers: Mapping[bytes, bytes]) -> str:
    encoding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
    return "" if encoding == "identity" else encoding


def _seconds(value: bytes | None) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds < math.inf:
        raise Refusal(400, "X-Hotset-Timeout must be a number of seconds greater than 0")
    return seconds


def _object(body: bytes) -> dict[str, Any]:
    """A JSON object; no body is an empty one."""
    if not body.strip():
        return {}
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"the body must be a JSON object: {error}") from None


def _parameters(body: bytes) -> dict[str, Any]:
    found = _object(body).get("parameters", {})
    if not isinstance(found, dict):
        raise Refusal(400, "parameters must be a JSON object")
    return found


async def _refuse(send: Send, refusal: Refusal) -> None:
    extra = []
    if refusal.retry_after_s is not None:
        extra.append((b"retry-after", b"%d" % math.ceil(refusal.retry_after_s)))
    if refusal.allow:
        extra.append((b"allow", ", ".join(refusal.allow).encode()))
    await _respond(send, refusal.status, _encode({"error": str(refusal)}), extra)


async def _respond(send: Send, status: int, body: bytes, extra: list[tuple[bytes, bytes]] | None = None) -> None:
    headers = [(b"content-type", _JSON), (b"content-length", b"%d" % len(body)), *(extra or ())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
