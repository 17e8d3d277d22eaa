"""``/system/functions`` and ``/system/function/NAME``: what is deployed, and deploying it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from time import monotonic
from urllib.parse import parse_qsl

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from hotset.errors import HotsetError
from hotset.functions.contract import FunctionKind
from hotset.functions.units import format_bytes
from hotset.gateway import readings
from hotset.gateway.app import Application, Scope, Send
from hotset.gateway.calls import Receive
from hotset.gateway.control import Control
from hotset.gateway.deployments import Deployments
from hotset.gateway.openfaas.namespaces import Namespaces
from hotset.gateway.openfaas.naming import check_function_name, name_of
from hotset.gateway.openfaas.scaling import Replicas
from hotset.gateway.openfaas.types import (
    DeleteFunctionRequest,
    FunctionDeployment,
    FunctionDetails,
    FunctionStatus,
    Resources,
    Usage,
)
from hotset.gateway.operations import ACCEPTED, NAMESPACE, Answer, Operation, Parameter, name_parameter
from hotset.gateway.statuses import error_body
from hotset.gateway.usage import Used, used
from hotset.gateway.web import BUG, NDJSON, accepted, json_response, read_flag, read_json, rfc3339, status_of_error
from hotset.store.datastore import FunctionRecord

FUNCTIONS = "/system/functions"
FUNCTION = "/system/function/{name}"
NAME_LABEL = "faas_function"
"""A label every function has; OpenFaaS clients look for it."""
GPU, GPU_MEMORY, GPU_REQUEST = "hotset.gpu", "hotset.gpu-memory-now", "hotset.gpu-request"
"""Annotations that say what became of a request for a GPU: they survive an OpenFaaS gateway, other fields do not."""

_STATUS = "/system/function/"
_JSON_TYPE = (b"content-type", b"application/json")
_encode = msgspec.json.Encoder().encode

log = logging.getLogger("hotset.gateway")


class FunctionsApi:
    def __init__(self, control: Control, deployments: Deployments, namespaces: Namespaces, replicas: Replicas) -> None:
        self._control = control
        self._deployments = deployments
        self._namespaces = namespaces
        self._replicas = replicas
        self._running: set[asyncio.Task[FunctionRecord]] = set()
        self._looks: dict[str, tuple[Used, float]] = {}
        """Model -> what it used when it was last asked for, and when that was."""

    def operations(self) -> list[Operation]:
        deploys = {
            202: Answer(text="New calls go to it.", media=None),
            200: Answer(text="With Accept: application/x-ndjson, what happens, line by line.", media=NDJSON),
        }
        return [
            Operation(
                method="GET",
                path=FUNCTIONS,
                handler=self.listed,
                summary="All functions of a namespace",
                tag="functions",
                parameters=(NAMESPACE,),
                answers={200: Answer(text="Their status.", kind=list[FunctionStatus])},
            ),
            Operation(
                method="POST",
                path=FUNCTIONS,
                handler=self.deploy,
                summary="Deploy a function, or replace it",
                tag="functions",
                parameters=(NAMESPACE,),
                body=FunctionDeployment,
                answers=deploys,
            ),
            Operation(
                method="PUT",
                path=FUNCTIONS,
                handler=self.deploy,
                summary="Replace a function that is deployed",
                tag="functions",
                parameters=(NAMESPACE,),
                body=FunctionDeployment,
                answers=deploys,
            ),
            Operation(
                method="DELETE",
                path=FUNCTIONS,
                handler=self.remove,
                summary="Take a function out of service; its calls end first",
                tag="functions",
                parameters=(NAMESPACE,),
                body=DeleteFunctionRequest,
                answers=ACCEPTED,
            ),
            Operation(
                method="GET",
                path=FUNCTION,
                handler=self.status,
                summary="One function",
                tag="functions",
                parameters=(
                    name_parameter("The function."),
                    NAMESPACE,
                    Parameter(name="usage", text="1: with the memory and processor time of its processes."),
                ),
                answers={200: Answer(text="Its status.", kind=FunctionStatus)},
            ),
        ]

    # Finding

    def find(self, name: str, namespaces: Sequence[str | None] = ()) -> FunctionRecord:
        """The function of this name; ``namespaces``: those given beside it. Raises 404, 400 for a namespace."""
        meant = self._namespaces.function(name, *namespaces)
        record = self._deployments.records.get(meant.key)
        if record is None:
            raise unknown(name)
        return record

    # Reading

    async def listed(self, request: Request) -> Response:
        namespace = self._namespaces.check(request.query_params.get("namespace"))
        records = [each for each in self._deployments.records.values() if name_of(each.name).namespace == namespace]
        waiting = readings.waiting(self._control)
        return json_response([self._status(record, waiting.get(record.name, 0)) for record in records])

    async def status(self, request: Request) -> Response:
        query = request.query_params
        status = self.status_of(self.find(request.path_params["name"], (query.get("namespace"),)))
        return json_response(await self._with_usage(status) if read_flag(query.get("usage", "")) else status)

    def around(self, application: Application) -> Application:
        """The same application, with a way past the framework for what an OpenFaaS gateway asks before every call."""

        async def shortened(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["method"] != "GET" or not scope["path"].startswith(_STATUS):
                await application(scope, receive, send)
                return
            query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
            if read_flag(query.get("usage", "")):
                await application(scope, receive, send)
                return
            code = 200
            try:
                body = _encode(self.status_of(self.find(scope["path"][len(_STATUS) :], (query.get("namespace"),))))
            except HTTPException as error:
                code, body = error.status_code, error_body(error.detail)
            headers = [_JSON_TYPE, (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": code, "headers": headers})
            await send({"type": "http.response.body", "body": body})

        return shortened

    def status_of(self, record: FunctionRecord) -> FunctionStatus:
        return self._status(record, readings.waiting_of(self._control, record.name))

    def _status(self, record: FunctionRecord, waiting: int) -> FunctionStatus:
        options, client, name = record.options, record.client, name_of(record.name)
        version = self._control.functions.current.get(record.name)
        footprint = self._control.scheduler.profiles.footprints.get(record.model)
        gpus = list(self._control.scheduler.cache.holders(record.model))
        wanted = self._replicas.wanted(record)
        details = FunctionDetails(
            model=record.model,
            entry=record.entry,
            kind=options.kind.value,
            bundle=record.bundle,
            requirements=record.requirements,
            gpu_memory_bytes=options.gpu_memory_bytes,
            measured_memory_bytes=footprint.newest_bytes if footprint is not None else None,
            memory_margin_bytes=readings.memory_margin(self._control, record.model),
            max_batch=options.max_batch,
            max_batch_wait_s=options.max_batch_wait_s,
            timeout_s=options.timeout_s,
            load_timeout_s=options.load_timeout_s,
            retry=options.retry,
            fast_load=self._deployments.load_checks.outcome(record) if version else None,
            gpus=gpus,
            waiting=waiting,
            problem=None if version else self._deployments.unavailable.get(record.name, "it is being restored"),
            schema=record.schema,
        )
        return FunctionStatus(
            name=name.name,
            namespace=name.namespace,
            image=record.image,
            env_process=client.env_process,
            env_vars=options.env or None,
            constraints=client.constraints or None,
            secrets=client.secrets or None,
            labels={**record.labels, NAME_LABEL: name.name},
            annotations={**record.annotations, **_outcome(record, details)},
            limits=_limits(record),
            requests=_resources(client.requests),
            read_only_root_filesystem=client.read_only_root_filesystem,
            invocation_count=version.metrics.total if version else 0,
            replicas=wanted,
            available_replicas=wanted if version else 0,
            created_at=rfc3339(record.created_at_s),
            hotset=details,
        )

    async def _with_usage(self, status: FunctionStatus) -> FunctionStatus:
        model = status.hotset.model
        mine = {pid: owner for pid, owner in readings.pids(self._control).items() if owner == model}
        now = (await asyncio.to_thread(used, mine)).get(model, Used())
        at_s = monotonic()
        before, before_s = self._looks.get(model, (Used(), self._control.started_s))
        self._looks[model] = (now, at_s)
        milli = 1000.0 * max(0.0, now.cpu_s - before.cpu_s) / max(at_s - before_s, 0.001)
        usage = Usage(cpu=round(milli, 3), total_memory_bytes=float(now.memory_bytes))
        return msgspec.structs.replace(status, usage=usage)

    # Changing

    async def deploy(self, request: Request) -> Response:
        """Answers 202 once new calls go to the new version; with ``Accept: application/x-ndjson``, what happens until
        then as it happens: lines of ``{"progress": ...}``, then ``{"deployed": FunctionStatus}`` or ``{"error": ...}``.
        """
        wanted = await read_json(request, FunctionDeployment)
        namespace = self._namespaces.check(wanted.namespace or request.query_params.get("namespace"))
        check_function_name(wanted.service)
        wanted = msgspec.structs.replace(wanted, namespace=namespace)
        if request.method == "PUT":
            key = self._namespaces.function(wanted.service, namespace).key
            if key not in self._deployments.records:
                raise HTTPException(404, f"there is no function {wanted.service!r} to update: POST it")
        news: asyncio.Queue[str | None] = asyncio.Queue()
        # A task of its own: a client that leaves does not leave a half-done deploy behind.
        task = asyncio.create_task(self._deployments.deploy(wanted, news.put_nowait))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        task.add_done_callback(lambda _: news.put_nowait(None))
        if NDJSON in request.headers.get("accept", ""):
            return StreamingResponse(self._deploying(task, news), media_type=NDJSON)
        await asyncio.shield(task)
        return accepted()

    async def _deploying(
        self, task: asyncio.Task[FunctionRecord], news: asyncio.Queue[str | None]
    ) -> AsyncIterator[bytes]:
        while (line := await news.get()) is not None:
            yield msgspec.json.encode({"progress": line}) + b"\n"
        try:
            record = await task
        except HotsetError as error:
            yield error_body(str(error), status=status_of_error(error)) + b"\n"
        except Exception:
            log.exception("a deploy failed in a way nobody thought of")
            yield error_body(BUG, status=500) + b"\n"
        else:
            yield msgspec.json.encode({"deployed": self.status_of(record)}) + b"\n"

    async def remove(self, request: Request) -> Response:
        wanted = await read_json(request, DeleteFunctionRequest)
        if not wanted.function_name:
            raise HTTPException(400, "functionName: name the function to remove")
        record = self.find(wanted.function_name, (wanted.namespace, request.query_params.get("namespace")))
        if not await self._deployments.remove(record.name):
            raise unknown(wanted.function_name)
        return accepted()


def unknown(name: str) -> HTTPException:
    return HTTPException(404, f"there is no function {name[:200]!r}: deploy it, or list them with GET {FUNCTIONS}")


def _resources(given: object) -> Resources | None:
    return None if given is None else msgspec.convert(given, Resources)


def _limits(record: FunctionRecord) -> Resources | None:
    """As given, and the GPU a GPU function has."""
    limits = _resources(record.client.limits)
    if record.options.kind is FunctionKind.GPU and (limits is None or limits.nvidia_gpu is None):
        return msgspec.structs.replace(limits or Resources(), nvidia_gpu="1")
    return limits


def _outcome(record: FunctionRecord, details: FunctionDetails) -> dict[str, str]:
    if record.options.kind is not FunctionKind.GPU:
        return {}
    memory = details.measured_memory_bytes or details.gpu_memory_bytes
    outcome = {
        GPU: ", ".join(details.gpus) or "none now",
        GPU_MEMORY: format_bytes(memory) if memory else "not measured yet",
    }
    if record.client.gpu_request is not None:
        outcome[GPU_REQUEST] = record.client.gpu_request
    return outcome
