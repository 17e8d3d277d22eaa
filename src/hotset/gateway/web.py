"""What the handlers of all small JSON routes share: reading a request, writing an answer, refusing in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from hotset.errors import BundleError, ConfigurationError, FunctionError, HotsetError
from hotset.gateway.statuses import error_body

JSON = "application/json"
NDJSON = "application/x-ndjson"
MAX_JSON_BYTES = 1 << 20
BUG = "this is a bug in hotset: please report it with what the server logged"

T = TypeVar("T")
_encode = msgspec.json.Encoder().encode


def json_response(value: object, status: int = 200) -> Response:
    return Response(_encode(value), status_code=status, media_type=JSON)


def accepted() -> Response:
    """202 with an empty body: how OpenFaaS answers a change."""
    return Response(status_code=202)


async def read_json(request: Request, kind: type[T], most_bytes: int = MAX_JSON_BYTES) -> T:
    """The body as this record, however it was sent (its type is not looked at); 400 names what does not fit."""
    body = await read_body(request, most_bytes)
    try:
        return msgspec.convert(_integers(msgspec.json.decode(body)), kind)
    except msgspec.ValidationError as error:
        raise HTTPException(400, f"{error}") from None
    except RecursionError:
        raise HTTPException(400, "the body is nested too deeply: send it flatter") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None


def _integers(value: Any) -> Any:
    """2.0 becomes 2: to JSON Schema, and so to who reads /openapi.json, it is an integer; msgspec refuses it as one."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, list):
        return [_integers(each) for each in value]
    if isinstance(value, dict):
        return {key: _integers(each) for key, each in value.items()}
    return value


async def read_body(request: Request, most_bytes: int = MAX_JSON_BYTES) -> bytes:
    """All of it, chunked or not; 413 as soon as it is known to be larger."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most_bytes:
            raise HTTPException(413, f"the body is larger than {most_bytes} bytes", {"connection": "close"})
    return bytes(body)


def read_flag(value: str) -> bool:
    return value.lower() in ("1", "true")


def read_whole(value: str, name: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise HTTPException(422, f"{name} must be a whole number, not {value[:80]!r}") from None


def read_time(value: str, name: str) -> float:
    """Unix time of an RFC 3339 time."""
    try:
        moment = datetime.fromisoformat(value)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise HTTPException(422, f"{name} must be a time such as 2030-01-31T12:00:00Z, not {value[:80]!r}") from None


def rfc3339(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat()


def status_of_error(error: Exception) -> int:
    return 400 if isinstance(error, BundleError | ConfigurationError | FunctionError) else 500


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Response(error_body(error.detail), status_code=error.status_code, headers=error.headers, media_type=JSON)


async def _hotset_error(_: Request, error: Exception) -> Response:
    return Response(error_body(str(error)), status_code=status_of_error(error), media_type=JSON)


async def _bug(_: Request, __: Exception) -> Response:
    return Response(error_body(BUG), status_code=500, media_type=JSON)


ERROR_HANDLERS: Mapping[Any, Any] = {HTTPException: _http_error, HotsetError: _hotset_error, Exception: _bug}
"""For a Starlette application: every error is ``{"error": "one sentence"}``."""
