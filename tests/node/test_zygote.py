"""Processes from a zygote: ready beforehand, alike in what they share, and gone when they should be."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil
import pytest
from recording import FUNCTIONS, GPU, Recorder, ask, launch, running, story

from hotset.node import zygote as zygote_module
from hotset.node.manager import LocalNode
from hotset.node.zygote import ZygoteSource
from hotset.vocabulary import FailureKind


@asynccontextmanager
async def pooled(recorder: Recorder, *modules: str) -> AsyncIterator[tuple[LocalNode, ZygoteSource]]:
    """A node whose processes come from a zygote with these modules, which is ready."""
    source = ZygoteSource(pool_size=1)
    async with running(recorder, source=source) as node:
        source.prepare(sys.executable, modules)
        await until_ready(source)
        yield node, source


async def until_ready(source: ZygoteSource) -> None:
    """The wait is bounded by the story's minute."""
    while not source.ready(sys.executable):
        await asyncio.sleep(0.01)


class Questions:
    """Asks the process of model ``Forked@1``."""

    def __init__(self, node: LocalNode, recorder: Recorder) -> None:
        self._node, self._recorder, self._asked = node, recorder, 0

    async def ask(self, question: str) -> str:
        self._asked += 1
        answered = len(self._recorder.answers)
        self._node.run(GPU, "Forked@1", [ask(self._asked, question)])
        await self._recorder.until(lambda: len(self._recorder.answers) > answered)
        return self._recorder.answers[-1].body.decode().strip('"')


def forked(**changes: object):  # type: ignore[no-untyped-def]
    return launch("Forked", entry="forked:Forked", **changes)


@story
async def test_a_process_from_the_pool_has_the_imports_and_its_own_environment(recorder: Recorder) -> None:
    async with pooled(recorder, "colorsys") as (node, _):
        node.load(GPU, forked(env={"GREETING": "hi"}))
        questions = Questions(node, recorder)
        assert await questions.ask("colorsys") == "True"
        assert await questions.ask("env:GREETING") == "hi"
        # An import that asks for a GPU must not spoil CUDA for the forks.
        assert await questions.ask("env:PYTORCH_NVML_BASED_CUDA_CHECK") == "1"
        assert await questions.ask("env:CUDA_VISIBLE_DEVICES") == ""
        assert int(await questions.ask("parent")) != os.getpid()
        assert recorder.whats[0] == "loaded"


@story
async def test_a_fork_has_the_threads_of_its_device_the_server_or_its_function(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its zygote has one thread, and says so to the libraries it imports; a fork is not to keep that."""
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    async with pooled(recorder, "colorsys") as (node, _):
        questions = Questions(node, recorder)
        node.load(GPU, forked())
        assert await questions.ask("env:OMP_NUM_THREADS") == "3"
        assert await questions.ask("env:MKL_NUM_THREADS") == "8"
        node.unload(GPU, "Forked@1")
        node.load(GPU, forked(env={"OMP_NUM_THREADS": "2"}))
        assert await questions.ask("env:OMP_NUM_THREADS") == "2"


@story
async def test_forks_draw_different_random_numbers(recorder: Recorder) -> None:
    async with pooled(recorder) as (node, _):
        questions = Questions(node, recorder)
        drawn = set()
        for _ in range(3):
            node.load(GPU, forked())
            drawn.add(await questions.ask("random"))
            node.unload(GPU, "Forked@1")
        assert len(drawn) == 3


@story
async def test_variables_that_count_at_start_up_get_a_fresh_interpreter(recorder: Recorder) -> None:
    async with pooled(recorder) as (node, _):
        node.load(GPU, forked(env={"PYTHONHASHSEED": "1"}))
        assert int(await Questions(node, recorder).ask("parent")) == os.getpid()


@story
async def test_what_functions_import_is_imported_beforehand_for_the_next(recorder: Recorder) -> None:
    async with pooled(recorder) as (node, source):
        questions = Questions(node, recorder)
        node.load(GPU, forked(env={"IMPORTS": "PIL"}))
        assert await questions.ask("PIL") == "True"
        node.unload(GPU, "Forked@1")
        await until_ready(source)
        node.load(GPU, forked())
        assert await questions.ask("PIL") == "True"


@story
async def test_a_zygote_serves_until_the_one_that_imports_more_is_ready(recorder: Recorder) -> None:
    async with pooled(recorder) as (node, source):
        questions = Questions(node, recorder)
        first = source.zygote_pid(sys.executable)
        source.prepare(sys.executable, ("colorsys",))
        source.prepare(
            sys.executable, ("colorsys", "this_is_no_module")
        )  # the one that has imported half of it is given up
        assert not source.ready(sys.executable)
        node.load(GPU, forked())
        assert int(await questions.ask("parent")) == first
        await until_ready(source)
        node.unload(GPU, "Forked@1")
        node.load(GPU, forked())
        assert int(await questions.ask("parent")) == source.zygote_pid(sys.executable) != first
        assert await questions.ask("colorsys") == "True"
        while psutil.pid_exists(first):  # its last process is gone, and so is it
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("how", "reason"), [("leave", "exited with code 3"), ("kill", "killed by SIGKILL"), ("unused", "")]
)
@story
async def test_a_fork_dies_alone_and_its_status_is_known(recorder: Recorder, how: str, reason: str) -> None:
    async with pooled(recorder) as (node, source):
        if how == "unused":
            # The kernel, or somebody, takes a process that waits in the pool: nobody notices.
            zygote = psutil.Process(source.zygote_pid(sys.executable))
            while not (waiting := zygote.children()):
                await asyncio.sleep(0.01)
            waiting[0].kill()
            while zygote.children() in ([], waiting):  # the zygote forks another in its place
                await asyncio.sleep(0.01)
            node.load(GPU, forked())
            assert await Questions(node, recorder).ask("sys") == "True"
            return
        node.load(GPU, forked())
        await recorder.until(lambda: recorder.whats == ["loaded"])
        if how == "kill":
            os.kill(node.processes()[0].pid, signal.SIGKILL)
            await recorder.until(lambda: recorder.whats == ["loaded", "process_lost"])
        else:
            node.run(GPU, "Forked@1", [ask(1, "leave")])
            await recorder.until(lambda: recorder.whats == ["loaded", "run_failed"])
            assert recorder.told[-1].kind is FailureKind.CRASH
        assert reason in recorder.told[-1].reason
        node.load(GPU, forked())
        await recorder.until(lambda: recorder.whats[-1] == "loaded")


@story
async def test_a_zygote_that_dies_takes_its_forks_along_and_is_born_again(recorder: Recorder) -> None:
    async with pooled(recorder) as (node, source):
        for life in range(zygote_module.MOST_LIVES + 1):
            node.load(GPU, forked())
            await recorder.until(lambda life=life: recorder.whats.count("loaded") == life + 1)
            os.kill(source.zygote_pid(sys.executable), signal.SIGKILL)
            await recorder.until(lambda life=life: recorder.whats.count("process_lost") == life + 1)
            assert "killed by SIGKILL" in recorder.told[-1].reason
            node.load(GPU, forked())  # from a fresh interpreter: the next zygote is not ready yet
            await recorder.until(lambda life=life: recorder.whats.count("loaded") == life + 2)
            node.unload(GPU, "Forked@1")
            recorder.told.remove(recorder.told[-1])
            if life < zygote_module.MOST_LIVES:
                await until_ready(source)
        assert not source.ready(sys.executable)
        node.load(GPU, forked())
        assert int(await Questions(node, recorder).ask("parent")) == os.getpid()


@story
async def test_a_module_that_starts_threads_is_left_to_the_functions(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FUNCTIONS))
    # A program's own -P flag ignores the current folder, not PYTHONPATH.
    async with pooled(recorder, "starts_a_thread", "colorsys", "no_such_module") as (node, source):
        node.load(GPU, forked())
        questions = Questions(node, recorder)
        assert await questions.ask("colorsys") == "True"
        assert await questions.ask("starts_a_thread") == "False"
        born = source.zygote_pid(sys.executable)
        source.prepare(sys.executable, ("starts_a_thread", "no_such_module"))
        assert source.zygote_pid(sys.executable) == born, "it was tried, and is not tried again"


@story
async def test_nothing_is_left_when_the_node_stops(recorder: Recorder) -> None:
    others = set(psutil.Process().children(recursive=True))  # servers that other tests still need
    async with pooled(recorder, "colorsys") as (node, source):
        node.load(GPU, forked())
        await recorder.until(lambda: recorder.whats == ["loaded"])
        source.prepare(sys.executable, ("base64",))  # the old zygote lives on for the process it has
        family = list(set(psutil.Process().children(recursive=True)) - others)
        assert len(family) >= 3
    # The kernel kills the forks as their zygote goes, which takes it a moment.
    _, left = await asyncio.to_thread(psutil.wait_procs, family, 10)
    assert not [each for each in left if each.status() != psutil.STATUS_ZOMBIE]


@story
async def test_an_interpreter_that_is_none_costs_no_zygote(recorder: Recorder) -> None:
    async with pooled(recorder) as (node, source):
        source.prepare("/no/such/python", ())
        assert not source.ready("/no/such/python")
        node.load(GPU, forked(python="/no/such/python"))
        await recorder.until(lambda: recorder.whats == ["load_failed"])


@story
async def test_only_so_many_interpreters_have_one(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygote_module, "MOST_ZYGOTES", 1)
    async with pooled(recorder) as (_, source):
        source.prepare("another-python", ())
        assert not source.ready("another-python")
