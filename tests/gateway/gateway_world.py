"""What the gateway tests share: a control loop over the real scheduler and a fake node, with time moved by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec

from hotset.gateway.calls import PendingCall, Result
from hotset.gateway.control import Control, ControlConfig
from hotset.gateway.functions import VersionSpec
from hotset.node.cpu import CpuPool
from hotset.node.fake import FakeClock, FakeFunction, FakeNode, virtual_gpus
from hotset.node.interface import LaunchSpec
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.vocabulary import Model

GPU = "local/virtual:0"
MIB = 1 << 20
T = TypeVar("T")


def run(story: Callable[[], Awaitable[T]]) -> T:
    """Run one test's story on a loop of its own; a hang is a failure, not a wait."""
    return asyncio.run(asyncio.wait_for(story(), 30))


class HandClock(FakeClock):
    """The fake node's clock, with the hour hand the control loop reads."""

    def time(self) -> float:
        return self.now_s


def version(
    function: str,
    digest: str = "1",
    *,
    memory_bytes: int = 100 * MIB,
    max_batch: int = 1,
    patience_s: float = 30.0,
    on_cpu: bool = False,
) -> VersionSpec:
    model = f"{function}@{digest}"
    return VersionSpec(
        function=function,
        launch=LaunchSpec(
            model=model,
            entry="main:Function",
            code_path="/nowhere",
            python="python",
            memory_bytes=memory_bytes,
            max_batch=max_batch,
        ),
        scheduled=None if on_cpu else Model(name=model, memory_bytes=memory_bytes, max_batch=max_batch),
        patience_s=patience_s,
    )


class World:
    """A started control loop and all it stands on."""

    def __init__(
        self,
        *,
        gpus: int = 1,
        memory_bytes: int = 320 * MIB,
        config: SchedulerConfig | None = None,
        control: ControlConfig | None = None,
        cpu: CpuPool | None = None,
    ) -> None:
        self.clock = HandClock()
        self.node = FakeNode(virtual_gpus(gpus, memory_bytes=memory_bytes), clock=self.clock)
        scheduler = Scheduler(
            policy=make_policy("lalb_o3"),
            eviction=make_eviction("lru"),
            config=config or SchedulerConfig(journal_capacity=1000),
        )
        self.control = Control(
            scheduler, [self.node], cpu=cpu, config=control, clock=self.clock, unix_time=lambda: 1_000_000.0
        )

    async def start(self, *functions: VersionSpec) -> World:
        await self.control.start()
        for each in functions:
            self.control.deploy(each)
        return self

    def behave(self, model: str, **how: Any) -> None:
        """How a model behaves: load_s, inference_s, respond, ..."""
        self.node.functions[model] = msgspec.structs.replace(self.node.functions.get(model, FakeFunction()), **how)

    async def advance(self, seconds: float = 0.0, steps: int = 1) -> None:
        """Let time pass, in so many steps, and every task that wants to run."""
        await self._settle()
        for _ in range(steps):
            self.clock.advance(seconds / steps)
            await self._settle()

    async def _settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def finish(self, pending: PendingCall, within_s: float = 60.0) -> Result:
        """Let time pass until the call has its result."""
        for _ in range(int(within_s / 0.05)):
            if pending.future.done():
                return pending.future.result()
            await self.advance(0.05)
        raise AssertionError(f"request {pending.request_id} got no answer within {within_s} s")

    def verbs(self, *verbs: str) -> list[tuple[str, str]]:
        """What the node was asked to do, in order: (verb, model)."""
        return [(each.verb, each.model) for each in self.node.operations if not verbs or each.verb in verbs]


class Reply(msgspec.Struct):
    """What an ASGI application sent."""

    status: int = 0
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    body: bytes = b""
    chunks: list[bytes] = msgspec.field(default_factory=list)
    complete: bool = False

    @property
    def error(self) -> str:
        return str(msgspec.json.decode(self.body)["error"])


class Client:
    """Raw ASGI calls; ``body`` may be a list of parts, as a chunked upload arrives."""

    def __init__(self, application: Any) -> None:
        self.application = application
        self.left = asyncio.Event()
        """Set it, and every client is gone."""

    async def request(
        self,
        method: str,
        path: str,
        body: bytes | list[bytes] = b"",
        headers: dict[str, str] | None = None,
        *,
        reply: Reply | None = None,
    ) -> Reply:
        reply = reply or Reply()
        parts = body if isinstance(body, list) else [body]
        messages = [
            {"type": "http.request", "body": part, "more_body": index < len(parts)}
            for index, part in enumerate(parts, 1)
        ]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop(0)
            await self.left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                assert reply.status == 0, "two answers"
                reply.status = message["status"]
                reply.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
            else:
                assert not reply.complete, "more after the end"
                chunk = bytes(message.get("body", b""))
                reply.chunks.append(chunk)
                reply.body += chunk
                reply.complete = not message.get("more_body", False)

        route, _, query = path.partition("?")
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "path": route,
            "raw_path": route.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()],
        }
        await self.application(scope, receive, send)
        return reply
