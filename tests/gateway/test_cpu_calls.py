"""Plain functions: no GPU, no scheduler, but bounds and deadlines all the same."""

from __future__ import annotations

import asyncio

from gateway_world import World, run, version

from hotset.gateway.control import ControlConfig
from hotset.node.interface import Answer, Call, LaunchSpec, NodeListener, ProcessReport


class HandPool:
    """A CPU pool that answers when told to."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.cancelled: list[int] = []
        self.forgotten: list[str] = []
        self.stopped = False

    async def start(self, listener: NodeListener) -> None:
        self.listener = listener

    async def stop(self) -> None:
        self.stopped = True

    def run(self, spec: LaunchSpec, call: Call) -> None:
        self.calls.append(call)

    def cancel(self, request_id: int) -> None:
        self.cancelled.append(request_id)

    def forget(self, model: str) -> None:
        self.forgotten.append(model)

    def processes(self) -> list[ProcessReport]:
        return []

    def answer(self) -> None:
        call = self.calls.pop(0)
        self.listener.answered(Answer(request_id=call.request_id, body=call.body, inference_s=0.25))


def test_a_plain_function_is_called_without_a_gpu():
    async def story():
        pool = HandPool()
        world = await World(cpu=pool).start(version("add", on_cpu=True))
        pending = world.control.submit("add", b"1+1")
        await world.advance(1.0)
        pool.answer()
        record = (await pending.future).record
        assert (record.status, record.gpu_id) == (200, "")
        assert (record.queue_s, record.inference_s, record.duration_s) == (0.75, 0.25, 1.0)
        assert world.verbs() == []

    run(story)


def test_too_many_plain_calls_are_turned_away():
    async def story():
        pool = HandPool()
        world = await World(cpu=pool, control=ControlConfig(max_cpu_calls=1)).start(version("add", on_cpu=True))
        world.control.submit("add", b"1")
        assert (await world.control.submit("add", b"2").future).record.status == 429
        pool.answer()
        world.control.submit("add", b"3")
        assert len(pool.calls) == 1

    run(story)


def test_a_plain_call_has_a_deadline_and_a_client():
    async def story():
        pool = HandPool()
        world = await World(cpu=pool).start(version("add", on_cpu=True, patience_s=1.0))
        late = world.control.submit("add", b"1")
        left = asyncio.create_task(world.control.call("add", b"2"))
        await world.advance(0.5)
        left.cancel()
        await asyncio.wait([left])
        assert pool.cancelled == [2]
        await world.advance(1.0, steps=10)
        assert late.future.result().record.status == 504
        assert pool.cancelled == [2, 1]

    run(story)


def test_a_plain_functions_old_version_goes_when_its_calls_have():
    async def story():
        pool = HandPool()
        world = await World(cpu=pool).start(version("add", "1", on_cpu=True))
        world.control.submit("add", b"1")
        world.control.deploy(version("add", "2", on_cpu=True))
        assert pool.forgotten == []
        pool.answer()
        await world.advance(0.0)
        assert pool.forgotten == ["add@1"]
        await world.control.stop()
        assert pool.stopped

    run(story)


def test_a_server_without_a_cpu_pool_says_so():
    async def story():
        world = await World().start(version("add", on_cpu=True))
        assert (await world.control.submit("add", b"1").future).record.status == 502

    run(story)
