"""What models take more, or less, after their runs is measured, and told when it is news."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from recording import GPU, MIB, STUB, Recorder, ask, launch, running, story
from test_devices import FakeNvml

from hotset.node.cpu import CpuPool
from hotset.node.devices.cuda import Nvml
from hotset.node.frames import ANSWER_HEAD, Flag, Kind, LoadOrder, Measured, control, is_news
from hotset.node.interface import Call
from hotset.node.manager import LocalNode
from hotset.node.spawner import Spawner
from hotset.node.worker import model_memory
from hotset.node.worker.model_memory import LOOK_AGAIN_S, ModelMemory

KEEPER = launch("Keeper", memory_bytes=MIB)
ENDS = ANSWER_HEAD.pack(12, Kind.ANSWER, Flag.LAST | Flag.ENDS, 200, 1, 0.001, 0) + b"ok"
"""The answer to call 1, all of its run."""


def keep(mib: int, *, peak: bool = False, request_id: int = 1) -> Call:
    return ask(request_id, {"mib": mib, "peak": peak})


def says(memory_bytes: int | None, *, times: int = 1) -> str:
    """Hex of an answer, and of what a process says that its model takes."""
    return (ENDS + times * control(Kind.MEASURED, Measured(memory_bytes=memory_bytes))).hex()


@story
async def test_what_a_function_keeps_and_lets_go_of_is_told(recorder: Recorder) -> None:
    async with running(recorder, memory_bytes=200 * MIB) as node:
        node.load(GPU, KEEPER)
        loaded = await recorder.hears("loaded")
        assert loaded.memory_bytes is not None
        node.run(GPU, "Keeper@1", [keep(64)])
        await recorder.until(lambda: recorder.measurements)
        ((model, grown_bytes),) = recorder.measurements
        assert model == "Keeper@1"
        assert 63 * MIB < grown_bytes - loaded.memory_bytes < 72 * MIB  # the kernel's figure is no exact one
        (report,) = node.processes()
        assert report.device_bytes == grown_bytes

        recorder.measurements.clear()
        node.run(GPU, "Keeper@1", [keep(-1)])
        await recorder.until(lambda: recorder.measurements)
        ((_, left_bytes),) = recorder.measurements
        assert left_bytes < grown_bytes - 60 * MIB
        assert node.processes()[0].device_bytes == left_bytes


@story
async def test_what_is_freed_before_the_answer_is_no_growth(recorder: Recorder) -> None:
    async with running(recorder, memory_bytes=200 * MIB) as node:
        node.load(GPU, KEEPER)
        loaded = await recorder.hears("loaded")
        node.run(GPU, "Keeper@1", [keep(100, peak=True)])
        await recorder.hears("run_finished")
        node.run(GPU, "Keeper@1", [keep(16)])
        await recorder.until(lambda: any(size > 15 * MIB for _, size in recorder.measurements))
        most_bytes = max(size for _, size in recorder.measurements)
        assert loaded.memory_bytes is not None
        assert most_bytes - loaded.memory_bytes < 24 * MIB


@story
async def test_a_model_is_parked_as_it_is_by_then(recorder: Recorder) -> None:
    async with running(recorder, memory_bytes=200 * MIB) as node:
        node.load(GPU, KEEPER)
        await recorder.hears("loaded")
        node.run(GPU, "Keeper@1", [keep(1)])  # looked at, so that it is not again for a while
        node.run(GPU, "Keeper@1", [keep(40)])
        node.offload(GPU, "Keeper@1")
        told = await recorder.hears("run_finished", "run_finished", "offloaded")
        assert 40 * MIB < told.host_bytes < 50 * MIB
        assert recorder.measurements[-1] == ("Keeper@1", told.host_bytes)
        node.restore(GPU, "Keeper@1")
        assert (await recorder.hears("restored")).memory_bytes == told.host_bytes


@story
async def test_it_is_seen_although_calls_keep_coming(recorder: Recorder) -> None:
    async with running(recorder, memory_bytes=2000 * MIB) as node:
        node.load(GPU, KEEPER)
        await recorder.hears("loaded")
        node.run(GPU, "Keeper@1", [keep(0)])
        await recorder.hears("run_finished")
        node.run(GPU, "Keeper@1", [keep(8)])
        while not any(size > 7 * MIB for _, size in recorder.measurements):
            await recorder.hears("run_finished")
            node.run(GPU, "Keeper@1", [keep(0)])


@pytest.mark.parametrize(
    "lie", [says(5 * MIB, times=2), says(-1), control(Kind.MEASURED, Measured(memory_bytes=1)).hex()]
)
@story
async def test_a_process_that_tells_more_than_it_may_is_ended(recorder: Recorder, lie: str) -> None:
    async with running(recorder, source=Spawner(STUB)) as node:
        node.load(GPU, launch("Liar", env={"LIE": lie}))
        await recorder.hears("loaded")
        node.run(GPU, "Liar@1", [ask(1, "x")])
        await recorder.until(lambda: any("untimely or impossible MEASURED" in each.reason for each in recorder.told))


@story
async def test_a_plain_function_has_nothing_to_tell(recorder: Recorder) -> None:
    pool = CpuPool(source=Spawner(STUB))
    await pool.start(recorder)
    try:
        pool.run(launch("liar", env={"LIE": says(5)}), ask(1, "x"))
        await recorder.until(lambda: recorder.answers)
        assert recorder.answers[0].status == 200
        pool.process_measured(next(iter(pool._alive)), 5)
        assert recorder.measurements == []
    finally:
        await pool.stop()


@story
async def test_on_cuda_the_node_asks_the_driver(recorder: Recorder) -> None:
    library = FakeNvml()
    gpu = "local/cuda:0"
    node = LocalNode(cuda=True, nvml=Nvml(library), source=Spawner(STUB))
    await node.start(recorder)
    try:
        for name, said_bytes in (("Torch", 30 * MIB), ("Other", None)):
            node.load(gpu, launch(name, env={"LIE": says(said_bytes)}))
            await recorder.hears("loaded")
        torch_pid, other_pid = (each.pid for each in node.processes())
        library.processes = [
            SimpleNamespace(pid=torch_pid, usedGpuMemory=90 * MIB),
            SimpleNamespace(pid=other_pid, usedGpuMemory=200 * MIB),
        ]
        for model in ("Torch@1", "Other@1"):
            node.run(gpu, model, [ask(1, "x")])
            await recorder.hears("run_finished")
        await recorder.until(lambda: len(recorder.measurements) == 2)
        assert recorder.measurements == [("Torch@1", 90 * MIB), ("Other@1", 200 * MIB)]

        # Where it does not tell, the process itself may; what nobody knows stays what it was.
        library.processes = []
        for model in ("Torch@1", "Other@1"):
            node.run(gpu, model, [ask(1, "x")])
            await recorder.hears("run_finished")
        await recorder.until(lambda: len(recorder.measurements) == 3)
        assert recorder.measurements[2] == ("Torch@1", 30 * MIB)
        assert [each.device_bytes for each in node.processes()] == [30 * MIB, 200 * MIB]
    finally:
        await node.stop()


def made(device: str, monkeypatch: pytest.MonkeyPatch, taken: Callable[[], int | None]) -> ModelMemory:
    """Of a model that takes this much, by a clock that hardly moves."""
    order = LoadOrder(model="m@1", entry="m:M", code_path="", device=device, limit_bytes=1 << 30)
    clock = iter(range(1000))
    monkeypatch.setattr(model_memory, "perf_counter", lambda: float(next(clock)) / 1e4)
    monkeypatch.setattr(model_memory, "thread_time", lambda: 0.0)
    monkeypatch.setattr(model_memory, "cuda_bytes", lambda emptied=False: taken())
    return ModelMemory(order)


def test_questions_to_the_driver_become_seldom_where_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    size_bytes: int | None = 50 * MIB
    memory = made("cuda:0", monkeypatch, lambda: size_bytes)
    assert memory.loaded(SimpleNamespace(), 0) == 50 * MIB
    pauses_s = []
    for _ in range(8):
        assert memory.look() == Measured(memory_bytes=50 * MIB)
        pauses_s.append(round(memory.due_s))  # the clock stands nearly still
    assert pauses_s == [2, 4, 8, 16, 32, 60, 60, 60]
    size_bytes = 80 * MIB
    assert memory.look() == Measured(memory_bytes=80 * MIB)
    assert memory.memory_bytes == 80 * MIB
    assert memory.due_s < 1 + LOOK_AGAIN_S
    size_bytes = None  # torch is not in use
    assert memory.look() == Measured(memory_bytes=None)
    assert memory.memory_bytes == 80 * MIB


def test_what_takes_long_to_look_at_is_looked_at_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = made("cpu", monkeypatch, lambda: None)
    memory.loaded(SimpleNamespace(), 0)
    spent = iter((10.0, 10.005, 20.0, 21.0))
    monkeypatch.setattr(model_memory, "thread_time", lambda: next(spent))
    monkeypatch.setattr(model_memory, "perf_counter", lambda: 7.0)
    assert memory.look() is None
    assert memory.due_s == pytest.approx(7.0 + 5.0)
    assert memory.look() is None
    assert memory.due_s == pytest.approx(7.0 + 60.0), "but not for ever"


def test_nothing_is_gone_through_while_the_process_is_as_large_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = made("cpu", monkeypatch, lambda: None)
    memory.loaded(SimpleNamespace(), 0)
    memory.look()
    monkeypatch.setattr(model_memory, "measure", lambda instance, growth_bytes: pytest.fail("it was gone through"))
    assert memory.look() is None


def test_what_is_news() -> None:
    assert not is_news(0, MIB - 1)
    assert is_news(0, MIB)
    assert is_news(5 * MIB, 4 * MIB)
    assert not is_news(1000 * MIB, 1009 * MIB)
    assert is_news(1000 * MIB, 1010 * MIB)
