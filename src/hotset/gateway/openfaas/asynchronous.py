"""``POST /async-function/NAME``, and looking after the queue: ``/system/async``."""

from __future__ import annotations

import asyncio
import re
import uuid
from datetime import UTC, datetime
from enum import Enum

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from hotset.gateway.callers import CallerError
from hotset.gateway.control import Control
from hotset.gateway.openfaas.callbacks import CallbackPolicy
from hotset.gateway.openfaas.queue import AsyncQueue
from hotset.gateway.operations import ACCEPTED, Answer, Operation, Parameter, name_parameter
from hotset.gateway.web import accepted, json_response, read_body, read_whole
from hotset.store.async_calls import AsyncRequest

MOST_LISTED = 1_000
_CALL_ID = re.compile(r"[\w.:-]{1,100}", re.ASCII)
_NAME = re.compile(r"[-a-zA-Z_0-9.]+")
_CALL = name_parameter("Its X-Call-Id.", "call_id", "^[A-Za-z0-9_.:-]+$")


class CallState(Enum):
    QUEUED = "queued"
    DEAD = "dead"


class AsyncCallStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One asynchronous call that has not ended well."""

    call_id: str
    function: str
    state: CallState
    attempts: int
    status: int
    """HTTP status of the last attempt; 0: none was made."""
    reason: str
    accepted_at: str
    """RFC 3339."""


class AsyncApi:
    def __init__(self, control: Control, queue: AsyncQueue, policy: CallbackPolicy, *, max_body_bytes: int) -> None:
        self._control = control
        self.queue = queue
        self._policy = policy
        self._max_body_bytes = max_body_bytes

    def operations(self) -> list[Operation]:
        answers = {202: Answer(text="It is on the disk and will be made.", media=None)}
        callback = Parameter(
            name="X-Callback-Url",
            where="header",
            text="Where the answer is sent.",
            schema={"type": "string", "pattern": "^(https?://[a-zA-Z0-9.-]+(/[a-zA-Z0-9/._-]*)?)?$"},
        )
        return [
            *(
                Operation(
                    method="POST",
                    path=path,
                    handler=self.call,
                    summary="Call a function later",
                    tag="calls",
                    parameters=(name_parameter("The function."), callback, *more),
                    raw_body="*/*",
                    answers=answers,
                    protected=False,
                )
                for path, more in (
                    ("/async-function/{name}", ()),
                    ("/async-function/{name}/{rest:path}", (name_parameter("The path it sees.", "rest", "^.*$"),)),
                )
            ),
            Operation(
                method="GET",
                path="/system/async",
                handler=self.listed,
                summary="Asynchronous calls that have not ended well, the newest first",
                tag="calls",
                parameters=(
                    Parameter(name="state", text="queued or dead.", schema={"enum": ["queued", "dead"]}),
                    Parameter(name="limit", text="At most so many.", schema={"type": "integer", "minimum": 1}),
                ),
                answers={200: Answer(text="The calls.", kind=list[AsyncCallStatus])},
            ),
            Operation(
                method="POST",
                path="/system/async/{call_id}/retry",
                handler=self.retry,
                summary="Try a dead letter again",
                tag="calls",
                parameters=(_CALL,),
                answers=ACCEPTED,
            ),
            Operation(
                method="DELETE",
                path="/system/async/{call_id}",
                handler=self.remove,
                summary="Forget a call that waits or was given up",
                tag="calls",
                parameters=(_CALL,),
                answers=ACCEPTED,
            ),
        ]

    async def call(self, request: Request) -> Response:
        started_ns = int(datetime.now(UTC).timestamp() * 1e9)
        function = request.path_params["name"]
        if not _NAME.fullmatch(function):
            raise HTTPException(404, f"there is no function {function[:80]!r}")
        try:
            caller = self._control.callers.of(dict(request.scope["headers"]))
        except CallerError as error:
            raise HTTPException(400, str(error)) from None
        callback = request.headers.get("x-callback-url") or None
        if callback is not None:
            await self._policy.check(callback)
        if self.queue.full:
            raise HTTPException(429, "too many asynchronous calls wait: try again later", {"retry-after": "5"})
        body = await read_body(request, self._max_body_bytes)
        given = request.headers.get("x-call-id", "")
        call_id = given if _CALL_ID.fullmatch(given) else str(uuid.uuid4())
        rest = request.scope.get("raw_path", b"").decode("latin-1").partition("?")[0].split("/", 3)
        stored = AsyncRequest(
            path=f"/{rest[3]}" if len(rest) > 3 else "/",
            query=request.url.query,
            headers=tuple(
                (name, value) for name, value in request.headers.items() if name not in ("x-callback-url", "x-call-id")
            ),
            callback_url=callback,
        )
        await self.queue.accept(call_id, function, caller, stored, body)
        return Response(status_code=202, headers={"x-call-id": call_id, "x-start-time": str(started_ns)})

    async def listed(self, request: Request) -> Response:
        state = request.query_params.get("state")
        if state not in (None, "queued", "dead"):
            raise HTTPException(400, f"state must be queued or dead, not {state[:40]!r}")
        most = read_whole(request.query_params.get("limit", "100"), "limit")
        if most < 1:
            raise HTTPException(400, "limit must be 1 or more")
        calls = await asyncio.to_thread(self.queue.store.listed, state, min(most, MOST_LISTED))
        return json_response(
            [
                AsyncCallStatus(
                    call_id=call.call_id,
                    function=call.function,
                    state=CallState(call.state),
                    attempts=call.attempts,
                    status=call.status,
                    reason=call.reason,
                    accepted_at=datetime.fromtimestamp(call.accepted_at_s, UTC).isoformat(),
                )
                for call in calls
            ]
        )

    async def retry(self, request: Request) -> Response:
        if not await self.queue.retry(request.path_params["call_id"]):
            raise _unknown(request.path_params["call_id"])
        return accepted()

    async def remove(self, request: Request) -> Response:
        if not await self.queue.remove(request.path_params["call_id"]):
            raise _unknown(request.path_params["call_id"])
        return accepted()


def _unknown(call_id: str) -> HTTPException:
    return HTTPException(404, f"there is no such call {call_id[:100]!r}: list them with GET /system/async")
