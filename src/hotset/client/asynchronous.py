"""The asyncio client: as the blocking one, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec

from hotset.client.messages import (
    InferenceError,
    InferResult,
    ModelMetadata,
    ModelStatus,
    Request,
    index_request,
    infer_request,
    load_request,
    metadata_request,
    read_error,
    read_result,
    ready_request,
)
from hotset.client.retries import Retries

DEFAULT_URL = "http://127.0.0.1:8080"


class AsyncClient:
    """A connection pool to one server, for one event loop."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout_s: float = 600.0,
        retries: Retries | None = None,
        key: str | None = None,
        auth: tuple[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """``timeout_s``: longest wait for one answer. ``key``: shown to functions that ask for one. ``auth``: user and
        password, for ``models``, ``load`` and ``unload`` where the server asks. ``transport``: httpx's, for tests."""
        self._http = httpx.AsyncClient(
            base_url=url.rstrip("/"),
            timeout=httpx.Timeout(timeout_s, connect=10.0),
            headers={} if key is None else {"X-Api-Key": key},
            auth=auth,
            transport=transport,
        )
        self._retries = retries or Retries()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        version: str = "",
        outputs: Sequence[str] | None = None,
        parameters: Mapping[str, bool | int | float | str] | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> InferResult:
        """Run a model. ``inputs``: name to numpy array, torch tensor, number, text, or lists of these.

        ``outputs``: the names wanted; None: all. ``timeout_s``: what the server gives the call, waiting included.
        Raises ``InferenceError``, with the server's sentence and status.
        """
        request = infer_request(
            model,
            inputs,
            version=version,
            outputs=outputs,
            parameters=parameters,
            request_id=request_id,
            timeout_s=timeout_s,
        )
        response = await self._send(request)
        return read_result(response.headers, response.content)

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """The inputs and outputs of a model."""
        response = await self._send(metadata_request(model, version))
        return msgspec.json.decode(response.content, type=ModelMetadata)

    async def models(self) -> list[ModelStatus]:
        """Every model of the server, whether it takes calls or not."""
        response = await self._send(index_request())
        return msgspec.json.decode(response.content, type=list[ModelStatus])

    async def ready(self, model: str = "", version: str = "") -> bool:
        """Whether the server, or a model, takes calls; one that is not in GPU memory does."""
        try:
            await self._send(ready_request(model, version), attempts=1)
        except InferenceError as error:
            if error.status == 0:
                raise
            return False
        return True

    async def load(self, model: str) -> None:
        """Put a model in service and in GPU memory; returns when it is there."""
        await self._send(load_request(model, "load"))

    async def unload(self, model: str) -> None:
        """Evict a model and refuse its calls until ``load``."""
        await self._send(load_request(model, "unload"))

    async def _send(self, request: Request, attempts: int | None = None) -> httpx.Response:
        """The successful response; tries again where that makes sense, else raises ``InferenceError``."""
        attempt = 0
        while True:
            attempt += 1
            response = await self._send_once(request)
            if not response.is_error:
                return response
            error = read_error(response.status_code, response.content)
            wait_s = self._retries.wait_s(attempt, error, response.headers.get("retry-after"))
            if wait_s is None or attempt == attempts:
                raise error
            await asyncio.sleep(wait_s)

    async def _send_once(self, request: Request) -> httpx.Response:
        try:
            return await self._http.request(
                request.method,
                request.path,
                headers=request.headers,
                content=request.body,
            )
        except httpx.TimeoutException:
            raise InferenceError(0, f"{self._http.base_url} did not answer in time: see the server's log") from None
        except httpx.TransportError as error:
            raise InferenceError(
                0, f"no answer from {self._http.base_url} ({error}): start a server with `hotset serve`"
            ) from None
