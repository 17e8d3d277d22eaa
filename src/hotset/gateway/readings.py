"""What can be read off a running control loop, for metrics, health checks, the datastore and people."""

from __future__ import annotations

from hotset.gateway.control import Control
from hotset.gateway.metrics import GpuMetrics, HostReport
from hotset.node.history import ModelHistory
from hotset.node.interface import ProcessReport
from hotset.scheduling.profiles import Footprint
from hotset.scheduling.thrash import Episode
from hotset.store.datastore import ProfileRecord
from hotset.vocabulary import Profile


def problem(control: Control) -> str | None:
    """One sentence on why the server is of no use; None: GPU processes can be started on some GPU."""
    if not control.accepting:
        return "the server is shutting down"
    if control.lost_gpus and not control.scheduler.cluster.gpus:
        return f"every GPU is lost ({'; '.join(losses(control))}): see the driver's log, then restart the server"
    if control.nodes and not any(node.healthy() for node in control.nodes):
        return "the server cannot start a GPU process: see its log"
    return None


def losses(control: Control) -> list[str]:
    """A sentence on each GPU that was lost since the start."""
    return [f"GPU {gpu_id} is lost: {reason}" for gpu_id, reason in control.lost_gpus.items()]


def waiting(control: Control) -> dict[str, int]:
    """Function -> calls whose run has not begun, for every function that is deployed. Linear in the open calls."""
    counts = dict.fromkeys(control.functions.current, 0)
    for pending in control.calls.values():
        if pending.run_s is None:
            counts[pending.version.function] = counts.get(pending.version.function, 0) + 1
    return counts


def waiting_of(control: Control, function: str) -> int:
    """The same of one function; free while it has no open call."""
    version = control.functions.current.get(function)
    if version is None or not version.calls:
        return 0
    return sum(each.run_s is None and each.version.function == function for each in control.calls.values())


def prefetches(control: Control) -> dict[str, int]:
    """What became of the models that were loaded ahead: those that are neither yet are not counted."""
    cache = control.scheduler.cache
    return {"useful": cache.useful_prefetches, "useless": cache.useless_prefetches}


def thrashing(control: Control) -> Episode | None:
    """While GPUs swap models more than they run them, and calls queue up: since when, and how badly."""
    return control.scheduler.cluster.thrash.episode(control.now_s())


def gpu_metrics(control: Control) -> list[GpuMetrics]:
    """Memory as the scheduler accounts for it, and how busy each GPU is."""
    busy: dict[str, float] = {}
    for node in control.nodes:
        busy.update(node.utilisation())
    return [
        GpuMetrics(
            gpu_id=gpu_id,
            capacity_bytes=gpu.memory.capacity_bytes,
            used_bytes=gpu.memory.used_bytes,
            busy_ratio=busy.get(gpu_id, 0.0),
        )
        for gpu_id, gpu in control.scheduler.cluster.gpus.items()
    ]


def hosts(control: Control) -> list[HostReport]:
    """Each node that may park models; GPUs of one node share its account."""
    by_node = {gpu.gpu.node: gpu.memory.host for gpu in control.scheduler.cluster.gpus.values()}
    return [
        HostReport(node=node, capacity_bytes=host.capacity_bytes, used_bytes=host.used_bytes)
        for node, host in by_node.items()
        if host.capacity_bytes
    ]


def processes(control: Control) -> list[ProcessReport]:
    """Every process of a function, as the operating system and the devices see them. Slow: for a thread."""
    of_nodes = [report for node in control.nodes for report in node.processes()]
    return of_nodes if control.cpu is None else of_nodes + control.cpu.processes()


def pids(control: Control) -> dict[int, str]:
    """Process id -> model, of every process of a function."""
    of_nodes = {pid: model for node in control.nodes for pid, model in node.pids().items()}
    return of_nodes if control.cpu is None else {**of_nodes, **control.cpu.pids()}


def histories(control: Control) -> dict[str, ModelHistory]:
    """Model -> what its loads, restores, offloads and unloads cost; of several nodes, the last that had it."""
    return {model: history for node in control.nodes for model, history in node.history().items()}


def smallest_gpu_bytes(control: Control) -> int:
    """What every GPU can hold: the reservation for a first load whose size nobody declared."""
    return min((gpu.memory.capacity_bytes for gpu in control.scheduler.cluster.gpus.values()), default=0)


def memory_margin(control: Control, model: str) -> int | None:
    """Bytes kept free for the model's next load beside what the last one took, which may be more than any GPU has;
    None: none was measured."""
    cluster = control.scheduler.cluster
    known = cluster.profiles.footprints.get(model)
    if known is None or known.newest_bytes is None:
        return None
    return max(0, cluster.models[model].memory_bytes - known.newest_bytes)


def learned(control: Control) -> list[ProfileRecord]:
    """What was measured of every version in service since the start, for the datastore."""
    profiles = control.scheduler.profiles
    records = []
    for version in control.functions.current.values():
        scheduled = version.spec.scheduled
        declared = scheduled.profile if scheduled is not None else Profile()
        footprint = profiles.footprints[version.model] if scheduled is not None else Footprint()
        for kind, known in version.learned.items():
            ran = known.runs > 0 or declared.inference_s is not None
            restored = known.restores > 0 or declared.restore_s is not None
            records.append(
                ProfileRecord(
                    model=version.model,
                    gpu_kind=kind,
                    load_s=profiles.load_s(version.model, kind),
                    loads=known.loads,
                    restore_s=profiles.restore_s(version.model, kind) if restored else None,
                    restores=known.restores,
                    reload_s=profiles.reload_s(version.model, kind),
                    inference_s=profiles.inference_s(version.model, kind) if ran else None,
                    runs=known.runs,
                    memory_bytes=max(footprint.sizes_bytes, default=None),
                    sizes_bytes=footprint.sizes_bytes,
                    growth_bytes=footprint.growth_bytes,
                )
            )
    return records
