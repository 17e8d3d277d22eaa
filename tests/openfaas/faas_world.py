"""What these tests share: the whole HTTP side in-process, over a fake node and a real pool for CPU functions.

A request is made as a client would make it; bodies may come in pieces, as an OpenFaaS gateway forwards all of them.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import httpx

from hotset.functions.http_envelope import RESPONSE, ResponseHead, pack, unpack_request
from hotset.gateway.app import Gateway
from hotset.gateway.auth import ApiKeys, Guard
from hotset.gateway.control import Control
from hotset.gateway.deployments import Deployments
from hotset.gateway.openfaas.service import AccessConfig, system_front
from hotset.node.cpu import CpuPool
from hotset.node.fake import FakeFunction, FakeNode, virtual_gpus
from hotset.node.interface import Answer, Call
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.store.bundles import Bundles, make_bundle
from hotset.store.environments import Environments
from hotset.store.secrets import Secrets
from hotset.store.sqlite import SqliteDatastore

MIB = 1 << 20
ALPINE = "functions/alpine:latest"
ON_GPU = {"annotations": {"hotset.gpu-memory": "100MiB"}}
T = TypeVar("T")


def echo(call: Call) -> list[Answer]:
    """A process function on the fake node: the body back."""
    head, body = unpack_request(call.body)
    answer = pack(ResponseHead([("content-type", "text/plain"), ("x-path", head.path)]), body)
    return [Answer(request_id=call.request_id, content_type=RESPONSE, body=answer)]


class Faas:
    """A server. ``async with Faas(data) as faas``; the same ``data`` again is the same server, started anew."""

    def __init__(
        self, data: Path, *, gpus: int = 1, callbacks: Callable[[httpx.Request], httpx.Response] | None = None, **access
    ) -> None:
        self.data = data
        self.node = FakeNode(virtual_gpus(gpus, memory_bytes=320 * MIB))
        self.node.default = FakeFunction(load_s=0.0, inference_s=0.0, respond=echo)
        scheduler = Scheduler(make_policy("lalb_o3"), make_eviction("lru"), SchedulerConfig(journal_capacity=100))
        self.control = Control(scheduler, [self.node], cpu=CpuPool())
        self.access = AccessConfig(**access)
        self.calls_back = callbacks
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Faas:
        self.store = SqliteDatastore(self.data)
        self.secrets = Secrets(self.data / "secrets", self.access.secrets_path)
        self.deployments = Deployments(
            self.control,
            self.store,
            Bundles(self.data / "bundles"),
            Environments(self.data / "environments"),
            secrets=self.secrets,
            profiles=self.access.profiles,
            allow_local_images=self.access.allow_local_images,
        )
        await self.control.start()
        self._stack.push_async_callback(self.deployments.close)
        self._stack.push_async_callback(self.control.stop)
        await self.deployments.restore()
        keys = ApiKeys()
        front = system_front(
            self.control, self.deployments, self.secrets, keys, self.access, self.data, self._transport()
        )
        self.front = await self._stack.enter_async_context(front)
        gateway = Gateway(self.control, self.front.application)
        application: Any = Guard(gateway, self.access.credentials, keys)
        transport = httpx.ASGITransport(application)
        client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080", timeout=20)
        self.http = await self._stack.enter_async_context(client)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _transport(self) -> httpx.AsyncBaseTransport | None:
        return None if self.calls_back is None else httpx.MockTransport(self.calls_back)

    def queued(self) -> int:
        """Asynchronous calls that have not ended."""
        return self.front.queue.length

    async def get(self, path: str, **query: str) -> httpx.Response:
        return await self.http.get(path, params=query)

    async def send(self, method: str, path: str, value: object = None, **headers: str) -> httpx.Response:
        """A JSON request, as faas-cli sends it."""
        return await self.http.request(method, path, json=value, headers=headers)

    async def forwarded(self, method: str, path: str, body: bytes) -> httpx.Response:
        """A request as an OpenFaaS gateway passes it on: in chunks, without a length."""

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(body), 7):
                yield body[start : start + 7]

        headers = {"x-forwarded-for": "127.0.0.1:51234", "x-forwarded-host": "127.0.0.1:8080"}
        return await self.http.request(method, path, content=pieces(), headers=headers)

    async def push(self, image: str = ALPINE, files: dict[str, str] | None = None) -> str:
        """Push an image; its digest."""
        folder = self.data / "source"
        folder.mkdir(exist_ok=True)
        for name, text in (files or {"README": "an image without code"}).items():
            (folder / name).write_text(text)
        archive = io.BytesIO()
        bundle = make_bundle(folder, archive)
        (await self.http.put(f"/system/bundles/{bundle.digest}", content=archive.getvalue())).raise_for_status()
        named = await self.send("PUT", f"/system/images/{image}", {"digest": bundle.digest})
        assert named.status_code == 201, named.text
        return bundle.digest

    async def deploy(self, name: str = "env", command: str = "env", method: str = "POST", **more) -> httpx.Response:
        """Deploy a process function from the pushed image, with the fields faas-cli always sends."""
        body = {"service": name, "image": ALPINE, "envProcess": command, "labels": {}, "annotations": {}, **more}
        return await self.send(method, "/system/functions", body)

    async def status(self, name: str) -> dict[str, Any]:
        reply = await self.get(f"/system/function/{name}")
        assert reply.status_code == 200, reply.text
        return reply.json()


def run(story: Callable[[], Awaitable[T]]) -> T:
    """Run one test's story; a hang is a failure, not a wait."""
    return asyncio.run(asyncio.wait_for(story(), 60))


def serving(story: Callable[[Faas], Awaitable[None]], data: Path, **how: Any) -> None:
    """Run a story against a server with one image pushed."""

    async def whole() -> None:
        async with Faas(data, **how) as faas:
            await faas.push()
            await story(faas)

    run(whole)


async def until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    """Let the loop run until something is so."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.002)
