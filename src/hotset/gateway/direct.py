"""Everyday calls of functions, handed in and answered by their connection itself.

What uvicorn makes of a request for an ASGI application (a task, an event, messages of dicts, turns of the loop between
them) costs more than all that hotset does with it. A POST to ``/function/NAME`` with a short body needs none of that:
it is handed to the control loop when its last byte is read, and its answer is written the moment it comes. Everything
else, and every request that is refused, goes uvicorn's way to the application, whose methods serve both.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Protocol

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from hotset.deadline import Deadline
from hotset.gateway.app import PREFIX, Gateway, Headers, Scope, Send
from hotset.gateway.calls import Chunks, PendingCall, Receive, Result
from hotset.gateway.coalescing import CoalescingProtocol

_PATH = PREFIX.encode()


class Admits(Protocol):
    """Whether a request for this path that shows these headers may be made."""

    def __call__(self, path: str, headers: Headers) -> bool: ...


class DirectProtocol(CoalescingProtocol):
    """A connection of the gateway. One request of a connection is served at a time; the next ones wait, as uvicorn's
    pipelined requests do: to it a direct call is a request whose response is not complete."""

    def __init__(self, gateway: Gateway, admits: Admits, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._gateway = gateway
        self._admits = admits
        self._direct: RequestResponseCycle | None = None
        """The request that is read, or waits for its result."""
        self._pending: PendingCall | None = None
        """The latest call, to be taken back should its client leave."""
        self._idle = Deadline(self._idle_for_long)
        self._default_headers: Headers | None = None
        self._default_lines = b""

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if self._is_everyday(cycle):
            self._direct = cycle
        else:
            super()._start_asgi_task(cycle, app)

    def _is_everyday(self, cycle: RequestResponseCycle) -> bool:
        """Called when its head was read. A pipelined one may have been read to its end before: that is too late."""
        if not self.url.startswith(_PATH) or self.parser.get_method() != b"POST":
            return False
        if not cycle.more_body or cycle.waiting_for_100_continue or self.flow.write_paused:
            return False
        for name, value in self.headers:
            if name == b"content-length":
                return int(value) <= HIGH_WATER_LIMIT  # of a longer one, uvicorn reads on only when it is asked to
        return False

    def on_message_complete(self) -> None:
        super().on_message_complete()
        cycle = self._direct
        if cycle is None or cycle is not self.cycle:
            return
        scope: Scope = cycle.scope  # type: ignore[assignment]
        pending = None
        if self._admits(scope["path"], scope["headers"]):
            pending = self._gateway.hand_in(scope, bytes(cycle.body), self._answer)
        if pending is None:
            self._direct = None
            super()._start_asgi_task(cycle, self.app)
        elif self._direct is not None:  # else it is answered already
            self._pending = pending

    def _answer(self, result: Result) -> None:
        cycle, self._direct = self._direct, None
        if cycle is None or cycle.disconnected:
            return
        if result.chunks is not None:
            super()._start_asgi_task(cycle, partial(self._stream, result, result.chunks))
            return
        self._pending = None
        cycle.response_started = cycle.response_complete = True
        keeps = b"" if cycle.keep_alive else b"connection: close\r\n"
        head = (STATUS_LINE[result.record.status], self._own_lines(), self._gateway.head(result), keeps, b"\r\n")
        if type(result.body) is bytes:
            self.transport.write_at_once(b"".join((*head, result.body)))
        else:  # shared memory: not to be copied
            self.transport.write(b"".join(head))
            self.transport.write(result.body)
        if keeps:
            self.transport.close()
        if self.pipeline:
            self.on_response_complete()
        else:
            self.server_state.total_requests += 1
            self._idle.set(self.timeout_keep_alive)

    def _idle_for_long(self) -> None:
        """Close a connection on which nothing was begun after a direct answer; after others, uvicorn's timer runs."""
        if self.cycle.response_complete and self.cycle.scope is self.scope and self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_handler()

    async def _stream(self, result: Result, chunks: Chunks, scope: Scope, receive: Receive, send: Send) -> None:
        """What is left of a streamed answer, as an ASGI application."""
        pending = self._pending
        try:
            await self._gateway.stream(result, chunks, send)
        except asyncio.CancelledError:
            if pending is not None:
                self._gateway.cancel(pending)
            raise

    def _own_lines(self) -> bytes:
        """Header lines of every response (the date), which uvicorn makes anew each second."""
        headers = self.server_state.default_headers
        if headers is not self._default_headers:
            self._default_headers = headers
            self._default_lines = b"".join([b"%b: %b\r\n" % header for header in headers])
        return self._default_lines

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._idle.cancel()
        pending, self._pending = self._pending, None
        if pending is not None:
            self._gateway.cancel(pending)
