"""While one model leaves a GPU, the process of the next one starts and imports its function."""

from __future__ import annotations

import asyncio
import os
import signal

import psutil
import pytest
from recording import GPU, Recorder, ask, launch, running, story

from hotset.node.manager import LocalNode
from hotset.node.process import ModelProcess, ProcessState
from hotset.vocabulary import FailureKind


async def prepared(recorder: Recorder, node: LocalNode, **changes: object) -> ModelProcess:
    """The process of ``changes``'s model, started while a model that takes its time leaves."""
    node.load(GPU, launch("Hooked", entry="hooked:Hooked", env={"UNLOAD": "hang"}))
    await recorder.hears("loaded")
    node.unload(GPU, "Hooked@1")
    node.load(GPU, launch("Echo", **changes))
    ahead = node._lanes[GPU]._ahead
    assert ahead is not None
    assert ahead.state is ProcessState.STARTING
    return ahead


@story
async def test_the_next_process_has_imported_its_function_when_its_turn_comes(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotset.node.process.GRACE_S", 1.0)
    async with running(recorder) as node:
        process = await prepared(recorder, node)
        node.run(GPU, "Echo@1", [ask(1, "x")])
        loaded = await recorder.hears("loaded")
        assert await recorder.hears("run_finished")
        (report,) = node.processes()
        assert report.pid == process.pid
        parts = node.history()["Echo@1"].last_load
        assert parts is not None
        assert parts.ahead
        assert parts.import_s > 0
        assert loaded.seconds < 1.4  # it did not wait for the other one, which takes a second more
        # With nobody to wait for, nothing is done ahead.
        node.unload(GPU, "Echo@1")
        while node.processes() or node._lanes[GPU]._alive:
            await asyncio.sleep(0.01)
        node.load(GPU, launch("Echo"))
        await recorder.hears("loaded")
        parts = node.history()["Echo@1"].last_load
        assert parts is not None
        assert not parts.ahead


@story
async def test_one_that_dies_before_its_turn_is_replaced(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotset.node.process.GRACE_S", 1.0)
    async with running(recorder) as node:
        process = await prepared(recorder, node)
        os.kill(process.pid, signal.SIGKILL)
        loaded = await recorder.hears("loaded")
        assert loaded.model == "Echo@1"
        (report,) = node.processes()
        assert report.pid != process.pid


@story
async def test_one_that_cannot_import_is_reported_once_when_its_turn_comes(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotset.node.process.GRACE_S", 0.5)
    async with running(recorder) as node:
        await prepared(recorder, node, entry="basic:Nobody")
        failed = await recorder.hears("load_failed")
        assert failed.kind is FailureKind.ERROR
        assert "Nobody" in failed.reason
        assert recorder.told == []
        assert node.processes() == []


@story
async def test_a_stop_ends_it_too(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotset.node.process.GRACE_S", 0.3)
    async with running(recorder) as node:
        pid = (await prepared(recorder, node)).pid
    assert not psutil.pid_exists(pid)
    assert recorder.told == []
