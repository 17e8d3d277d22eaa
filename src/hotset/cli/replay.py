"""``hotset replay``: what if? A recorded live trace through the simulator, under its own policy and others."""

from __future__ import annotations

import contextlib
import itertools
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Any

import click
import msgspec

from hotset.cli.options import gateway_option, json_option, policy_settings, print_rows
from hotset.cli.output import miss_ratio_text, write_json
from hotset.cli.remote import Remote
from hotset.errors import ConfigurationError, TraceError
from hotset.functions.units import parse_bytes
from hotset.gateway.state import TraceHeader, TraceRow
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import make_policy
from hotset.scheduling.policies.interface import PolicySettings
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.engine import Engine
from hotset.simulation.hardware import Hardware, ModelCost
from hotset.simulation.metrics import Recorder, RunMetrics
from hotset.simulation.workloads import Arrival
from hotset.vocabulary import Gpu

FIGURES = ("mean_latency_s", "p50_latency_s", "p95_latency_s", "p99_latency_s", "miss_ratio", "mean_queueing_s")


_ONE_MOMENT_S = 10e-6
"""Above what rounding to microseconds does to the start of a run, below what a run takes."""

LONGEST_TURNOVER_S = 0.01
"""A call that waited longer at a GPU that was free waited for something else."""

AROUND_S = 1.0
"""Loads that began within that much of each other ..."""
FEWEST_AROUND = 5
"""... and are so many tell how fast the machine was at the time."""


class Recording(msgspec.Struct, frozen=True):
    """A live trace: the server it was recorded on, and the answered calls of the GPU functions in service there."""

    header: TraceHeader
    rows: Sequence[TraceRow]

    def functions(self) -> list[str]:
        """In order of first arrival."""
        return list(dict.fromkeys(row.function for row in self.rows))


class BatchCost(msgspec.Struct, frozen=True):
    """What runs of a batching function cost: a line over the number of calls."""

    inference_s: float
    """Of one call."""
    marginal: float
    """What each further call adds, as a share of that."""


class Replayed(msgspec.Struct, frozen=True):
    """One policy's figures; ``measured`` is what really happened, under the recorded policy."""

    policy: str
    eviction: str
    measured: bool
    metrics: RunMetrics


@click.command()
@click.argument("trace", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--policy", metavar="A,B,...", help="Policies to try; default: the recorded one, lb, lalb and lalb_o3.")
@click.option("--eviction", help="Eviction policy; default: the recorded one.")
@click.option("--o3-limit", type=click.IntRange(min=0), help="Most times passed over; default: as recorded.")
@click.option("--max-skips", type=click.IntRange(min=1), help="The same, of hotset.")
@click.option("--max-wait", metavar="TIME", help="Then hotset passes it over no more; default: as recorded.")
@click.option("--overrun", metavar="TIME", help="How far mqfq_sticky lets a function run ahead; default: as recorded.")
@click.option("--gpus", type=click.IntRange(min=1), help="What if there were this many GPUs?")
@click.option("--gpu-memory", metavar="SIZE", help="What if each had this much memory?")
@click.option("--load-scale", default=1.0, show_default=True, type=click.FloatRange(min=0), help="Dearer loads?")
@click.option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Keep the server's trace in this file.")
@gateway_option
@json_option
def replay(
    trace: Path | None,
    policy: str | None,
    eviction: str | None,
    o3_limit: int | None,
    max_skips: int | None,
    max_wait: str | None,
    overrun: str | None,
    gpus: int | None,
    gpu_memory: str | None,
    load_scale: float,
    save: Path | None,
    gateway: str,
    as_json: bool,
) -> None:
    """Re-run what the server served in the simulator: what would other policies, more GPUs or more memory have done?

    Takes the running server's newest calls, or a TRACE file saved before. Load times, run times and sizes are the
    measured ones, so the recorded policy's row says how far the simulator can be trusted.
    """
    if trace is not None:
        with trace.open("rb") as lines:
            recording = read_recording(lines, str(trace))
    else:
        with Remote(gateway) as remote, contextlib.ExitStack() as opened:
            lines_out = opened.enter_context(save.open("wb")) if save is not None else None
            recording = read_recording(_teed(remote.raw_lines("/system/trace"), lines_out), f"{gateway}/system/trace")
    known = recording.header
    names = [name.strip() for name in policy.split(",")] if policy else [known.policy, "lb", "lalb", "lalb_o3"]
    eviction = eviction or known.eviction
    hardware = hardware_of(
        recording,
        gpus=gpus,
        gpu_memory_bytes=parse_bytes(gpu_memory, "--gpu-memory") if gpu_memory else None,
        load_scale=load_scale,
    )
    settings = policy_settings(known.settings, max_skips=max_skips, max_wait=max_wait, overrun=overrun)
    if o3_limit is not None:
        settings = msgspec.structs.replace(settings, o3_limit=o3_limit)
    results = [Replayed(known.policy, known.eviction, True, measured(recording))]
    for name in dict.fromkeys(names):
        metrics = simulated(recording, hardware, name, eviction, settings)
        results.append(Replayed(name, eviction, False, metrics))
    if as_json:
        write_json({"calls": len(recording.rows), "runs": [_as_json(result) for result in results]})
    else:
        print_rows(("policy", "", *FIGURES), [_row(result) for result in results])


def read_recording(lines: Iterable[bytes], source: str) -> Recording:
    """Parse an NDJSON trace with its header; raises ``TraceError``."""
    numbered = enumerate(lines, start=1)
    _, first = next(numbered, (0, b""))
    try:
        header = msgspec.json.decode(first, type=TraceHeader)
    except msgspec.MsgspecError as error:
        raise TraceError(source, 1, f"expected the header of a live server's trace: {error}") from None
    decoder = msgspec.json.Decoder(TraceRow)
    rows = []
    for number, line in numbered:
        try:
            row = decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise TraceError(source, number, f"expected a recorded call: {error}") from None
        # A function that was removed meanwhile has taken its size and load time along.
        if row.gpu_id and row.inference_s is not None and row.function in header.models:
            rows.append(row)
    if not rows:
        raise ConfigurationError(f"{source} has no answered call of a GPU function in service: call some first")
    return Recording(header, rows)


def hardware_of(
    recording: Recording,
    *,
    gpus: int | None = None,
    gpu_memory_bytes: int | None = None,
    load_scale: float = 1.0,
) -> Hardware:
    """The recorded cluster with its measured costs, or one with other GPUs.

    A function's load time is the mean of its recorded loads, so is its restore time (``load_pace_of`` tells how fast
    loads were when). These include what it took to make room, so that offloading costs nothing beside them. A batching
    function's run time is the line through its recorded runs; of what was not seen meanwhile, it is what the server had
    learned.
    """
    known = list(recording.header.gpus)
    if gpus is not None:
        known = [
            Gpu(gpu_id=f"what-if/gpu:{i}", memory_bytes=known[0].memory_bytes, kind=known[0].kind) for i in range(gpus)
        ]
    if gpu_memory_bytes is not None:
        known = [msgspec.structs.replace(gpu, memory_bytes=gpu_memory_bytes) for gpu in known]
    loads: defaultdict[tuple[str, bool], list[float]] = defaultdict(list)
    """By function and whether it was parked."""
    for row in recording.rows:
        if row.load_s:
            loads[row.function, row.warm].append(row.load_s)
    costs = {}
    for name in recording.functions():
        learned = recording.header.models[name]
        load_s = fmean(loads[name, False] or [learned.load_s])
        restore_s = fmean(loads[name, True]) if loads[name, True] else learned.restore_s
        runs = batch_cost(recording, name) if learned.max_batch > 1 else None
        costs[name] = ModelCost(
            memory_bytes=learned.memory_bytes,
            load_s=load_s * load_scale,
            inference_s=runs.inference_s if runs else learned.inference_s,
            batch_marginal=runs.marginal if runs else learned.batch_marginal,
            max_batch=learned.max_batch,
            max_batch_wait_s=learned.max_batch_wait_s,
            min_copies=learned.min_copies,
            max_copies=learned.max_copies,
            restore_s=restore_s,
            residue_bytes=learned.residue_bytes,
        )
    return Hardware(gpus=known, costs=costs)


def batches_of(recording: Recording, function: str) -> list[list[TraceRow]]:
    """The recorded calls by the run that answered them: those of one GPU whose run began at one moment."""
    if recording.header.models[function].max_batch == 1:
        return [[row] for row in recording.rows if row.function == function]
    return _runs(row for row in recording.rows if row.function == function)


def _runs(rows: Iterable[TraceRow]) -> list[list[TraceRow]]:
    """Calls by the run they were in."""
    runs: list[list[TraceRow]] = []
    for row in sorted(rows, key=_run_began):
        gpu_id, began_s = _run_began(row)
        if runs:
            last_gpu_id, last_began_s = _run_began(runs[-1][-1])
            if gpu_id == last_gpu_id and began_s - last_began_s < _ONE_MOMENT_S:
                runs[-1].append(row)
                continue
        runs.append([row])
    return runs


def _run_began(row: TraceRow) -> tuple[str, float]:
    return row.gpu_id, row.arrival_s + row.queue_s + row.load_s


def _kept_s(row: TraceRow) -> float:
    """How long a call kept its GPU: its run, and the way to the process and back."""
    return max(row.inference_s or 0.0, row.duration_s - row.queue_s - row.load_s)


def batch_cost(recording: Recording, function: str) -> BatchCost | None:
    """The line, by least squares, through the recorded runs; None where all had the same number of calls."""
    runs = [(len(batch), max(map(_kept_s, batch))) for batch in batches_of(recording, function)]
    sizes, seconds = [size for size, _ in runs], [run_s for _, run_s in runs]
    if len(set(sizes)) < 2:
        return None
    slope_s, base_s = linear_regression(sizes, seconds)
    slope_s = max(0.0, slope_s)
    one_s = base_s + slope_s
    if one_s <= 0:
        return None
    return BatchCost(inference_s=one_s, marginal=min(1.0, slope_s / one_s))


def arrivals_of(recording: Recording) -> Iterator[Arrival]:
    """The recorded calls as the simulator's arrivals. How long a batch ran says little of a single call: where the
    function batches, that is left to its line. A call that had its run to itself kept its GPU until its answer was
    there, from the answer before it if it waited for that, and so it does here: on a busy machine the way to the
    process and back is a good part of that, and a queue adds up every one of them."""
    start_s = recording.rows[0].arrival_s
    models = recording.header.models
    runs = _runs(recording.rows)
    alone = {id(run[0]) for run in runs if len(run) == 1}
    turnovers = _turnovers(runs)
    for row in recording.rows:
        run_s = row.inference_s if models[row.function].max_batch == 1 else None
        if run_s is not None and id(row) in alone:
            run_s = max(run_s, row.duration_s - row.queue_s - row.load_s) + turnovers.get(id(row), 0.0)
        yield Arrival(row.arrival_s - start_s, row.function, run_s, row.caller, row.weight, row.priority)


def _turnovers(runs: Sequence[Sequence[TraceRow]]) -> dict[int, float]:
    """Seconds from a GPU's last answer to the start of the next call (by ``id``), where that waited for it."""
    turnovers = {}
    for before, (row, *_) in itertools.pairwise(runs):
        free_s = max(each.arrival_s + each.duration_s for each in before)
        turnover_s = row.arrival_s + row.queue_s - free_s
        if before[0].gpu_id == row.gpu_id and row.arrival_s < free_s and 0 < turnover_s < LONGEST_TURNOVER_S:
            turnovers[id(row)] = turnover_s
    return turnovers


def load_pace_of(recording: Recording) -> Callable[[float], float]:
    """How many times as long as its function's loads usually did one take that began at a time (seconds after the first
    call): the mean of what was recorded around it, as a machine that others use is not equally fast all the time."""
    start_s = recording.rows[0].arrival_s
    cold = sorted((row for row in recording.rows if row.load_s and not row.warm), key=_load_began_s)
    loads: defaultdict[str, list[float]] = defaultdict(list)
    for row in cold:
        loads[row.function].append(row.load_s)
    usual_s = {function: fmean(each) for function, each in loads.items()}
    began_s = [_load_began_s(row) - start_s for row in cold]
    paces = [row.load_s / usual_s[row.function] for row in cold]

    def pace(time_s: float) -> float:
        around = paces[bisect_left(began_s, time_s - AROUND_S) : bisect_right(began_s, time_s + AROUND_S)]
        return fmean(around) if len(around) >= FEWEST_AROUND else 1.0

    return pace


def _load_began_s(row: TraceRow) -> float:
    return row.arrival_s + row.queue_s


def config_of(recording: Recording) -> SchedulerConfig:
    """The recorded server's scheduler, as far as it matters for when a call is answered."""
    known = recording.header
    return SchedulerConfig(
        burst_s=known.burst_s,
        host_memory_bytes=known.host_memory_bytes,
        overlap=known.overlap,
        prefetch_recurring=known.prefetch_recurring,
    )


def simulated(
    recording: Recording, hardware: Hardware, policy: str, eviction: str, settings: PolicySettings | None = None
) -> RunMetrics:
    """What the simulator predicts for the recorded calls under these policies; with the recorded settings unless told
    others."""
    return engine_of(recording, hardware, policy, eviction, settings).run(arrivals_of(recording))


def engine_of(
    recording: Recording, hardware: Hardware, policy: str, eviction: str, settings: PolicySettings | None = None
) -> Engine:
    """The recorded server in the simulator, before its first call."""
    scheduler = Scheduler(
        make_policy(policy, settings or recording.header.settings), make_eviction(eviction), config_of(recording)
    )
    return Engine(scheduler, hardware, load_pace=load_pace_of(recording))


def measured(recording: Recording) -> RunMetrics:
    """The same figures as the simulator's, from what really happened."""
    start_s = recording.rows[0].arrival_s
    tiers = recording.header.host_memory_bytes > 0
    recorder = Recorder(dict.fromkeys(recording.functions()), len(recording.header.gpus), tiers=tiers)
    for row in recording.rows:
        end_s = row.arrival_s + row.duration_s - start_s
        recorder.arrived += 1
        recorder.misses += not row.hit
        recorder.restores += row.warm and not row.hit
        recorder.load_s += row.load_s
        recorder.inference_s += row.inference_s or 0.0
        recorder.finished(row.function, row.duration_s, max(end_s, recorder.last_end_s))
    for function in recording.functions():
        batches = batches_of(recording, function)
        recorder.run_s += sum(max(row.inference_s or 0.0 for row in batch) for batch in batches)
    return recorder.result()


def _teed(lines: Iterable[bytes], out: Any) -> Iterator[bytes]:
    for line in lines:
        if out is not None:
            out.write(line + b"\n")
        yield line


def _as_json(result: Replayed) -> dict[str, Any]:
    figures = {key: getattr(result.metrics, key) for key in FIGURES}
    return {
        "policy": result.policy,
        "eviction": result.eviction,
        "measured": result.measured,
        "requests": result.metrics.requests,
        "restores": result.metrics.restores,
        **figures,
    }


def _row(result: Replayed) -> tuple[str, ...]:
    metrics = result.metrics
    values = [
        miss_ratio_text(metrics) if key == "miss_ratio" else f"{getattr(metrics, key) * 1e3:.1f} ms" for key in FIGURES
    ]
    return (f"{result.policy} + {result.eviction}", "measured" if result.measured else "simulated", *values)
