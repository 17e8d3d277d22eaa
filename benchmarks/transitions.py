"""The transitions that bench_transitions.py measures, each beside its floor."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil

from hotset.node.history import LoadParts
from hotset.node.host_memory import host_memory
from hotset.node.interface import Answer, Call, LaunchSpec
from hotset.node.manager import LocalNode
from hotset.node.zygote import ZygoteSource
from hotset.store.bundles import make_bundle
from hotset.vocabulary import FailureKind

HERE = Path(__file__).parent
FRAMEWORKS = ("torch", "safetensors", "safetensors.torch", "numpy")
GPU = "local/virtual:0"
WITHIN_S = 60.0
"""The bound on every wait."""
MS = 1e3


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One figure beside its floor, both medians."""

    name: str
    value: float
    unit: str
    floor: float | None = None
    floor_name: str = ""
    ratio: float | None = None
    bar: str = ""
    holds: bool | None = None
    """None: there is no bar."""


class Driver:
    """A node, driven call by call."""

    def __init__(self, node: LocalNode) -> None:
        self.node = node
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._body = b""

    async def load(self, spec: LaunchSpec) -> LoadParts:
        """Load it; where the time went."""
        await self._told(spec.model, lambda: self.node.load(GPU, spec))
        parts = self.node.history()[spec.model].last_load
        assert parts is not None
        return parts

    async def ask(self, spec: LaunchSpec, **fields: str) -> float:
        body = msgspec.json.encode(fields)
        await self._told(spec.model, lambda: self.node.run(GPU, spec.model, [Call(request_id=1, body=body)]))
        answer = msgspec.json.decode(self._body)
        if not isinstance(answer, float):
            raise RuntimeError(f"{fields}: {answer}")
        return answer

    async def offload(self, spec: LaunchSpec) -> float:
        """Seconds."""
        return float(await self._told(spec.model, lambda: self.node.offload(GPU, spec.model)))

    async def restore(self, spec: LaunchSpec) -> float:
        """Seconds."""
        return float(await self._told(spec.model, lambda: self.node.restore(GPU, spec.model)))

    async def unload(self, spec: LaunchSpec) -> None:
        """Returns when its process is gone."""
        pids = [each.pid for each in self.node.processes() if each.model == spec.model]
        self.node.unload(GPU, spec.model)
        async with asyncio.timeout(WITHIN_S):
            while any(map(psutil.pid_exists, pids)):
                await asyncio.sleep(0.001)

    async def _told(self, model: str, ask: Callable[[], None]) -> Any:
        future = self._waiting[model] = asyncio.get_running_loop().create_future()
        ask()
        return await asyncio.wait_for(future, WITHIN_S)

    # NodeListener

    def loaded(self, gpu_id: str, model: str, load_s: float, memory_bytes: int | None) -> None:
        self._waiting[model].set_result(load_s)

    def load_failed(
        self, gpu_id: str, model: str, kind: FailureKind, reason: str, memory_bytes: int | None = None
    ) -> None:
        self._waiting[model].set_exception(RuntimeError(reason))

    def offloaded(self, gpu_id: str, model: str, offload_s: float, device_bytes: int, host_bytes: int) -> None:
        self._waiting[model].set_result(offload_s)

    def restored(self, gpu_id: str, model: str, restore_s: float, memory_bytes: int | None) -> None:
        self._waiting[model].set_result(restore_s)

    def measured(self, gpu_id: str, model: str, memory_bytes: int) -> None:
        """What models take is not measured here."""

    def answered(self, answer: Answer) -> None:
        self._body = bytes(answer.body)

    def run_finished(self, gpu_id: str, model: str, inference_s: float) -> None:
        self._waiting[model].set_result(inference_s)

    def run_failed(self, gpu_id: str, model: str, kind: FailureKind, reason: str, answered: tuple[int, ...]) -> None:
        self._waiting[model].set_exception(RuntimeError(reason))

    def process_lost(self, gpu_id: str, model: str, reason: str) -> None:
        raise RuntimeError(f"the process of {model} is gone: {reason}")

    def gpu_lost(self, gpu_id: str, reason: str) -> None:
        raise RuntimeError(reason)

    def logged(self, model: str, line: str) -> None:
        print(f"  {model}: {line}", file=sys.stderr)


class Bench:
    """A node whose processes have torch, and the files its models load. Made by ``bench``."""

    def __init__(self, folder: Path, driver: Driver, source: ZygoteSource, rounds: int) -> None:
        self.folder = folder
        self.driver = driver
        self.source = source
        self.rounds = rounds
        self.floors = self.spec("Floors")

    def spec(self, entry: str, number: int = 1, **env: str) -> LaunchSpec:
        return LaunchSpec(
            model=f"{entry.lower()}{number}@1",
            entry=f"encoder:{entry}",
            code_path=str(HERE),
            python=sys.executable,
            env=env,
            memory_bytes=1 << 20,
            frameworks=FRAMEWORKS,
        )

    def encoder(self, size: str, number: int = 1, **env: str) -> LaunchSpec:
        return self.spec("Encoder", number, SIZE=size, WEIGHTS=self.weights(size), **env)

    def weights(self, size: str) -> str:
        return str(self.folder / f"{size}.safetensors")

    async def floor(self, what: str, size: str) -> float:
        return await self.driver.ask(self.floors, what=what, size=size, path=self.weights(size))

    async def pool_full(self) -> None:
        """Until a process waits in the pool."""
        async with asyncio.timeout(WITHIN_S):
            while not self.source.waiting(sys.executable):
                await asyncio.sleep(0.002)
        await asyncio.sleep(0.02)  # and is done with starting


async def processes(bench: Bench) -> Iterator[Row]:
    """From the order to a process that carries it out, and back: all of a load that is not the function's."""
    imports = []
    for _ in range(3):
        begin_s = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        imports.append(time.perf_counter() - begin_s)
    pooled, forked = [], []
    first, second = bench.spec("Nothing", 1), bench.spec("Nothing", 2)
    for _ in range(3 * bench.rounds):
        await bench.pool_full()
        pooled.append((await bench.driver.load(first)).process_s)
        # The pool holds one, so this one is forked now.
        forked.append((await bench.driver.load(second)).process_s)
        await bench.driver.unload(first)
        await bench.driver.unload(second)
    import_s, pool_s, fork_s = map(statistics.median, (imports, pooled, forked))
    return iter(
        [
            Row(name="process from the pool", value=pool_s * MS, unit="ms", bar="<= 5 ms", holds=pool_s <= 5e-3),
            Row(
                name="process from the zygote",
                value=fork_s * MS,
                unit="ms",
                floor=import_s * MS,
                floor_name="import torch",
                ratio=fork_s / import_s,
                bar="<= 5 %",
                holds=fork_s <= 0.05 * import_s,
            ),
        ]
    )


async def modules(bench: Bench, size: str) -> Iterator[Row]:
    """A usable module from a file in the page cache."""
    spec = bench.encoder(size)
    loads, bests, forked, ordinaries = [], [], [], []
    for number in range(bench.rounds):
        await bench.pool_full()
        loads.append((await bench.driver.load(spec)).load_s)
        await bench.driver.unload(spec)
        bests.append(await bench.floor("best", size))
        forked.append(await bench.floor("best_forked", size))
        if number < 3:
            ordinaries.append(await bench.floor("ordinary", size))
    load_s, best_s, forked_s, ordinary_s = map(statistics.median, (loads, bests, forked, ordinaries))
    faster = ordinary_s / load_s
    return iter(
        [
            Row(
                name=f"module of {size} MB",
                value=load_s * MS,
                unit="ms",
                floor=forked_s * MS,
                floor_name="best known, in a fork",
                ratio=load_s / forked_s,
                bar="<= 2.5x",
                holds=load_s <= 2.5 * forked_s,
            ),
            Row(
                name=f"  {size} MB, beside a process that never forks",
                value=load_s * MS,
                unit="ms",
                floor=best_s * MS,
                floor_name="best known, again and again",
                ratio=load_s / best_s,
                bar="<= 2.5x",
                holds=load_s <= 2.5 * best_s,
            ),
            Row(
                name=f"  {size} MB: times faster than init + load_state_dict",
                value=faster,
                unit="x",
                floor=ordinary_s * MS,
                floor_name="init + load_state_dict",
                bar=">= 30x" if size == "500" else "",
                holds=faster >= 30 if size == "500" else None,
            ),
        ]
    )


async def warm(bench: Bench, size: str) -> Iterator[Row]:
    """WARM -> HOT."""
    spec = bench.encoder(size)
    await bench.driver.load(spec)
    restores, floors, copies, floors_alone = [], [], [], []
    for _ in range(bench.rounds):
        await bench.driver.offload(spec)
        restores.append(await bench.driver.restore(spec))
        floors.append(await bench.floor("copied", size))
        copies.append(await bench.floor("staged", size))
        floors_alone.append(await bench.floor("copied_alone", size))
    await bench.driver.unload(spec)
    restore_s, floor_s, copy_s, alone_s = map(statistics.median, (restores, floors, copies, floors_alone))
    return iter(
        [
            Row(
                name=f"{name}, {size} MB",
                value=seconds * MS,
                unit="ms",
                floor=least_s * MS,
                floor_name=floor_name,
                ratio=least_s / seconds,
                bar=">= 70 %",
                holds=least_s >= 0.7 * seconds,
            )
            for name, seconds, floor_name, least_s in (
                ("WARM -> HOT on a virtual GPU (nothing is copied)", restore_s, "memcpy", floor_s),
                ("The host's part of WARM -> HOT on CUDA, to the ring", copy_s, "memcpy of one thread", alone_s),
            )
        ]
    )


async def cold(bench: Bench, size: str) -> Iterator[Row]:
    """COLD -> HOT with every page read, from a file that is not in the page cache, beside the best way to read it. Each
    way is read as often as it is loaded, and its median counts, not its luck: a virtual machine may have given memory
    that was freed back to its host, and whoever needs it next waits for that, several times as long as for the disk."""
    spec = bench.encoder(size, TOUCH="1")
    loads, left = [], []
    ways: dict[str, list[float]] = {"disk": [], "disk_by_four": []}
    for _ in range(bench.rounds):
        for way, seconds in ways.items():
            seconds.append(await bench.floor(way, size))
        await bench.pool_full()
        left.append(await bench.floor("evict", size))
        loads.append((await bench.driver.load(spec)).load_s)
        await bench.driver.unload(spec)
    load_s, disk_s = statistics.median(loads), min(map(statistics.median, ways.values()))
    return iter(
        [
            Row(
                name=f"COLD -> HOT, {size} MB ({max(left):.0%} was left in the page cache)",
                value=load_s * MS,
                unit="ms",
                floor=disk_s * MS,
                floor_name="best read of the disk",
                ratio=disk_s / load_s,
                bar=">= 65 %",
                holds=disk_s >= 0.65 * load_s,
            )
        ]
    )


async def swaps(bench: Bench, count: int = 100) -> Iterator[Row]:
    """Memory of the node, its zygote and their processes (PSS), after two swaps and after all. The process of the
    floors is gone meanwhile: its heap keeps much of what they took, which is none of the node's."""
    await bench.driver.unload(bench.floors)
    specs = [bench.encoder("100", number) for number in (1, 2)]
    await bench.driver.load(specs[0])
    sizes: list[int] = []
    for number in range(count):
        comes, goes = specs[(number + 1) % 2], specs[number % 2]
        await bench.driver.unload(goes)
        await bench.driver.load(comes)
        if number in (1, count - 1):
            await bench.pool_full()
            family = [psutil.Process(), *psutil.Process().children(recursive=True)]
            held = [host_memory(process.pid) for process in family]
            sizes.append(sum(each.private_bytes + each.shared_bytes for each in held))
    await bench.driver.unload(specs[count % 2])
    await bench.driver.load(bench.floors)
    change = sizes[1] / sizes[0] - 1
    return iter(
        [
            Row(
                name=f"memory after {count} swaps of 100 MB",
                value=sizes[1] / (1 << 20),
                unit="MiB",
                floor=sizes[0] / (1 << 20),
                floor_name="after two swaps",
                ratio=1 + change,
                bar="+- 5 %",
                holds=abs(change) <= 0.05,
            )
        ]
    )


# A miss, end to end over HTTP


@contextmanager
def server(folder: Path) -> Iterator[httpx.Client]:
    """``hotset serve`` with room for one model of 100 MB and no host memory: each change of models is a cold load."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "hotset", "serve", "--port", "0", "--data-dir", str(folder / "data"), "--json"),
            *("--virtual-gpus", "1", "--gpu-memory", "150MiB", "--host-memory", "0", "--log-level", "warning"),
        ],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    try:
        said = b""
        while not said.rstrip().endswith(b"}"):
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("the server did not start")
            said += line
        with httpx.Client(base_url=msgspec.json.decode(said)["url"], timeout=WITHIN_S) as client:
            yield client
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def miss(bench: Bench, misses: int = 30) -> Iterator[Row]:
    """A call whose model is COLD (its file in the page cache) beside one whose model is HOT."""
    with server(bench.folder) as client:
        archive = BytesIO()
        bundle = make_bundle(HERE / "encoder.py", archive)
        client.put(f"/system/bundles/{bundle.digest}", content=archive.getvalue()).raise_for_status()
        for name in ("one", "two"):
            deployment = {
                "service": name,
                "image": f"sha256:{bundle.digest}",
                "envVars": {"SIZE": "100", "WEIGHTS": bench.weights("100")},
                "hotset": {"entry": "encoder:Encoder", "gpu_memory": "120MiB"},
            }
            client.post("/system/functions", json=deployment).raise_for_status()
        for name in ("one", "two", "one"):
            _call(client, name)
        while any(_details(client, name)["fast_load"] is None for name in ("one", "two")):
            time.sleep(0.1)  # in the background, both ways of loading them are compared
        time.sleep(0.5)  # the zygote has what these imported, the pool is full
        calls: dict[str, list[dict[str, float]]] = {"hit": [], "miss": []}
        for number in range(misses):
            for _ in range(3):  # the first one misses
                call = _call(client, ("two", "one")[number % 2])
                calls["miss" if call["miss"] else "hit"].append(call)
            if len(calls["miss"]) != number + 1:
                raise RuntimeError("a call that should have missed did not, or the other way round")
    return iter(_rows_of_miss(calls["hit"], calls["miss"]))


def _details(client: httpx.Client, name: str) -> dict[str, Any]:
    details: dict[str, Any] = client.get(f"/system/function/{name}").raise_for_status().json()["hotset"]
    return details


def _call(client: httpx.Client, name: str) -> dict[str, float]:
    """Where one call's time went, in seconds."""
    begin_s = time.perf_counter()
    response = client.post(f"/function/{name}", json={})
    seconds = time.perf_counter() - begin_s
    response.raise_for_status()
    headers = response.headers
    call = {part: float(headers[f"x-hotset-{part}-seconds"]) for part in ("queue", "load", "inference")}
    call |= {"all": seconds, "miss": float(headers["x-hotset-cache"] == "miss")}
    if call["miss"]:
        functions = client.get("/system/state").raise_for_status().json()["functions"]
        call |= next(each["last_load"] for each in functions if each["name"] == name)
    return call


def _rows_of_miss(hits: list[dict[str, float]], misses: list[dict[str, float]]) -> list[Row]:
    def median(calls: list[dict[str, float]], part: str) -> float:
        return statistics.median(call[part] for call in calls)

    hit_s, miss_s = median(hits, "all"), median(misses, "all")
    ahead = bool(misses[0]["ahead"])  # the function is imported while the other model leaves
    own = ("process_s", "load_s") if ahead else ("process_s", "import_s", "load_s")
    evict_s = statistics.median(call["load"] - sum(call[part] for part in own) for call in misses)
    rows = [
        Row(
            name="a miss over HTTP, 100 MB in the page cache, adds",
            value=(miss_s - hit_s) * MS,
            unit="ms",
            floor=hit_s * MS,
            floor_name="a hit",
            bar="<= 30 ms",
            holds=miss_s - hit_s <= 0.030,
        )
    ]
    steps = {
        "queue": median(misses, "queue") - median(hits, "queue"),
        "evict: the other model's process goes": evict_s,
        "process" + (" is told" if ahead else ", from the pool"): median(misses, "process_s"),
        "import of the function" + (", meanwhile" if ahead else ""): median(misses, "import_s"),
        "load": median(misses, "load_s"),
        "first run's page faults": median(misses, "inference") - median(hits, "inference"),
    }
    rows += [Row(name=f"  {name}", value=seconds * MS, unit="ms") for name, seconds in steps.items()]
    return rows
