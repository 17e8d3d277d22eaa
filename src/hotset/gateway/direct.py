"""Everyday calls, handed in and answered by their connection itself.

What uvicorn makes of a request for an ASGI application (a task, an event, messages of dicts, turns of the loop between
them) costs more than all that hotset does with it. A POST to a function or for an inference needs none of that: it is
handed to the control loop when its last byte is read, and its answer is written the moment it comes. A body longer than
uvicorn would buffer is received in place (intake.py). Everything else, and every request that is refused, goes
uvicorn's way to the application, whose methods serve both.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from hotset.deadline import Deadline
from hotset.gateway.app import Headers, Scope, Send
from hotset.gateway.bodies import Bodies, BodyError, Incoming
from hotset.gateway.calls import Chunks, PendingCall, Receive, Result
from hotset.gateway.coalescing import CoalescingProtocol
from hotset.gateway.control import Control
from hotset.gateway.fronts import DirectFront
from hotset.gateway.intake import Intake

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Admits(Protocol):
    """Whether a request for this path that shows these headers may be made."""

    def __call__(self, path: str, headers: Headers) -> bool: ...


class DirectProtocol(CoalescingProtocol):
    """A connection of the gateway. One request of a connection is served at a time; the next ones wait, as uvicorn's
    pipelined requests do: to it a direct call is a request whose response is not complete."""

    def __init__(
        self, control: Control, bodies: Bodies, fronts: Mapping[bytes, DirectFront], admits: Admits, **uvicorns: Any
    ) -> None:
        """``fronts``: by the first part of the paths they serve."""
        super().__init__(**uvicorns)
        self.intake: Intake | None = None
        """What receives large bodies in place; None: they come through ``data_received`` too."""
        self._control = control
        self._bodies = bodies
        self._fronts = fronts
        self._admits = admits
        self._direct: RequestResponseCycle | None = None
        """The request that is read, or waits for its result."""
        self._front: DirectFront
        """Where it goes."""
        self._incoming: Incoming | None = None
        """Its body, if that is large and not complete."""
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
        if self.parser.get_method() != b"POST" or not cycle.more_body or self.flow.write_paused:
            return False
        for prefix, front in self._fronts.items():
            if self.url.startswith(prefix):
                self._front = front
                break
        else:
            return False
        for name, value in self.headers:
            if name == b"content-length":
                size = int(value)
                if size > HIGH_WATER_LIMIT:
                    return not cycle.body and self._begin_large(cycle, size)
                return not cycle.waiting_for_100_continue
        return False

    def _begin_large(self, cycle: RequestResponseCycle, size: int) -> bool:
        """Make room for a body that uvicorn would read only as asked to; False: there is none, or no use for it."""
        scope: Scope = cycle.scope  # type: ignore[assignment]
        if not self._front.takes(scope["path"]) or not self._admits(scope["path"], scope["headers"]):
            return False
        try:
            self._incoming = self._bodies.begin(size)
        except BodyError:
            return False
        if cycle.waiting_for_100_continue:
            cycle.waiting_for_100_continue = False
            self.transport.write(_CONTINUE)
        return True

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._incoming is not None and self.intake is not None:
            self.intake.receive(self._incoming)

    def on_body(self, body: bytes) -> None:
        if self._incoming is not None:
            self._incoming.feed(body)
        else:
            super().on_body(body)

    def body_received(self) -> None:
        """The rest of a large body is there, which the parser has not seen: the next request gets a new one."""
        self.parser = new_parser(self)
        self.on_message_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        cycle = self._direct
        if cycle is None or cycle is not self.cycle:
            return
        incoming, self._incoming = self._incoming, None
        if incoming is None:
            body: bytes | memoryview = bytes(cycle.body)
        else:
            body = incoming.view
            incoming.close()
        scope: Scope = cycle.scope  # type: ignore[assignment]
        pending = None
        if self._admits(scope["path"], scope["headers"]):
            pending = self._front.hand_in(scope, body, self._answer)
        if pending is None:
            self._direct = None
            super()._start_asgi_task(cycle, partial(self._with_body, cycle, body))
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
        reply = self._front.reply(result)
        head = (STATUS_LINE[reply.status], self._own_lines(), reply.head, keeps, b"\r\n")
        if type(reply.body) is bytes:
            self.transport.write_at_once(b"".join((*head, reply.body)))
        else:  # shared memory: not to be copied
            self.transport.write(b"".join(head))
            self.transport.write(reply.body)
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

    async def _with_body(
        self, cycle: RequestResponseCycle, body: bytes | memoryview, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """The application, for a request whose body was read without it."""
        cycle.body = body  # type: ignore[assignment] # uvicorn only makes bytes of it
        try:
            await self.app(scope, receive, send)
        finally:
            cycle.body = bytearray()

    async def _stream(self, result: Result, chunks: Chunks, scope: Scope, receive: Receive, send: Send) -> None:
        """What is left of a streamed answer, as an ASGI application."""
        pending = self._pending
        try:
            await self._front.stream(result, chunks, send)
        finally:
            if pending is not None:
                self._control.cancel(pending)  # which changes nothing if all of it was sent

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
        if self._incoming is not None:
            self._incoming.close()
            self._incoming = None
        pending, self._pending = self._pending, None
        if pending is not None:
            self._control.cancel(pending)


def new_parser(protocol: DirectProtocol) -> httptools.HttpRequestParser:
    """A parser as uvicorn makes it for a new connection."""
    parser = httptools.HttpRequestParser(protocol)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser
