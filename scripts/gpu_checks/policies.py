"""The scheduler on real processes: the same calls under each policy, with more models than fit."""

from __future__ import annotations

import asyncio
import random
from statistics import mean

import msgspec

from gpu_checks.record import Findings
from gpu_checks.setup import MIB, Setup, in_time
from hotset.gateway import readings
from hotset.gateway.calls import Result
from hotset.gateway.control import Control
from hotset.gateway.functions import VersionSpec
from hotset.node.interface import LaunchSpec
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.vocabulary import Model

MODELS = 6
HELD = 3
"""How many of them fit on one GPU."""
MOST_CALLS, LEAST_CALLS = 60, 20
LOADING_S = 12.0
"""About how long one policy may take, as far as loads go."""
SEED = 7


async def started(setup: Setup, policy: str, memory_bytes: int, specs: list[LaunchSpec]) -> Control:
    """A control loop over a fresh node with these models deployed."""
    scheduler = Scheduler(make_policy(policy), make_eviction("lru"), SchedulerConfig())
    control = Control(scheduler, [setup.local_node(gpus=2, memory_bytes=memory_bytes)])
    await control.start()
    for spec in specs:
        model = Model(name=spec.model, memory_bytes=spec.memory_bytes)
        control.deploy(VersionSpec(function=spec.model.partition("@")[0], launch=spec, scheduled=model))
    return control


async def call(control: Control, function: str, what: str, value: float) -> Result:
    return await control.call(function, msgspec.json.encode({"what": what, "value": value}))


async def retried(setup: Setup, found: Findings) -> None:
    """A call that poisons its process is tried once more, fails with a clear answer, and the server stays healthy."""
    setup.need_torch()
    if setup.virtual:
        found.note = "no CUDA: the error was raised by hand"
    specs = [setup.probe(1), setup.probe(2)]
    memory_bytes = 4 * setup.model_bytes if setup.virtual else 4 * (setup.model_bytes + 512 * MIB)
    control = await started(setup, "lalb", memory_bytes, specs)
    try:
        poisoned = await call(control, "probe1", "fault", 0.0)
        fine = await call(control, "probe2", "scale", 2.0)
        again = await call(control, "probe1", "scale", 2.0)
        loads = next(each.misses for each in control.functions.metrics() if each.function == "probe1")
        problem = readings.problem(control)
    finally:
        await in_time(control.stop())
    found.figures |= {"status": poisoned.record.status, "loads": loads, "answer": bytes(poisoned.body).decode()}
    found.expect(poisoned.record.status == 502, f"the call ended with {poisoned.record.status}")
    found.expect(loads == 3, f"its model was loaded {loads} times, not once for each try and once for the next call")
    found.expect([fine.record.status, again.record.status] == [200, 200], "a later call failed")
    found.expect(problem is None, f"the server says: {problem}")


async def locality(setup: Setup, found: Findings) -> None:
    """LALB and LALB+O3 against LB: fewer misses, no failed call."""
    specs = [setup.probe(number) for number in range(1, MODELS + 1)]
    async with setup.node() as node:
        loaded = await node.load(specs[0])
        await node.ask(specs[0], "scale", 1.0)
    # Known beforehand, context included, so that no policy spends its calls on learning it.
    specs = [msgspec.structs.replace(spec, memory_bytes=loaded.memory_bytes) for spec in specs]
    memory_bytes = int((HELD + 0.5) * loaded.memory_bytes)
    # Twice what one GPU could do if every second call missed: calls wait, so that there is something to choose from.
    gap_s = loaded.load_s / 4
    calls = min(MOST_CALLS, max(LEAST_CALLS, int(LOADING_S / loaded.load_s)))
    found.figures |= {"models": MODELS, "held_per_gpu": HELD, "calls": calls, "load_s": loaded.load_s}
    misses = {}
    for policy in ("lb", "lalb", "lalb_o3"):
        control = await started(setup, policy, memory_bytes, specs)
        try:
            results = await _load(control, calls, gap_s)
            misses[policy] = sum(each.misses for each in control.functions.metrics())
        finally:
            await in_time(control.stop())
        failed = [result for result in results if result.record.status != 200]
        found.expect(not failed, f"{policy}: {len(failed)} calls failed")
        found.figures |= {
            f"{policy}_mean_s": mean(result.record.duration_s for result in results),
            f"{policy}_misses": misses[policy],
        }
    for policy in ("lalb", "lalb_o3"):
        found.expect(misses[policy] <= misses["lb"], f"{policy} misses more often than lb")


async def _load(control: Control, calls: int, gap_s: float) -> list[Result]:
    """Poisson arrivals with Zipf popularity, the same for every policy."""
    draws = random.Random(SEED)
    weights = [1 / rank for rank in range(1, MODELS + 1)]
    tasks = []
    for number in draws.choices(range(1, MODELS + 1), weights, k=calls):
        tasks.append(asyncio.create_task(call(control, f"probe{number}", "scale", 1.0)))
        await asyncio.sleep(draws.expovariate(1 / gap_s))
    return await asyncio.gather(*tasks)
