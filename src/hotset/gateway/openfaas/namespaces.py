"""``/system/namespaces`` and ``/system/namespace/NAME``: the default namespace, and those that were made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from hotset.gateway.openfaas.naming import DEFAULT_NAMESPACE, Name, check_namespace_name, name_of, read_name
from hotset.gateway.openfaas.types import FunctionNamespace, NewNamespace
from hotset.gateway.operations import ACCEPTED, Answer, Operation, name_parameter
from hotset.gateway.web import accepted, json_response, read_json
from hotset.store.datastore import Datastore, NamespaceRecord

PATH = "/system/namespace/{name}"
_NAME = name_parameter("The namespace.")


class Namespaces:
    """Which namespaces there are. ``in_use`` yields the keys of all functions."""

    def __init__(self, store: Datastore, in_use: Callable[[], list[str]]) -> None:
        self._store = store
        self._in_use = in_use
        self._made = {record.name: record for record in store.named(NamespaceRecord)}

    def __contains__(self, namespace: str) -> bool:
        return namespace == DEFAULT_NAMESPACE or namespace in self._made

    def check(self, namespace: str | None, refusal: int = 400) -> str:
        """The namespace that is meant; ``refusal``: status where there is none of that name."""
        if not namespace:
            return DEFAULT_NAMESPACE
        if namespace not in self:
            message = f"there is no namespace {namespace[:80]!r}: make it, or use {DEFAULT_NAMESPACE}"
            raise HTTPException(refusal, message)
        return namespace

    def function(self, name: str, *given: str | None) -> Name:
        """The function that is meant; ``given``: namespaces beside the name, the first that says something counts."""
        apart = next((each for each in given if each), None)
        return read_name(name, apart)

    def operations(self) -> list[Operation]:
        return [
            Operation(
                method="GET",
                path="/system/namespaces",
                handler=self.listed,
                summary="Names of all namespaces",
                tag="namespaces",
                answers={200: Answer(text="Their names.", kind=list[str])},
            ),
            *(
                Operation(
                    method="POST",
                    path=path,
                    handler=self.make,
                    summary="Make a namespace; its name is in the body",
                    tag="namespaces",
                    body=NewNamespace,
                    answers={201: Answer(text="It is there.", media=None)},
                )
                for path in ("/system/namespace/", "/system/namespace")
            ),
            Operation(
                method="GET",
                path=PATH,
                handler=self.show,
                summary="One namespace",
                tag="namespaces",
                parameters=(_NAME,),
                answers={200: Answer(text="Its labels and annotations.", kind=FunctionNamespace)},
            ),
            Operation(
                method="PUT",
                path=PATH,
                handler=self.change,
                summary="Change a namespace's labels and annotations",
                tag="namespaces",
                parameters=(_NAME,),
                body=FunctionNamespace,
                answers=ACCEPTED,
            ),
            Operation(
                method="DELETE",
                path=PATH,
                handler=self.remove,
                summary="Remove an empty namespace",
                tag="namespaces",
                parameters=(_NAME,),
                answers=ACCEPTED,
            ),
        ]

    async def listed(self, request: Request) -> Response:
        return json_response([DEFAULT_NAMESPACE, *sorted(self._made)])

    async def make(self, request: Request) -> Response:
        wanted = await read_json(request, NewNamespace)
        name = check_namespace_name(wanted.name)
        if name in self:
            raise HTTPException(409, f"there is a namespace {name!r} already")
        await self._save(name, wanted)
        return Response(status_code=201)

    async def show(self, request: Request) -> Response:
        record = self._record(request.path_params["name"])
        shown = FunctionNamespace(name=record.name, labels=record.labels, annotations=record.annotations)
        return json_response(shown)

    async def change(self, request: Request) -> Response:
        name = request.path_params["name"]
        wanted = await read_json(request, FunctionNamespace)
        if name == DEFAULT_NAMESPACE:
            raise HTTPException(409, f"{DEFAULT_NAMESPACE} is always there and has no labels: make another namespace")
        self._record(name)
        await self._save(name, wanted)
        return accepted()

    async def remove(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name == DEFAULT_NAMESPACE:
            raise HTTPException(409, f"{DEFAULT_NAMESPACE} is always there: remove its functions instead")
        self._record(name)
        if any(name_of(key).namespace == name for key in self._in_use()):
            raise HTTPException(409, f"the namespace {name!r} has functions: remove them first")
        self._made.pop(name, None)
        await asyncio.to_thread(self._store.remove_named, NamespaceRecord, name)
        return accepted()

    def _record(self, name: str) -> NamespaceRecord:
        if name == DEFAULT_NAMESPACE:
            return NamespaceRecord(name=name)
        record = self._made.get(name)
        if record is None:
            raise HTTPException(404, f"there is no namespace {name[:80]!r}: make it with POST /system/namespace/")
        return record

    async def _save(self, name: str, wanted: FunctionNamespace) -> None:
        record = NamespaceRecord(name=name, labels=wanted.labels or {}, annotations=wanted.annotations or {})
        self._made[name] = record
        await asyncio.to_thread(self._store.save_named, record)
