"""What the checks stand on: a node of real or virtual GPUs, driven call by call, and the models that run on it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec
import numpy
import psutil  # type: ignore[import-untyped]
from safetensors.numpy import save_file

from gpu_checks.record import Unavailable
from hotset.node.devices.cuda import Nvml
from hotset.node.interface import Answer, Call, LaunchSpec, ProcessReport
from hotset.node.manager import LocalNode
from hotset.node.spawner import ProcessSource
from hotset.node.zygote import ZygoteSource
from hotset.vocabulary import FailureKind, Gpu

FUNCTIONS = Path(__file__).parent / "functions"
MIB = 1 << 20
WIDTH = 1024
LAYER_MIB = 4
CALL_LIMIT_S = 40.0
GONE_WITHIN_S = 10.0
ZYGOTE_WITHIN_S = 40.0
MEASURED_WITHIN_S = 10.0
WAITS_WITHIN_S = 20.0
STOPPED_WITHIN_S = 15.0
POOL_SIZE = 1
FRAMEWORKS = ("torch", "safetensors", "safetensors.torch", "numpy")
"""What the probes import."""


class NodeFailure(Exception):
    """A load or run that the node reports as failed."""

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(f"{kind.value}: {reason}")
        self.kind = kind
        self.reason = reason


class Loaded(msgspec.Struct, frozen=True):
    """A finished load. ``memory_bytes``: what the node says the model takes."""

    load_s: float
    memory_bytes: int


class KeptSource(ZygoteSource):
    """Outlives the nodes that take processes from it, so that only the first check waits for torch to be imported."""

    def close(self) -> None:
        """A node was stopped: nothing."""

    def end(self) -> None:
        super().close()


class Parked(msgspec.Struct, frozen=True):
    """A finished offload. ``device_bytes``: what its process still holds of the GPU."""

    offload_s: float
    device_bytes: int
    host_bytes: int


class Setup:
    """Where the checks run. ``folder``: for weight files; ``nvml_library``: ``pynvml``; None: virtual GPUs."""

    def __init__(self, folder: Path, *, nvml_library: Any, model_mib: int) -> None:
        self.folder = folder
        self.nvml = None if nvml_library is None else Nvml(nvml_library)
        self.model_mib = model_mib
        self._nvml_library = nvml_library

    @cached_property
    def source(self) -> KeptSource:
        return KeptSource(pool_size=POOL_SIZE)

    def close(self) -> None:
        """On the loop that ran the checks."""
        self.source.end()
        if self.nvml is not None:
            self.nvml.close()

    @property
    def virtual(self) -> bool:
        return self.nvml is None

    @property
    def model_bytes(self) -> int:
        return self.model_mib * MIB

    @cached_property
    def weights(self) -> Path:
        """A file of identity matrices, ``model_mib`` large: what goes in comes out, exactly, on any device."""
        path = self.folder / "weights.safetensors"
        identity = numpy.eye(WIDTH, dtype=numpy.float32)
        save_file({f"{layer}.weight": identity for layer in range(self.model_mib // LAYER_MIB)}, path)
        return path

    @cached_property
    def onnx_model(self) -> Path:
        """The same weights as an ONNX model. Raises ``Unavailable`` where there is nothing to make or run it with."""
        try:
            import onnx
            import onnxruntime  # type: ignore[import-untyped]
        except ModuleNotFoundError as error:
            raise Unavailable(f"needs {error.name}: install onnx, and onnxruntime-gpu on a GPU") from None
        if not self.virtual and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise Unavailable("this onnxruntime knows no CUDA: install onnxruntime-gpu in its place")
        layers = range(self.model_mib // LAYER_MIB)
        identity = numpy.eye(WIDTH, dtype=numpy.float32)
        first, last = (
            onnx.helper.make_tensor_value_info(f"x{number}", onnx.TensorProto.FLOAT, [1, WIDTH])
            for number in (0, len(layers))
        )
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("MatMul", [f"x{each}", f"w{each}"], [f"x{each + 1}"]) for each in layers],
            *("identities", [first], [last]),
            [onnx.numpy_helper.from_array(identity, f"w{each}") for each in layers],
        )
        path = self.folder / "identities.onnx"
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)
        return path

    @cached_property
    def torch_cuda(self) -> str:
        """The CUDA version that torch is built for, empty without; asked in a process of its own."""
        source = "import torch; print(torch.version.cuda or '')"
        asked = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
        return asked.stdout.strip()

    def need_cuda(self) -> Nvml:
        """Raises ``Unavailable`` where there is no GPU, or no torch that could use it."""
        if self.nvml is None:
            raise Unavailable("needs a CUDA GPU")
        self.need_torch()
        return self.nvml

    def need_torch(self) -> None:
        if self.nvml is not None and not self.torch_cuda:
            raise Unavailable("torch is built without CUDA: install a build with it")

    def probe(self, number: int = 1, entry: str = "Probe", *, module: str = "probe", **env: str) -> LaunchSpec:
        """The spec of one of the functions in ``functions/``; a Probe multiplies by its ``number``."""
        return LaunchSpec(
            model=f"{entry.lower()}{number}@1",
            entry=f"{module}:{entry}",
            code_path=str(FUNCTIONS),
            python=sys.executable,
            env={"PROBE_WEIGHTS": str(self.weights), "PROBE_FACTOR": str(number)} | env,
            memory_bytes=self.model_bytes,
            frameworks=FRAMEWORKS,
            timeout_s=CALL_LIMIT_S,
            load_timeout_s=CALL_LIMIT_S,
        )

    def local_node(
        self,
        *,
        gpus: int = 1,
        memory_bytes: int | None = None,
        source: ProcessSource | None = None,
        pool_contexts: int = 0,
    ) -> LocalNode:
        """``gpus`` counts on virtual GPUs only; ``memory_bytes``: by default all there is, or room for four models;
        ``source``: by default one that is kept from check to check."""
        if self.nvml is not None:
            nvml = Nvml(self._nvml_library)  # a node closes its own
            return LocalNode(
                cuda=True,
                memory_bytes=memory_bytes,
                source=source or self.source,
                pool_contexts=pool_contexts,
                nvml=nvml,
            )
        memory_bytes = memory_bytes or 4 * self.model_bytes
        return LocalNode(virtual_gpus=gpus, memory_bytes=memory_bytes, source=source or self.source)

    @asynccontextmanager
    async def node(
        self,
        *,
        gpus: int = 1,
        memory_bytes: int | None = None,
        source: ProcessSource | None = None,
        pool_contexts: int = 0,
    ) -> AsyncIterator[Driven]:
        """A started node, stopped at the end whatever happens."""
        self.need_torch()
        if source is None:
            await zygote_ready(self.source)
        driven = Driven(
            self.local_node(gpus=gpus, memory_bytes=memory_bytes, source=source, pool_contexts=pool_contexts)
        )
        await driven.node.start(driven)
        try:
            yield driven
        finally:
            await in_time(driven.node.stop())


async def in_time(stopping: Awaitable[None]) -> None:
    """Raises ``TimeoutError`` when processes cannot even be killed, as in a driver that hangs."""
    try:
        async with asyncio.timeout(STOPPED_WITHIN_S):
            await stopping
    except TimeoutError:
        problem = f"GPU processes could not be ended within {STOPPED_WITHIN_S:g} s: see what dmesg says of NVRM"
        raise TimeoutError(problem) from None


async def zygote_ready(source: ZygoteSource) -> None:
    """Wait until processes come from a zygote that has torch imported."""
    source.prepare(sys.executable, FRAMEWORKS)
    async with asyncio.timeout(ZYGOTE_WITHIN_S):
        while not source.ready(sys.executable):
            await asyncio.sleep(0.02)


class Driven:
    """A node and its listener: asks for one thing and waits for the answer."""

    def __init__(self, node: LocalNode) -> None:
        self.node = node
        self.lost_gpus: list[str] = []
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[tuple[str, str], asyncio.Future[Any]] = {}
        self._bodies: dict[int, bytes] = {}
        self._measured_bytes: dict[tuple[str, str], int] = {}
        self._last_request_id = 0

    @property
    def gpus(self) -> list[Gpu]:
        return list(self.node.gpus)

    async def load(self, spec: LaunchSpec, gpu: int = 0) -> Loaded:
        """Raises ``NodeFailure``."""
        gpu_id = self.gpus[gpu].gpu_id
        future = self._expect(gpu_id, spec.model)
        self.node.load(gpu_id, spec)
        loaded: Loaded = await future
        return loaded

    async def ask(self, spec: LaunchSpec, what: str, value: float = 0.0, gpu: int = 0) -> dict[str, Any]:
        """One call; raises ``NodeFailure``, also for an answer that is an error."""
        gpu_id = self.gpus[gpu].gpu_id
        self._last_request_id = request_id = self._last_request_id + 1
        future = self._expect(gpu_id, spec.model)
        body = msgspec.json.encode({"what": what, "value": value})
        self.node.run(gpu_id, spec.model, [Call(request_id=request_id, body=body)])
        await future
        answer: dict[str, Any] = msgspec.json.decode(self._bodies.pop(request_id))
        if "error" in answer:
            raise NodeFailure(FailureKind.ERROR, str(answer["error"]))
        return answer

    async def offload(self, spec: LaunchSpec) -> Parked:
        """Raises ``NodeFailure``."""
        gpu_id = self.gpus[0].gpu_id
        future = self._expect(gpu_id, spec.model)
        self.node.offload(gpu_id, spec.model)
        parked: Parked = await future
        return parked

    async def restore(self, spec: LaunchSpec) -> Loaded:
        """Raises ``NodeFailure``."""
        gpu_id = self.gpus[0].gpu_id
        future = self._expect(gpu_id, spec.model)
        self.node.restore(gpu_id, spec.model)
        restored: Loaded = await future
        return restored

    async def unload(self, spec: LaunchSpec, gpu: int = 0) -> float:
        """Returns the seconds until its process was gone."""
        gpu_id = self.gpus[gpu].gpu_id
        pid = self.report(spec, gpu).pid
        begin_s = monotonic()
        self.node.unload(gpu_id, spec.model)
        while psutil.pid_exists(pid):
            if monotonic() - begin_s > GONE_WITHIN_S:
                raise TimeoutError(f"process {pid} is there {GONE_WITHIN_S:g} s after its unload")
            await asyncio.sleep(0.002)
        return monotonic() - begin_s

    async def until_waiting(self, spec: LaunchSpec, but: int | None = None) -> int:
        """The process id of one that waits with the GPU open, and is not ``but``, once it is told of this model."""
        self.node.prepare(spec)
        deadline_s = monotonic() + WAITS_WITHIN_S
        while not (pids := set(self.node.waiting_with(self.gpus[0].gpu_id)) - {but}):
            if monotonic() > deadline_s:
                raise TimeoutError(f"no process waits with the GPU open after {WAITS_WITHIN_S:g} s")
            await asyncio.sleep(0.02)
        return pids.pop()

    async def until_measured(self, spec: LaunchSpec, at_least_bytes: int, gpu: int = 0) -> int:
        """What the model takes, once the node has told after a run that it is so much or more; or what it last told."""
        deadline_s = monotonic() + MEASURED_WITHIN_S
        key = (self.gpus[gpu].gpu_id, spec.model)
        while self._measured_bytes.get(key, 0) < at_least_bytes and monotonic() < deadline_s:
            await asyncio.sleep(0.02)
        return self._measured_bytes.get(key, 0)

    def report(self, spec: LaunchSpec, gpu: int = 0) -> ProcessReport:
        """What the node says of a resident model's process."""
        gpu_id = self.gpus[gpu].gpu_id
        return next(each for each in self.node.processes() if (each.gpu_id, each.model) == (gpu_id, spec.model))

    def _expect(self, gpu_id: str, model: str) -> asyncio.Future[Any]:
        future = self._waiting[gpu_id, model] = self._loop.create_future()
        return future

    def _settle(self, gpu_id: str, model: str, result: Loaded | Parked | NodeFailure | None) -> None:
        future = self._waiting.pop((gpu_id, model), None)
        if future is None or future.done():
            return
        if isinstance(result, NodeFailure):
            future.set_exception(result)
        else:
            future.set_result(result)

    # NodeListener

    def loaded(self, gpu_id: str, model: str, load_s: float, memory_bytes: int | None) -> None:
        self._settle(gpu_id, model, Loaded(load_s, memory_bytes or 0))

    def load_failed(
        self, gpu_id: str, model: str, kind: FailureKind, reason: str, memory_bytes: int | None = None
    ) -> None:
        self._settle(gpu_id, model, NodeFailure(kind, reason))

    def offloaded(self, gpu_id: str, model: str, offload_s: float, device_bytes: int, host_bytes: int) -> None:
        self._settle(gpu_id, model, Parked(offload_s, device_bytes, host_bytes))

    def restored(self, gpu_id: str, model: str, restore_s: float, memory_bytes: int | None) -> None:
        self._settle(gpu_id, model, Loaded(restore_s, memory_bytes or 0))

    def measured(self, gpu_id: str, model: str, memory_bytes: int) -> None:
        self._measured_bytes[gpu_id, model] = memory_bytes

    def answered(self, answer: Answer) -> None:
        self._bodies[answer.request_id] = bytes(answer.body)

    def run_finished(self, gpu_id: str, model: str, inference_s: float) -> None:
        self._settle(gpu_id, model, None)

    def run_failed(self, gpu_id: str, model: str, kind: FailureKind, reason: str, answered: tuple[int, ...]) -> None:
        self._settle(gpu_id, model, NodeFailure(kind, reason))

    def process_lost(self, gpu_id: str, model: str, reason: str) -> None:
        self._settle(gpu_id, model, NodeFailure(FailureKind.CRASH, reason))

    def gpu_lost(self, gpu_id: str, reason: str) -> None:
        self.lost_gpus.append(f"{gpu_id}: {reason}")

    def logged(self, model: str, line: str) -> None:
        """Reasons of failures come with the failures."""
