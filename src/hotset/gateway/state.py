"""What the server is doing now, as records: answers of ``/system/state``, ``/system/explain`` and ``/system/trace``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from hotset.functions.contract import FunctionKind
from hotset.gateway import readings
from hotset.gateway.calls import CallRecord
from hotset.gateway.control import Control
from hotset.gateway.metrics import HostReport
from hotset.node.history import LoadParts, Times, Transition
from hotset.node.interface import ProcessReport
from hotset.scheduling.cluster import Cluster
from hotset.scheduling.journal import Explanation
from hotset.scheduling.policies.interface import PolicySettings
from hotset.scheduling.thrash import Episode
from hotset.vocabulary import NORMAL_PRIORITY, Gpu, Model

TRACE_VERSION = 1


class ResidentState(msgspec.Struct, frozen=True, kw_only=True):
    """One model in one GPU's memory."""

    model: str
    memory_bytes: int
    """What the scheduler accounts for it."""
    state: str
    """``loading`` or ``hot``."""
    in_use: bool
    pinned: bool
    """Kept hot: never evicted."""
    uses: int
    """Runs since it was loaded."""
    idle_s: float
    """Since its last run began."""


class ParkedState(msgspec.Struct, frozen=True, kw_only=True):
    """One model in host memory, ready to come back to the GPU it left."""

    model: str
    host_bytes: int
    device_bytes: int
    """What its process still holds of the GPU."""
    idle_s: float


class GpuReport(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU and what is in its memory."""

    gpu_id: str
    node: str
    kind: str
    capacity_bytes: int
    used_bytes: int
    busy_ratio: float
    running: str | None
    """The model that runs or loads there."""
    local_queue: int
    residents: list[ResidentState]
    """Least recently used first: the order in which LRU evicts."""
    parked: list[ParkedState]
    """Longest parked first."""


class FunctionState(msgspec.Struct, frozen=True, kw_only=True):
    """One function, counted since the server's start."""

    name: str
    model: str
    kind: FunctionKind
    waiting: int
    requests: int
    errors: int
    """Calls that ended with a status of 400 or more."""
    hits: int
    restores: int
    misses: int
    offloads: int
    evictions: int
    mean_latency_s: float | None
    hot: list[str]
    """GPUs that hold it."""
    warm: list[str]
    """GPUs to which it can come back from host memory; a model that is in neither list is cold."""
    measured_memory_bytes: int | None
    """GPU memory as last measured."""
    memory_margin_bytes: int | None
    """Kept free beside that for its next load."""
    transitions: dict[Transition, Times]
    """How long its loads, restores, offloads and unloads took."""
    last_load: LoadParts | None
    """Where the time of its last load went."""


class CallerState(msgspec.Struct, frozen=True, kw_only=True):
    """One caller since the start; the empty name is nobody in particular."""

    name: str
    requests: int
    run_s: float
    """GPU seconds of runs."""
    load_s: float
    """GPU seconds of the loads that the caller's calls caused."""


class State(msgspec.Struct, frozen=True, kw_only=True):
    """Everything ``hotset top`` shows."""

    policy: str
    eviction: str
    uptime_s: float
    healthy: bool
    waiting: int
    requests: int
    hits: int
    restores: int
    """Models that came back from host memory."""
    misses: int
    """Models that were loaded."""
    hit_ratio: float | None
    """None before the first run."""
    thrashing: Episode | None
    """GPUs swap models more than they run them, since then (on the control loop's clock); None: they do not."""
    hosts: list[HostReport]
    gpus: list[GpuReport]
    functions: list[FunctionState]
    callers: list[CallerState]
    """Those that most was spent on, first."""
    processes: list[ProcessReport] | None = None
    """Only when asked for: reading a process's memory takes milliseconds."""


class ExplanationReport(msgspec.Struct, frozen=True, kw_only=True):
    """Why one call went the way it did; times are seconds on the control loop's clock."""

    call_id: str
    request: CallRecord | None
    """None: it has not ended, or is too old."""
    decisions: Explanation | None
    """None: it was never scheduled (a plain function), or is too old."""


class TracedModel(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a function's model, declared or learned: what a replay in the simulator needs."""

    memory_bytes: int
    load_s: float
    inference_s: float
    """Of a run of one call."""
    max_batch: int = 1
    max_batch_wait_s: float = 0.0
    min_copies: int = 0
    max_copies: int | None = None
    batch_marginal: float = 1.0
    """What each further call of a batch adds to a run, as a share of ``inference_s``."""
    restore_s: float | None = None
    """From host memory."""
    offload_s: float = 0.0
    """To host memory."""
    residue_bytes: int = 0
    """GPU memory that its process keeps meanwhile."""


class TraceHeader(msgspec.Struct, frozen=True, kw_only=True):
    """First line of ``/system/trace``: the server the calls were recorded on (docs/traces.md)."""

    hotset_trace: int = TRACE_VERSION
    recorded_from_unix_s: float
    policy: str
    eviction: str
    settings: PolicySettings = PolicySettings()
    """What the policy was made with."""
    burst_s: float
    host_memory_bytes: int = 0
    """Of each node, for parked models."""
    overlap: bool = False
    prefetch_recurring: bool = False
    gpus: list[Gpu]
    models: dict[str, TracedModel]
    """By function, those in service."""


class TraceRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One call in hotset's own trace format (docs/traces.md); ``arrival_s`` counts from the server's start."""

    arrival_s: float
    function: str
    inference_s: float | None = None
    """None: it did not run."""
    status: int
    caller: str = ""
    weight: float = 1.0
    priority: int = NORMAL_PRIORITY
    gpu_id: str = ""
    hit: bool = False
    warm: bool = False
    """Its model was parked in host memory: ``load_s`` is a restore."""
    queue_s: float = 0.0
    load_s: float = 0.0
    duration_s: float = 0.0


def state_of(control: Control, processes: list[ProcessReport] | None = None) -> State:
    """A snapshot; linear in GPUs, residents, functions and waiting calls."""
    lengths = readings.waiting(control)
    functions = []
    histories = readings.histories(control)
    cache = control.scheduler.cache
    hits = restores = misses = requests = 0
    for metrics in control.functions.metrics():
        hits, misses, requests = hits + metrics.hits, misses + metrics.misses, requests + metrics.total
        restores += metrics.restores
        version = control.functions.current.get(metrics.function)
        if version is not None:
            history = histories.get(version.model)
            functions.append(
                FunctionState(
                    name=metrics.function,
                    model=version.model,
                    kind=FunctionKind.CPU if version.spec.scheduled is None else FunctionKind.GPU,
                    waiting=lengths[metrics.function],
                    requests=metrics.total,
                    errors=sum(count for status, count in metrics.requests.items() if status >= 400),
                    hits=metrics.hits,
                    restores=metrics.restores,
                    misses=metrics.misses,
                    offloads=metrics.offloads,
                    evictions=metrics.evictions,
                    mean_latency_s=metrics.duration_s / metrics.total if metrics.total else None,
                    hot=list(cache.holders(version.model)),
                    warm=list(cache.parked_on(version.model)),
                    measured_memory_bytes=history.memory_bytes if history else None,
                    memory_margin_bytes=readings.memory_margin(control, version.model),
                    transitions=history.times if history else {},
                    last_load=history.last_load if history else None,
                )
            )
    return State(
        policy=control.scheduler.policy.name,
        eviction=control.scheduler.cache.eviction.name,
        uptime_s=control.uptime_s(),
        healthy=readings.problem(control) is None,
        waiting=sum(lengths.values()),
        requests=requests,
        hits=hits,
        restores=restores,
        misses=misses,
        hit_ratio=hits / (hits + restores + misses) if hits + restores + misses else None,
        thrashing=readings.thrashing(control),
        hosts=readings.hosts(control),
        gpus=_gpus(control),
        functions=functions,
        callers=_callers(control),
        processes=processes,
    )


def _callers(control: Control) -> list[CallerState]:
    callers = [
        CallerState(name=name, requests=usage.requests, run_s=usage.run_s, load_s=usage.load_s)
        for name, usage in control.scheduler.cluster.queues.usage.items()
    ]
    return sorted(callers, key=lambda caller: -caller.run_s - caller.load_s)


def _gpus(control: Control) -> list[GpuReport]:
    now_s = control.now_s()
    busy = {gpu.gpu_id: gpu.busy_ratio for gpu in readings.gpu_metrics(control)}
    return [
        GpuReport(
            gpu_id=gpu.gpu_id,
            node=gpu.gpu.node,
            kind=gpu.kind,
            capacity_bytes=gpu.memory.capacity_bytes,
            used_bytes=gpu.memory.used_bytes,
            busy_ratio=busy[gpu.gpu_id],
            running=gpu.work.model if gpu.work is not None else None,
            local_queue=len(gpu.local_queue),
            residents=[
                ResidentState(
                    model=resident.model,
                    memory_bytes=resident.memory_bytes,
                    state=resident.state.value,
                    in_use=resident.in_use,
                    pinned=resident.pinned,
                    uses=resident.uses,
                    idle_s=now_s - resident.last_used_s,
                )
                for resident in gpu.memory.residents.values()
            ],
            parked=[
                ParkedState(
                    model=parked.model,
                    host_bytes=parked.host_bytes,
                    device_bytes=parked.device_bytes,
                    idle_s=now_s - parked.last_used_s,
                )
                for parked in gpu.memory.parked.values()
            ],
        )
        for gpu in control.scheduler.cluster.gpus.values()
    ]


def explain(control: Control, call_id: str) -> ExplanationReport | None:
    """What is known of a call, by its public id (or the bare number of its request); None: nothing."""
    request_id = int(call_id) if call_id.isdecimal() and len(call_id) < 16 else control.ids.request_id(call_id)
    if request_id is None:
        return None
    ended = next((each for each in reversed(control.records) if each.request_id == request_id), None)
    decisions = control.scheduler.journal.explain(request_id)
    if ended is None and decisions is None:
        return None
    return ExplanationReport(call_id=control.ids.public(request_id), request=ended, decisions=decisions)


def trace_header(control: Control) -> TraceHeader:
    """What the recorded calls ran on, and what their models cost there."""
    scheduler = control.scheduler
    cluster = scheduler.cluster
    gpus = [gpu.gpu for gpu in cluster.gpus.values()]
    kind = gpus[0].kind if gpus else ""
    return TraceHeader(
        recorded_from_unix_s=control.started_unix_s,
        policy=scheduler.policy.name,
        eviction=scheduler.cache.eviction.name,
        settings=scheduler.config.settings,
        burst_s=scheduler.config.burst_s,
        host_memory_bytes=scheduler.config.host_memory_bytes,
        overlap=scheduler.config.overlap,
        prefetch_recurring=scheduler.config.prefetch_recurring,
        gpus=gpus,
        models={
            version.function: _traced_model(cluster, cluster.models[version.model], kind)
            for version in control.functions.current.values()
            if version.model in cluster.models
        },
    )


def _traced_model(cluster: Cluster, model: Model, kind: str) -> TracedModel:
    profiles = cluster.profiles
    one_s, two_s = (profiles.inference_s(model.name, kind, batch) for batch in (1, 2))
    return TracedModel(
        memory_bytes=profiles.footprints[model.name].newest_bytes or model.memory_bytes,
        load_s=profiles.load_s(model.name, kind),
        inference_s=one_s,
        max_batch=model.max_batch,
        max_batch_wait_s=model.max_batch_wait_s,
        min_copies=model.min_copies,
        max_copies=model.max_copies,
        batch_marginal=min(1.0, (two_s - one_s) / one_s) if one_s else 1.0,
        restore_s=profiles.restore_s(model.name, kind),
        offload_s=profiles.offload_s(model.name, kind),
        residue_bytes=cluster.cache.residue_bytes(model.name),
    )


def trace(records: Sequence[CallRecord], header: TraceHeader, start_s: float) -> Iterator[bytes]:
    """The recorded calls as an NDJSON trace, in order of arrival; pieces of up to a thousand lines."""
    yield msgspec.json.encode(header) + b"\n"
    in_order = sorted(records, key=_by_arrival)
    for first in range(0, len(in_order), 1000):
        rows = [_trace_row(record, start_s) for record in in_order[first : first + 1000]]
        yield b"".join(msgspec.json.encode(row) + b"\n" for row in rows)


def _by_arrival(record: CallRecord) -> tuple[float, int]:
    return record.arrival_s, record.request_id


def _trace_row(record: CallRecord, start_s: float) -> TraceRow:
    return TraceRow(
        arrival_s=round(record.arrival_s - start_s, 6),
        function=record.function,
        inference_s=round(record.inference_s, 6) if record.inference_s else None,
        status=record.status,
        caller=record.caller.name,
        weight=record.caller.weight,
        priority=record.caller.priority,
        gpu_id=record.gpu_id,
        hit=record.hit,
        warm=record.warm,
        queue_s=round(record.queue_s, 6),
        load_s=round(record.load_s, 6),
        duration_s=round(record.duration_s, 6),
    )
