"""The local node with real processes: what is reported, in what order, and what is left behind (nothing)."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from recording import GPU, MIB, STUB, Recorder, ask, launch, running, story

from hotset.errors import ConfigurationError, NodeError
from hotset.node import process as process_module
from hotset.node.frames import ANSWER_PREFIX, HEADER, SECONDS, SLOT_REFERENCE, Kind
from hotset.node.history import Transition
from hotset.node.interface import Call, Node
from hotset.node.manager import LocalNode
from hotset.node.spawner import Spawner
from hotset.vocabulary import FailureKind


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@story
async def test_load_run_unload(recorder: Recorder) -> None:
    async with running(recorder, gpus=2) as node:
        as_node: Node = node
        assert [gpu.gpu_id for gpu in as_node.gpus] == [GPU, "local/virtual:1"]
        node.load(GPU, launch("Holder", env={"GREETING": "world"}))
        node.run(GPU, "Holder@1", [ask(1, "hello"), ask(2, "bye")])
        assert recorder.told == []  # never from inside a call
        await recorder.hears("loaded", "run_finished")
        assert [answer.body for answer in recorder.answers] == [b'"cpu hello world"', b'"cpu bye world"']
        assert all(answer.status == 200 and answer.inference_s > 0 for answer in recorder.answers)
        await recorder.until(lambda: len(recorder.lines) == 2)
        assert recorder.lines == [("Holder@1", "predicting hello"), ("Holder@1", "predicting bye")]

        (report,) = node.processes()
        assert (report.gpu_id, report.model, report.device_bytes) == (GPU, "Holder@1", 8 * MIB)
        assert report.private_bytes > 8 * MIB
        assert 0 < node.utilisation()[GPU] < 1
        assert node.utilisation()["local/virtual:1"] == 0
        assert node.healthy()

        node.unload(GPU, "Holder@1")
        node.load(GPU, launch("Echo"))
        told = await recorder.hears("loaded")
        assert (told.model, gone(report.pid)) == ("Echo@1", True)
        known = node.history()
        leaving_s = known["Holder@1"].times[Transition.UNLOAD].last_s
        own_s = known["Echo@1"].times[Transition.LOAD].last_s
        assert told.seconds > max(leaving_s, own_s), "its callers waited for both"
    assert node.processes() == []


@story
async def test_measured_memory_decides_what_fits(recorder: Recorder) -> None:
    async with running(recorder) as node:  # room for two Holders, not for three
        for number in (1, 2, 3):
            node.load(GPU, launch("Holder", model=f"h@{number}"))
        told = await recorder.hears("loaded", "loaded", "load_failed")
        assert (told.model, told.kind, told.memory_bytes) == ("h@3", FailureKind.OUT_OF_MEMORY, 8 * MIB)
        assert told.reason == "takes 8.0 MiB once loaded, but its GPU had 4.0 MiB free"
        assert sum(report.device_bytes for report in node.processes()) == 16 * MIB
        node.unload(GPU, "h@1")
        node.load(GPU, launch("Holder", model="h@3"))
        await recorder.hears("loaded")


@story
async def test_a_batching_function_gets_its_calls_together(recorder: Recorder) -> None:
    async with running(recorder) as node:
        node.load(GPU, launch("Batch", max_batch=8))
        node.run(GPU, "Batch@1", [ask(7, 70), ask(8, "no number"), ask(9, 90)])
        await recorder.hears("loaded", "run_finished")
        first, bad, last = recorder.answers
        assert (first.body, last.body) == (b"[70,2]", b"[90,2]")
        assert (bad.request_id, bad.status) == (8, 400)
        assert b"number" in bad.body


@story
async def test_a_stream_arrives_in_chunks_and_is_closed_when_its_client_leaves(recorder: Recorder) -> None:
    async with running(recorder) as node:
        node.load(GPU, launch("Numbers"))
        node.run(GPU, "Numbers@1", [ask(1, 3)])
        await recorder.hears("loaded", "run_finished")
        assert [answer.body.strip() for answer in recorder.answers] == [b"0", b"1", b"2", b""]
        assert [answer.final for answer in recorder.answers] == [False, False, False, True]

        # Endless: one is cancelled while it runs, the next before it has begun.
        recorder.answers.clear()
        node.run(GPU, "Numbers@1", [ask(2, -1)])
        node.run(GPU, "Numbers@1", [ask(3, -1)])
        node.cancel(3)
        node.cancel(99)
        await recorder.until(lambda: len(recorder.answers) > 10)
        node.cancel(2)
        await recorder.hears("run_finished", "run_finished")
        assert [answer.request_id for answer in recorder.answers if answer.final] == [2, 3]
        await recorder.until(lambda: recorder.lines.count(("Numbers@1", "closed")) >= 2)


@pytest.mark.parametrize(
    ("what", "kind", "reason"),
    [
        ("kill", FailureKind.CRASH, "killed by SIGKILL"),
        ("crash", FailureKind.CRASH, "killed by SIGSEGV; it last printed: about to read address 0"),
        ("leave", FailureKind.CRASH, "exited with code 3; it last printed: no newline at the end"),
        ("device_error", FailureKind.DEVICE, "RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("garbage", FailureKind.CRASH, "sent a frame of 4294967295 bytes, more than any may have"),
        ("close_socket", FailureKind.CRASH, "killed by SIGKILL"),
    ],
)
@story
async def test_a_process_dies_alone(recorder: Recorder, what: str, kind: FailureKind, reason: str) -> None:
    async with running(recorder) as node:
        node.load(GPU, launch("Trouble"))
        node.load(GPU, launch("Echo"))
        await recorder.hears("loaded", "loaded")
        node.run(GPU, "Trouble@1", [ask(1, "fine"), ask(2, what), ask(3, "fine")])
        node.run(GPU, "Echo@1", [Call(request_id=4, body=b"still here", content_type="application/octet-stream")])
        node.run(GPU, "Trouble@1", [ask(5, "fine")])
        await recorder.until(lambda: len(recorder.told) == 3)
        assert recorder.whats == ["run_failed", "run_finished", "run_failed"]
        failed, refused = recorder.told[0], recorder.told[2]
        assert (failed.kind, failed.reason) == (kind, reason)
        assert set(failed.answered) <= {1}
        assert [answer.request_id for answer in recorder.answers if answer.body == b"still here"] == [4]
        assert refused.reason == "Trouble@1 has no process on local/virtual:0"
        assert [report.model for report in node.processes()] == ["Echo@1"]
        assert node.healthy()


@story
async def test_an_idle_process_that_is_killed_is_reported_as_lost(recorder: Recorder) -> None:
    async with running(recorder) as node:
        node.load(GPU, launch("Echo"))
        await recorder.hears("loaded")
        os.kill(node.processes()[0].pid, signal.SIGKILL)
        told = await recorder.hears("process_lost")
        assert (told.model, told.reason) == ("Echo@1", "killed by SIGKILL")
        node.unload(GPU, "Echo@1")  # the core had decided that before it heard
        node.load(GPU, launch("Echo"))
        await recorder.hears("loaded")


@pytest.mark.parametrize("what", ["hang", "hang_in_c"])
@story
async def test_a_hanging_run_is_killed(recorder: Recorder, what: str) -> None:
    async with running(recorder) as node:
        node.load(GPU, launch("Trouble", timeout_s=0.2))
        node.run(GPU, "Trouble@1", [ask(1, "fine")])
        node.run(GPU, "Trouble@1", [ask(2, what)])
        told = await recorder.hears("loaded", "run_finished", "run_failed")
        assert told.kind is FailureKind.HANG
        assert told.reason == "did not finish a run within 0.2 s: make predict faster or raise timeout"


@pytest.mark.parametrize(
    ("what", "kind", "reason"),
    [
        ("raise", FailureKind.ERROR, "ValueError: no weights"),
        ("exit", FailureKind.CRASH, "exited with code 7"),
        ("hang", FailureKind.HANG, "did not load within 2 s: make load faster or raise load_timeout"),
        ("memory", FailureKind.OUT_OF_MEMORY, "MemoryError"),
    ],
)
@story
async def test_loads_that_fail(recorder: Recorder, what: str, kind: FailureKind, reason: str) -> None:
    async with running(recorder) as node:
        node.load(GPU, launch("LoadTrouble", env={"LOAD": what}, load_timeout_s=2.0 if what == "hang" else 60.0))
        told = await recorder.hears("load_failed")
        assert (told.kind, told.reason) == (kind, reason)
        assert node.processes() == []
        if what == "raise":
            assert any("no weights" in line for _, line in recorder.lines)


@story
async def test_loads_that_cannot_begin(recorder: Recorder) -> None:
    async with running(recorder) as node:
        node.load(GPU, launch("Echo", entry="basic:Nobody"))
        assert (await recorder.hears("load_failed")).kind is FailureKind.ERROR
        node.load(GPU, launch("Echo", python="/nowhere/python"))
        told = await recorder.hears("load_failed")
        assert told.reason == "/nowhere/python cannot be run (No such file or directory): deploy Echo@1 again"
        assert node.healthy()
        node.load(GPU, launch("Echo"))
        node.load(GPU, launch("Echo"))
        told = await recorder.hears("loaded", "load_failed")
        assert told.reason == "Echo@1 is on local/virtual:0 already"
        node.run(GPU, "Echo@1", [])
        await recorder.hears("run_finished")


@story
async def test_a_stubborn_process_is_killed_and_a_busy_one_does_not_delay_the_end(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "GRACE_S", 0.1)
    async with running(recorder, gpus=2) as node:
        node.load(GPU, launch("Stubborn"))
        node.unload(GPU, "Stubborn@1")
        node.load(GPU, launch("Echo"))
        await recorder.hears("loaded", "loaded")
        node.load("local/virtual:1", launch("Trouble"))
        await recorder.hears("loaded")
        node.run("local/virtual:1", "Trouble@1", [ask(1, "hang")])
        pids = [report.pid for report in node.processes()]
    assert len(pids) == 2
    assert all(map(gone, pids))
    assert recorder.told == []


@story
async def test_what_a_function_started_ends_with_its_process(recorder: Recorder) -> None:
    async with running(recorder) as node:
        node.load(GPU, launch("Trouble"))
        node.run(GPU, "Trouble@1", [ask(1, "start_a_child")])
        await recorder.hears("loaded", "run_finished")
        child = int(recorder.answers[0].body.strip(b'"'))
        assert not gone(child)
        node.unload(GPU, "Trouble@1")
        node.load(GPU, launch("Echo"))
        await recorder.hears("loaded")
        assert gone(child)


@story
async def test_a_chatterbox_is_cut_short(recorder: Recorder) -> None:
    async with running(recorder) as node:
        node.load(GPU, launch("Trouble"))
        node.run(GPU, "Trouble@1", [ask(1, "chatter")])
        await recorder.hears("loaded", "run_finished")
        node.unload(GPU, "Trouble@1")
        await recorder.until(lambda: recorder.lines and "left out" in recorder.lines[-1][1])
        left_out = int(recorder.lines[-1][1].split()[1])
        assert left_out + len(recorder.lines) - 1 == 2_000


class Refusing(Spawner):
    """The system is out of processes for a while."""

    refuse = True

    def spawn(self, python: str, env: object) -> object:  # type: ignore[override]
        if self.refuse:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return super().spawn(python, env)  # type: ignore[arg-type]


@story
async def test_a_node_that_cannot_start_processes_says_so_and_recovers(recorder: Recorder) -> None:
    source = Refusing()
    node = LocalNode(virtual_gpus=1, memory_bytes=MIB, source=source)
    await node.start(recorder)
    try:
        node.load(GPU, launch("Echo"))
        told = await recorder.hears("load_failed")
        assert told.reason.startswith("the system would not start a process (Resource temporarily unavailable)")
        assert not node.healthy()
        node._probe()  # what a timer does
        assert not node.healthy()
        source.refuse = False
        node._probe()
        assert node.healthy()
    finally:
        await node.stop()


@story
async def test_a_hundred_swaps_leave_nothing(recorder: Recorder) -> None:
    me = psutil.Process()
    async with running(recorder, gpus=2, source=Spawner(STUB)) as node:
        descriptors = None
        for swap in range(50):
            for gpu in node.gpus:
                node.load(gpu.gpu_id, launch("Echo", model=f"echo@{swap}"))
                node.run(gpu.gpu_id, f"echo@{swap}", [ask(swap, "x")])
                node.unload(gpu.gpu_id, f"echo@{swap}")
            await recorder.until(lambda: recorder.whats.count("run_finished") == 2)
            assert sorted(recorder.whats) == ["loaded", "loaded", "run_finished", "run_finished"]
            recorder.told.clear()
            if swap == 0:
                descriptors = me.num_fds()
        for gpu in node.gpus:
            node.load(gpu.gpu_id, launch("Echo"))
        await recorder.hears("loaded", "loaded")
        assert descriptors is not None
        assert me.num_fds() <= descriptors + 8  # two idle processes may stand where two ending ones stood
    assert node.gpus == []
    assert me.children() == []


def _frame(kind: Kind, payload: bytes, id: int = 1, flags: int = 1, status: int = 200) -> bytes:
    return HEADER.pack(len(payload), kind, flags, status, id) + payload


_PREFIX = ANSWER_PREFIX.pack(0.1, 0)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (b"\xff" * 64, "a frame of 4294967295 bytes, more than any may have"),
        (_frame(Kind.CALL, b""), "a frame of kind 2, which no process may send"),
        (_frame(Kind.ANSWER, b"short"), "an answer that is shorter than its own prefix"),
        (_frame(Kind.ANSWER, ANSWER_PREFIX.pack(0.1, 9)), "an answer whose content type runs past its end"),
        (_frame(Kind.ANSWER, ANSWER_PREFIX.pack(math.nan, 0)), "an answer that took an impossible time"),
        (_frame(Kind.ANSWER, ANSWER_PREFIX.pack(0.1, 2) + b"\r\n"), "an answer whose content type is not printable"),
        (_frame(Kind.ANSWER, _PREFIX, status=100), "an answer with status 100, which no HTTP answer may have"),
        (_frame(Kind.ANSWER, _PREFIX, id=2), "an answer to a request it does not have"),
        (_frame(Kind.ANSWER, _PREFIX + b"ab", flags=3), "a slot reference of the wrong size"),
        (
            _frame(Kind.ANSWER, _PREFIX + SLOT_REFERENCE.pack(0, 1 << 31), flags=3),
            "a slot reference outside the other side's free memory",
        ),
        (_frame(Kind.FREE, b"", id=5), "a slot was freed that was not in use"),
        (_frame(Kind.RAN, SECONDS.pack(0.1)), "the end of a run that has unanswered calls"),
        (_frame(Kind.RAN, b"1"), "a duration of the wrong size"),
        (_frame(Kind.ANSWER, _PREFIX) + _frame(Kind.RAN, SECONDS.pack(-1.0)), "a run that took an impossible time"),
        (_frame(Kind.LOADED, b"\x81\xacmemory_bytes\x00"), "an untimely or impossible LOADED"),
        (_frame(Kind.MOVED, b"\x82\xacdevice_bytes\x00\xaahost_bytes\x00"), "an untimely or impossible MOVED"),
        (_frame(Kind.LOADED, b"rubbish"), "a control frame that cannot be read (Expected `object`, got `int`)"),
        (_frame(Kind.FAILED, b"\x80"), "a control frame that cannot be read (Object missing required field `kind`)"),
    ],
)
@story
async def test_a_lying_process_costs_nobody_but_itself(recorder: Recorder, lie: bytes, reason: str) -> None:
    async with running(recorder, source=Spawner(STUB)) as node:
        node.load(GPU, launch("Liar", env={"LIE": lie.hex()}))
        node.load(GPU, launch("Honest"))
        await recorder.hears("loaded", "loaded")
        node.run(GPU, "Liar@1", [ask(1, "x")])
        node.run(GPU, "Honest@1", [ask(2, "x")])
        await recorder.until(lambda: len(recorder.told) == 2)
        assert recorder.whats == ["run_failed", "run_finished"]
        assert recorder.told[0].kind is FailureKind.CRASH
        assert recorder.told[0].reason.startswith(f"sent {reason}")
        assert recorder.answers[-1].request_id == 2


def test_orphans_when_the_server_is_killed(tmp_path: Path) -> None:
    """The whole server dies by SIGKILL: so do its GPU processes and what their functions started."""
    script = tmp_path / "server.py"
    script.write_text(
        f"import asyncio, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from recording import *\n"
        "async def main():\n"
        "    recorder = Recorder()\n"
        "    async with running(recorder) as node:\n"
        "        node.load(GPU, launch('Trouble'))\n"
        "        node.run(GPU, 'Trouble@1', [ask(1, 'start_a_child')])\n"
        "        await recorder.until(lambda: 'run_finished' in recorder.whats)\n"
        "        print(node.processes()[0].pid, recorder.answers[0].body.decode().strip('\"'), flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pids = [int(word) for word in server.stdout.readline().split()]
        server.kill()
    assert len(pids) == 2
    psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert all(map(gone, pids))


def test_a_node_is_one_thing_or_the_other() -> None:
    with pytest.raises(ConfigurationError, match="either CUDA GPUs or virtual ones"):
        LocalNode()
    with pytest.raises(ConfigurationError, match="either CUDA GPUs or virtual ones"):
        LocalNode(virtual_gpus=1, memory_bytes=1, cuda=True)
    with pytest.raises(ConfigurationError, match="need a size"):
        LocalNode(virtual_gpus=1)
    with pytest.raises(ConfigurationError, match="must be positive"):
        LocalNode(virtual_gpus=-1, memory_bytes=1)


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_no_gpu_is_one_sentence(recorder: Recorder) -> None:
    with pytest.raises(NodeError, match="install the NVIDIA driver, or start with --virtual-gpus"):
        asyncio.run(LocalNode(cuda=True).start(recorder))
