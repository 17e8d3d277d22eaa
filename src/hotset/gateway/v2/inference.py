"""An inference request on its way in, and its answer on its way out, whichever protocol carries them.

The JSON header is looked into only when a tensor is in shared memory; else it goes to the worker unread.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from hotset.functions.v2 import MAX_HEADER_IN_ACCEPT_BYTES, header_bytes, unframe
from hotset.gateway.callers import NOBODY, Caller
from hotset.gateway.calls import CallRecord, Deliver, PendingCall, Receive, Result
from hotset.gateway.control import Control
from hotset.gateway.v2.models import Models, Served, error_text
from hotset.gateway.v2.refusal import Refusal
from hotset.gateway.v2.shared_memory import Place, Regions
from hotset.gateway.v2.statistics import Statistics
from hotset.vocabulary import HIGHEST_PRIORITY, LOWEST_PRIORITY

_MARK = b"shared_memory_region"
_TIMEOUT = b'"timeout"'
_PRIORITY = b'"priority"'
_SHARED = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size")


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """A successful inference: the JSON header, and the raw data of its binary outputs."""

    record: CallRecord
    header: memoryview | bytes
    binary: bytes | memoryview = b""

    @property
    def whole(self) -> bool:
        """The header is all there is."""
        return not len(self.binary)


class Inference:
    """Takes inference requests for the models in service."""

    def __init__(self, control: Control, models: Models, regions: Regions, statistics: Statistics) -> None:
        self.control = control
        self.models = models
        self.regions = regions
        self.statistics = statistics

    async def infer(
        self,
        name: str,
        version: str,
        header: bytes,
        binary: bytes | memoryview = b"",
        *,
        timeout_s: float | None = None,
        receive: Receive | None = None,
        caller: Caller = NOBODY,
    ) -> Response:
        """One request and its answer; raises ``Refusal``, also for what the worker refused. Cancelling is leaving.

        ``header``: the JSON; ``binary``: the raw data behind it.
        """
        served = self.models.find(name, version)
        if _MARK not in header:
            return self._response(await self._result(served, header, binary, timeout_s, receive, caller))
        moved = _Moved(header, binary)
        with self.regions.used(moved.places):
            parts = [memoryview(self.regions.read(part)) if isinstance(part, Place) else part for part in moved.parts]
            joined = parts[0] if len(parts) == 1 else b"".join(parts)
            result = await self._result(served, moved.header, joined, timeout_s, receive, caller)
            return self._put_outputs(self._response(result), moved.outputs)

    async def stream(
        self, name: str, version: str, header: bytes, binary: bytes | memoryview = b"", caller: Caller = NOBODY
    ) -> AsyncGenerator[tuple[Response, bool]]:
        """Every response to one request, and whether it is known to be the last: one, or each item that a streaming
        function yields. Raises ``Refusal`` and ``StreamBroken``; closing it is leaving."""
        served = self.models.find(name, version)
        if _MARK in header:
            yield await self.infer(name, version, header, binary, caller=caller), True
            return
        pending = self.submit(served, header, binary, caller=caller)
        try:
            result = await pending.future
            self.statistics.observe(name, served.version, result.record)
            if result.chunks is None:
                yield self._response(result), True
                return
            async for chunk in result.chunks:
                body, json_bytes = unframe(chunk)
                if bytes(body[:9]) == b'{"error":':
                    raise Refusal(500, error_text(body))
                yield response(result.record, body, json_bytes), False
        finally:
            self.control.cancel(pending)

    def hand_in(
        self,
        name: str,
        version: str,
        header: bytes,
        binary: bytes | memoryview,
        *,
        timeout_s: float | None,
        caller: Caller = NOBODY,
        deliver: Deliver,
    ) -> PendingCall | None:
        """One request whose result ``deliver`` gets; raises ``Refusal``. None: its tensors are in shared memory."""
        if _MARK in header:
            return None
        served = self.models.find(name, version)

        def observed(result: Result) -> None:
            self.statistics.observe(served.name, served.version, result.record)
            deliver(result)

        return self.submit(served, header, binary, timeout_s, caller=caller, deliver=observed)

    def submit(
        self,
        served: Served,
        header: bytes,
        binary: bytes | memoryview,
        timeout_s: float | None = None,
        receive: Receive | None = None,
        caller: Caller = NOBODY,
        deliver: Deliver | None = None,
    ) -> PendingCall:
        """Hand the request to the control loop in the form that functions/v2.py describes; raises ``Refusal`` (400).

        Of ``timeout_s`` and the request's own ``timeout`` parameter the shorter counts; its own ``priority`` is bounded
        by what ``caller`` may have.
        """
        own_s = _timeout_s(header) if _TIMEOUT in header else None
        if own_s is not None:
            timeout_s = own_s if timeout_s is None else min(own_s, timeout_s)
        if _PRIORITY in header:
            caller = _at_priority(caller, header)
        content_type, accept = served.content_type, "*/*"
        body: bytes | memoryview = header
        if len(binary):
            if len(header) <= MAX_HEADER_IN_ACCEPT_BYTES:
                content_type, accept, body = f"{content_type}; header=accept", header.decode("latin-1"), binary
            else:
                content_type, body = f"{content_type}; header={len(header)}", b"".join((header, binary))
        return self.control.submit(
            served.function,
            body,
            content_type,
            accept,
            caller=caller,
            timeout_s=timeout_s,
            receive=receive,
            deliver=deliver,
        )

    async def _result(
        self,
        served: Served,
        header: bytes,
        binary: bytes | memoryview,
        timeout_s: float | None,
        receive: Receive | None,
        caller: Caller,
    ) -> Result:
        pending = self.submit(served, header, binary, timeout_s, receive, caller)
        try:
            result = await pending.future
        except BaseException:
            self.control.cancel(pending)
            raise
        if result.chunks is not None:
            self.control.cancel(pending)
            raise no_streams(served.name)
        self.statistics.observe(served.name, served.version, result.record)
        return result

    @staticmethod
    def _response(result: Result) -> Response:
        if result.record.status != 200:
            raise Refusal(result.record.status, error_text(result.body), retry_after_s=result.retry_after_s)
        return response(result.record, result.body, header_bytes(result.content_type))

    def _put_outputs(self, answer: Response, wanted: dict[str, Place]) -> Response:
        """Move the outputs that belong in shared memory there; the others stay."""
        if not wanted:
            return answer
        message = msgspec.json.decode(answer.header)
        rest: list[memoryview] = []
        at = 0
        for output in message["outputs"]:
            size = output.get("parameters", {}).get("binary_data_size")
            if size is None:
                continue
            data = memoryview(answer.binary)[at : at + size]
            at += size
            place = wanted.get(output["name"])
            if place is None:
                rest.append(data)
            else:
                self.regions.write(place, data)
                output["parameters"] = {
                    "shared_memory_region": place.region,
                    "shared_memory_offset": place.offset,
                    "shared_memory_byte_size": size,
                }
        return Response(record=answer.record, header=msgspec.json.encode(message), binary=b"".join(rest))


class _Head(msgspec.Struct, frozen=True):
    parameters: dict[str, Any] = msgspec.field(default_factory=dict)


_head = msgspec.json.Decoder(_Head)


def _parameter(header: bytes, name: str) -> object:
    """Of the schedule policy extension; 0: it is not set."""
    try:
        return _head.decode(header).parameters.get(name, 0)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0  # the worker says what is wrong with it


def _at_priority(caller: Caller, header: bytes) -> Caller:
    """The extension counts from 1, the highest, downwards; 0: what the caller has anyway."""
    level = _parameter(header, "priority")
    if type(level) is not int or level < 0:
        raise Refusal(400, "the parameter priority must be a whole number: 1 for the highest, 0 for the usual")
    if not level:
        return caller
    asked = max(HIGHEST_PRIORITY - (level - 1), LOWEST_PRIORITY)
    return msgspec.structs.replace(caller, priority=min(asked, caller.priority))


def _timeout_s(header: bytes) -> float | None:
    """How many microseconds the caller gives its request."""
    wanted = _parameter(header, "timeout")
    if type(wanted) is not int or wanted < 0:
        raise Refusal(400, "the parameter timeout must be a whole number of microseconds, 0 for none")
    return wanted / 1e6 if wanted else None


def no_streams(name: str) -> Refusal:
    return Refusal(400, f"{name} streams its results: use gRPC's ModelStreamInfer, or POST /function/{name}")


def response(record: CallRecord, body: bytes | bytearray | memoryview, json_bytes: int | None) -> Response:
    """An answer's body split into its JSON and its raw data."""
    if json_bytes is None:
        return Response(record=record, header=memoryview(body))
    view = memoryview(body)
    return Response(record=record, header=view[:json_bytes], binary=view[json_bytes:])


class _Moved:
    """A request whose shared-memory tensors have been turned into binary ones.

    ``parts``: its binary data, in order; a ``Place`` stands for what is to be read there. ``outputs``: where to put
    which outputs. ``places``: all of them. Raises ``Refusal`` (400) when the header is not what it must be.
    """

    def __init__(self, header: bytes, binary: bytes | memoryview) -> None:
        self.parts: list[Place | memoryview] = []
        self.outputs: dict[str, Place] = {}
        self.places: list[Place] = []
        view = memoryview(binary)
        at = 0
        try:
            message = msgspec.json.decode(header, type=dict[str, Any])
            for tensor in _parameterised(message, "inputs"):
                parameters = tensor["parameters"]
                size = parameters.get("binary_data_size")
                if "shared_memory_region" in parameters:
                    if size is not None or "data" in tensor:
                        raise Refusal(400, "an input in shared memory must bring no other data")
                    place = _take_place(parameters)
                    self.parts.append(place)
                    self.places.append(place)
                    parameters["binary_data_size"] = place.byte_size
                elif isinstance(size, int) and 0 <= size <= len(view) - at:
                    self.parts.append(view[at : at + size])
                    at += size
            for output in _parameterised(message, "outputs"):
                if "shared_memory_region" in output["parameters"]:
                    place = _take_place(output["parameters"])
                    self.outputs[str(output.get("name"))] = place
                    self.places.append(place)
                    output["parameters"]["binary_data"] = True
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise Refusal(400, f"the inference request cannot be read: {error}") from None
        if at < len(view):
            self.parts.append(view[at:])  # the worker says whose it is not
        self.header = msgspec.json.encode(message)


def _parameterised(message: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The tensors under ``key`` that have parameters, whatever else the client sent there."""
    listed = message.get(key)
    if not isinstance(listed, list):
        return []
    return [each for each in listed if isinstance(each, dict) and isinstance(each.get("parameters"), dict)]


def _take_place(parameters: dict[str, Any]) -> Place:
    """Take the shared-memory parameters out of a tensor's; raises ``Refusal`` (400)."""
    region, offset, size = (parameters.pop(name, 0) for name in _SHARED)
    with contextlib.suppress(msgspec.ValidationError):
        return msgspec.convert({"region": region, "offset": offset, "byte_size": size}, Place)
    raise Refusal(400, "shared_memory_region must be a name, its offset and byte_size whole numbers")
