"""Processes that wait with their GPU open: real forks of a real zygote, with a device that only pretends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from recording import FUNCTIONS, MIB, Recorder, ask, launch, story

from hotset.functions.http_envelope import PROCESS_ENTRY
from hotset.node import contexts as contexts_module
from hotset.node.devices.cuda import CudaDevice
from hotset.node.devices.device import OpensAhead
from hotset.node.devices.virtual import VirtualDevice
from hotset.node.interface import LaunchSpec
from hotset.node.manager import LocalNode
from hotset.node.zygote import ZygoteSource
from hotset.vocabulary import FailureKind, Gpu

FIRST, SECOND = "local/fake:0", "local/fake:1"
CONTEXT_BYTES = 2 * MIB


class FakeDevice(VirtualDevice):
    """Something to open; the process that has is told by ``fake_driver``."""

    opens_ahead = OpensAhead("fake_driver", "fake_driver:open_device", CONTEXT_BYTES)

    def __init__(self, index: int, free_bytes: int | None) -> None:
        super().__init__(Gpu(gpu_id=f"local/fake:{index}", memory_bytes=64 * MIB), threads=1)
        self.free = free_bytes
        self.listed: dict[int, int] = {}
        self.why_lost: str | None = None
        self._index = index

    def environment(self) -> Mapping[str, str]:
        return {"CUDA_VISIBLE_DEVICES": f"GPU-{self._index}"}

    def free_bytes(self) -> int | None:
        return self.free

    def process_bytes(self, pid: int) -> int | None:
        return self.listed.get(pid)

    def lost(self) -> str | None:
        return self.why_lost


class World:
    """A node with two such devices, whose zygote is ready."""

    def __init__(self, node: LocalNode, source: ZygoteSource, recorder: Recorder, devices: list[FakeDevice]) -> None:
        self.node, self.source, self.recorder = node, source, recorder
        self.first, self.second = devices
        self._asked = 0

    def waiting(self, gpu: str = FIRST) -> list[int]:
        return self.node.waiting_with(gpu)

    async def until_waiting(self, gpu: str = FIRST, but: int | None = None, count: int = 1) -> int:
        """The process id of the first, which is not ``but``."""
        await until(lambda: len(self.waiting(gpu)) == count and but not in self.waiting(gpu))
        return self.waiting(gpu)[0]

    async def load(self, spec: LaunchSpec, gpu: str = FIRST) -> int:
        """Returns its process id."""
        self.node.load(gpu, spec)
        await self.recorder.hears("loaded")
        return next(pid for pid, model in self.node.pids().items() if model == spec.model)

    async def unload(self, spec: LaunchSpec, gpu: str = FIRST) -> None:
        self.node.unload(gpu, spec.model)
        await until(lambda: not self.node._lanes[gpu]._alive)

    async def ask(self, spec: LaunchSpec, question: str, gpu: str = FIRST) -> str:
        self._asked += 1
        self.node.run(gpu, spec.model, [ask(self._asked, question)])
        await self.recorder.hears("run_finished")
        return self.recorder.answers[-1].body.decode().strip('"')


async def until(holds: Callable[[], object]) -> None:
    """The wait is bounded by the story's minute."""
    while not holds():
        await asyncio.sleep(0.005)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that says what the driver does, and is told what it did."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(FUNCTIONS), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("FAKE_DRIVER", str(tmp_path))
    (tmp_path / "does").write_text("open")
    (tmp_path / "opened").touch()
    return tmp_path


def opened(driver: Path) -> list[str]:
    """The GPUs that were opened, one after the other."""
    return (driver / "opened").read_text().split()


@asynccontextmanager
async def world(
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    *,
    size: int = 1,
    deployed: bool = True,
    free_bytes: int | None = None,
) -> AsyncIterator[World]:
    devices = [FakeDevice(0, free_bytes), FakeDevice(1, free_bytes)]
    monkeypatch.setattr("hotset.node.manager.virtual_devices", lambda *_, **__: devices)
    source = ZygoteSource()
    node = LocalNode(virtual_gpus=2, memory_bytes=MIB, source=source, pool_contexts=size)
    await node.start(recorder)
    try:
        node.prepare(uses() if deployed else launch("Forked", frameworks=("colorsys",)))
        await until(lambda: source.ready(sys.executable))
        yield World(node, source, recorder, devices)
    finally:
        await node.stop()


def uses(**changes: object) -> LaunchSpec:
    """A function that uses the device's framework."""
    return launch("Forked", **({"entry": "forked:Forked", "frameworks": ("fake_driver",)} | changes))


@story
async def test_a_load_gets_a_process_that_has_its_gpu_open_and_no_others(
    recorder: Recorder, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(recorder, monkeypatch) as it:
        waiting = {gpu: await it.until_waiting(gpu) for gpu in (FIRST, SECOND)}
        assert waiting[FIRST] != waiting[SECOND]
        assert it.node.processes() == []
        assert it.node.pids() == {}
        assert await it.load(uses(), SECOND) == waiting[SECOND]
        assert await it.ask(uses(), "opened", SECOND) == "GPU-1"
        assert it.waiting(FIRST) == [waiting[FIRST]]
        # Its place is taken again, and the next one gets that.
        following = await it.until_waiting(SECOND, but=waiting[SECOND])
        assert await it.load(uses(model="Another@1"), SECOND) == following
        # With nothing open for it a load takes what there is, and never what has another GPU open.
        (driver / "does").write_text("wait")
        third = await it.load(uses(model="Third@1"), FIRST)
        assert third == waiting[FIRST]
        await until(lambda: opened(driver).count("GPU-0") == 2)
        assert await it.load(uses(model="Fourth@1"), FIRST) not in it.waiting(SECOND)
        assert await it.ask(uses(model="Fourth@1"), "opened") == ""
        assert await it.ask(uses(model="Fourth@1"), "env:CUDA_VISIBLE_DEVICES") == "GPU-0"
        (driver / "does").write_text("open")
        await it.until_waiting(FIRST)


@story
async def test_who_does_not_use_the_framework_or_wants_other_variables_gets_none(
    recorder: Recorder, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(recorder, monkeypatch) as it:
        pid = await it.until_waiting()
        others = [
            uses(model="Plain@1", frameworks=("numpy",)),
            uses(model="Debugged@1", env={"CUDA_LAUNCH_BLOCKING": "1"}),
            uses(model="Hashed@1", env={"PYTHONHASHSEED": "1"}),
        ]
        for spec in others:
            assert await it.load(spec) != pid
            assert await it.ask(spec, "opened") == ""
        assert await it.ask(others[1], "env:CUDA_LAUNCH_BLOCKING") == "1"
        assert not it.node._contexts[FIRST].serves(uses(entry=PROCESS_ENTRY))
        named = uses(model="Named@1", env={"GREETING": "hi"})
        assert await it.load(named) == pid
        assert await it.ask(named, "env:GREETING") == "hi"


@story
async def test_nothing_is_opened_beside_the_load_that_took_one(
    recorder: Recorder, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(recorder, monkeypatch) as it:
        pid = await it.until_waiting()
        await it.until_waiting(SECOND)
        hangs = launch("LoadTrouble", frameworks=("fake_driver",), env={"LOAD": "hang"})
        it.node.load(FIRST, hangs)
        await until(lambda: pid in it.node.pids())
        # Meanwhile another GPU's is taken and replaced, for which the pool is emptied and filled.
        fills: list[bool] = []
        await it.load(uses(), SECOND)
        it.source.watch(lambda: fills.append(True))
        await until(lambda: len(opened(driver)) == 3 and fills)
        assert opened(driver).count("GPU-0") == 1
        # A load that fails is over, too.
        os.kill(pid, signal.SIGKILL)
        assert (await recorder.hears("load_failed")).kind is FailureKind.CRASH
        await it.until_waiting(but=pid)
        assert opened(driver).count("GPU-0") == 2


@story
async def test_where_the_driver_lists_no_process_the_context_still_counts_in_its_models_size(
    recorder: Recorder, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (driver / "does").write_text("wait")
    async with world(recorder, monkeypatch, free_bytes=40 * MIB) as it:
        await until(lambda: len(opened(driver)) == 2)
        it.first.free = 37 * MIB
        (driver / "does").write_text("open")
        pid = await it.until_waiting()
        spec = launch("Holder", frameworks=("fake_driver",))
        assert await it.load(spec) == pid
        (report,) = it.node.processes()
        assert report.device_bytes == (8 + 3) * MIB
        # Where the driver does list it, its figure is all there is.
        other = await it.until_waiting(but=pid)
        it.first.listed = {other: 30 * MIB}
        await it.load(uses())
        assert {each.device_bytes for each in it.node.processes()} == {11 * MIB, 30 * MIB}
        # With its process the model's account is gone, context and all; what waits is on none.
        await it.until_waiting(but=other)
        os.kill(pid, signal.SIGKILL)
        await recorder.hears("process_lost")
        assert it.node._lanes[FIRST]._booked_free_bytes() == (64 - 30) * MIB


@story
async def test_nothing_is_opened_where_there_is_no_room(
    recorder: Recorder, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(recorder, monkeypatch, deployed=False) as it:
        assert opened(driver) == []  # nobody is known to use it
        it.first.free = CONTEXT_BYTES - 1
        it.node.prepare(uses())
        await it.until_waiting(SECOND)
        assert opened(driver) == ["GPU-1"]
        # It is looked at again after a load.
        it.first.free = CONTEXT_BYTES
        await it.load(uses(memory_bytes=MIB))
        await it.until_waiting(FIRST)


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("raise", "RuntimeError: CUDA error: out of memory"),
        ("exit", "exited with code 3"),
        ("babble", "what it said cannot be read"),
        ("wait", "did not open within 0.3 s"),
    ],
)
@story
async def test_a_gpu_that_cannot_be_opened_is_tried_again_but_not_for_ever(
    recorder: Recorder,
    driver: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    does: str,
    reason: str,
) -> None:
    monkeypatch.setattr(contexts_module, "FIRST_BACK_OFF_S", 0.01)
    monkeypatch.setattr(contexts_module, "MOST_FAILURES", 3)
    monkeypatch.setattr(contexts_module, "OPENS_WITHIN_S", 0.3 if does == "wait" else 30)
    (driver / "does").write_text(does)
    caplog.set_level(logging.WARNING, "hotset.node")

    def said(gpu: str) -> list[str]:
        return [text for text in caplog.messages if gpu in text]

    async with world(recorder, monkeypatch) as it:
        await until(lambda: len(said(FIRST)) == len(said(SECOND)) == 2)
        first, last = said(FIRST)
        assert first == f"a process that waited with {FIRST} open, or was to, is gone ({reason}): another is tried"
        assert last == f"no process waits with {FIRST} open any more: 3 in a row failed ({reason})"
        assert sorted(opened(driver)) == 3 * ["GPU-0"] + 3 * ["GPU-1"]
        await it.load(uses())  # loads do without
        assert await it.ask(uses(), "opened") == ""
        assert it.waiting() == []
        assert len(opened(driver)) == 6


@story
async def test_a_torch_without_cuda_says_so_once(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The opener of CUDA devices, as far as it goes here."""
    torch = pytest.importorskip("torch")
    if torch.version.cuda is not None:
        pytest.skip("this torch knows CUDA")
    monkeypatch.setattr(FakeDevice, "opens_ahead", CudaDevice.opens_ahead)
    monkeypatch.setattr(contexts_module, "MOST_FAILURES", 1)
    async with world(recorder, monkeypatch, deployed=False) as it:
        it.node.prepare(uses(frameworks=("torch",)))
        await until(lambda: len(caplog.messages) == 2)
        assert all("Torch not compiled with CUDA enabled" in text for text in caplog.messages)
        assert it.waiting() == it.waiting(SECOND) == []


@story
async def test_one_that_somebody_kills_is_replaced(
    recorder: Recorder, driver: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(contexts_module, "FIRST_BACK_OFF_S", 0.01)
    caplog.set_level(logging.WARNING, "hotset.node")
    async with world(recorder, monkeypatch) as it:
        await it.until_waiting(SECOND)
        pid = await it.until_waiting()
        os.kill(pid, signal.SIGKILL)
        following = await it.until_waiting(but=pid)
        assert [text for text in caplog.messages if "killed by SIGKILL" in text] == caplog.messages
        assert len(caplog.messages) == 1
        assert await it.load(uses()) == following
        assert it.node._contexts[FIRST]._failures == 0
        # With the zygote all go; the one that the next load starts has them again.
        family = [await it.until_waiting(), await it.until_waiting(SECOND)]
        os.kill(it.source.zygote_pid(sys.executable), signal.SIGKILL)
        await recorder.hears("process_lost")
        await until(lambda: not any(map(psutil.pid_exists, family)))
        assert it.waiting() == []
        await it.load(uses())
        await it.until_waiting(but=family[0])
        await it.until_waiting(SECOND, but=family[1])


@story
async def test_a_failure_of_the_gpu_costs_those_that_have_it_open(
    recorder: Recorder, driver: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(recorder, monkeypatch) as it:
        broken = launch("Troubled", entry="fake_driver:Broken", frameworks=("fake_driver",))
        other = await it.until_waiting(SECOND)
        await it.until_waiting()
        await it.load(broken)
        pid = await it.until_waiting()
        it.node.run(FIRST, broken.model, [ask(1, "x")])
        assert (await recorder.hears("run_failed")).kind is FailureKind.DEVICE
        await it.until_waiting(but=pid)
        assert it.waiting(SECOND) == [other]
        # One that is lost is nobody's any more.
        await it.load(broken)
        it.first.why_lost = "fell off the bus"
        it.node.run(FIRST, broken.model, [ask(2, "x")])
        await recorder.hears("run_failed", "gpu_lost")
        assert it.waiting() == []
        await until(lambda: not it.node._contexts[FIRST]._processes)
        assert caplog.messages == [], "nobody is to hear of processes that were ended"


@story
async def test_with_several_interpreters_those_of_the_latest_loads_wait(
    recorder: Recorder, driver: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    elsewhere = uses(model="Elsewhere@1", python=str(python))
    async with world(recorder, monkeypatch) as it:
        pid = await it.until_waiting()
        it.node.prepare(elsewhere)
        following = await it.until_waiting(but=pid)
        assert not psutil.pid_exists(pid)
        assert psutil.Process(following).ppid() == it.source.zygote_pid(str(python))
        # It takes one load of the other interpreter, which gets none, to have it back.
        assert await it.load(uses()) != following
        latest = await it.until_waiting(but=following)
        assert psutil.Process(latest).ppid() == it.source.zygote_pid(sys.executable)
        assert len(it.waiting()) == 1


@story
async def test_two_places_are_shared_by_two_interpreters(
    recorder: Recorder, driver: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    async with world(recorder, monkeypatch, size=2) as it:
        await it.until_waiting(count=2)
        it.node.prepare(uses(python=str(python)))
        zygotes = {it.source.zygote_pid(each) for each in (sys.executable, str(python))}
        await until(lambda: {psutil.Process(each).ppid() for each in it.waiting()} == zygotes)
        assert len(it.waiting()) == 2


@story
async def test_they_are_replaced_with_their_zygote(
    recorder: Recorder, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(recorder, monkeypatch) as it:
        pid = await it.until_waiting()
        it.source.prepare(sys.executable, ("colorsys",))
        assert it.waiting() == [pid], "it serves until the next is there"
        following = await it.until_waiting(but=pid)
        assert psutil.Process(following).ppid() == it.source.zygote_pid(sys.executable)
        assert await it.load(uses()) == following
        assert await it.ask(uses(), "colorsys") == "True"


@story
async def test_none_is_left_when_the_node_stops(
    recorder: Recorder, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(recorder, monkeypatch) as it:
        pids = [await it.until_waiting(FIRST), await it.until_waiting(SECOND)]
        (driver / "does").write_text("wait")
        await it.load(uses())
        await until(lambda: len(opened(driver)) == 3)  # and one is about to open
        opening = [each.spawned.process.pid for each in it.node._contexts[FIRST]._processes]
        assert len(opening) == 1
    assert not any(map(psutil.pid_exists, pids + opening))
    assert it.source._watching == []


@story
async def test_none_waits_where_none_is_wanted(
    recorder: Recorder, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(recorder, monkeypatch, size=0) as it:
        await it.load(uses())
        assert await it.ask(uses(), "opened") == ""
        assert it.waiting() == []
        assert opened(driver) == []
