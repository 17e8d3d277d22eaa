"""Failures stay with whom they belong to; processes come from where they should."""

from __future__ import annotations

import sys
from time import monotonic

import psutil  # type: ignore[import-untyped]

from gpu_checks.memory import first_handle
from gpu_checks.record import Findings, Unavailable
from gpu_checks.setup import MIB, Driven, NodeFailure, Setup, zygote_ready
from hotset.node.interface import LaunchSpec
from hotset.node.spawner import Spawner
from hotset.node.zygote import ZygoteSource
from hotset.vocabulary import FailureKind


async def _answers(node: Driven, spec: LaunchSpec, factor: int) -> bool:
    return bool((await node.ask(spec, "scale", 2.0))["value"] == 2.0 * factor)


async def _failure_of(found: Findings, node: Driven, spec: LaunchSpec, what: str = "", value: float = 0.0) -> str:
    """The kind of failure of a load, or of the run ``what``; its reason becomes a figure."""
    try:
        if what:
            await node.ask(spec, what, value)
        else:
            await node.load(spec)
    except NodeFailure as failure:
        found.figures[f"{what or 'load'}_reason"] = failure.reason
        return failure.kind.value
    return "none"


async def out_of_memory(setup: Setup, found: Findings) -> None:
    """A load that is too large, and on CUDA a run, fails alone while a neighbour goes on answering."""
    budget_bytes = 4 * setup.model_bytes if setup.virtual else 4 * (setup.model_bytes + 512 * MIB)
    wanted = FailureKind.OUT_OF_MEMORY.value
    async with setup.node(memory_bytes=budget_bytes) as node:
        neighbour, victim = setup.probe(2), setup.probe(3)
        greedy = setup.probe(entry="Greedy", GREEDY_BYTES=str(node.gpus[0].memory_bytes))
        await node.load(neighbour)
        pid = node.report(neighbour).pid
        kind = await _failure_of(found, node, greedy)
        found.expect(kind == wanted, f"the load that is too large failed as {kind}")
        found.expect(await _answers(node, neighbour, 2), "the neighbour answers wrongly after a load that failed")
        if not setup.virtual:
            await node.load(victim)
            kind = await _failure_of(found, node, victim, "hoard", node.gpus[0].memory_bytes / MIB)
            found.expect(kind == wanted, f"the run that takes too much failed as {kind}")
            found.expect(await _answers(node, neighbour, 2), "the neighbour answers wrongly after a run that failed")
        found.expect(node.report(neighbour).pid == pid, "the neighbour's process is another one")
        await node.load(setup.probe(4))
        found.expect(await _answers(node, setup.probe(4), 4), "a later load answers wrongly")


async def sticky_error(setup: Setup, found: Findings) -> None:
    """A device-side assert poisons one process; it is ended, never called healthy, and the next one is right."""
    if setup.virtual:
        found.note = "no CUDA: the error was raised by hand"
    async with setup.node() as node:
        neighbour, broken = setup.probe(2), setup.probe(3)
        await node.load(neighbour)
        await node.load(broken)
        pid = node.report(broken).pid
        kind = await _failure_of(found, node, broken, "fault")
        found.figures["kind"] = kind
        found.expect(kind == FailureKind.DEVICE.value, f"the poisoned run failed as {kind}")
        found.expect(not psutil.pid_exists(pid), "the poisoned process lives on")
        found.expect([each.model for each in node.node.processes()] == [neighbour.model], "its model is still listed")
        found.expect(node.lost_gpus == [], f"the GPU was given up: {node.lost_gpus}")
        found.expect(node.node.healthy(), "the node is not healthy although its GPU answers")
        found.expect(await _answers(node, neighbour, 2), "the neighbour answers wrongly")
        begin_s = monotonic()
        await node.load(broken)
        found.expect(await _answers(node, broken, 3), "the replacement answers wrongly")
        found.figures["replaced_s"] = monotonic() - begin_s


async def zygote(setup: Setup, found: Findings) -> None:
    """A fork of a zygote that imported torch, and never touched the device, can use it; and is there sooner."""
    async with setup.node(source=Spawner()) as node:
        fresh = await node.load(setup.probe(2))
    source = ZygoteSource()
    async with setup.node(source=source) as node:
        begin_s = monotonic()
        await zygote_ready(source)
        found.figures["zygote_start_s"] = monotonic() - begin_s
        zygote_pid = source.zygote_pid(sys.executable)
        spec = setup.probe(2)
        forked = await node.load(spec)
        answer = await node.ask(spec, "scale", 2.0)
        found.expect(answer["parent"] == zygote_pid, "the process was not forked by the zygote")
        found.expect(answer["value"] == 4.0, f"the fork answered {answer['value']}")
        if setup.nvml is not None:
            listed = setup.nvml.ask("nvmlDeviceGetComputeRunningProcesses", first_handle(setup.nvml)) or []
            found.expect(all(each.pid != zygote_pid for each in listed), "the zygote holds a CUDA context")
    found.figures |= {"fresh_load_s": fresh.load_s, "forked_load_s": forked.load_s}
    found.expect(forked.load_s < fresh.load_s, "a fork is no faster than a new interpreter")


async def isolation(setup: Setup, found: Findings) -> None:
    """Each process sees its own GPU and no other."""
    async with setup.node(gpus=2) as node:
        found.figures["gpus"] = len(node.gpus)
        if len(node.gpus) < 2:
            raise Unavailable("needs two GPUs")
        spec = setup.probe(2)
        uuids = set()
        for gpu in (0, 1):
            await node.load(spec, gpu)
            found.expect((await node.ask(spec, "scale", 2.0, gpu))["value"] == 4.0, f"GPU {gpu} answers wrongly")
            if not setup.virtual:
                seen = await node.ask(spec, "device", gpu=gpu)
                uuids.add(seen["uuid"])
                found.expect(seen["visible"] == 1, f"the process on GPU {gpu} sees {seen['visible']:g} GPUs")
        found.expect(node.report(spec, 0).pid != node.report(spec, 1).pid, "one process serves both GPUs")
        found.expect(setup.virtual or len(uuids) == 2, "both processes are on one GPU")
