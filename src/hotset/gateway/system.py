"""Everything but the calls: ``/system/*`` in OpenFaaS's shapes where it has one, ``/healthz`` and ``/metrics``.

Handlers stand in one file per concern (openfaas/, keys.py); here are bundles, images, looking inside, and the table of
all routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from hotset.gateway import readings
from hotset.gateway.auth import ApiKeys
from hotset.gateway.control import Control
from hotset.gateway.dashboard import Dashboard
from hotset.gateway.deployments import Deployments
from hotset.gateway.keys import KeysApi
from hotset.gateway.logbook import LogLine
from hotset.gateway.metrics import CallersCollector, HotsetCollector, exposition
from hotset.gateway.openapi import document
from hotset.gateway.openfaas.asynchronous import AsyncApi
from hotset.gateway.openfaas.calls import CALLS
from hotset.gateway.openfaas.functions import FunctionsApi
from hotset.gateway.openfaas.images import NAME_PATTERN
from hotset.gateway.openfaas.info import InfoApi, Role, Telemetry
from hotset.gateway.openfaas.metrics import FunctionGauges, GatewayCollector, HttpCollector, QueueCollector
from hotset.gateway.openfaas.namespaces import Namespaces
from hotset.gateway.openfaas.naming import name_of
from hotset.gateway.openfaas.prometheus import QueryApi
from hotset.gateway.openfaas.scaling import Replicas, ScalingApi
from hotset.gateway.openfaas.secrets import SecretsApi
from hotset.gateway.openfaas.types import LogEntry
from hotset.gateway.operations import ACCEPTED, NAMESPACE, Answer, Operation, Parameter, name_parameter, routes
from hotset.gateway.provider_metrics import ProviderMetrics
from hotset.gateway.state import ExplanationReport, State, explain, state_of, trace, trace_header
from hotset.gateway.statuses import error_body
from hotset.gateway.usage import Used, used
from hotset.gateway.web import (
    ERROR_HANDLERS,
    JSON,
    NDJSON,
    accepted,
    json_response,
    read_flag,
    read_json,
    read_time,
    read_whole,
    rfc3339,
)
from hotset.store.datastore import BundleRecord, FunctionRecord, ImageRecord
from hotset.store.secrets import Secrets

_DIGEST = name_parameter("SHA-256 of its content.", "digest", "^[0-9a-f]{64}$")
_IMAGE = name_parameter("REPOSITORY[:TAG].", "name", NAME_PATTERN)


class ImageRequest(msgspec.Struct, frozen=True, kw_only=True):
    digest: Annotated[str, msgspec.Meta(extra_json_schema={"pattern": "^[0-9a-f]{64}$"})]
    """Of a bundle that is here."""


class Health(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    status: str
    losses: list[str] = []
    """What no longer works although the server does: a sentence on each lost GPU."""


class SystemApi:
    """The parts put together; ``application()`` is the Starlette application around them."""

    def __init__(
        self,
        control: Control,
        deployments: Deployments,
        *,
        secrets: Secrets | None = None,
        asynchronous: AsyncApi | None = None,
        keys: ApiKeys | None = None,
        role: Role = Role.AUTO,
        described: Sequence[Operation] = (),
    ) -> None:
        """``described``: operations that are served elsewhere and belong in the OpenAPI document too.

        Without ``secrets`` or ``asynchronous`` their routes are absent.
        """
        self._control = control
        self._deployments = deployments
        self._asynchronous = asynchronous
        self.namespaces = Namespaces(deployments.store, lambda: list(deployments.records))
        self.replicas = Replicas(control, deployments.records)
        self._functions = FunctionsApi(control, deployments, self.namespaces, self.replicas)
        self._requests = ProviderMetrics()
        find = self._functions.find
        self.operations: list[Operation] = [
            *self._functions.operations(),
            *ScalingApi(self.replicas, find).operations(),
            *(SecretsApi(secrets, self.namespaces).operations() if secrets is not None else ()),
            *self.namespaces.operations(),
            *(asynchronous.operations() if asynchronous is not None else ()),
            *KeysApi(deployments.store, keys if keys is not None else ApiKeys(), find).operations(),
            *InfoApi(self._telemetry, role).operations(),
            *QueryApi(self._counts).operations(),
            *Dashboard().operations(),
            *self._own(),
        ]
        self._document: bytes | None = None
        self._described = [*self.operations, *CALLS, *described]

    def application(self) -> Any:
        """ASGI, with the provider's request metrics around it."""
        application = Starlette(routes=routes(self.operations), exception_handlers=ERROR_HANDLERS)
        return self._requests.around(self._functions.around(application))

    def _own(self) -> list[Operation]:
        return [
            Operation(
                method="GET",
                path="/system/bundles/{digest}",
                handler=self.has_bundle,
                summary="Whether a bundle is here",
                tag="bundles",
                parameters=(_DIGEST,),
                answers={200: Answer(text="It is.", media=None)},
            ),
            Operation(
                method="PUT",
                path="/system/bundles/{digest}",
                handler=self.upload,
                summary="Send a bundle, a zip file",
                tag="bundles",
                parameters=(_DIGEST,),
                raw_body="application/octet-stream",
                answers={201: Answer(text="It is here.", kind=BundleRecord)},
            ),
            Operation(
                method="GET",
                path="/system/images",
                handler=self.images,
                summary="All image names",
                tag="bundles",
                answers={200: Answer(text="Names and what they mean.", kind=list[ImageRecord])},
            ),
            Operation(
                method="PUT",
                path="/system/images/{name:path}",
                handler=self.name_image,
                summary="Give a bundle an image name",
                tag="bundles",
                parameters=(_IMAGE,),
                body=ImageRequest,
                answers={201: Answer(text="It has the name.", kind=ImageRecord)},
            ),
            Operation(
                method="DELETE",
                path="/system/images/{name:path}",
                handler=self.forget_image,
                summary="Forget an image name; functions made from it stay",
                tag="bundles",
                parameters=(_IMAGE,),
                answers=ACCEPTED,
            ),
            Operation(
                method="GET",
                path="/system/explain/{call_id}",
                handler=self.explain,
                summary="Why a call went where it went",
                tag="inside",
                parameters=(name_parameter("Its X-Call-Id.", "call_id"),),
                answers={200: Answer(text="What was decided.", kind=ExplanationReport)},
            ),
            Operation(
                method="GET",
                path="/system/state",
                handler=self.state,
                summary="GPUs, what is in their memory, functions, queues",
                tag="inside",
                parameters=(Parameter(name="processes", text="true: with each process's real memory."),),
                answers={200: Answer(text="As of now.", kind=State)},
            ),
            Operation(
                method="GET",
                path="/system/trace",
                handler=self.trace,
                summary="The newest calls as a trace",
                tag="inside",
                answers={200: Answer(text="A header, then one call a line.", media=NDJSON)},
            ),
            Operation(
                method="GET",
                path="/system/logs",
                handler=self.logs,
                summary="What a function printed",
                tag="inside",
                parameters=(
                    Parameter(name="name", text="The function.", required=True),
                    NAMESPACE,
                    Parameter(name="tail", text="The newest so many lines; -1: all.", schema={"type": "integer"}),
                    Parameter(name="since", text="Only later ones.", schema={"type": "string", "format": "date-time"}),
                    Parameter(name="follow", text="true: go on as they come.", schema={"enum": ["true", "false"]}),
                    Parameter(name="instance", text="Only of this version."),
                ),
                answers={200: Answer(text="One line a line.", kind=LogEntry, media=NDJSON)},
            ),
            *(
                Operation(
                    method=method,
                    path="/healthz",
                    handler=self.health,
                    summary="Whether the server can serve",
                    tag="server",
                    answers={200: Answer(text="It can.", kind=Health if method == "GET" else None)},
                    protected=False,
                )
                for method in ("GET", "HEAD")
            ),
            Operation(
                method="GET",
                path="/metrics",
                handler=self.metrics,
                summary="Prometheus metrics",
                tag="metrics",
                answers={200: Answer(text="In Prometheus' text format.", media="text/plain")},
                protected=False,
            ),
            Operation(
                method="GET",
                path="/openapi.json",
                handler=self.openapi,
                summary="This document",
                tag="server",
                protected=False,
            ),
        ]

    # Bundles and images

    async def has_bundle(self, request: Request) -> Response:
        if request.path_params["digest"] not in self._deployments.bundles:
            raise _no_bundle()
        return Response(status_code=200)

    async def upload(self, request: Request) -> Response:
        record = await self._deployments.receive(request.path_params["digest"], request.stream())
        return json_response(record, status=201)

    async def images(self, request: Request) -> Response:
        return json_response(self._deployments.images.listed())

    async def name_image(self, request: Request) -> Response:
        wanted = await read_json(request, ImageRequest)
        if wanted.digest not in self._deployments.bundles:
            raise _no_bundle()
        bundle = self._deployments.bundle(wanted.digest)
        image = await asyncio.to_thread(self._deployments.images.push, request.path_params["name"], bundle)
        return json_response(image, status=201)

    async def forget_image(self, request: Request) -> Response:
        name = request.path_params["name"]
        if not await asyncio.to_thread(self._deployments.images.remove, name):
            raise HTTPException(404, f"there is no image {name[:200]!r}: list them with GET /system/images")
        return accepted()

    # What happens

    async def explain(self, request: Request) -> Response:
        call_id = request.path_params["call_id"]
        report = explain(self._control, call_id)
        if report is None:
            raise HTTPException(404, f"nothing is known of the call {call_id!r}: it is too old, or not this server's")
        return json_response(report)

    async def state(self, request: Request) -> Response:
        with_processes = read_flag(request.query_params.get("processes", "false"))
        processes = await asyncio.to_thread(readings.processes, self._control) if with_processes else None
        return json_response(state_of(self._control, processes))

    async def trace(self, request: Request) -> Response:
        control = self._control
        pieces = trace(list(control.records), trace_header(control), control.started_s)
        return StreamingResponse(iterate_in_threadpool(pieces), media_type=NDJSON)

    async def logs(self, request: Request) -> Response:
        query = request.query_params
        name = self._functions.find(query.get("name", ""), (query.get("namespace"),)).name
        most = read_whole(query.get("tail", "-1"), "tail")
        since = query.get("since")
        since_s = 0.0 if not since else read_time(since, "since")
        instance = query.get("instance") or None
        logbook = self._control.logbook
        kept = most if most > 0 else None
        if not read_flag(query.get("follow", "false")):
            tail = logbook.tail(name, kept, since_s)
            return Response(b"".join(_log_line(line) for line in tail if _is_of(line, instance)), media_type=NDJSON)

        async def lines() -> AsyncIterator[bytes]:
            async for line in logbook.follow(name, kept, since_s):
                if _is_of(line, instance):
                    yield _log_line(line)

        return StreamingResponse(lines(), media_type=NDJSON)

    async def health(self, request: Request) -> Response:
        wrong = readings.problem(self._control)
        if wrong is not None:
            return Response(error_body(wrong), status_code=503, media_type=JSON)
        return json_response(Health(status="ok", losses=readings.losses(self._control)))

    async def metrics(self, request: Request) -> Response:
        control = self._control
        functions = list(control.functions.metrics())
        uses = await asyncio.to_thread(used, readings.pids(control))
        gauges = [self._gauges(record, uses) for record in self._deployments.records.values()]
        body, content_type = exposition(
            HotsetCollector(
                functions,
                readings.gpu_metrics(control),
                readings.waiting(control),
                control.lost_gpus,
                readings.prefetches(control),
                hosts=readings.hosts(control),
                thrashing=readings.thrashing(control) is not None,
            ),
            CallersCollector(control.scheduler.cluster.queues.usage),
            GatewayCollector(functions, gauges),
            HttpCollector(self._requests, functions, gauges),
            self._requests,
            *([QueueCollector(self._asynchronous.queue)] if self._asynchronous is not None else ()),
        )
        return Response(body, headers={"content-type": content_type})

    def _gauges(self, record: FunctionRecord, uses: Mapping[str, Used]) -> FunctionGauges:
        version, name = self._control.functions.current.get(record.name), name_of(record.name)
        wanted = self.replicas.wanted(record)
        return FunctionGauges(
            full_name=name.full,
            namespace=name.namespace,
            scaling=self.replicas.scaling(record),
            replicas=wanted,
            ready=wanted if version else 0,
            open_calls=version.calls if version else 0,
            used=uses.get(record.model, Used()),
        )

    async def openapi(self, request: Request) -> Response:
        if self._document is None:
            self._document = msgspec.json.encode(document(self._described))
        return Response(self._document, media_type=JSON)

    def _telemetry(self) -> Telemetry:
        control, gpus = self._control, self._control.scheduler.cluster.gpus.values()
        return Telemetry(
            uptime_s=control.uptime_s(),
            functions=len(self._deployments.records),
            invocations=sum(each.total for each in control.functions.metrics()),
            gpus=len(gpus),
            gpu_memory_bytes=sum(gpu.memory.capacity_bytes for gpu in gpus),
            hot_models=sum(len(gpu.memory.residents) for gpu in gpus),
        )

    def _counts(self) -> dict[str, int]:
        totals = {each.function: each.total for each in self._control.functions.metrics()}
        return {name_of(name).full: totals.get(name, 0) for name in self._deployments.records}


def _no_bundle() -> HTTPException:
    return HTTPException(404, "there is no such bundle: PUT it to /system/bundles/DIGEST")


def _is_of(line: LogLine, instance: str | None) -> bool:
    return instance is None or line.instance == instance


def _log_line(line: LogLine) -> bytes:
    name = name_of(line.name)
    entry = LogEntry(
        name=name.name,
        namespace=name.namespace,
        instance=line.instance,
        timestamp=rfc3339(line.timestamp_s),
        text=line.text.rstrip("\n"),
    )
    return msgspec.json.encode(entry) + b"\n"
