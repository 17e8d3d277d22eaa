"""Three levels of residency, from the scheduler's decision to the caller's header, over a fake node."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from gateway_world import GPU, MIB, Client, Reply, World, run, version

from hotset.cli.output import miss_ratio_text
from hotset.cli.replay import hardware_of, measured, read_recording, simulated
from hotset.cli.residency import tier, transitions
from hotset.cli.top import render_state
from hotset.gateway import readings
from hotset.gateway.app import Gateway
from hotset.gateway.calls import Result
from hotset.gateway.state import State, state_of, trace, trace_header
from hotset.node.history import Transition
from hotset.scheduling.config import SchedulerConfig
from hotset.vocabulary import FailureKind

ROOMY = SchedulerConfig(journal_capacity=1000, host_memory_bytes=1000 * MIB)
OVERLAPPING = msgspec.structs.replace(ROOMY, overlap=True)


async def tiered(config: SchedulerConfig = ROOMY, host_bytes: int | None = None) -> World:
    """Three functions of 100 MiB on a GPU with room for two; loads take 0.5 s, copies 0.02 and 0.01 s."""
    if host_bytes is not None:
        config = msgspec.structs.replace(config, host_memory_bytes=host_bytes)
    world = World(memory_bytes=220 * MIB, config=config)
    for name in ("ant", "bee", "cat"):
        world.behave(f"{name}@1", load_s=0.5, inference_s=0.01)
    return await world.start(*(version(name) for name in ("ant", "bee", "cat")))


async def call(world: World, function: str) -> Result:
    return await world.finish(world.control.submit(function, b"1"))


def shown(world: World) -> State:
    """What ``/system/state`` answers."""
    return msgspec.json.decode(msgspec.json.encode(state_of(world.control)), type=State)


def test_a_model_that_leaves_is_parked_and_comes_back_sooner() -> None:
    async def story() -> None:
        world = await tiered()
        misses = [await call(world, name) for name in ("ant", "bee", "cat")]
        assert world.verbs("load", "offload", "unload")[2:] == [("offload", "ant@1"), ("load", "cat@1")]
        assert [result.record.load_s for result in misses] == pytest.approx([0.5, 0.5, 0.52])

        back = await call(world, "ant")
        assert (back.record.hit, back.record.warm) == (False, True)
        # Somebody else is parked first; the caller waits for both copies.
        assert world.verbs("offload", "restore", "unload")[1:] == [("offload", "bee@1"), ("restore", "ant@1")]
        assert back.record.load_s == pytest.approx(0.03)
        again = await call(world, "ant")
        assert (again.record.hit, again.record.warm, again.record.load_s) == (True, False, 0.0)

        metrics = {each.function: each for each in world.control.functions.metrics()}
        ant = metrics["ant"]
        assert (ant.hits, ant.restores, ant.misses, ant.offloads, ant.evictions) == (1, 1, 1, 1, 0)

    run(story)


def test_the_state_says_where_each_model_is_and_what_moving_it_took() -> None:
    async def story() -> None:
        world = await tiered()
        for name in ("ant", "bee", "cat", "ant"):
            await call(world, name)
        state = shown(world)
        by_name = {each.name: each for each in state.functions}
        assert {name: (each.hot, each.warm) for name, each in by_name.items()} == {
            "ant": ([GPU], []),
            "bee": ([], [GPU]),
            "cat": ([GPU], []),
        }
        assert {name: tier(msgspec.to_builtins(each)) for name, each in by_name.items()} == {
            "ant": "hot",
            "bee": "warm",
            "cat": "hot",
        }
        (gpu,), (host,) = state.gpus, state.hosts
        (parked,) = gpu.parked
        assert (parked.model, parked.host_bytes, parked.device_bytes) == ("bee@1", 100 * MIB, 0)
        assert (host.node, host.capacity_bytes, host.used_bytes) == ("local", 1000 * MIB, 100 * MIB)
        assert (state.hits, state.restores, state.misses, state.hit_ratio) == (0, 1, 3, 0.0)
        times = by_name["ant"].transitions
        assert {each.value: times[each].last_s for each in times} == {"load": 0.5, "offload": 0.02, "restore": 0.01}
        assert times[Transition.LOAD].median_s == 0.5
        rows = transitions(msgspec.to_builtins(by_name["ant"]))
        assert ("load", "last 500.0 ms, median 500.0 ms (once)") in rows
        assert render_state(msgspec.to_builtins(state), transitions=True) is not None

    run(story)


def test_callers_are_told_whether_their_model_was_hot_warm_or_cold() -> None:
    async def story() -> None:
        world = await tiered()

        async def nothing(*_: object) -> None:
            raise AssertionError

        client = Client(Gateway(world.control, nothing))

        async def cache(name: str) -> str:
            reply = Reply()
            task = asyncio.create_task(client.request("POST", f"/function/{name}", b"1", reply=reply))
            while not task.done():
                await world.advance(0.05)
            await task
            return reply.headers["x-hotset-cache"]

        assert [await cache(name) for name in ("ant", "ant", "bee", "cat", "ant")] == [
            "miss",
            "hit",
            "miss",
            "miss",
            "warm",
        ]

    run(story)


def test_without_host_memory_models_are_unloaded() -> None:
    async def story() -> None:
        world = await tiered(host_bytes=0)
        for name in ("ant", "bee", "cat", "ant"):
            result = await call(world, name)
        assert (result.record.hit, result.record.warm) == (False, False)
        assert world.verbs("offload", "restore") == []
        assert shown(world).hosts == []

    run(story)


def test_what_is_parked_too_long_goes_when_host_memory_is_full() -> None:
    async def story() -> None:
        world = await tiered(host_bytes=100 * MIB)
        for name in ("ant", "bee", "cat"):
            await call(world, name)
        await call(world, "bee")  # hot still
        await call(world, "ant")
        held = {each.name: (bool(each.hot), bool(each.warm)) for each in shown(world).functions}
        assert sum(warm for _, warm in held.values()) <= 1
        assert shown(world).hosts[0].used_bytes <= 100 * MIB

    run(story)


@pytest.mark.parametrize("kind", [FailureKind.CRASH, FailureKind.OUT_OF_MEMORY, FailureKind.HANG])
def test_a_restore_that_fails_costs_one_attempt(kind: FailureKind) -> None:
    async def story() -> None:
        world = await tiered()
        for name in ("ant", "bee", "cat"):
            await call(world, name)
        world.node.fail_restore("ant@1", kind, "the bus")
        result = await call(world, "ant")
        assert (result.record.status, result.record.warm) == (200, False)  # loaded after all
        assert world.verbs("restore", "load")[-2:] == [("restore", "ant@1"), ("load", "ant@1")]
        books_are_right(world)

    run(story)


def test_an_offload_that_fails_makes_room_all_the_same() -> None:
    async def story() -> None:
        world = await tiered()
        for name in ("ant", "bee"):
            await call(world, name)
        world.node.fail_offload("ant@1", "the bus")
        assert (await call(world, "cat")).record.status == 200
        assert (await call(world, "ant")).record.warm is False
        books_are_right(world)

    run(story)


def test_a_parked_process_that_dies_is_cold() -> None:
    async def story() -> None:
        world = await tiered()
        for name in ("ant", "bee", "cat"):
            await call(world, name)
        world.node.lose_process(GPU, "ant@1")
        await world.advance(0.01)
        assert shown(world).gpus[0].parked == []
        assert shown(world).hosts[0].used_bytes == 0
        result = await call(world, "ant")
        assert (result.record.status, result.record.warm) == (200, False)

    run(story)


def test_a_lost_gpu_takes_what_was_parked_for_it() -> None:
    async def story() -> None:
        world = World(gpus=2, memory_bytes=120 * MIB, config=ROOMY)
        await world.start(*(version(name) for name in ("ant", "bee", "cat")))
        for name in ("ant", "bee", "cat"):
            await call(world, name)
        (gpu_id,) = [gpu.gpu_id for gpu in shown(world).gpus if gpu.parked]
        world.node.lose_gpu(gpu_id)
        await world.advance(0.01)
        assert shown(world).hosts[0].used_bytes == 0
        assert [(await call(world, name)).record.status for name in ("ant", "bee", "cat")] == [200, 200, 200]
        books_are_right(world)

    run(story)


def test_with_overlap_a_model_is_loaded_while_another_runs() -> None:
    async def story() -> None:
        world = await tiered(OVERLAPPING)
        await call(world, "ant")
        world.behave("ant@1", inference_s=5.0)
        long = world.control.submit("ant", b"1")
        await world.advance(0.1)
        other = world.control.submit("bee", b"1")
        await world.advance(1.0)
        assert not long.future.done()
        assert {each.name for each in shown(world).functions if each.hot} == {"ant", "bee"}
        await world.advance(5.0)
        assert other.future.result().record.status == long.future.result().record.status == 200
        books_are_right(world)

    run(story)


def test_an_evicted_function_leaves_host_memory_too() -> None:
    async def story() -> None:
        world = await tiered()
        for name in ("ant", "bee", "cat", "ant"):
            await call(world, name)
        assert world.control.evict("ant")
        assert world.control.evict("bee")  # parked
        await world.advance(0.1)
        assert [each.hot + each.warm for each in shown(world).functions] == [[], [], [GPU]]
        assert {report.model for report in world.node.processes()} == {"cat@1"}
        learned = {each.model: each for each in readings.learned(world.control)}
        assert learned["ant@1"].restore_s == pytest.approx(0.01)
        assert (learned["ant@1"].restores, learned["bee@1"].restore_s) == (1, None)

    run(story)


def books_are_right(world: World) -> None:
    """The scheduler's accounts are those of the processes that are there."""
    state = shown(world)
    hot = {(gpu.gpu_id, each.model) for gpu in state.gpus for each in gpu.residents}
    warm = {(gpu.gpu_id, each.model) for gpu in state.gpus for each in gpu.parked}
    assert hot | warm == {(report.gpu_id, report.model) for report in world.node.processes()}
    for gpu in state.gpus:
        assert gpu.used_bytes == sum(each.memory_bytes for each in gpu.residents) + sum(
            each.device_bytes for each in gpu.parked
        )
    assert state.hosts[0].used_bytes == sum(each.host_bytes for gpu in state.gpus for each in gpu.parked)


@pytest.mark.parametrize("residue_bytes", [0, 5 * MIB])
def test_a_replay_of_what_was_recorded_finds_and_restores_the_same_models(residue_bytes: int) -> None:
    async def story() -> None:
        world = await tiered()
        for name in ("ant", "bee", "cat"):
            world.behave(f"{name}@1", load_s=0.5, inference_s=0.01, parked_bytes=residue_bytes)
        for name in ("ant", "bee", "cat", "ant", "ant", "bee", "cat", "cat", "ant", "bee"):
            await call(world, name)
        control = world.control
        lines = b"".join(trace(control.records, trace_header(control), control.started_s)).splitlines()
        recording = read_recording(lines, "the test")
        happened = measured(recording)

        again = simulated(
            recording, hardware_of(recording), control.scheduler.policy.name, control.scheduler.cache.eviction.name
        )

        assert again.mean_latency_s == pytest.approx(happened.mean_latency_s, rel=0.01)
        assert (again.miss_ratio, again.restores) == (happened.miss_ratio, 5.0) == (0.8, happened.restores)
        assert miss_ratio_text(again) == "80.0% (50.0% warm)"
        assert again.evictions == 0

    run(story)


def test_a_node_hears_of_a_model_that_waits_while_no_gpu_has_it() -> None:
    async def story() -> None:
        world = await tiered()
        pending = [world.control.submit(name, b"1") for name in ("ant", "bee", "ant")]
        # The GPU loads ant: bee waits, and its files can be read meanwhile.
        assert world.node.expected == ["bee@1"]
        for each in pending:
            await world.finish(each)

    run(story)


def test_a_model_that_has_grown_is_accounted_for_and_its_neighbour_leaves() -> None:
    async def story() -> None:
        world = await tiered()
        for name in ("ant", "bee"):
            world.behave(f"{name}@1", memory_bytes=100 * MIB)
            await call(world, name)
        world.node.measure(GPU, "bee@1", 150 * MIB)
        world.node.measure(GPU, "gone@1", 150 * MIB)
        await world.advance(0.1)
        assert world.verbs("offload", "unload") == [("offload", "ant@1")]
        (gpu,) = shown(world).gpus
        assert [(each.model, each.memory_bytes) for each in gpu.residents] == [("bee@1", 150 * MIB)]
        bee = next(each for each in readings.learned(world.control) if each.model == "bee@1")
        assert (bee.sizes_bytes, bee.growth_bytes) == ((100 * MIB,), 50 * MIB)
        profile = world.control.functions.current["bee"].profile(world.control.scheduler.profiles)
        assert profile is not None
        assert profile.growth_bytes == 50 * MIB

    run(story)
