"""``/system/secrets``: values go in and never come out again, but as files of the functions that were given them."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from hotset.gateway.openfaas.namespaces import Namespaces
from hotset.gateway.openfaas.naming import check_secret_name
from hotset.gateway.openfaas.types import Secret, SecretName
from hotset.gateway.operations import ACCEPTED, NAMESPACE, Answer, Operation
from hotset.gateway.web import accepted, json_response, read_json
from hotset.store.secrets import MAX_SECRET_BYTES, Secrets

PATH = "/system/secrets"
_MOST_BYTES = 4 * MAX_SECRET_BYTES
"""Of the JSON around one: base64, and the value twice."""


class SecretsApi:
    def __init__(self, secrets: Secrets, namespaces: Namespaces) -> None:
        self._secrets = secrets
        self._namespaces = namespaces

    def operations(self) -> list[Operation]:
        return [
            Operation(
                method="GET",
                path=PATH,
                handler=self.listed,
                summary="Names of the secrets",
                tag="secrets",
                parameters=(NAMESPACE,),
                answers={200: Answer(text="Their names; never a value.", kind=list[SecretName])},
            ),
            Operation(
                method="POST",
                path=PATH,
                handler=self.make,
                summary="Make a secret",
                tag="secrets",
                parameters=(NAMESPACE,),
                body=Secret,
                answers={201: Answer(text="It is kept.", media=None)},
            ),
            Operation(
                method="PUT",
                path=PATH,
                handler=self.change,
                summary="Give a secret another value",
                tag="secrets",
                parameters=(NAMESPACE,),
                body=Secret,
                answers=ACCEPTED,
            ),
            Operation(
                method="DELETE",
                path=PATH,
                handler=self.remove,
                summary="Remove a secret",
                tag="secrets",
                parameters=(NAMESPACE,),
                body=Secret,
                answers=ACCEPTED,
            ),
        ]

    async def listed(self, request: Request) -> Response:
        namespace = self._namespaces.check(request.query_params.get("namespace"), 404)
        names = await asyncio.to_thread(self._secrets.names, namespace)
        return json_response([SecretName(name=name, namespace=namespace) for name in names])

    async def make(self, request: Request) -> Response:
        secret, namespace = await self._read(request)
        if self._secrets.exists(namespace, secret.name):
            raise HTTPException(409, f"there is a secret {secret.name!r} already: PUT changes it")
        await self._save(secret, namespace)
        return Response(status_code=201)

    async def change(self, request: Request) -> Response:
        secret, namespace = await self._read(request)
        if not self._secrets.exists(namespace, secret.name):
            raise _unknown(secret.name)
        await self._save(secret, namespace)
        return accepted()

    async def remove(self, request: Request) -> Response:
        secret, namespace = await self._read(request)
        if not await asyncio.to_thread(self._secrets.remove, namespace, secret.name):
            raise _unknown(secret.name)
        return accepted()

    async def _read(self, request: Request) -> tuple[Secret, str]:
        secret = await read_json(request, Secret, _MOST_BYTES)
        check_secret_name(secret.name)
        return secret, self._namespaces.check(secret.namespace or request.query_params.get("namespace"), 404)

    async def _save(self, secret: Secret, namespace: str) -> None:
        value = secret.raw_value if secret.raw_value is not None else (secret.value or "").encode()
        await asyncio.to_thread(self._secrets.save, namespace, secret.name, value)


def _unknown(name: str) -> HTTPException:
    return HTTPException(404, f"there is no secret {name!r}: POST makes it")
