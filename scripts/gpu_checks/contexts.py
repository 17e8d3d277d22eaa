"""Processes that wait with the GPU's context open: what they save a load and take meanwhile, and that it comes back."""

from __future__ import annotations

from gpu_checks.memory import SLACK_MIB, first_handle, settled_mib, used_mib
from gpu_checks.record import Findings
from gpu_checks.setup import MIB, Setup
from hotset.node.devices.cuda import CONTEXT_BYTES


async def contexts(setup: Setup, found: Findings) -> None:
    """A load gets the process whose context was open before; it is sooner there, and its model counts as ever."""
    nvml = setup.need_cuda()
    spec = setup.probe(2)
    async with setup.node() as node:
        await node.load(spec)  # so that both loads to be compared find the file in memory
        await node.unload(spec)
        without = await node.load(spec)
    async with setup.node(pool_contexts=1) as node:
        before_mib = used_mib(nvml)
        pid = await node.until_waiting(spec)
        grown_mib = used_mib(nvml) - before_mib
        listed = nvml.ask("nvmlDeviceGetComputeRunningProcesses", first_handle(nvml)) or []
        by_nvml = [each.usedGpuMemory for each in listed if each.pid == pid and each.usedGpuMemory is not None]
        loaded = await node.load(spec)
        found.expect(node.report(spec).pid == pid, "the load did not get the process that waited")
        found.expect((await node.ask(spec, "scale", 2.0))["value"] == 4.0, "the process that waited answers wrongly")
        await node.until_waiting(spec, but=pid)
    after_mib = await settled_mib(nvml, before_mib + SLACK_MIB)
    found.figures |= {
        "load_s": loaded.load_s,
        "load_without_s": without.load_s,
        "waiting_mib": grown_mib,
        "nvml_process_mib": by_nvml[0] / MIB if by_nvml else "not listed",
        "set_aside_mib": CONTEXT_BYTES / MIB,
        "model_mib": loaded.memory_bytes / MIB,
        "model_without_mib": without.memory_bytes / MIB,
        "not_back_mib": after_mib - before_mib,
    }
    found.expect(loaded.load_s < without.load_s, "a load is no sooner there with the context open")
    found.expect(grown_mib <= CONTEXT_BYTES / MIB, "a process that waits takes more than is set aside for it")
    found.expect(
        abs(loaded.memory_bytes - without.memory_bytes) <= SLACK_MIB * MIB,
        "the model's size is another than without",
    )
    found.expect(after_mib <= before_mib + SLACK_MIB, f"{after_mib - before_mib:.0f} MiB did not come back")
