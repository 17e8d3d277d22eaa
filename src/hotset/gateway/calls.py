"""One call on its way through the gateway: what waits for it, what it becomes, and its public id."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from hotset.gateway.callers import NOBODY, Caller
from hotset.gateway.functions import Version
from hotset.node.interface import Call

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class CallRecord(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What happened to one call: the source of its response headers, its metrics and its trace row.

    ``queue_s + load_s + inference_s`` falls short of ``duration_s`` by what hotset itself took.
    """

    request_id: int
    function: str
    model: str
    arrival_s: float
    """On the control loop's clock, as is every other time here."""
    status: int
    caller: Caller = NOBODY
    gpu_id: str = ""
    """Empty: it never got to a GPU (a plain function, or a rejection)."""
    hit: bool = False
    warm: bool = False
    """Its model was parked in host memory and only had to be restored."""
    queue_s: float = 0.0
    """From arrival until its run began, less ``load_s``."""
    load_s: float = 0.0
    """The load or restore this very call caused; 0 for a hit."""
    inference_s: float = 0.0
    duration_s: float = 0.0
    """From arrival until its answer, or the last chunk of it, left the control loop."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """How a call ended (``chunks`` is None), or how its streamed answer begins (the body follows in ``chunks``)."""

    record: CallRecord
    content_type: str = "application/json"
    body: bytes | memoryview = b""
    retry_after_s: float | None = None
    internal: bool = False
    """The answer is hotset's own: the function did not give one."""
    chunks: Chunks | None = None


class Chunks:
    """A streamed answer, passed on as it comes; iterate over it once.

    Iteration ends with the answer; it raises ``StreamBroken`` when the answer ends early (its process died, the
    reader was too slow). Chunks that nobody has read yet count in ``buffered_bytes``.
    """

    def __init__(self) -> None:
        self.buffered_bytes = 0
        self._chunks: deque[bytes | memoryview] = deque()
        self._ended = False
        self._error: str | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, chunk: bytes | memoryview) -> None:
        if chunk:
            self._chunks.append(chunk)
            self.buffered_bytes += len(chunk)
        self._wake()

    def end(self, error: str | None = None) -> None:
        self._ended = True
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def __aiter__(self) -> AsyncIterator[bytes | memoryview]:
        while True:
            while self._chunks:
                chunk = self._chunks.popleft()
                self.buffered_bytes -= len(chunk)
                yield chunk
            if self._ended:
                if self._error is not None:
                    raise StreamBroken(self._error)
                return
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader


Deliver = Callable[[Result], None]
"""Gets a call's result at once, from inside the control loop: it must not call back into it, nor raise."""


class StreamBroken(Exception):
    """A streamed answer ended before its last chunk; the message is one sentence for the caller."""


class PendingCall:
    """A call that has not ended: what the control loop remembers of it. ``deliver`` gets the ``Result``, or where there
    is none ``future`` does."""

    # Defaults stand here and not in __init__: most calls never change them.
    expires_s: float | None = None
    """When it ends with 504 even while it runs; None: the function's own timeout bounds the run."""
    run_s: float | None = None
    """When its run began; None: it waits."""
    load_began_s: float | None = None
    """When the load or restore it waits for, and caused, was decided."""
    load_s = 0.0
    caller = NOBODY
    gpu_id = ""
    hit = False
    warm = False
    on_cpu = False
    """It was handed to the CPU pool: no GPU, no scheduler."""
    chunks: Chunks | None = None
    watcher: asyncio.Task[None] | None = None
    receive: Receive | None = None
    """Where the client's leaving can be seen (ASGI); looked at only when the call takes long."""
    future: asyncio.Future[Result]

    def __init__(self, version: Version, call: Call, arrival_s: float, deliver: Deliver | None) -> None:
        self.request_id = call.request_id
        self.version = version
        self.call = call
        self.arrival_s = arrival_s
        self.deliver = deliver
        if deliver is None:
            self.future = asyncio.get_running_loop().create_future()

    def resolve(self, result: Result) -> None:
        """Hand over the result to whoever waits for it."""
        if self.deliver is not None:
            self.deliver(result)
        elif not self.future.done():
            self.future.set_result(result)

    def load_begins(self, gpu_id: str, now_s: float, *, warm: bool = False) -> None:
        self.gpu_id = gpu_id
        self.warm = warm
        self.load_began_s = now_s

    def run_begins(self, gpu_id: str, hit: bool, now_s: float) -> None:
        if self.load_began_s is not None:
            self.load_s += now_s - self.load_began_s
            self.load_began_s = None
        self.gpu_id = gpu_id
        self.hit = hit
        self.run_s = now_s

    def record(self, status: int, now_s: float, inference_s: float = 0.0) -> CallRecord:
        """The call as it stands at ``now_s``."""
        # The CPU pool does not say when a run begins, only how long it took.
        until_s = now_s - inference_s if self.run_s is None else self.run_s
        return CallRecord(
            request_id=self.request_id,
            function=self.version.function,
            model=self.version.model,
            arrival_s=self.arrival_s,
            status=status,
            caller=self.caller,
            gpu_id=self.gpu_id,
            hit=self.hit,
            warm=self.warm,
            queue_s=max(0.0, until_s - self.arrival_s - self.load_s),
            load_s=self.load_s,
            inference_s=inference_s,
            duration_s=now_s - self.arrival_s,
        )


class CallIds:
    """Public call ids: UUIDs whose last 12 digits are the request id, under a prefix drawn at start.

    So an id tells which request it was without a table, and an id from before a restart is not mistaken for a new one.
    """

    def __init__(self) -> None:
        self._prefix = str(uuid.uuid4())[:24]
        self._prefix_bytes = self._prefix.encode()

    def public(self, request_id: int) -> str:
        return f"{self._prefix}{request_id:012x}"

    def public_bytes(self, request_id: int) -> bytes:
        """The same, as it stands in a header."""
        return b"%b%012x" % (self._prefix_bytes, request_id)

    def request_id(self, public: str) -> int | None:
        """The request behind a public id; None: not one of this server's."""
        if len(public) != 36 or not public.startswith(self._prefix):
            return None
        try:
            return int(public[24:], 16)
        except ValueError:
            return None
