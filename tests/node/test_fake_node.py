"""The fake node: what the gateway's tests drive instead of GPUs."""

from __future__ import annotations

import asyncio

import pytest
from recording import Recorder

from hotset.node.fake import FakeClock, FakeFunction, FakeNode, virtual_gpus
from hotset.node.interface import Answer, Call, LaunchSpec, Node
from hotset.vocabulary import FailureKind

GPU = "local/virtual:0"


def spec(model: str = "cat@1", **changes: object) -> LaunchSpec:
    settings: dict[str, object] = {"entry": "m:C", "code_path": ".", "python": "python", "memory_bytes": 100} | changes
    return LaunchSpec(model=model, **settings)  # type: ignore[arg-type]


def call(request_id: int, body: bytes = b"{}") -> Call:
    return Call(request_id=request_id, body=body)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def node(clock: FakeClock, recorder: Recorder) -> FakeNode:
    made = FakeNode(virtual_gpus(2, memory_bytes=1000), clock=clock)
    made.functions["cat@1"] = FakeFunction(load_s=0.5, inference_s=0.1, memory_bytes=70)
    asyncio.run(made.start(recorder))
    return made


def test_it_is_a_node(node: FakeNode) -> None:
    as_node: Node = node
    assert [gpu.gpu_id for gpu in as_node.gpus] == [GPU, "local/virtual:1"]
    assert as_node.healthy()
    node.well = False
    assert not as_node.healthy()


def test_a_load_takes_its_time_and_a_run_waits_for_it(node: FakeNode, clock: FakeClock, recorder: Recorder) -> None:
    node.load(GPU, spec())
    node.run(GPU, "cat@1", [call(1, b"[1]"), call(2, b"[2]")])
    clock.advance(0.49)
    assert recorder.told == []
    clock.advance(0.01)
    assert recorder.whats == ["loaded"]
    assert (recorder.told[0].seconds, recorder.told[0].memory_bytes) == (0.5, 70)
    assert node.utilisation()[GPU] == 1.0
    clock.advance(0.1)
    assert [(answer.request_id, answer.body) for answer in recorder.answers] == [(1, b"[1]")]
    clock.advance(0.1)
    assert [answer.request_id for answer in recorder.answers] == [1, 2]
    assert recorder.told[-1].what == "run_finished"
    assert recorder.told[-1].seconds == pytest.approx(0.2)
    assert [report.device_bytes for report in node.processes()] == [70]
    assert [operation.verb for operation in node.operations] == ["load", "run"]


def test_a_batching_function_answers_all_at_once(node: FakeNode, clock: FakeClock, recorder: Recorder) -> None:
    node.load(GPU, spec(max_batch=4))
    node.run(GPU, "cat@1", [call(1), call(2), call(3)])
    clock.advance(0.6)
    assert [answer.request_id for answer in recorder.answers] == [1, 2, 3]
    assert recorder.told[-1].seconds == 0.1


def test_what_is_asked_after_an_unload_waits_for_it(node: FakeNode, clock: FakeClock, recorder: Recorder) -> None:
    node.functions["cat@1"].unload_s = 2.0
    node.load(GPU, spec())
    clock.drain()
    node.unload(GPU, "cat@1")
    node.load(GPU, spec("dog@1"))
    clock.advance(2.0)
    assert recorder.whats == ["loaded"]
    clock.drain()
    assert [told.model for told in recorder.told] == ["cat@1", "dog@1"]
    assert [report.model for report in node.processes()] == ["dog@1"]


def test_failures_on_demand(node: FakeNode, clock: FakeClock, recorder: Recorder) -> None:
    node.fail_load("cat@1", FailureKind.OUT_OF_MEMORY, "did not fit")
    node.load(GPU, spec())
    clock.drain()
    assert (recorder.told[-1].what, recorder.told[-1].kind) == ("load_failed", FailureKind.OUT_OF_MEMORY)

    node.fail_run("cat@1", FailureKind.CRASH, answered=1)
    node.load(GPU, spec())
    node.run(GPU, "cat@1", [call(1), call(2)])
    clock.drain()
    assert (recorder.told[-1].what, recorder.told[-1].answered) == ("run_failed", (1,))
    assert node.processes() == []

    node.run(GPU, "cat@1", [call(3)])
    clock.drain()
    assert recorder.told[-1].reason == f"cat@1 has no process on {GPU}"


def test_losing_a_process_and_a_gpu(node: FakeNode, clock: FakeClock, recorder: Recorder) -> None:
    node.load(GPU, spec())
    clock.drain()
    node.lose_process(GPU, "cat@1")
    clock.drain()
    assert recorder.whats == ["loaded", "process_lost"]
    node.load(GPU, spec())
    node.lose_gpu(GPU)
    node.run(GPU, "cat@1", [call(1)])
    clock.drain()
    assert recorder.whats == ["loaded", "process_lost", "gpu_lost"]
    assert [gpu.gpu_id for gpu in node.gpus] == ["local/virtual:1"]


def test_a_cancelled_stream_ends_at_its_next_item(node: FakeNode, clock: FakeClock, recorder: Recorder) -> None:
    def count(call: Call) -> list[Answer]:
        return [Answer(request_id=call.request_id, body=b"%d" % number) for number in range(10)]

    node.functions["cat@1"] = FakeFunction(load_s=0, inference_s=1.0, respond=count)
    node.load(GPU, spec())
    node.run(GPU, "cat@1", [call(7)])
    clock.advance(0.35)
    assert [(answer.body, answer.final) for answer in recorder.answers] == [(b"0", False), (b"1", False), (b"2", False)]
    node.cancel(7)
    node.cancel(99)
    clock.drain()
    assert [(answer.body, answer.final) for answer in recorder.answers[3:]] == [(b"", True)]
    assert recorder.whats == ["loaded", "run_finished"]


def test_it_runs_on_an_event_loop_and_stops(recorder: Recorder) -> None:
    async def story() -> None:
        node = FakeNode(virtual_gpus(1, memory_bytes=1000))
        node.default = FakeFunction(load_s=0.0, inference_s=0.0)
        await node.start(recorder)
        node.log("cat@1", "hello")
        node.load(GPU, spec())
        node.run(GPU, "cat@1", [call(1)])
        while "run_finished" not in recorder.whats:
            await asyncio.sleep(0)
        node.load(GPU, spec("dog@1"))
        await node.stop()
        assert node.processes() == []

    asyncio.run(asyncio.wait_for(story(), 5))
    assert recorder.whats == ["loaded", "run_finished"]
    assert recorder.lines == [("cat@1", "hello")]
