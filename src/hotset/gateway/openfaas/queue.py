"""Asynchronous calls: accepted once they are on the disk, made when nothing interactive waits, tried until they end.

A call that the server accepted ends in one of three ways: its function answered (and its callback was delivered), it
was given up and is a dead letter, or somebody removed it. A server that is killed takes up every other one where it
starts again, so a function may see a call twice: with the same ``X-Call-Id``.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import msgspec

from hotset.errors import StoreError
from hotset.functions.http_envelope import REQUEST
from hotset.functions.media import JSON, V2
from hotset.gateway.callers import Caller
from hotset.gateway.calls import Result, StreamBroken
from hotset.gateway.control import Control
from hotset.gateway.functions import Version
from hotset.gateway.openfaas.callbacks import Callbacks
from hotset.gateway.openfaas.invocation import Headers, forwarded, is_process, is_response, opened, request_envelope
from hotset.gateway.openfaas.labels import Retrying, read_retrying
from hotset.gateway.openfaas.naming import key_of
from hotset.gateway.openfaas.turns import Turns
from hotset.gateway.statuses import error_body
from hotset.store.async_calls import DEAD, QUEUED, AsyncCall, AsyncCalls, AsyncRequest
from hotset.store.datastore import FunctionRecord

LOOK_S = 0.01
"""How often a call that waits for room looks whether interactive calls left some."""
MOST_OPEN = 1_000
"""Calls that run or wait for their callback to be taken."""
MOST_BYTES = 4 << 30
"""Bodies of all calls that have not ended; one more call gets a 429."""
MOST_ANSWER_BYTES = 64 << 20
CALLBACK_ATTEMPTS = 6
CALLBACK_WAIT_S = 0.5
"""Before the second attempt; doubled each time."""

log = logging.getLogger("hotset.gateway")


class _Answer(msgspec.Struct, frozen=True):
    """What a function said, or what is said in its place."""

    status: int
    headers: Headers
    body: bytes
    took_s: float
    retry_after_s: float | None = None
    reached: bool = True


class AsyncQueue:
    """Takes calls and makes them. ``records``: what is deployed, by key."""

    def __init__(
        self,
        control: Control,
        store: AsyncCalls,
        callbacks: Callbacks,
        records: dict[str, FunctionRecord],
        *,
        most_queued: int = 100_000,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self._control = control
        self._callbacks = callbacks
        self._records = records
        self._most_queued = most_queued
        self._unix_time = unix_time
        self._waiting = Turns(
            self._had_s, control.scheduler.profiles.typical_inference_s, lambda function: self._on_gpu(key_of(function))
        )
        """Ready to be made."""
        self._later: list[tuple[float, int, AsyncCall]] = []
        """To be tried again: when, number, call."""
        self._running: set[asyncio.Task[None]] = set()
        self._added: list[tuple[AsyncCall, AsyncRequest, bytes, asyncio.Future[int]]] = []
        self._ended: list[int] = []
        self._known: dict[int, int] = {}
        """Number -> bytes of its body, of every call that has not ended, dead letters apart."""
        self._bytes = 0
        self.accepted = 0
        """Calls taken since the start."""
        self.ended = 0
        """Calls that ended since, one way or another."""
        self.inflight: Counter[str] = Counter()
        """Calls being made, by the name they are made under."""
        self._on_gpus = 0
        """Asynchronous calls that are on a GPU, or in line for one."""
        self._coming: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
        """Calls that are read from the disk to be handed in, by function: for GPUs, and others."""
        self._news = asyncio.Event()
        self._to_write = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    # Life

    async def start(self) -> None:
        """Take up what an earlier server left, and begin."""
        for call in await asyncio.to_thread(self.store.queued):
            self._ready(call)
        self._tasks = [asyncio.create_task(self._dispatch()), asyncio.create_task(self._write())]

    async def stop(self) -> None:
        """Stop; what has not ended stays on the disk."""
        tasks = [*self._tasks, *self._running]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._ended:
            await asyncio.to_thread(self.store.write, (), self._ended)
        await self._callbacks.close()
        await asyncio.to_thread(self.store.close)

    # What clients do

    @property
    def full(self) -> bool:
        return len(self._known) + len(self._added) >= self._most_queued or self._bytes >= MOST_BYTES

    @property
    def length(self) -> int:
        """Calls that have not ended, dead letters apart."""
        return len(self._known)

    def pending(self) -> Counter[str]:
        """Calls that wait to be made, or made again, by function. Linear in them."""
        waiting = [*self._waiting, *(call for _, _, call in self._later)]
        return Counter(call.function for call in waiting if call.number in self._known)

    async def accept(self, call_id: str, function: str, caller: Caller, request: AsyncRequest, body: bytes) -> None:
        """Returns when the call is on the disk; raises ``StoreError`` when it cannot be written."""
        call = AsyncCall(
            call_id=call_id,
            function=function,
            caller=caller.name,
            weight=caller.weight,
            priority=caller.priority,
            accepted_at_s=self._unix_time(),
            body_bytes=len(body),
        )
        written: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._added.append((call, request, body, written))
        self._to_write.set()
        await asyncio.shield(written)
        self.accepted += 1

    async def retry(self, call_id: str) -> bool:
        """Try a dead letter again, from the beginning; False: there is none of that id."""
        call = await asyncio.to_thread(self.store.find, call_id)
        if call is None or call.state != DEAD:
            return False
        await asyncio.to_thread(self.store.note, call.number, state=QUEUED, attempts=0, status=0, reason="")
        self._ready(msgspec.structs.replace(call, state=QUEUED, attempts=0, status=0, reason=""))
        return True

    async def remove(self, call_id: str) -> bool:
        """Forget a call that does not run; False: there is none of that id."""
        call = await asyncio.to_thread(self.store.find, call_id)
        if call is None:
            return False
        self._forget(call)
        await asyncio.to_thread(self.store.write, (), [call.number])
        return True

    # Writing: all that came while the last write was under way leaves with the next one

    async def _write(self) -> None:
        while True:
            await self._to_write.wait()
            self._to_write.clear()
            added, self._added = self._added, []
            ended, self._ended = self._ended, []
            try:
                rows = [(call, request, body) for call, request, body, _ in added]
                numbers = await asyncio.to_thread(self.store.write, rows, ended)
            except StoreError as error:
                log.error("asynchronous calls were refused: %s", error)
                self._ended += ended
                for *_, written in added:
                    written.set_exception(error)
                continue
            for (call, _, _, written), number in zip(added, numbers, strict=True):
                written.set_result(number)
                self._ready(msgspec.structs.replace(call, number=number))

    # Dispatching

    def _ready(self, call: AsyncCall) -> None:
        if call.number not in self._known:
            self._known[call.number] = call.body_bytes
            self._bytes += call.body_bytes
        self._waiting.add(call)
        self._news.set()

    def _forget(self, call: AsyncCall) -> None:
        """It has ended."""
        self.ended += call.number in self._known
        self._bytes -= self._known.pop(call.number, 0)

    async def _dispatch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._news.clear()
            while self._later and self._later[0][0] <= loop.time():
                self._ready(heapq.heappop(self._later)[2])
            while self._take_turns():
                pass
            waits_s = LOOK_S if self._waiting else None
            if self._later:
                until_s = max(0.0, self._later[0][0] - loop.time())
                waits_s = until_s if waits_s is None else min(waits_s, until_s)
            with suppress(TimeoutError):  # not wait_for: before Python 3.12 it may overlook that stop() cancels this
                async with asyncio.timeout(waits_s):
                    await self._news.wait()

    def _take_turns(self) -> bool:
        """Make the next call of the first function, in order of turns, that there is room for; whether there was."""
        return any(self._next_of(function) for function in self._waiting.functions())

    def _next_of(self, function: str) -> bool:
        """Make the next call of a function, if there is room for it; whether there was."""
        if len(self._running) >= MOST_OPEN or not self._control.accepting or not self._room(key_of(function)):
            return False
        call = self._waiting.take(function)
        if call.number in self._known:
            coming = self._coming[self._on_gpu(key_of(function))]
            coming[function] += 1
            task = asyncio.create_task(self._make(call, coming))
            self._running.add(task)
            task.add_done_callback(self._over)
        return True

    def _had_s(self, caller: str) -> float:
        """GPU seconds that were spent on a caller since the start; 0 for those who are not told apart any more."""
        usage = self._control.scheduler.cluster.queues.usage.get(caller)
        return 0.0 if usage is None else usage.run_s + usage.load_s

    def _on_gpu(self, key: str) -> bool:
        version = self._control.functions.current.get(key)
        return version is not None and version.spec.scheduled is not None

    def _room(self, key: str) -> bool:
        """Whether a call would run at once: interactive calls never wait behind calls that nobody waits for."""
        control = self._control
        version = control.functions.current.get(key)
        scheduled = None if version is None else version.spec.scheduled
        coming = self._coming[scheduled is not None]
        if version is None or scheduled is None:
            return control.open_cpu_calls + coming.total() < max(1, os.cpu_count() or 1)
        gpus = len(control.scheduler.cluster.gpus)
        copies = gpus if scheduled.max_copies is None else min(gpus, scheduled.max_copies)
        own = sum(count for function, count in coming.items() if key_of(function) == key)
        if version.calls + own >= copies * scheduled.max_batch:
            return False  # every GPU that may hold it has as much to do as it takes at once
        open_calls = control.open_gpu_calls + coming.total()
        if control.open_gpu_calls > self._on_gpus:  # some of them are interactive
            return open_calls < gpus
        return open_calls < gpus * scheduled.max_batch

    def _over(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._news.set()
        if not task.cancelled() and task.exception() is not None:
            log.error("an asynchronous call failed in a way nobody thought of", exc_info=task.exception())

    # One call

    async def _make(self, call: AsyncCall, coming: Counter[str]) -> None:
        try:
            stored = await asyncio.to_thread(self.store.request, call.number)
        finally:
            coming[call.function] -= 1  # from here to its being handed in, nothing else happens
            if not coming[call.function]:
                del coming[call.function]
        if stored is None:
            self._forget(call)
            return
        request, body = stored
        retrying = self._retrying(call)
        answer = await self._attempt(call, request, body)
        self._waiting.made(call)
        if answer is None:
            return
        attempts = call.attempts + 1
        if answer.status in retrying.codes and attempts < retrying.attempts:
            wait_s = max(answer.retry_after_s or 0.0, retrying.wait_s(attempts))
            reason = f"answered {answer.status}; tried again after {wait_s:g} s"
            await self._note(call, QUEUED, attempts, answer.status, reason)
            later = msgspec.structs.replace(call, attempts=attempts, status=answer.status, reason=reason)
            due_s = asyncio.get_running_loop().time() + wait_s
            heapq.heappush(self._later, (due_s, call.number, later))
            self._news.set()
            return
        undelivered = None
        if request.callback_url is not None:
            undelivered = await self._call_back(request.callback_url, call, answer)
        if undelivered is not None or answer.status in retrying.codes or not answer.reached:
            reason = undelivered or f"answered {answer.status} after {attempts} attempts: {_text(answer.body)}"
            await self._note(call, DEAD, attempts, answer.status, reason)
            self._forget(call)
        else:
            self._forget(call)
            self._ended.append(call.number)
            self._to_write.set()

    async def _note(self, call: AsyncCall, state: str, attempts: int, status: int, reason: str) -> None:
        await asyncio.to_thread(
            self.store.note, call.number, state=state, attempts=attempts, status=status, reason=reason
        )

    def _retrying(self, call: AsyncCall) -> Retrying:
        record = self._records.get(key_of(call.function))
        return Retrying() if record is None else read_retrying(record.labels, record.annotations)

    async def _attempt(self, call: AsyncCall, request: AsyncRequest, body: bytes) -> _Answer | None:
        """Make the call; None: the server is stopping, and the call stays as it is."""
        key = key_of(call.function)
        version = self._control.functions.current.get(key)
        if version is None:
            if key in self._records:  # being restored, or suspended: not now
                return _Answer(503, [("content-type", JSON)], error_body(f"{key} is not ready"), 0.0, reached=False)
            refusal = error_body(f"there is no function {call.function!r}: deploy it")
            return _Answer(404, [("content-type", JSON)], refusal, 0.0, reached=False)
        given = dict(request.headers)
        content_type, accept = given.get("content-type", ""), given.get("accept", "*/*")
        if content_type.startswith(V2):
            refusal = error_body("inference requests of the v2 protocol go to /v2/models/NAME/infer")
            return _Answer(415, [("content-type", JSON)], refusal, 0.0, reached=False)
        if is_process(version):
            added = forwarded(None, given.get("host", ""), call.call_id, int(call.accepted_at_s * 1e9))
            body = request_envelope("POST", request.path, request.query, request.headers, body, added)
            content_type = REQUEST
        caller = Caller(call.caller, call.weight, call.priority)
        on_gpu = version.spec.scheduled is not None
        self._on_gpus += on_gpu
        self.inflight[call.function] += 1
        try:
            result = await self._control.call(key, body, content_type, accept, caller=caller)
            if not self._control.accepting and result.record.status == 503:
                return None
            return await _read(version, result)
        finally:
            self._on_gpus -= on_gpu
            self.inflight[call.function] -= 1
            self.inflight += Counter()  # drops those at 0
            self._news.set()

    async def _call_back(self, url: str, call: AsyncCall, answer: _Answer) -> str | None:
        """Send the answer until it is taken; returns why it was not."""
        headers = [
            *answer.headers,
            ("x-call-id", call.call_id),
            ("x-duration-seconds", f"{answer.took_s:f}"),
            ("x-function-name", call.function),
            ("x-function-status", str(answer.status)),
            ("x-start-time", str(int(call.accepted_at_s * 1e9))),
        ]
        wait_s = CALLBACK_WAIT_S
        for attempt in range(1, CALLBACK_ATTEMPTS + 1):
            problem = await self._callbacks.send(url, headers, answer.body)
            if problem is None:
                return None
            if attempt < CALLBACK_ATTEMPTS:
                await asyncio.sleep(wait_s)
                wait_s *= 2
        return problem


async def _read(version: Version, result: Result) -> _Answer:
    """All of it, and what it says."""
    status, body = result.record.status, bytes(result.body)
    content_type, whole = result.content_type, is_response(version, result)
    if result.chunks is not None:
        pieces, size = [], 0
        try:
            async for chunk in result.chunks:
                size += len(chunk)
                if size <= MOST_ANSWER_BYTES:
                    pieces.append(bytes(chunk))
            body = b"".join(pieces)
        except StreamBroken as broken:
            status, content_type, body, whole = 502, JSON, error_body(str(broken)), False
    headers = [("content-type", content_type)]
    if whole:
        headers, rest = opened(body)
        body = bytes(rest)
    return _Answer(status, headers, body, result.record.duration_s, result.retry_after_s, not result.internal)


def _text(body: bytes) -> str:
    return body[:200].decode("utf-8", "replace")
