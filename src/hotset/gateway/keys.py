"""``/system/keys``: keys that calls of a function must show. A key is told once, when it is made."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable
from typing import Annotated

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from hotset.gateway.auth import ApiKeys, key_digest
from hotset.gateway.operations import ACCEPTED, Answer, Operation, name_parameter
from hotset.gateway.web import accepted, json_response, read_json, rfc3339
from hotset.store.datastore import ApiKeyRecord, Datastore, FunctionRecord
from hotset.vocabulary import HIGHEST_PRIORITY, LOWEST_PRIORITY, NORMAL_PRIORITY

PATH = "/system/keys"
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?")


class KeyRequest(msgspec.Struct, frozen=True, kw_only=True):
    function: str
    name: str | None = None
    """To tell it from others; None: one is made up."""
    weight: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1.0
    """Of its caller's share of the GPUs' time."""
    priority: Annotated[int, msgspec.Meta(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY)] = NORMAL_PRIORITY
    """Of calls that show it, and the most that they may ask for."""


class NewKey(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    function: str
    key: str
    """Shown this once."""


class KeyStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    function: str
    weight: float
    priority: int
    created_at: str
    """RFC 3339."""


class KeysApi:
    def __init__(self, store: Datastore, keys: ApiKeys, find: Callable[[str], FunctionRecord]) -> None:
        """``find``: a function by its name; raises a 404."""
        self._store = store
        self._keys = keys
        self._find = find

    def operations(self) -> list[Operation]:
        return [
            Operation(
                method="GET",
                path=PATH,
                handler=self.listed,
                summary="All keys, without the keys themselves",
                tag="keys",
                answers={200: Answer(text="Names and functions.", kind=list[KeyStatus])},
            ),
            Operation(
                method="POST",
                path=PATH,
                handler=self.make,
                summary="Make a key; from the first one on, the function answers only who shows one",
                tag="keys",
                body=KeyRequest,
                answers={201: Answer(text="The key, this once.", kind=NewKey)},
            ),
            Operation(
                method="DELETE",
                path=f"{PATH}/{{name}}",
                handler=self.remove,
                summary="Take a key back",
                tag="keys",
                parameters=(name_parameter("The key's name."),),
                answers=ACCEPTED,
            ),
        ]

    async def listed(self, request: Request) -> Response:
        records = await asyncio.to_thread(self._store.named, ApiKeyRecord)
        return json_response(
            [
                KeyStatus(
                    name=record.name,
                    function=record.function,
                    weight=record.weight,
                    priority=record.priority,
                    created_at=rfc3339(record.created_at_s),
                )
                for record in records
            ]
        )

    async def make(self, request: Request) -> Response:
        wanted = await read_json(request, KeyRequest)
        function = self._find(wanted.function).name
        name = wanted.name or f"{function}-{secrets.token_hex(4)}"
        if not _NAME.fullmatch(name):
            raise HTTPException(400, f"name: {name[:80]!r} is no key name: use up to 63 of a-z, 0-9, dots and dashes")
        if any(record.name == name for record in await asyncio.to_thread(self._store.named, ApiKeyRecord)):
            raise HTTPException(409, f"there is a key {name!r} already: take it back first, or choose another name")
        key = f"hs_{secrets.token_urlsafe(32)}"
        record = ApiKeyRecord(
            name=name,
            function=function,
            digest=key_digest(key.encode()),
            created_at_s=time.time(),
            weight=wanted.weight,
            priority=wanted.priority,
        )
        await asyncio.to_thread(self._store.save_named, record)
        self._keys.add(record)
        return json_response(NewKey(name=name, function=function, key=key), 201)

    async def remove(self, request: Request) -> Response:
        name = request.path_params["name"]
        records = await asyncio.to_thread(self._store.named, ApiKeyRecord)
        record = next((each for each in records if each.name == name), None)
        if record is None:
            raise HTTPException(404, f"there is no key {name[:80]!r}: list them with GET {PATH}")
        await asyncio.to_thread(self._store.remove_named, ApiKeyRecord, name)
        self._keys.remove(record)
        return accepted()
