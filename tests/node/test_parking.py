"""Models that leave a GPU and come back inside their processes: the very same weights, and true reports."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import psutil
import pytest
from recording import GPU, MIB, Recorder, ask, launch, running, story

from hotset.node import process as process_module
from hotset.node.history import MOST_MODELS, History, LoadParts, Transition
from hotset.node.interface import LaunchSpec
from hotset.node.manager import LocalNode
from hotset.node.zygote import ZygoteSource
from hotset.vocabulary import FailureKind

pytest.importorskip("torch")


def weights(model: str = "w@1", **changes: object) -> LaunchSpec:
    return launch("Weights", **({"model": model, "entry": "parked:Weights"} | changes))


def hooked(**env: str) -> LaunchSpec:
    return launch("Hooked", entry="hooked:Hooked", env=env)


def hurry(node: LocalNode) -> None:
    """From here on the process of ``Hooked`` gets little time."""
    process = node._lanes[GPU].processes["Hooked@1"]
    process.spec = msgspec.structs.replace(process.spec, load_timeout_s=0.2)


@asynccontextmanager
async def with_torch(recorder: Recorder, **settings: int) -> AsyncIterator[LocalNode]:
    """A node whose processes have torch from the start."""
    source = ZygoteSource(pool_size=1)
    async with running(recorder, source=source, **settings) as node:
        node.prepare(weights(frameworks=("torch",)))
        while not source.ready(sys.executable):
            await asyncio.sleep(0.01)
        yield node


async def answer(recorder: Recorder, node: LocalNode, model: str, value: int) -> object:
    """What the model says to one call."""
    recorder.answers.clear()
    node.run(GPU, model, [ask(1, value)])
    await recorder.hears("run_finished")
    return msgspec.json.decode(recorder.answers[0].body)


@story
async def test_a_model_is_parked_and_comes_back_without_another_load(recorder: Recorder) -> None:
    async with with_torch(recorder) as node:
        node.load(GPU, weights())
        await recorder.hears("loaded")
        before = await answer(recorder, node, "w@1", 3)
        (report,) = node.processes()

        node.offload(GPU, "w@1")
        told = await recorder.hears("offloaded")
        assert (told.model, told.memory_bytes, told.host_bytes) == ("w@1", 0, report.device_bytes)
        (parked,) = node.processes()
        assert (parked.pid, parked.device_bytes) == (report.pid, 0)

        node.restore(GPU, "w@1")
        told = await recorder.hears("restored")
        assert told.memory_bytes == report.device_bytes
        assert await answer(recorder, node, "w@1", 3) == before
        assert await answer(recorder, node, "w@1", -1) == [1.0, float(report.pid)]

        history = node.history()["w@1"]
        assert history.memory_bytes == report.device_bytes
        assert {each.value: times.count for each, times in history.times.items()} == {
            "load": 1,
            "offload": 1,
            "restore": 1,
        }
        parts = history.last_load
        assert parts is not None
        assert parts.first_run_s is not None
        assert parts.room_s >= 0
        assert parts.import_s > 0 < parts.load_s
        assert history.times[Transition.LOAD].last_s >= parts.import_s + parts.load_s
        node.unload(GPU, "w@1")
        node.load(GPU, weights())
        await recorder.hears("loaded")
        assert node.history()["w@1"].times[Transition.UNLOAD].count == 1


@story
async def test_parked_models_leave_their_memory_to_others(recorder: Recorder) -> None:
    async with with_torch(recorder, memory_bytes=6 * MIB) as node:  # room for one
        for number in (1, 2, 3):
            node.load(GPU, weights(f"w@{number}"))
            node.run(GPU, f"w@{number}", [ask(number, 1)])
            node.offload(GPU, f"w@{number}")
            await recorder.hears("loaded", "run_finished", "offloaded")
        node.restore(GPU, "w@2")
        node.run(GPU, "w@2", [ask(9, 1)])
        await recorder.hears("restored", "run_finished")
        assert len({answer.body for answer in recorder.answers}) == 1
        assert {each.model: each.device_bytes > 0 for each in node.processes()} == {
            "w@1": False,
            "w@2": True,
            "w@3": False,
        }
        # What is known not to fit is refused before anything is started for it.
        node.load(GPU, launch("Holder"))
        told = await recorder.hears("load_failed")
        assert (told.kind, told.memory_bytes) == (FailureKind.OUT_OF_MEMORY, 8 * MIB)
        node.load(GPU, launch("Holder"))
        told = await recorder.hears("load_failed")
        assert (told.kind, told.memory_bytes) == (FailureKind.OUT_OF_MEMORY, 8 * MIB)
        assert told.reason == f"takes 8 MiB, but its GPU has {told.reason.split('GPU has ')[1]}"


@story
async def test_a_modelled_bus_makes_copies_take_their_time(recorder: Recorder) -> None:
    node = LocalNode(virtual_gpus=1, memory_bytes=20 * MIB, copy_bandwidth=80 * MIB)  # 8 MiB: 0.1 s
    await node.start(recorder)
    try:
        node.load(GPU, launch("Holder"))
        node.offload(GPU, "Holder@1")
        node.restore(GPU, "Holder@1")
        await recorder.until(lambda: len(recorder.told) == 3)
        assert recorder.whats == ["loaded", "offloaded", "restored"]
        assert all(told.seconds >= 0.1 for told in recorder.told)
    finally:
        await node.stop()


@story
async def test_a_function_may_park_itself(recorder: Recorder) -> None:
    async with running(recorder) as node:
        node.load(GPU, hooked())
        node.offload(GPU, "Hooked@1")
        node.restore(GPU, "Hooked@1")
        await recorder.hears("loaded", "offloaded", "restored")
        assert await answer(recorder, node, "Hooked@1", 0) == ["offload", "restore cpu"]


@pytest.mark.parametrize(
    ("how", "told", "reason"),
    [
        ("raise", ["offloaded", "process_lost"], "RuntimeError: no offload"),
        ("memory", ["process_lost"], "MemoryError"),
        ("kill", ["process_lost"], "killed by SIGKILL"),
        ("exit", ["process_lost"], "exited with code 3; it last printed: leaving"),
        ("hang", ["process_lost"], "was not done offloading within 0.2 s: raise load_timeout"),
    ],
)
@story
async def test_offloads_that_fail(recorder: Recorder, how: str, told: list[str], reason: str) -> None:
    async with running(recorder) as node:
        node.load(GPU, hooked(OFFLOAD=how))
        await recorder.hears("loaded")
        if how == "hang":
            hurry(node)
        (report,) = node.processes()
        node.offload(GPU, "Hooked@1")
        node.load(GPU, launch("Echo"))  # waits until the memory is free
        await recorder.until(lambda: "loaded" in recorder.whats)
        assert recorder.whats == [*told, "loaded"]
        assert recorder.told[-2].reason == reason
        if how == "raise":  # parking it is of no use: it freed nothing
            assert (recorder.told[0].memory_bytes, recorder.told[0].host_bytes) == (report.device_bytes, 0)
        assert not psutil.pid_exists(report.pid)
        assert [each.model for each in node.processes()] == ["Echo@1"]
        recorder.told.clear()
        node.offload(GPU, "Hooked@1")  # decided before it was known
        node.restore(GPU, "Hooked@1")
        failed = await recorder.hears("load_failed")
        assert failed.reason == "Hooked@1 has no process on local/virtual:0"


@pytest.mark.parametrize(
    ("how", "kind", "reason"),
    [
        ("raise", FailureKind.ERROR, "RuntimeError: no restore"),
        ("memory", FailureKind.OUT_OF_MEMORY, "MemoryError"),
        ("kill", FailureKind.CRASH, "killed by SIGKILL"),
        ("hang", FailureKind.HANG, "was not done restoring within 0.2 s: raise load_timeout"),
    ],
)
@story
async def test_restores_that_fail(recorder: Recorder, how: str, kind: FailureKind, reason: str) -> None:
    async with running(recorder) as node:
        node.load(GPU, hooked(RESTORE=how))
        node.offload(GPU, "Hooked@1")
        await recorder.hears("loaded", "offloaded")
        if how == "hang":
            hurry(node)
        node.restore(GPU, "Hooked@1")
        node.run(GPU, "Hooked@1", [ask(1, 0)])
        await recorder.until(lambda: len(recorder.told) == 2)
        assert recorder.whats == ["load_failed", "run_failed"]
        failed = recorder.told[0]
        assert (failed.model, failed.kind, failed.reason) == ("Hooked@1", kind, reason)
        assert node.processes() == []
        node.load(GPU, hooked())
        await recorder.until(lambda: recorder.whats[-1] == "loaded")


@story
async def test_who_loses_track_of_a_model_loses_its_process(recorder: Recorder) -> None:
    async with running(recorder) as node:
        for wrong, expected in (("run", "run_failed"), ("offload", "process_lost"), ("restore", "load_failed")):
            node.load(GPU, hooked())
            await recorder.hears("loaded")
            if wrong != "restore":
                node.offload(GPU, "Hooked@1")
                await recorder.hears("offloaded")
            match wrong:
                case "run":
                    node.run(GPU, "Hooked@1", [ask(1, 0)])
                case "offload":
                    node.offload(GPU, "Hooked@1")
                case "restore":
                    node.restore(GPU, "Hooked@1")
            told = await recorder.hears(expected)
            state = "ready" if wrong == "restore" else "parked"
            assert told.reason == f"Hooked@1 was to {wrong} while {state}"
            assert node.processes() == []


@story
async def test_a_parked_process_that_dies_is_reported_and_leaves_nothing(recorder: Recorder) -> None:
    async with running(recorder) as node:
        node.load(GPU, hooked())
        node.offload(GPU, "Hooked@1")
        await recorder.hears("loaded", "offloaded")
        os.kill(node.processes()[0].pid, signal.SIGKILL)
        told = await recorder.hears("process_lost")
        assert (told.model, told.reason) == ("Hooked@1", "killed by SIGKILL")
        assert node.processes() == []


@story
async def test_a_stop_ends_parked_and_moving_processes(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "GRACE_S", 0.2)
    async with running(recorder, gpus=2) as node:
        node.load(GPU, launch("Echo"))
        node.offload(GPU, "Echo@1")
        node.load("local/virtual:1", hooked(OFFLOAD="hang"))
        await recorder.until(lambda: len(recorder.told) == 3)
        node.offload("local/virtual:1", "Hooked@1")
        pids = [each.pid for each in node.processes()]
        assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


@story
async def test_a_run_goes_on_while_another_model_is_loaded(recorder: Recorder) -> None:
    async with running(recorder) as node:
        node.load(GPU, launch("Numbers"))
        await recorder.hears("loaded")
        node.run(GPU, "Numbers@1", [ask(1, -1)])  # endless
        await recorder.until(lambda: recorder.answers)
        node.load(GPU, launch("Echo"))
        node.run(GPU, "Echo@1", [ask(2, 0)])
        node.unload(GPU, "Numbers@1")
        assert (await recorder.hears("loaded")).model == "Echo@1"
        node.cancel(1)
        await recorder.until(lambda: len(recorder.told) == 2)
        assert [told.model for told in recorder.told] == ["Numbers@1", "Echo@1"]
        assert [operation.model for operation in node.processes()] == ["Echo@1"]


@story
async def test_swaps_leave_memory_where_it_was(recorder: Recorder) -> None:
    async with with_torch(recorder) as node:
        node.load(GPU, weights())
        await recorder.hears("loaded")
        for swaps in (3, 50):
            for _ in range(swaps):
                node.offload(GPU, "w@1")
                node.restore(GPU, "w@1")
            await recorder.until(lambda swaps=swaps: len(recorder.told) == 2 * swaps)
            assert recorder.whats == ["offloaded", "restored"] * swaps
            recorder.told.clear()
            (report,) = node.processes()
            if swaps == 3:
                before_bytes = report.private_bytes
        assert report.private_bytes == pytest.approx(before_bytes, rel=0.05)
        node.unload(GPU, "w@1")

        for swaps in (3, 30):
            for _ in range(swaps):
                node.load(GPU, weights())
                node.unload(GPU, "w@1")
            await recorder.until(lambda swaps=swaps: len(recorder.told) == swaps)
            assert recorder.whats == ["loaded"] * swaps
            recorder.told.clear()
            while node.processes():
                await asyncio.sleep(0.01)
            if swaps == 3:
                before_bytes = psutil.Process().memory_full_info().uss
        assert psutil.Process().memory_full_info().uss == pytest.approx(before_bytes, rel=0.05)


def test_history_is_bounded_and_forgets_who_did_nothing_for_longest() -> None:
    history = History()
    parts = LoadParts(process_s=0.1, import_s=0.2, load_s=0.3)
    history.first_ran("a", 1.0)  # nothing is known of its load
    assert history.report()["a"].last_load is None
    history.loaded("a", parts)
    for seconds in range(1, 41):
        history.took("a", Transition.LOAD, float(seconds))
    times = history.report()["a"].times[Transition.LOAD]
    assert (times.count, times.last_s, times.median_s) == (40, 40.0, 24.5)
    for number in range(MOST_MODELS):
        if number == 1:
            history.measured("a", 7)
        history.measured(f"m{number}", number)
    assert history.memory_bytes("a") == 7
    assert history.memory_bytes("m0") is None
    assert len(history.report()) == MOST_MODELS


@story
async def test_what_is_parked_waits_for_the_host_memory_of_what_is_forgotten_elsewhere(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "GRACE_S", 0.3)
    other = "local/virtual:1"
    async with running(recorder, gpus=2) as node:
        node.load(GPU, hooked(UNLOAD="hang"))
        node.offload(GPU, "Hooked@1")
        node.load(other, launch("Holder"))
        await recorder.until(lambda: len(recorder.told) == 3)
        recorder.told.clear()
        pid = next(each.pid for each in node.processes() if each.model == "Hooked@1")
        node.unload(GPU, "Hooked@1")  # takes its time
        node.offload(other, "Holder@1")
        node.load(other, launch("Echo"))
        assert node._lanes[other]._turns.copying is None
        assert (await recorder.hears("offloaded", "loaded")).model == "Echo@1"
        assert not psutil.pid_exists(pid)


@story
async def test_what_will_never_leave_holds_nobody_up(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "GRACE_S", 0.3)
    other = "local/virtual:1"
    async with running(recorder, gpus=2) as node:
        node.load(GPU, hooked(OFFLOAD="hang"))
        node.load(other, launch("Holder"))
        await recorder.hears("loaded", "loaded")
        node.offload(GPU, "Hooked@1")
        node.unload(GPU, "Hooked@1")
        node.offload(other, "Holder@1")
        assert node._lanes[other]._turns.copying is None
        node._lanes[GPU]._give_up()
        assert (await recorder.hears("offloaded")).model == "Holder@1"
