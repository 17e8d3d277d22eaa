"""What a connection must know of a front door to hand in calls and write their answers without ASGI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from hotset.gateway.calls import Chunks, Deliver, PendingCall, Result

if TYPE_CHECKING:
    from hotset.gateway.app import Scope, Send


class Reply(msgspec.Struct, frozen=True, gc=False):
    """A whole answer as it is sent."""

    status: int
    head: bytes
    """Header lines, each with its line end."""
    body: bytes | memoryview


class DirectFront(Protocol):
    """The calls under one prefix. What is not taken, or refused, goes to the application, which says why."""

    def takes(self, path: str) -> bool:
        """Whether there is something to call there: asked before a large body is received."""
        ...

    def hand_in(self, scope: Scope, body: bytes | memoryview, deliver: Deliver) -> PendingCall | None:
        """Hand in a POST whose body is here; ``deliver`` gets its result, as ``Control.submit`` says. None: not so."""
        ...

    def reply(self, result: Result) -> Reply:
        """An answer that does not stream."""
        ...

    async def stream(self, result: Result, chunks: Chunks, send: Send) -> None:
        """Answer with one that does."""
        ...
