"""The Open Inference Protocol v2 over gRPC: ``inference.GRPCInferenceService`` on grpc.aio."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

# The server's children are started by fork and exec at once: gRPC need not prepare for forks, nor complain about them.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc  # type: ignore[import-untyped]
from google.protobuf import json_format  # type: ignore[import-untyped]

from hotset.errors import ConfigurationError
from hotset.gateway.app import Headers
from hotset.gateway.calls import StreamBroken
from hotset.gateway.v2.conversion import (
    FINAL_RESPONSE,
    WANTS_EMPTY_FINAL,
    final_response,
    infer_response,
    request_parts,
    set_parameter,
)
from hotset.gateway.v2.refusal import Refusal
from hotset.gateway.v2.service import NO_CUDA_REGIONS, V2Service
from hotset.protocol.messages import SERVICE, message_class

ENVELOPE_BYTES = 1 << 20
"""What a message may have beside its tensors."""
OPEN_PER_STREAM = 64
"""Requests of one stream that are under way at once; a client that sends more waits."""
_SHORTEST_S = 1e-3
"""What a client whose deadline is about to pass is given: less than nothing is no time."""
BUFFERED_RESPONSES = 16
"""Of one streamed request, before its function is held up."""

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
    507: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_StreamResponse = message_class("ModelStreamInferResponse")

log = logging.getLogger("hotset.gateway")


class GrpcServer:
    """Serves a ``V2Service`` over gRPC; ``start`` it on the loop of its control loop."""

    def __init__(
        self,
        service: V2Service,
        host: str,
        port: int,
        *,
        max_body_bytes: int,
        admits: Callable[[str, Headers], bool] | None = None,
    ) -> None:
        """``port`` 0: any free one. ``admits``: as in ``front.v2_front``."""
        self._service = service
        self._admits = admits
        self._address = (host, port)
        self._server: Any = None
        self._options = [
            ("grpc.max_receive_message_length", max_body_bytes + ENVELOPE_BYTES),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ]
        self.port = port

    async def start(self) -> None:
        """Listen; raises ``ConfigurationError`` when the port is taken."""
        host, port = self._address
        self._server = grpc.aio.server(options=self._options)
        self._server.add_generic_rpc_handlers((_handlers(self),))
        try:
            self.port = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            self.port = 0
        if not self.port:
            raise ConfigurationError(f"{host}:{port} cannot be listened on: choose another with --grpc-port")
        await self._server.start()

    async def stop(self, grace_s: float = 0.0) -> None:
        """Take no more requests; those under way have ``grace_s`` seconds."""
        if self._server is not None:
            await self._server.stop(grace_s)

    def check(self, method: str, request: Any, context: Any) -> None:
        """Raise ``Refusal`` (401) for who may not do this; each method counts as the HTTP path it corresponds to."""
        if self._admits is None:
            return
        if method.startswith("Repository"):
            path = "/v2/repository"
        elif "SharedMemory" in method:
            path = "/v2/systemsharedmemory"
        else:
            path = f"/v2/models/{getattr(request, 'model_name', '') or getattr(request, 'name', '')}"
        if not self._admits(path, _headers(context)):
            raise Refusal(401, "this needs a key or credentials: send them as authorization or x-api-key metadata")

    # Health and metadata

    async def server_live(self, request: Any) -> dict[str, Any]:
        return {"live": True}

    async def server_ready(self, request: Any) -> dict[str, Any]:
        return {"ready": self._service.is_ready()}

    async def model_ready(self, request: Any) -> dict[str, Any]:
        return {"ready": self._service.models.is_ready(request.name, request.version)}

    async def server_metadata(self, request: Any) -> dict[str, Any]:
        return self._service.server_metadata()

    async def model_metadata(self, request: Any) -> dict[str, Any]:
        return self._service.models.metadata(request.name, request.version)

    async def model_config(self, request: Any) -> dict[str, Any]:
        return {"config": self._service.models.configuration(request.name, request.version)}

    async def model_statistics(self, request: Any) -> dict[str, Any]:
        return self._service.model_statistics(request.name, request.version)

    async def trace_setting(self, request: Any) -> dict[str, Any]:
        wanted: dict[str, Any] = {}
        for name, setting in request.settings.items():
            listed = list(setting.value)
            wanted[name] = (listed if name == "trace_level" else "".join(listed)) or None
        settings = self._service.trace_settings(wanted, request.model_name)
        return {
            "settings": {
                name: {"value": list(value) if name == "trace_level" else [value]} for name, value in settings.items()
            }
        }

    # Model repository

    async def repository_index(self, request: Any) -> dict[str, Any]:
        return {"models": self._service.index(request.ready)}

    async def repository_model_load(self, request: Any) -> dict[str, Any]:
        parameters = {}
        for name, parameter in request.parameters.items():
            choice = parameter.WhichOneof("parameter_choice")
            parameters[name] = None if choice is None else getattr(parameter, choice)
        await self._service.models.load(request.model_name, parameters)
        return {}

    async def repository_model_unload(self, request: Any) -> dict[str, Any]:
        self._service.models.unload(request.model_name)
        return {}

    # Shared memory

    async def system_shared_memory_status(self, request: Any) -> dict[str, Any]:
        regions = self._service.regions.status(request.name)
        return {
            "regions": {
                each.name: {"name": each.name, "key": each.key, "offset": each.offset, "byte_size": each.byte_size}
                for each in regions
            }
        }

    async def system_shared_memory_register(self, request: Any) -> dict[str, Any]:
        self._service.regions.register(request.name, request.key, request.offset, request.byte_size)
        return {}

    async def system_shared_memory_unregister(self, request: Any) -> dict[str, Any]:
        self._service.regions.unregister(request.name)
        return {}

    async def cuda_shared_memory_status(self, request: Any) -> dict[str, Any]:
        return {}

    async def cuda_shared_memory_register(self, request: Any) -> dict[str, Any]:
        raise Refusal(400, NO_CUDA_REGIONS)

    async def cuda_shared_memory_unregister(self, request: Any) -> dict[str, Any]:
        return {}

    # Inference

    async def model_infer(self, request: Any, context: Any) -> Any:
        try:
            self.check("ModelInfer", request, context)
            header, binary = request_parts(request)
            answer = await self._service.inference.infer(
                request.model_name,
                request.model_version,
                header,
                binary,
                timeout_s=_time_left_s(context),
                caller=self._service.caller(dict(_headers(context))),
            )
            return infer_response(answer)
        except Refusal as refusal:
            return await _abort(context, refusal)

    async def model_stream_infer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Requests are under way together; their responses come in the order of the requests."""
        turns: asyncio.Queue[asyncio.Queue[Any] | None] = asyncio.Queue(OPEN_PER_STREAM)
        tasks: set[asyncio.Task[None]] = set()

        async def read() -> None:
            async for request in requests:
                answers: asyncio.Queue[Any] = asyncio.Queue(BUFFERED_RESPONSES)
                task = asyncio.create_task(self._answer_in_stream(request, answers, context))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                await turns.put(answers)
            await turns.put(None)

        reader = asyncio.create_task(read())
        try:
            while (answers := await turns.get()) is not None:
                while (answer := await answers.get()) is not None:
                    yield answer
        finally:
            for task in (reader, *tasks):
                task.cancel()

    async def _answer_in_stream(self, request: Any, answers: asyncio.Queue[Any], context: Any) -> None:
        """Put the responses to one request, then None."""
        try:
            self.check("ModelStreamInfer", request, context)
            header, binary = request_parts(request)
            version, final = "", False
            inference, caller = self._service.inference, self._service.caller(dict(_headers(context)))
            responses = inference.stream(request.model_name, request.model_version, header, binary, caller)
            async with contextlib.aclosing(responses):
                async for answer, final in responses:
                    response = infer_response(answer)
                    version = response.model_version
                    set_parameter(response.parameters[FINAL_RESPONSE], final)
                    await answers.put(_StreamResponse(infer_response=response))
            if not final and request.parameters[WANTS_EMPTY_FINAL].bool_param:
                await answers.put(_StreamResponse(infer_response=final_response(request, version)))
        except (Refusal, StreamBroken) as error:
            failed = _StreamResponse(error_message=str(error))
            failed.infer_response.id = request.id
            await answers.put(failed)
        except Exception:
            log.exception("a streamed inference failed in a way nobody thought of")
            await answers.put(_StreamResponse(error_message="this is a bug in hotset: please report it"))
        await answers.put(None)


Simple = Callable[[Any], Awaitable[dict[str, Any]]]
"""A method that is not on the inference path: its answer is a dict, which becomes the response message."""


def _handlers(server: GrpcServer) -> grpc.GenericRpcHandler:
    """Every method of the service, by its name in snake case."""
    handlers = {}
    for method in SERVICE.methods:
        request = message_class(method.input_type.name)
        response = message_class(method.output_type.name)
        own = getattr(server, _snake(method.name))
        codec = {"request_deserializer": request.FromString, "response_serializer": response.SerializeToString}
        if method.name == "ModelStreamInfer":
            handlers[method.name] = grpc.stream_stream_rpc_method_handler(own, **codec)
        else:
            behaviour = own if method.name == "ModelInfer" else _simple(server, method.name, own, response)
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(behaviour, **codec)
    return grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)


def _simple(server: GrpcServer, method: str, own: Simple, response: Any) -> Callable[[Any, Any], Awaitable[Any]]:
    async def behave(request: Any, context: Any) -> Any:
        try:
            server.check(method, request, context)
            return json_format.ParseDict(await own(request), response())
        except Refusal as refusal:
            return await _abort(context, refusal)

    return behave


async def _abort(context: Any, refusal: Refusal) -> None:
    code = _CODES.get(refusal.status, grpc.StatusCode.INTERNAL)
    metadata = () if refusal.retry_after_s is None else (("retry-after", f"{refusal.retry_after_s:g}"),)
    await context.abort(code, str(refusal), metadata)


def _headers(context: Any) -> Headers:
    """A call's metadata as HTTP headers."""
    return [(key.encode(), value.encode()) for key, value in context.invocation_metadata() if type(value) is str]


def _time_left_s(context: Any) -> float | None:
    """Until the client's own deadline; None: it has none."""
    left_s = context.time_remaining()
    return None if left_s is None else max(float(left_s), _SHORTEST_S)


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
