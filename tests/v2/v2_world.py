"""What the v2 tests share: a gateway whose one node runs functions in this very process, and a few functions."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import httpx
import msgspec
import numpy as np
import orjson

import hotset
from hotset.functions.contract import options_of
from hotset.functions.inspection import signature_of
from hotset.functions.loading import load_entry
from hotset.functions.runtime import Call as RuntimeCall
from hotset.functions.runtime import Runtime
from hotset.functions.v2_types import tensors_of
from hotset.gateway.app import Gateway
from hotset.gateway.bodies import Bodies
from hotset.gateway.control import Control
from hotset.gateway.deployments import Deployments
from hotset.gateway.v2.http import V2Http
from hotset.gateway.v2.models import ModelRepository
from hotset.gateway.v2.service import V2Service
from hotset.node.interface import Answer, Call, LaunchSpec, NodeListener, ProcessReport
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.store.bundles import Bundles
from hotset.store.datastore import FunctionRecord
from hotset.store.environments import Environments
from hotset.store.sqlite import SqliteDatastore
from hotset.vocabulary import FailureKind, Gpu

MIB = 1 << 20
GPU_ID = "local/virtual:0"
BODY_LIMIT = 1 * MIB
T = TypeVar("T")


def run(story: Callable[[], Awaitable[T]]) -> T:
    """Run one test's story on a loop of its own; a hang is a failure, not a wait."""
    return asyncio.run(asyncio.wait_for(story(), 60))


class InProcessNode:
    """A node whose GPU processes are ``Runtime`` objects here: real codecs, no processes, no waiting."""

    def __init__(self, targets: Mapping[str, Any]) -> None:
        self.targets = targets
        self.runtimes: dict[str, Runtime] = {}
        self.held: list[tuple[str, Sequence[Call]]] | None = None
        """Not None: runs wait here until ``release``."""
        self.cancelled: list[int] = []

    @property
    def gpus(self) -> Sequence[Gpu]:
        return [Gpu(gpu_id=GPU_ID, memory_bytes=1000 * MIB)]

    async def start(self, listener: NodeListener) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()

    async def stop(self) -> None:
        self.runtimes.clear()

    def expect(self, spec: LaunchSpec) -> None:
        pass

    def prepare(self, spec: LaunchSpec) -> None:
        pass

    def load(self, gpu_id: str, spec: LaunchSpec) -> None:
        sys.modules.pop(spec.entry.partition(":")[0], None)  # a process of its own would not know the last one's
        try:
            target = self.targets.get(spec.entry) or load_entry(spec.code_path, spec.entry, reload=True)
            runtime = Runtime(target)
            runtime.load()
        except Exception as error:  # noqa: BLE001 - whatever a load raises is reported
            self._loop.call_soon(self._listener.load_failed, gpu_id, spec.model, FailureKind.ERROR, str(error))
            return
        self.runtimes[spec.model] = runtime
        self._loop.call_soon(self._listener.loaded, gpu_id, spec.model, 0.01, spec.memory_bytes)

    def unload(self, gpu_id: str, model: str) -> None:
        self.runtimes.pop(model).unload()

    def run(self, gpu_id: str, model: str, calls: Sequence[Call]) -> None:
        if self.held is not None:
            self.held.append((model, calls))
        else:
            self._loop.call_soon(self._run, gpu_id, model, calls)

    def release(self) -> None:
        held, self.held = self.held or [], None
        for model, calls in held:
            self._run(GPU_ID, model, calls)

    def _run(self, gpu_id: str, model: str, calls: Sequence[Call]) -> None:
        outcomes = self.runtimes[model].call_batch([RuntimeCall(c.body, c.content_type, c.accept) for c in calls])
        for call, outcome in zip(calls, outcomes, strict=True):
            for chunk in outcome.stream or ():
                self._answer(call, outcome.status, outcome.content_type, chunk, final=False)
            self._answer(call, outcome.status, outcome.content_type, outcome.whole)
        self._listener.run_finished(gpu_id, model, 0.001)

    def _answer(self, call: Call, status: int, content_type: str, body: bytes, *, final: bool = True) -> None:
        self._listener.answered(
            Answer(
                request_id=call.request_id,
                status=status,
                content_type=content_type,
                body=body,
                inference_s=0.001,
                final=final,
            )
        )

    def cancel(self, request_id: int) -> None:
        self.cancelled.append(request_id)

    def healthy(self) -> bool:
        return True

    def processes(self) -> list[ProcessReport]:
        return []

    def pids(self) -> Mapping[int, str]:
        return {}

    def utilisation(self) -> Mapping[str, float]:
        return {}


class World:
    """A started gateway with ``functions`` in service; ``http`` calls it without a socket."""

    def __init__(self, data: Path, *functions: Any, limit_bytes: int = BODY_LIMIT) -> None:
        self.data = data
        self.functions = functions
        self.node = InProcessNode({f"test:{each.__name__}": each for each in functions})
        scheduler = Scheduler(make_policy("lalb_o3"), make_eviction("lru"), SchedulerConfig(journal_capacity=100))
        self.control = Control(scheduler, [self.node])
        self.deployments = Deployments(
            self.control, SqliteDatastore(data), Bundles(data / "bundles"), Environments(data / "environments")
        )
        self.limit_bytes = limit_bytes
        self.repository: ModelRepository | None = None

    async def __aenter__(self) -> World:
        await self.control.start()
        await self.deployments.restore()
        for each in self.functions:
            self.deployments.serve(record_of(each), self.data)
        self.service = V2Service(self.control, self.deployments, self.repository)
        self.bodies = Bodies(self.control, max_body_bytes=self.limit_bytes, max_open_bytes=10 * self.limit_bytes)
        self.front = V2Http(self.service, _nothing, self.bodies)
        self.application = Gateway(self.control, self.front, self.bodies)
        self.transport = httpx.ASGITransport(self.application, raise_app_exceptions=True)
        self.http = httpx.AsyncClient(transport=self.transport, base_url="http://hotset", headers=PLAIN)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()
        self.service.close()
        await self.control.stop()
        await self.deployments.close()

    async def infer(self, model: str, message: dict[str, Any], binary: bytes = b"", **headers: str) -> httpx.Response:
        """POST an inference; ``binary`` is what stands behind the JSON."""
        header = orjson.dumps(message)
        sent = dict(headers)
        if binary:
            sent["Inference-Header-Content-Length"] = str(len(header))
        return await self.http.post(f"/v2/models/{model}/infer", content=header + binary, headers=sent)


PLAIN = {"accept-encoding": "identity"}


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def record_of(target: Any, version: str = "1") -> FunctionRecord:
    options = options_of(target)
    assert options is not None
    signature = signature_of(target)
    return FunctionRecord(
        options=options,
        entry=f"test:{target.__name__}",
        bundle="",
        version=version,
        schema=signature.schema() | {"tensors": msgspec.to_builtins(tensors_of(signature))},
        created_at_s=0.0,
    )


def tensor(name: str, array: np.ndarray, datatype: str | None = None, **more: Any) -> dict[str, Any]:
    """An input whose data follows the JSON."""
    datatype = datatype or {"float32": "FP32", "int64": "INT64", "float64": "FP64", "bool": "BOOL"}[array.dtype.name]
    parameters = {"binary_data_size": array.nbytes, **more}
    return {"name": name, "shape": list(array.shape), "datatype": datatype, "parameters": parameters}


def binary_output(response: httpx.Response, dtype: str = "<f4") -> np.ndarray:
    """The one binary output of an answer."""
    size = int(response.headers["inference-header-content-length"])
    (output,) = orjson.loads(response.content[:size])["outputs"]
    return np.frombuffer(response.content[size:], dtype).reshape(output["shape"])


@contextmanager
def quiet_import() -> Iterator[None]:
    """Clients of others may warn of their own dependencies when they are imported."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@hotset.function(gpu_memory="10MiB")
class Scale:
    """Rows of three numbers, summed and scaled."""

    def predict(
        self, rows: Annotated[np.ndarray, hotset.Tensor("float32", (None, 3))], by: float = 1.0
    ) -> Annotated[np.ndarray, hotset.Tensor("float32", (None,))]:
        return (rows.sum(axis=1) * by).astype(np.float32)


@hotset.function(gpu_memory="10MiB", max_batch=8)
class Double:
    def predict(self, values: list[np.ndarray]) -> list[np.ndarray]:
        return [2 * each for each in values]


@hotset.function(gpu_memory="10MiB")
class Count:
    """Streams numbers."""

    def predict(self, upto: int) -> Iterator[int]:
        for number in range(upto):
            if number == 5:
                raise ValueError("five is too many")
            yield number


@hotset.function(gpu_memory="10MiB")
class Echo:
    """Gives back what it gets, whatever it is."""

    def predict(self, x: np.ndarray) -> np.ndarray:
        return x
