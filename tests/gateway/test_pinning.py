"""Functions whose copies are kept HOT: by their deployment or on request, through redeploys, failures and restarts."""

from __future__ import annotations

import msgspec
import pytest
from gateway_world import GPU, MIB, World, run, version

from hotset.errors import ConfigurationError
from hotset.gateway.functions import VersionSpec
from hotset.gateway.state import state_of


def kept(function: str, digest: str = "1", copies: int = 1) -> VersionSpec:
    spec = version(function, digest)
    assert spec.scheduled is not None
    return msgspec.structs.replace(spec, scheduled=msgspec.structs.replace(spec.scheduled, min_copies=copies))


def hot(world: World) -> dict[str, bool]:
    """Model -> pinned, as ``/system/state`` tells it."""
    (gpu, *_) = state_of(world.control).gpus
    return {each.model: each.pinned for each in gpu.residents if each.state == "hot"}


def test_a_deployment_that_keeps_a_copy_is_hot_before_its_first_call() -> None:
    async def story() -> None:
        world = await World(memory_bytes=220 * MIB).start(kept("ant"), version("bee"), version("cat"))
        await world.advance(10.0)
        assert hot(world) == {"ant@1": True}
        for name in ("bee", "cat", "bee"):
            await world.finish(world.control.submit(name, b"1"))
        assert hot(world) == {"ant@1": True, "bee@1": False}
        result = await world.finish(world.control.submit("ant", b"1"))
        assert result.record.hit
        ant = next(each for each in world.control.functions.metrics() if each.function == "ant")
        assert (ant.hits, ant.misses) == (1, 0), "loading it was nobody's miss"

    run(story)


def test_a_pin_is_for_the_function_whichever_version_is_in_service() -> None:
    async def story() -> None:
        world = await World(memory_bytes=220 * MIB).start(version("ant"), version("bee"))
        control = world.control
        control.pinning.pin("ant", 1)
        await world.advance(10.0)
        assert hot(world) == {"ant@1": True}
        call = control.submit("ant", b"1")
        control.deploy(version("ant", "2"))
        await world.finish(call)
        await world.advance(10.0)
        assert hot(world) == {"ant@2": True}
        assert control.pinning.copies("ant") == 1

        control.remove("ant")
        await world.advance(10.0)
        assert hot(world) == {}
        assert control.pinning.copies("ant") == 0
        control.deploy(version("ant", "2"))
        await world.advance(10.0)
        assert hot(world) == {}, "who deploys it anew must ask anew"

    run(story)


def test_a_pin_is_let_go_of() -> None:
    async def story() -> None:
        world = await World(memory_bytes=120 * MIB).start(kept("ant"), version("bee"))
        await world.advance(10.0)
        refused = await world.finish(world.control.submit("bee", b"1"))
        assert refused.record.status == 507
        assert "kept hot" in str(msgspec.json.decode(refused.body)["error"])
        world.control.pinning.pin("ant", 0)
        assert (await world.finish(world.control.submit("bee", b"1"))).record.status == 200
        assert hot(world) == {"bee@1": False}

    run(story)


def test_more_than_there_is_room_for_is_refused_and_changes_nothing() -> None:
    async def story() -> None:
        world = await World(memory_bytes=220 * MIB).start(kept("ant"), kept("bee"), version("cat"))
        await world.advance(10.0)
        for function, copies, told in (("cat", 1, "no room to keep a copy of cat hot"), ("ant", 2, "2 copies of ant")):
            with pytest.raises(ConfigurationError, match=told):
                world.control.pinning.pin(function, copies)
        assert world.control.pinning.copies("cat") == 0
        assert hot(world) == {"ant@1": True, "bee@1": True}
        with pytest.raises(KeyError):
            world.control.pinning.pin("dog", 1)

    run(story)


def test_a_plain_function_needs_no_pin() -> None:
    async def story() -> None:
        world = await World().start(version("ant", on_cpu=True))
        world.control.pinning.pin("ant", 1)
        assert world.control.pinning.copies("ant") == 0
        assert world.verbs("load") == []

    run(story)


def test_a_pinned_process_that_dies_is_started_again() -> None:
    async def story() -> None:
        world = await World(memory_bytes=220 * MIB).start(kept("ant"))
        await world.advance(10.0)
        world.node.lose_process(GPU, "ant@1")
        await world.advance(10.0)
        assert hot(world) == {"ant@1": True}
        assert world.verbs("load") == [("load", "ant@1")] * 2

    run(story)
