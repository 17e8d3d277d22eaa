"""Everything but the calls: ``/system/*`` in OpenFaaS's shapes where it has one, ``/healthz`` and ``/metrics``."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from hotset.errors import BundleError, ConfigurationError, FunctionError, HotsetError
from hotset.gateway.app import NAMESPACE
from hotset.gateway.control import Control
from hotset.gateway.deployments import Deployment, Deployments
from hotset.gateway.logbook import LogLine
from hotset.gateway.metrics import HotsetCollector, exposition
from hotset.gateway.readings import gpu_metrics, problem, waiting
from hotset.gateway.state import explain, state_of, trace, trace_header
from hotset.gateway.statuses import error_body
from hotset.store.datastore import FunctionRecord

NDJSON = "application/x-ndjson"
MAX_JSON_BYTES = 1 << 20
BUG = "this is a bug in hotset: please report it with what the server logged"

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
T = TypeVar("T")

log = logging.getLogger("hotset.gateway")


class FunctionStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """OpenFaaS's FunctionStatus, with hotset's own part beside it."""

    name: str
    image: str
    namespace: str = NAMESPACE
    env_vars: Mapping[str, str]
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    invocation_count: int
    replicas: int = 1
    available_replicas: int
    """1 when it takes calls; a process is started when one comes."""
    created_at: str
    """RFC 3339."""
    hotset: FunctionDetails


class FunctionDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What OpenFaaS has no field for."""

    model: str
    """``name@version``."""
    entry: str
    kind: str
    bundle: str
    requirements: tuple[str, ...]
    gpu_memory_bytes: int | None
    """As declared."""
    measured_memory_bytes: int | None
    """Most GPU memory it was seen to take since the server's start."""
    max_batch: int
    timeout_s: float
    load_timeout_s: float
    retry: bool
    gpus: list[str]
    """Where it is resident now."""
    waiting: int
    problem: str | None
    """Why it takes no calls; None: it does."""
    schema: Mapping[str, Any]


class DeleteRequest(msgspec.Struct, frozen=True, rename="camel"):
    function_name: str
    namespace: str = ""


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``/system/logs``."""

    name: str
    namespace: str = NAMESPACE
    instance: str
    timestamp: str
    text: str


class SystemApi:
    """The handlers; ``application()`` is the Starlette application around them."""

    def __init__(self, control: Control, deployments: Deployments) -> None:
        self._control = control
        self._deployments = deployments
        self._running: set[asyncio.Task[FunctionRecord]] = set()

    def application(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/system/functions", self.list_functions, methods=["GET"]),
                Route("/system/functions", self.deploy, methods=["POST", "PUT"]),
                Route("/system/functions", self.remove, methods=["DELETE"]),
                Route("/system/function/{name}", self.status, methods=["GET"]),
                Route("/system/bundles/{digest}", self.has_bundle, methods=["GET"]),
                Route("/system/bundles/{digest}", self.upload, methods=["PUT"]),
                Route("/system/explain/{call_id}", self.explain, methods=["GET"]),
                Route("/system/state", self.state, methods=["GET"]),
                Route("/system/trace", self.trace, methods=["GET"]),
                Route("/system/logs", self.logs, methods=["GET"]),
                Route("/healthz", self.health, methods=["GET"]),
                Route("/metrics", self.metrics, methods=["GET"]),
            ],
            exception_handlers={HTTPException: _http_error, HotsetError: _hotset_error, Exception: _bug},
        )

    # Functions

    async def list_functions(self, request: Request) -> Response:
        _check_namespace(request.query_params.get("namespace", ""))
        lengths = waiting(self._control)
        counts = {metrics.function: metrics.total for metrics in self._control.functions.metrics()}
        return _json([self._status(record, lengths, counts) for record in self._deployments.records.values()])

    async def status(self, request: Request) -> Response:
        _check_namespace(request.query_params.get("namespace", ""))
        record = self._record(request.path_params["name"])
        return _json(self._status_of(record))

    async def deploy(self, request: Request) -> Response:
        """Answers 202 once new calls go to the new version; with ``Accept: application/x-ndjson``, what happens until
        then as it happens: lines of ``{"progress": ...}``, then ``{"deployed": FunctionStatus}`` or ``{"error": ...}``.
        """
        wanted = _decode(await _body(request), Deployment)
        _check_namespace(wanted.namespace or request.query_params.get("namespace", ""))
        if not _NAME.fullmatch(wanted.service):
            raise HTTPException(
                400, f"service: {wanted.service!r} is no function name: use up to 63 of a-z, 0-9 and dashes"
            )
        if request.method == "PUT" and wanted.service not in self._deployments.records:
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
        return Response(status_code=202)

    async def _deploying(
        self, task: asyncio.Task[FunctionRecord], news: asyncio.Queue[str | None]
    ) -> AsyncIterator[bytes]:
        while (line := await news.get()) is not None:
            yield msgspec.json.encode({"progress": line}) + b"\n"
        try:
            record = await task
        except HotsetError as error:
            yield error_body(str(error), status=_status_of_error(error)) + b"\n"
        except Exception:
            log.exception("a deploy failed in a way nobody thought of")
            yield error_body(BUG, status=500) + b"\n"
        else:
            yield msgspec.json.encode({"deployed": self._status_of(record)}) + b"\n"

    async def remove(self, request: Request) -> Response:
        wanted = _decode(await _body(request), DeleteRequest)
        _check_namespace(wanted.namespace or request.query_params.get("namespace", ""))
        if not await self._deployments.remove(wanted.function_name):
            raise _unknown(wanted.function_name)
        return Response(status_code=202)

    def _record(self, name: str) -> FunctionRecord:
        records = self._deployments.records
        record = records.get(name) or records.get(name.removesuffix(f".{NAMESPACE}"))
        if record is None:
            raise _unknown(name)
        return record

    def _status_of(self, record: FunctionRecord) -> FunctionStatus:
        counts = {metrics.function: metrics.total for metrics in self._control.functions.metrics()}
        return self._status(record, waiting(self._control), counts)

    def _status(self, record: FunctionRecord, lengths: dict[str, int], counts: dict[str, int]) -> FunctionStatus:
        options, name = record.options, record.name
        version = self._control.functions.current.get(name)
        measured = [each.memory_bytes for each in version.learned.values() if each.memory_bytes] if version else []
        return FunctionStatus(
            name=name,
            image=record.image,
            env_vars=options.env,
            labels=record.labels,
            annotations=record.annotations,
            invocation_count=counts.get(name, 0),
            available_replicas=int(version is not None),
            created_at=_rfc3339(record.created_at_s),
            hotset=FunctionDetails(
                model=record.model,
                entry=record.entry,
                kind=options.kind.value,
                bundle=record.bundle,
                requirements=record.requirements,
                gpu_memory_bytes=options.gpu_memory_bytes,
                measured_memory_bytes=max(measured, default=None),
                max_batch=options.max_batch,
                timeout_s=options.timeout_s,
                load_timeout_s=options.load_timeout_s,
                retry=options.retry,
                gpus=list(self._control.scheduler.cache.holders(record.model)),
                waiting=lengths.get(name, 0),
                problem=None if version else self._deployments.unavailable.get(name, "it is being restored"),
                schema=record.schema,
            ),
        )

    # Bundles

    async def has_bundle(self, request: Request) -> Response:
        if request.path_params["digest"] not in self._deployments.bundles:
            raise HTTPException(404, "there is no such bundle: PUT it here")
        return Response(status_code=200)

    async def upload(self, request: Request) -> Response:
        record = await self._deployments.receive(request.path_params["digest"], request.stream())
        return _json(record, status=201)

    # What happens

    async def explain(self, request: Request) -> Response:
        call_id = request.path_params["call_id"]
        report = explain(self._control, call_id)
        if report is None:
            raise HTTPException(404, f"nothing is known of the call {call_id!r}: it is too old, or not this server's")
        return _json(report)

    async def state(self, request: Request) -> Response:
        with_processes = _flag(request.query_params.get("processes", "false"))
        return _json(state_of(self._control, processes=with_processes))

    async def trace(self, request: Request) -> Response:
        control = self._control
        pieces = trace(list(control.records), trace_header(control), control.started_s)
        return StreamingResponse(iterate_in_threadpool(pieces), media_type=NDJSON)

    async def logs(self, request: Request) -> Response:
        query = request.query_params
        _check_namespace(query.get("namespace", ""))
        name = self._record(query.get("name", "")).name
        most = _whole(query.get("tail", "-1"), "tail")
        since = query.get("since")
        since_s = 0.0 if not since else _unix_time(since)
        follow = _flag(query.get("follow", "false"))
        logbook = self._control.logbook
        kept = most if most > 0 else None
        if not follow:
            return Response(b"".join(map(_log_line, logbook.tail(name, kept, since_s))), media_type=NDJSON)

        async def lines() -> AsyncIterator[bytes]:
            async for line in logbook.follow(name, kept, since_s):
                yield _log_line(line)

        return StreamingResponse(lines(), media_type=NDJSON)

    async def health(self, request: Request) -> Response:
        wrong = problem(self._control)
        if wrong is not None:
            return Response(error_body(wrong), status_code=503, media_type="application/json")
        return _json({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        control = self._control
        collector = HotsetCollector(list(control.functions.metrics()), gpu_metrics(control), waiting(control))
        body, content_type = exposition(collector)
        return Response(body, headers={"content-type": content_type})


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Response(
        error_body(error.detail), status_code=error.status_code, headers=error.headers, media_type="application/json"
    )


async def _hotset_error(_: Request, error: Exception) -> Response:
    return Response(error_body(str(error)), status_code=_status_of_error(error), media_type="application/json")


async def _bug(_: Request, __: Exception) -> Response:
    return Response(error_body(BUG), status_code=500, media_type="application/json")


def _status_of_error(error: Exception) -> int:
    return 400 if isinstance(error, BundleError | ConfigurationError | FunctionError) else 500


def _unknown(name: str) -> HTTPException:
    return HTTPException(404, f"there is no function {name!r}: deploy it, or list them with GET /system/functions")


def _check_namespace(namespace: str) -> None:
    if namespace not in ("", NAMESPACE):
        raise HTTPException(400, f"there is no namespace {namespace!r}: leave it out, or use {NAMESPACE}")


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_JSON_BYTES:
            raise HTTPException(413, f"the body is larger than {MAX_JSON_BYTES} bytes", {"connection": "close"})
    return bytes(body)


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise HTTPException(400, f"{error}") from None
    except msgspec.DecodeError as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None


def _flag(value: str) -> bool:
    return value.lower() in ("1", "true")


def _whole(value: str, name: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise HTTPException(422, f"{name} must be a whole number, not {value!r}") from None


def _unix_time(value: str) -> float:
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise HTTPException(422, f"since must be a time such as 2030-01-31T12:00:00Z, not {value!r}") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _rfc3339(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat()


def _log_line(line: LogLine) -> bytes:
    entry = LogEntry(name=line.name, instance=line.instance, timestamp=_rfc3339(line.timestamp_s), text=line.text)
    return msgspec.json.encode(entry) + b"\n"
