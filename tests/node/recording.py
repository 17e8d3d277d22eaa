"""What the node tests share: a listener that keeps what it was told."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from hotset.node.interface import Answer, Call, LaunchSpec
from hotset.node.manager import LocalNode
from hotset.node.spawner import ProcessSource, Spawner
from hotset.vocabulary import FailureKind

FUNCTIONS = Path(__file__).parent / "functions"
"""Directory of the modules the GPU processes of these tests import."""


STUB = ("-I", "-S", str(Path(__file__).with_name("stub_process.py")))
"""For ``Spawner``: processes that start in no time and run no function."""
GPU = "local/virtual:0"
MIB = 1 << 20


def story(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on the event loop hotset runs on; it is given a minute."""

    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        uvloop.run(asyncio.wait_for(test(*args, **kwargs), 60))

    return run


@asynccontextmanager
async def running(
    recorder: Recorder, gpus: int = 1, memory_bytes: int = 20 * MIB, source: ProcessSource | None = None
) -> AsyncIterator[LocalNode]:
    """A started node with virtual GPUs; whatever happens, it is stopped."""
    node = LocalNode(virtual_gpus=gpus, memory_bytes=memory_bytes, source=source or Spawner())
    await node.start(recorder)
    try:
        yield node
    finally:
        await node.stop()


def launch(name: str, **changes: object) -> LaunchSpec:
    """The spec of ``functions/basic.py``'s ``name``, as model ``name@1``."""
    settings: dict[str, object] = {
        "model": f"{name}@1",
        "entry": f"basic:{name}",
        "code_path": str(FUNCTIONS),
        "python": sys.executable,
        "memory_bytes": 1 << 20,
    }
    return msgspec.convert(settings | changes, LaunchSpec)


def ask(request_id: int, value: object, accept: str = "*/*") -> Call:
    """A call with a JSON body."""
    return Call(request_id=request_id, body=msgspec.json.encode(value), accept=accept)


class Told(msgspec.Struct, frozen=True):
    """One report of a node, other than an answer or a log line."""

    what: str
    gpu_id: str = ""
    model: str = ""
    kind: FailureKind | None = None
    reason: str = ""
    answered: tuple[int, ...] = ()
    seconds: float = 0.0
    memory_bytes: int | None = None
    host_bytes: int = 0


class Recorder:
    """A ``NodeListener`` that remembers."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self.told: list[Told] = []
        self.answers: list[Answer] = []
        self.lines: list[tuple[str, str]] = []
        self.measurements: list[tuple[str, int]] = []
        """Model and bytes, after runs: not among ``told``, as they come when a process has time."""

    def loaded(self, gpu_id: str, model: str, load_s: float, memory_bytes: int | None) -> None:
        self.told.append(Told("loaded", gpu_id, model, seconds=load_s, memory_bytes=memory_bytes))
        self._changed.set()

    def load_failed(
        self, gpu_id: str, model: str, kind: FailureKind, reason: str, memory_bytes: int | None = None
    ) -> None:
        self.told.append(Told("load_failed", gpu_id, model, kind, reason, memory_bytes=memory_bytes))
        self._changed.set()

    def offloaded(self, gpu_id: str, model: str, offload_s: float, device_bytes: int, host_bytes: int) -> None:
        self.told.append(
            Told("offloaded", gpu_id, model, seconds=offload_s, memory_bytes=device_bytes, host_bytes=host_bytes)
        )
        self._changed.set()

    def restored(self, gpu_id: str, model: str, restore_s: float, memory_bytes: int | None) -> None:
        self.told.append(Told("restored", gpu_id, model, seconds=restore_s, memory_bytes=memory_bytes))
        self._changed.set()

    def measured(self, gpu_id: str, model: str, memory_bytes: int) -> None:
        self.measurements.append((model, memory_bytes))
        self._changed.set()

    def answered(self, answer: Answer) -> None:
        # A body may live in a shared slot that is free again after this call.
        self.answers.append(msgspec.structs.replace(answer, body=bytes(answer.body)))
        self._changed.set()

    def run_finished(self, gpu_id: str, model: str, inference_s: float) -> None:
        self.told.append(Told("run_finished", gpu_id, model, seconds=inference_s))
        self._changed.set()

    def run_failed(self, gpu_id: str, model: str, kind: FailureKind, reason: str, answered: tuple[int, ...]) -> None:
        self.told.append(Told("run_failed", gpu_id, model, kind, reason, answered))
        self._changed.set()

    def process_lost(self, gpu_id: str, model: str, reason: str) -> None:
        self.told.append(Told("process_lost", gpu_id, model, reason=reason))
        self._changed.set()

    def gpu_lost(self, gpu_id: str, reason: str) -> None:
        self.told.append(Told("gpu_lost", gpu_id, reason=reason))
        self._changed.set()

    def logged(self, model: str, line: str) -> None:
        self.lines.append((model, line))
        self._changed.set()

    async def until(self, holds: Callable[[], object], within_s: float = 20.0) -> None:
        """Wait for reports until ``holds()``."""
        async with asyncio.timeout(within_s):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    async def hears(self, *whats: str) -> Told:
        """Wait until exactly these things were told since the last time, and forget them; the last one."""
        await self.until(lambda: len(self.told) >= len(whats))
        told, self.told = self.told, []
        assert [each.what for each in told] == list(whats), told
        return told[-1]

    @property
    def whats(self) -> list[str]:
        return [told.what for told in self.told]
