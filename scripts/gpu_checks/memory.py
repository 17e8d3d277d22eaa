"""Memory: what is reported, what is really taken, and whether it comes back."""

from __future__ import annotations

import asyncio
import sys
from time import monotonic
from typing import Any

import psutil  # type: ignore[import-untyped]

from gpu_checks.record import Findings, Unavailable
from gpu_checks.setup import MIB, POOL_SIZE, Setup
from hotset.node.devices.cuda import Nvml, cuda_devices, visible_gpus
from hotset.node.host_memory import host_memory
from hotset.node.zygote import ZygoteSource

MOST_CONTEXT_MIB = 1024
"""A CUDA context and the kernels torch loads with it take a few hundred MiB; more means something else is counted."""
SLACK_MIB = 64
"""What drivers and allocators round up."""
SETTLED_WITHIN_S = 5.0
ONNX_RUNTIME_MIB = 64
"""On a virtual GPU a session is counted with what its process grew by, ONNX Runtime itself included."""
COMPUTE_MODE_DEFAULT = 0
"""NVML_COMPUTEMODE_DEFAULT; the others are for one process at a time, or none."""
SWAPS = 20


def first_handle(nvml: Nvml) -> Any:
    """NVML's handle of the GPU that the checks use, the first that the node would use."""
    gpus = visible_gpus(nvml)
    if not gpus:
        raise Unavailable("NVML shows no GPU, or none that CUDA_VISIBLE_DEVICES names")
    return gpus[0].handle


def used_mib(nvml: Nvml) -> float:
    """Memory in use on the first GPU, by anybody."""
    memory = nvml.ask("nvmlDeviceGetMemoryInfo", first_handle(nvml))
    if memory is None:
        raise Unavailable("NVML does not say how much memory the GPU has")
    return float(memory.used) / MIB


async def settled_mib(nvml: Nvml, at_most_mib: float) -> float:
    """Memory in use once it is down to ``at_most_mib``, or after ``SETTLED_WITHIN_S``."""
    deadline_s = monotonic() + SETTLED_WITHIN_S
    while (now_mib := used_mib(nvml)) > at_most_mib and monotonic() < deadline_s:
        await asyncio.sleep(0.02)
    return now_mib


async def device(setup: Setup, found: Findings) -> None:
    """NVML, the node and torch agree on what GPU this is."""
    nvml = setup.nvml
    if nvml is None:
        raise Unavailable("needs a CUDA GPU")
    first, *others = cuda_devices(nvml)
    found.figures |= {
        "gpu": first.gpu.kind,
        "gpus": 1 + len(others),
        "driver": str(nvml.ask("nvmlSystemGetDriverVersion")),
        "usable_mib": first.gpu.memory_bytes / MIB,
    }
    mode = nvml.ask("nvmlDeviceGetComputeMode", first_handle(nvml))
    found.expect(
        mode in (None, COMPUTE_MODE_DEFAULT),
        f"its compute mode ({mode}) lets no second process in: nvidia-smi -c DEFAULT, unless MPS shares it",
    )
    async with setup.node() as node:
        spec = setup.probe()
        await node.load(spec)
        seen = await node.ask(spec, "device")
    memory = nvml.ask("nvmlDeviceGetMemoryInfo", first_handle(nvml))
    found.figures |= {"torch": seen["torch"], "cuda": seen["cuda"], "capability": seen["capability"]}
    found.figures |= {"nvml_total_mib": memory.total / MIB, "torch_total_mib": seen["total_bytes"] / MIB}
    found.expect(seen["name"] == first.gpu.kind, f"torch calls the GPU {seen['name']}, NVML {first.gpu.kind}")
    found.expect(seen["visible"] == 1, f"its process sees {seen['visible']:g} GPUs")
    found.expect(
        0.9 * memory.total <= seen["total_bytes"] <= memory.total, "torch and NVML differ by a tenth in total memory"
    )
    found.expect(first.gpu.memory_bytes <= seen["total_bytes"], "the node would use more than there is")


async def figures(setup: Setup, found: Findings) -> None:
    """The node's figure of a loaded model beside torch's and NVML's."""
    async with setup.node() as node:
        before_mib = used_mib(setup.nvml) if setup.nvml else 0.0
        spec = setup.probe()
        loaded = await node.load(spec)
        report = node.report(spec)
        node_mib = loaded.memory_bytes / MIB
        found.figures |= {"weights_mib": setup.model_mib, "node_mib": node_mib, "host_mib": report.private_bytes / MIB}
        if setup.nvml is None:
            found.expect(node_mib == setup.model_mib, "the node's figure is not what the weights take")
            return
        grown_mib = used_mib(setup.nvml) - before_mib
        seen = await node.ask(spec, "device")
        reserved_mib = seen["reserved_bytes"] / MIB
        listed = setup.nvml.ask("nvmlDeviceGetComputeRunningProcesses", first_handle(setup.nvml)) or []
        by_nvml = [each.usedGpuMemory for each in listed if each.pid == report.pid and each.usedGpuMemory is not None]
    found.figures |= {
        "torch_allocated_mib": seen["allocated_bytes"] / MIB,
        "torch_reserved_mib": reserved_mib,
        "device_grew_mib": grown_mib,
        "nvml_process_mib": by_nvml[0] / MIB if by_nvml else "not listed",
    }
    if not by_nvml:
        found.note = (
            "NVML lists no process by this id (another PID namespace?): torch's figure counts, no context in it"
        )
    found.expect(node_mib >= setup.model_mib, "the node counts less than the weights")
    found.expect(node_mib <= reserved_mib + MOST_CONTEXT_MIB, "the node counts far more than torch reserved")
    found.expect(
        abs(grown_mib - node_mib) <= 0.05 * node_mib + (MOST_CONTEXT_MIB if not by_nvml else SLACK_MIB),
        "the device's memory did not grow by what the node counts",
    )


async def residency(setup: Setup, found: Findings) -> None:
    """Load, run, unload: the answer is right, and the memory is back."""
    nvml = setup.nvml
    async with setup.node() as node:
        before_mib = used_mib(nvml) if nvml else 0.0
        spec = setup.probe(3)
        loaded = await node.load(spec)
        begin_s = monotonic()
        answer = await node.ask(spec, "scale", 7.0)
        first_run_s = monotonic() - begin_s
        begin_s = monotonic()
        await node.ask(spec, "scale", 7.0)
        run_s = monotonic() - begin_s
        unload_s = await node.unload(spec)
        begin_s = monotonic()
        after_mib = await settled_mib(nvml, before_mib + SLACK_MIB) if nvml else 0.0
        back_s = monotonic() - begin_s
        found.figures |= {"load_s": loaded.load_s, "first_run_s": first_run_s, "run_s": run_s, "unload_s": unload_s}
        found.expect(answer["value"] == 21.0, f"3 times 7 was {answer['value']}")
        found.expect(node.node.processes() == [], "the node still lists a process")
    if nvml:
        found.figures |= {"before_mib": before_mib, "after_mib": after_mib, "memory_back_s": back_s}
        found.expect(after_mib <= before_mib + SLACK_MIB, f"{after_mib - before_mib:.0f} MiB did not come back")


async def onnx(setup: Setup, found: Findings) -> None:
    """ONNX Runtime computes on the GPU, and the node counts what it takes there, which PyTorch knows nothing of."""
    setup.need_torch()
    spec = setup.probe(3, "OnnxProbe", module="onnx_probe", PROBE_ONNX=str(setup.onnx_model))
    room_bytes = 4 * setup.model_bytes + ONNX_RUNTIME_MIB * MIB if setup.virtual else None
    async with setup.node(memory_bytes=room_bytes) as node:
        loaded = await node.load(spec)
        answer = await node.ask(spec, "scale", 7.0)
        node_mib = loaded.memory_bytes / MIB
        found.figures |= {"weights_mib": setup.model_mib, "node_mib": node_mib, "load_s": loaded.load_s}
        found.expect(answer["value"] == 21.0, f"3 times 7 was {answer['value']}")
        found.expect(node_mib >= setup.model_mib, "the node counts less than the weights")


async def allocator(setup: Setup, found: Findings) -> None:
    """PyTorch keeps what a run took for the next one, the node sees that, and it can be had back."""
    setup.need_cuda()
    async with setup.node() as node:
        spec = setup.probe()
        await node.load(spec)
        await node.ask(spec, "scale", 1.0)
        at_rest = await node.ask(spec, "release")
        used = await node.ask(spec, "workspace", setup.model_mib)
        seen_mib = node.report(spec).device_bytes / MIB
        released = await node.ask(spec, "release")
        seen_after_mib = node.report(spec).device_bytes / MIB
    rest_mib, kept_mib = at_rest["reserved_bytes"] / MIB, used["reserved_bytes"] / MIB
    found.figures |= {
        "at_rest_mib": rest_mib,
        "after_a_run_mib": kept_mib,
        "node_mib": seen_mib,
        "released_mib": released["reserved_bytes"] / MIB,
        "node_after_mib": seen_after_mib,
    }
    found.expect(released["reserved_bytes"] <= 1.05 * at_rest["reserved_bytes"], "empty_cache did not give it back")
    found.expect(used["peak_bytes"] / MIB >= 2 * setup.model_mib, "the run's peak was not counted")
    found.expect(seen_mib >= kept_mib, "the node reports less than torch holds")


async def growth(setup: Setup, found: Findings) -> None:
    """What a function keeps of its runs is measured a moment after them, and the node's listener is told."""
    async with setup.node(memory_bytes=3 * setup.model_bytes if setup.virtual else None) as node:
        spec = setup.probe()
        loaded = await node.load(spec)
        await node.ask(spec, "hoard", setup.model_mib)
        begin_s = monotonic()
        told_bytes = await node.until_measured(spec, loaded.memory_bytes + setup.model_bytes)
        found.figures |= {
            "loaded_mib": loaded.memory_bytes / MIB,
            "kept_mib": setup.model_mib,
            "told_mib": told_bytes / MIB,
            "told_after_s": monotonic() - begin_s,
        }
    found.expect(told_bytes >= loaded.memory_bytes + setup.model_bytes, "what a run left behind was not told")
    found.expect(
        told_bytes <= loaded.memory_bytes + setup.model_bytes + (0 if setup.virtual else MOST_CONTEXT_MIB * MIB),
        "more was told than a run left behind",
    )


async def swaps(setup: Setup, found: Findings) -> None:
    """Two models take turns on one GPU; memory stays where it was after the first turn."""
    nvml = setup.nvml
    async with setup.node() as node:
        specs = [setup.probe(1), setup.probe(2)]
        taken_s: list[float] = []
        readings: list[float] = []
        for number in range(SWAPS):
            spec = specs[number % 2]
            begin_s = monotonic()
            await node.load(spec)
            answer = await node.ask(spec, "scale", 5.0)
            taken_s.append(monotonic() - begin_s)
            found.expect(answer["value"] == 5.0 * (1 + number % 2), f"swap {number} answered {answer['value']}")
            readings.append(used_mib(nvml) if nvml else await _host_mib(setup.source, POOL_SIZE + 1))
            await node.unload(spec)
    early, late = readings[1], readings[-1]
    found.figures |= {
        "swaps": SWAPS,
        "swap_s": sorted(taken_s)[SWAPS // 2],
        "after_two_mib": early,
        "after_all_mib": late,
        "change": late / early - 1,
    }
    found.expect(late <= 1.05 * early, f"memory went from {early:.0f} to {late:.0f} MiB")


async def _host_mib(source: ZygoteSource, processes: int) -> float:
    """Memory of this process, the zygote and its children, once it has so many: what several share counts once."""
    zygote = psutil.Process(source.zygote_pid(sys.executable))
    deadline_s = monotonic() + SETTLED_WITHIN_S
    while len(zygote.children()) != processes and monotonic() < deadline_s:
        await asyncio.sleep(0.02)
    family = [psutil.Process(), zygote, *zygote.children()]
    held = [host_memory(process.pid) for process in family]
    return sum(each.private_bytes + each.shared_bytes for each in held) / MIB
