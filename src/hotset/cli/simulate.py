"""``hotset simulate``: policies compared on one cluster and workload, before anyone buys a GPU."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from hotset.cli.comparison import tables
from hotset.cli.options import policy_settings
from hotset.cli.output import STDOUT, progress, show_table, write_json
from hotset.errors import ConfigurationError, TraceError, UnknownNameError
from hotset.functions.units import format_bytes, parse_bytes, parse_duration
from hotset.scheduling.policies.interface import PolicySettings
from hotset.simulation.callers import Flood, Shared
from hotset.simulation.engine import Fault
from hotset.simulation.experiment import ClusterSpec, ExperimentSpec, run_experiment
from hotset.simulation.hardware import ModelCost
from hotset.simulation.presets import PRESETS, Preset, TraceMode, TraceUse, from_trace, preset, synthetic
from hotset.simulation.report import INDEX, ExperimentReport, write_report
from hotset.simulation.traces import FORMATS, open_trace
from hotset.simulation.traces.hotset_trace import HotsetTrace
from hotset.simulation.traces.replay import Timing
from hotset.simulation.working_set import WorkingSet
from hotset.simulation.workloads import Process, Workload

ALL = "all"
OWN = "own"
MODEL_COLUMNS = ("function", "memory", "load", "inference")


class Several(click.ParamType):  # type: ignore[type-arg]
    """A list, separated by commas."""

    def __init__(self, kind: Callable[[str], object], metavar: str) -> None:
        self.kind = kind
        self.name = metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            items = tuple(self.kind(item.strip()) for item in value.split(",") if item.strip())
        except ValueError:
            items = ()
        if not items:
            self.fail(f"{value!r} is no list such as {self.name}", param, ctx)
        return tuple(dict.fromkeys(items))


def _working_set(text: str) -> int | None:
    if text == ALL:
        return None
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


@click.command()
@click.option(
    "--preset",
    "preset_name",
    type=click.Choice(list(PRESETS)),
    default="paper",
    show_default=True,
    help="What everything else is by default.",
)
@click.option("--policy", "policies", type=Several(str, "lb,lalb,lalb_o3"), help="Scheduling policies.")
@click.option(
    "--eviction", "evictions", type=Several(str, "lru"), default="lru", show_default=True, help="Eviction policies."
)
@click.option("--gpus", type=click.IntRange(min=1), help="How many GPUs.")
@click.option("--gpu-memory", metavar="SIZE", help="Memory of each that models may use, such as 7800MiB.")
@click.option(
    "--working-set",
    "sizes",
    type=Several(_working_set, "15,25,35"),
    help="How many functions are called; 'all' for those of a trace.",
)
@click.option(
    "--trace",
    "trace_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Requests from this file, plain or .gz, instead of synthetic ones.",
)
@click.option("--trace-format", type=click.Choice(list(FORMATS)), help="Its format, if its header does not tell.")
@click.option(
    "--trace-mode",
    type=click.Choice([mode.value for mode in TraceMode]),
    default="replay",
    show_default=True,
    help="Replay its requests, or use only its functions' shares.",
)
@click.option(
    "--choice",
    default="top",
    show_default=True,
    metavar="top|skip:K|trigger:NAME",
    help="Which of its functions: the busiest; those after the first K; those with a trigger.",
)
@click.option("--start-minute", type=click.FloatRange(min=0), default=0.0, help="Where in the trace to start.")
@click.option(
    "--compression",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    help="Replay the trace's time this many times faster.",
)
@click.option("--rate", metavar="N|own", help="Requests a minute, all functions together; own: as many as traced.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Length of the workload.")
@click.option(
    "--arrivals",
    type=click.Choice([*(each.value for each in Process), OWN]),
    help="Spacing of requests; own: as traced.",
)
@click.option("--zipf", type=click.FloatRange(min=0), help="Exponent of the synthetic popularity.")
@click.option("--callers", type=click.IntRange(min=1), help="Callers who make the synthetic requests, equally busy.")
@click.option("--flood", metavar="N", help="Requests a minute of one more caller; with --callers.")
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of each kind.")
@click.option("--first-seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--o3-limit",
    "o3_limits",
    type=Several(int, "25"),
    default="25",
    show_default=True,
    help="Most times LALB+O3 lets a request be overtaken.",
)
@click.option("--max-skips", type=click.IntRange(min=1), help="The same, of hotset.")
@click.option("--max-wait", metavar="TIME", help="Then hotset lets it be overtaken no more.")
@click.option(
    "--overrun", metavar="TIME", help="How far mqfq_sticky lets a function run ahead of the least served one."
)
@click.option(
    "--load-scale",
    "load_scales",
    type=Several(float, "1"),
    default="1",
    show_default=True,
    help="Factor on every load time.",
)
@click.option("--model-memory", metavar="SIZE", help="Memory of every model, instead of the preset's models.")
@click.option("--load", metavar="TIME", help="Load time of every model (its fixed part, with --bandwidth).")
@click.option("--bandwidth", metavar="SIZE", help="Bytes a second that a load copies, such as 12GB.")
@click.option("--inference", metavar="TIME", help="Run time of every model.")
@click.option("--max-batch", type=click.IntRange(min=1), help="Most requests of one function that share a run.")
@click.option("--max-batch-wait", metavar="TIME", help="How long one is held back for others; with --max-batch.")
@click.option(
    "--batch-marginal",
    type=click.FloatRange(min=0),
    help="What each further request adds to a run, as a share of the first; with --max-batch.",
)
@click.option("--min-copies", type=click.IntRange(min=0), default=0, help="Copies of each model that are kept hot.")
@click.option(
    "--max-copies", type=click.IntRange(min=1), help="Most GPUs that hold one model; default: as many as pay."
)
@click.option(
    "--deadline", metavar="TIME", help="Within which each request is to be answered; those that cannot are rejected."
)
@click.option(
    "--host-memory", metavar="SIZE", help="Host memory for models that left a GPU, all GPUs together; default: none."
)
@click.option("--copy-bandwidth", metavar="SIZE", help="Bytes a second between host memory and a GPU; default: 24GB.")
@click.option("--overlap/--no-overlap", default=False, show_default=True, help="GPUs load and compute at once.")
@click.option("--prefetch-recurring", is_flag=True, help="They also load what is about to be called; with --overlap.")
@click.option(
    "--models",
    "models_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"A CSV file with the columns {', '.join(MODEL_COLUMNS)}.",
)
@click.option(
    "--fail",
    "fails",
    multiple=True,
    metavar="GPU@TIME[:BACK]",
    help="Lose GPU number GPU at TIME; it is back, empty, at BACK.",
)
@click.option("--no-baseline", is_flag=True, help="Do not run lb for comparison unless it is asked for.")
@click.option("--jobs", type=click.IntRange(min=1), help="Most processes; default: one per core.")
@click.option("--json", "json_path", metavar="FILE", help="Write the results as JSON; - for standard output.")
@click.option(
    "--report",
    "report_path",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write an HTML report, plots and CSV files into this folder.",
)
def simulate(**options: Any) -> None:
    """Compare scheduling and eviction policies in simulation.

    Without options this is the paper's evaluation. Sizes are written 7800MiB or 16GB, times 250ms or 1.5s. See
    docs/simulator.md for what each figure means.
    """
    chosen = Options(**options)
    if chosen.json_path not in (None, STDOUT) and not Path(chosen.json_path).parent.is_dir():
        raise ConfigurationError(f"--json: the folder of {chosen.json_path} does not exist; make it first")
    spec = experiment(chosen)
    if chosen.report_path is not None:
        chosen.report_path.mkdir(parents=True, exist_ok=True)
    with progress("simulating") as heard:
        results = run_experiment(spec, heard, chosen.jobs)
    if chosen.json_path is not None:
        write_json({"runs": results}, chosen.json_path)
    if chosen.report_path is not None:
        write_report(
            ExperimentReport(title="Policies compared", about=_about(spec, chosen), runs=results), chosen.report_path
        )
        click.echo(f"report: {chosen.report_path / INDEX}", err=True)
    if chosen.json_path != STDOUT:
        click.echo(_about(spec, chosen))
        for table in tables(results):
            click.echo()
            show_table(table)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The command's options as given; None: not given."""

    preset_name: str
    policies: tuple[str, ...] | None
    evictions: tuple[str, ...]
    gpus: int | None
    gpu_memory: str | None
    sizes: tuple[int | None, ...] | None
    trace_path: Path | None
    trace_format: str | None
    trace_mode: str
    choice: str
    start_minute: float
    compression: float
    rate: str | None
    minutes: float | None
    arrivals: str | None
    zipf: float | None
    callers: int | None
    flood: str | None
    seeds: int
    first_seed: int
    o3_limits: tuple[int, ...]
    max_skips: int | None
    max_wait: str | None
    overrun: str | None
    load_scales: tuple[float, ...]
    model_memory: str | None
    load: str | None
    bandwidth: str | None
    inference: str | None
    max_batch: int | None
    batch_marginal: float | None
    max_batch_wait: str | None
    min_copies: int
    max_copies: int | None
    deadline: str | None
    host_memory: str | None
    copy_bandwidth: str | None
    overlap: bool
    prefetch_recurring: bool
    models_path: Path | None
    fails: tuple[str, ...]
    no_baseline: bool
    jobs: int | None
    json_path: str | None
    report_path: Path | None


def experiment(options: Options) -> ExperimentSpec:
    """What the options ask for. Raises ``ConfigurationError`` for those that do not go together."""
    base = preset(options.preset_name)
    if (options.max_batch is None) != (options.batch_marginal is None):
        raise ConfigurationError("--max-batch and --batch-marginal go together: give both or neither")
    if options.max_batch_wait is not None and options.max_batch is None:
        raise ConfigurationError("--max-batch-wait is for filling batches: give --max-batch too")
    if options.max_copies is not None and options.min_copies > options.max_copies:
        raise ConfigurationError("--min-copies is more than --max-copies: keep no more than there may be")
    if options.trace_path is None:
        workloads: list[Workload] = _synthetic(options, base)
    else:
        workloads = _traced(options, options.trace_path, base)
    if (options.callers and options.trace_path) or (options.flood and not options.callers):
        raise ConfigurationError("--flood needs --callers, and --callers a synthetic workload: leave out --trace")
    cluster = ClusterSpec(
        gpus=options.gpus or base.cluster.gpus,
        gpu_memory_bytes=(
            base.cluster.gpu_memory_bytes
            if options.gpu_memory is None
            else parse_bytes(options.gpu_memory, "--gpu-memory")
        ),
        models=_models(options),
        max_batch=options.max_batch or 1,
        batch_marginal=1.0 if options.batch_marginal is None else options.batch_marginal,
        max_batch_wait_s=parse_duration(options.max_batch_wait or 0.0, "--max-batch-wait"),
        min_copies=options.min_copies,
        max_copies=options.max_copies,
        host_memory_bytes=parse_bytes(options.host_memory, "--host-memory") if options.host_memory else 0,
        copy_bytes_per_s=_bandwidth(options.copy_bandwidth, "--copy-bandwidth") or base.cluster.copy_bytes_per_s,
        overlap=options.overlap,
        prefetch_recurring=options.prefetch_recurring,
    )
    return ExperimentSpec(
        workloads=workloads,
        policies=options.policies or base.policies,
        evictions=options.evictions,
        o3_limits=options.o3_limits,
        settings=policy_settings(
            PolicySettings(), max_skips=options.max_skips, max_wait=options.max_wait, overrun=options.overrun
        ),
        load_scales=options.load_scales,
        cluster=cluster,
        seeds=options.seeds,
        first_seed=options.first_seed,
        faults=[_fault(text, cluster.gpus) for text in options.fails],
        deadline_s=None if options.deadline is None else parse_duration(options.deadline, "--deadline"),
        baseline=not options.no_baseline,
    )


def _synthetic(options: Options, base: Preset) -> list[Workload]:
    if OWN in (options.rate, options.arrivals) or options.sizes == (None,):
        raise ConfigurationError("only a trace has functions, a rate or arrivals of its own; give one with --trace")
    base = msgspec.structs.replace(
        base,
        rate_per_minute=_rate(options.rate) or base.rate_per_minute,
        minutes=options.minutes or base.minutes,
    )
    process = Process(options.arrivals or Process.EVEN.value)
    made = [synthetic(size, base, options.zipf, process) for size in options.sizes or base.working_sets if size]
    if options.callers is None:
        return [*made]
    rate = _rate(options.flood, "--flood")
    flood = None if rate is None else Flood(rate_per_minute=rate)
    return [Shared(base=each, callers=options.callers, flood=flood) for each in made]


def _traced(options: Options, path: Path, base: Preset) -> list[Workload]:
    trace = open_trace(path, options.trace_format)
    mode = TraceMode(options.trace_mode)
    # A recording of hotset's own is replayed as it was; other traces are cut and scaled to the preset, as in the paper.
    recording = isinstance(trace, HotsetTrace) and mode is TraceMode.REPLAY
    minutes, rate = options.minutes, _rate(options.rate)
    if not recording:
        available = max(0.0, trace.duration_s / 60 - options.start_minute) / options.compression
        minutes = minutes or min(base.minutes, available) or None
        rate = rate or (None if options.rate == OWN else base.rate_per_minute)
    process, timing = Process.EVEN, None
    if options.arrivals is not None:
        if mode is TraceMode.SHARES:
            if options.arrivals == OWN:
                raise ConfigurationError("--trace-mode shares makes arrivals up; use --trace-mode replay for its own")
            process = Process(options.arrivals)
        elif options.arrivals in (OWN, Process.EVEN.value):
            timing = Timing(options.arrivals)
        else:
            raise ConfigurationError(f"a replayed trace has arrivals 'own' or 'even', not {options.arrivals!r}")
    use = TraceUse(
        mode=mode,
        choice=_choice(options.choice),
        start_minute=options.start_minute,
        minutes=minutes,
        rate_per_minute=rate,
        compression=options.compression,
        timing=timing,
        process=process,
        zipf=base.zipf if options.zipf is None else options.zipf,
    )
    sizes: Sequence[int | None] = options.sizes or ((None,) if recording else base.working_sets)
    return [from_trace(trace, use, size) for size in sizes]


def _rate(text: str | None, option: str = "--rate") -> float | None:
    if text is None or text == OWN:
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if rate <= 0:
        raise ConfigurationError(f"{option}: {text!r} is no number of requests a minute; write one such as 325, or own")
    return rate


def _choice(text: str) -> WorkingSet:
    kind, _, value = text.partition(":")
    if text == "top":
        return WorkingSet()
    if kind == "skip" and value.isdecimal():
        return WorkingSet(skip=int(value))
    if kind == "trigger" and value:
        return WorkingSet(trigger=value)
    raise ConfigurationError(f"--choice: {text!r} is none of top, skip:K (such as skip:5) and trigger:NAME")


def _fault(text: str, gpus: int) -> Fault:
    match = re.fullmatch(r"(\d+)@([^:]+)(?::(.+))?", text)
    if match is None:
        raise ConfigurationError(f"--fail: {text!r} is not GPU@TIME or GPU@TIME:BACK, such as 0@90s:120s")
    number, time_s = int(match[1]), parse_duration(match[2], "--fail")
    back_s = None if match[3] is None else parse_duration(match[3], "--fail")
    if number >= gpus:
        raise UnknownNameError("GPU", match[1], tuple(map(str, range(gpus))))
    if back_s is not None and back_s <= time_s:
        raise ConfigurationError(
            f"--fail: {text!r} brings the GPU back before it fails; give a later time after the colon"
        )
    return Fault(time_s=time_s, gpu_id=f"sim/gpu:{number}", back_s=back_s)


def _models(options: Options) -> dict[str, ModelCost] | ModelCost | None:
    given = (options.model_memory, options.load, options.inference)
    if options.models_path is not None:
        if any(given) or options.bandwidth:
            raise ConfigurationError(
                "--models says it all; leave out --model-memory, --load, --bandwidth and --inference"
            )
        return read_models(options.models_path)
    if not any(given) and options.bandwidth is None:
        return None
    if options.model_memory is None or options.inference is None or not (options.load or options.bandwidth):
        raise ConfigurationError("equal models need --model-memory, --inference and one of --load and --bandwidth")
    memory_bytes = parse_bytes(options.model_memory, "--model-memory")
    load_s = parse_duration(options.load, "--load") if options.load else 0.0
    bandwidth = _bandwidth(options.bandwidth, "--bandwidth")
    if bandwidth is not None:
        load_s += memory_bytes / bandwidth
    return ModelCost(
        memory_bytes=memory_bytes, load_s=load_s, inference_s=parse_duration(options.inference, "--inference")
    )


def _bandwidth(text: str | None, option: str) -> int | None:
    """Bytes a second; None: not given."""
    if text is None:
        return None
    bandwidth = parse_bytes(text, option)
    if not bandwidth:
        raise ConfigurationError(f"{option} must be above 0")
    return bandwidth


def read_models(path: Path) -> dict[str, ModelCost]:
    """A table of models: CSV with ``function, memory, load, inference``. Raises ``TraceError`` for a bad row."""
    with path.open(newline="", encoding="utf-8") as stream:
        rows = csv.DictReader(stream)
        if not set(MODEL_COLUMNS) <= set(rows.fieldnames or ()):
            raise TraceError(str(path), 1, f"expected a header with the columns {', '.join(MODEL_COLUMNS)}")
        models: dict[str, ModelCost] = {}
        for row in rows:
            try:
                models[row["function"]] = ModelCost(
                    memory_bytes=parse_bytes(row["memory"], "memory"),
                    load_s=parse_duration(row["load"], "load"),
                    inference_s=parse_duration(row["inference"], "inference"),
                )
            except ConfigurationError as error:
                raise TraceError(str(path), rows.line_num, str(error)) from None
    return models


def _about(spec: ExperimentSpec, options: Options) -> str:
    cluster, first = spec.cluster, spec.workloads[0]
    memory = format_bytes(cluster.gpu_memory_bytes)
    source = f"trace {options.trace_path.name} ({first.name})" if options.trace_path else f"synthetic, {first.name}"
    seeds = f"{spec.seeds} seed{'s' if spec.seeds > 1 else ''}"
    if cluster.host_memory_bytes:
        memory += f", {format_bytes(cluster.host_memory_bytes)} on the host"
    if cluster.overlap:
        memory += ", loads overlap"
    return f"{cluster.gpus} GPUs with {memory} each; {source}; {seeds} from {spec.first_seed}"
