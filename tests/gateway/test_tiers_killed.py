"""Real processes that die in every transition, under a real control loop: every call ends, and the books are right."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
from pathlib import Path

import psutil
import uvloop
from gateway_world import GPU, MIB

from hotset.gateway.control import Control
from hotset.gateway.functions import VersionSpec
from hotset.node.interface import LaunchSpec
from hotset.node.manager import LocalNode
from hotset.node.zygote import ZygoteSource
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.vocabulary import Model

FUNCTIONS = Path(__file__).parent.parent / "node" / "functions"
CALLS = 60
GUILTY = {
    "dies-loading": ("basic:LoadTrouble", {"LOAD": "exit"}),
    "dies-offloading": ("hooked:Hooked", {"OFFLOAD": "kill"}),
    "raises-offloading": ("hooked:Hooked", {"OFFLOAD": "raise"}),
    "dies-restoring": ("hooked:Hooked", {"RESTORE": "kill"}),
    "dies-unloading": ("hooked:Hooked", {"UNLOAD": "kill"}),
}
INNOCENT = {name: ("hooked:Hooked", dict[str, str]()) for name in ("ant", "bee", "cat", "dog")}


def version(name: str, entry: str, env: dict[str, str]) -> VersionSpec:
    """A GPU has room for two of these, and host memory for two more."""
    launch = LaunchSpec(
        model=f"{name}@1",
        entry=entry,
        code_path=str(FUNCTIONS),
        python=sys.executable,
        env=env | {"HOLDS_BYTES": str(8 * MIB)},
        memory_bytes=8 * MIB,
    )
    return VersionSpec(function=name, launch=launch, scheduled=Model(name=launch.model, memory_bytes=8 * MIB))


def test_processes_die_in_every_transition() -> None:
    others = set(psutil.Process().children(recursive=True))  # servers that other tests still need

    async def story() -> None:
        scheduler = Scheduler(
            make_policy("lalb_o3"),
            make_eviction("lru"),
            SchedulerConfig(host_memory_bytes=20 * MIB, overlap=True, burst_s=0.002),
        )
        source = ZygoteSource()
        node = LocalNode(virtual_gpus=1, memory_bytes=20 * MIB, source=source)
        control = Control(scheduler, [node])
        dice = random.Random(7)
        await control.start()
        try:
            functions = GUILTY | INNOCENT
            for name, (entry, env) in functions.items():
                control.deploy(version(name, entry, env))
            while not source.ready(sys.executable):
                await asyncio.sleep(0.01)
            names = [dice.choice(list(functions)) for _ in range(CALLS)]
            pending = []
            for name in names:
                pending.append((name, control.submit(name, b"1")))
                if dice.random() < 0.15:
                    waiting = [spawned for zygote in source._zygotes.values() for spawned in zygote.pool]
                    if waiting:
                        with contextlib.suppress(ProcessLookupError):  # this one was killed before
                            os.kill(dice.choice(waiting).process.pid, signal.SIGKILL)
                if dice.random() < 0.6:
                    await asyncio.wait([each.future for _, each in pending])
            results = [(name, await each.future) for name, each in pending]
            assert len(results) == CALLS
            assert all(result.record.status == 200 for name, result in results if name in INNOCENT)
            metrics = list(control.functions.metrics())
            assert sum(each.total for each in metrics) == CALLS
            assert sum(each.offloads for each in metrics) > 0 < sum(each.restores for each in metrics)
            await quiet(control)
            books_are_right(control, node)
        finally:
            await control.stop()
        left = set(psutil.Process().children(recursive=True)) - others
        assert psutil.wait_procs(list(left), timeout=10)[1] == []

    uvloop.run(asyncio.wait_for(story(), 60))


async def quiet(control: Control) -> None:
    """Until the node has carried out what was decided."""
    lane_of = control.nodes[0]._lanes[GPU]  # type: ignore[attr-defined]
    while lane_of._turns.copying is not None or lane_of._turns.running is not None:
        await asyncio.sleep(0.01)


def books_are_right(control: Control, node: LocalNode) -> None:
    """The scheduler's accounts are those of the processes that the operating system has."""
    memory = control.scheduler.cluster.gpus[GPU].memory
    held = {*memory.residents, *memory.parked}
    reports = node.processes()
    assert {report.model for report in reports} == held
    assert all(psutil.pid_exists(report.pid) for report in reports)
    sizes = {report.model: report.device_bytes for report in reports}
    assert {model: sizes[model] for model in memory.residents} == {
        model: resident.memory_bytes for model, resident in memory.residents.items()
    }
    assert memory.used_bytes == sum(resident.memory_bytes for resident in memory.residents.values())
    assert memory.host.used_bytes == sum(parked.host_bytes for parked in memory.parked.values())
