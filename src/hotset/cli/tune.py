"""``hotset tune``: which policy, eviction and settings would serve this traffic best on this machine?"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from hotset.cli.options import gateway_option, json_option
from hotset.cli.output import Table, progress, show_table, write_json
from hotset.cli.remote import Remote
from hotset.cli.replay import Recording, arrivals_of, config_of, hardware_of, read_recording
from hotset.cli.simulate import Options, experiment, simulate
from hotset.errors import ConfigurationError
from hotset.functions.units import format_bytes, parse_bytes, parse_duration
from hotset.gateway.state import TraceHeader
from hotset.scheduling.eviction import EVICTIONS, make_eviction
from hotset.scheduling.policies import POLICIES, make_policy
from hotset.simulation.candidates import Candidate, other_settings, other_tiers, pairs
from hotset.simulation.hardware import MIB
from hotset.simulation.presets import PRESETS
from hotset.simulation.traces.reading import first_line
from hotset.simulation.tuning import Objective, Problem, Score, Tuning, tune
from hotset.simulation.workloads import Arrival

FLAGS: Mapping[str, str] = {
    "o3_limit": "o3-limit",
    "max_skips": "max-skips",
    "max_wait_s": "max-wait",
    "overrun_s": "overrun",
}
"""Which flag of ``hotset serve`` sets a field of ``PolicySettings``."""
DEFAULT_CURRENT = "hotset+hotset"
"""What ``hotset serve`` runs when nothing is said."""
_SHARED = (
    *("gpus", "gpu_memory", "trace_format", "trace_mode", "choice", "start_minute", "compression", "rate", "minutes"),
    *("arrivals", "zipf", "model_memory", "load", "bandwidth", "inference", "max_batch", "batch_marginal"),
    *("max_batch_wait", "copy_bandwidth", "models_path", "seeds", "first_seed"),
)
"""Options that are ``hotset simulate``'s own."""
_OF_RECORDINGS = ("gpus", "gpu_memory", "seeds", "first_seed")
"""Those that mean something for a live server's trace."""


class RecordedCalls(msgspec.Struct, frozen=True):
    """A live server's trace as a workload: the same for every seed."""

    recording: Recording

    @property
    def name(self) -> str:
        return "recorded calls"

    @property
    def functions(self) -> Sequence[str]:
        return self.recording.functions()

    @property
    def duration_s(self) -> float:
        rows = self.recording.rows
        return rows[-1].arrival_s - rows[0].arrival_s

    @property
    def requests(self) -> tuple[int, ...]:
        return (len(self.recording.rows),)

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        """The recorded calls, in order."""
        return arrivals_of(self.recording)


@click.command()
@click.argument("trace", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--preset", "preset_name", type=click.Choice(list(PRESETS)), help="Tune for this synthetic workload.")
@click.option("--working-set", type=click.IntRange(min=1), help="How many functions are called; default: see below.")
@click.option(
    "--objective",
    type=click.Choice([each.value for each in Objective]),
    default=Objective.MEAN.value,
    show_default=True,
    help="Mean latency, its 99th percentile, or the share of answers within --deadline.",
)
@click.option("--deadline", metavar="TIME", help="Within which requests are to be answered (goodput).")
@click.option("--current", metavar="POLICY+EVICTION", help="What is set now; default: as recorded, or hotset+hotset.")
@click.option("--policy", "policies", metavar="A,B,...", help="Policies to try; default: all.")
@click.option("--eviction", "evictions", metavar="A,B,...", help="Eviction policies to try; default: all.")
@click.option(
    "--host-memory", metavar="SIZE", help="Most host memory to try for models; default: the recorded server's, or none."
)
@click.option(
    "--save",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write what to set into this file, for `hotset serve --config`.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="About how long to try.",
)
@gateway_option
@json_option
def tune_command(
    trace: Path | None,
    preset_name: str | None,
    working_set: int | None,
    objective: str,
    deadline: str | None,
    current: str | None,
    policies: str | None,
    evictions: str | None,
    host_memory: str | None,
    save: Path | None,
    seconds: float,
    gateway: str,
    as_json: bool,
    **shared: Any,
) -> None:
    """Say which policy, eviction, settings and tiers would serve your traffic best, by trying them in the simulator.

    The traffic is that of the running server; or of TRACE, a file that `hotset replay --save` kept or a trace in any
    format of docs/traces.md; or a --preset. A server's trace brings its machine along; --gpus and --gpu-memory ask for
    another. Other traces are cut and scaled as by `hotset simulate`, to a working set of 35 functions and the preset's
    machine if nothing else is said. See docs/tuning.md.
    """
    if (objective == Objective.GOODPUT.value) != (deadline is not None):
        raise ConfigurationError("--objective goodput and --deadline go together: give both or neither")
    deadline_s = parse_duration(deadline, "--deadline") if deadline is not None else None
    host_bytes = parse_bytes(host_memory, "--host-memory") if host_memory is not None else None
    recording = None if preset_name is not None else _recording(trace, gateway)
    if recording is not None:
        context = click.get_current_context()
        given = [
            parameter.opts[0]
            for parameter in context.command.params
            if parameter.name in _SHARED
            and parameter.name not in _OF_RECORDINGS
            and context.get_parameter_source(parameter.name) is click.core.ParameterSource.COMMANDLINE
        ]
        if given or working_set is not None:
            named = given[0] if given else "--working-set"
            raise ConfigurationError(f"a server's trace is taken as it was; leave {named} out")
        problem = _recorded_problem(recording, shared, deadline_s)
        set_now = _recorded(recording)
        if host_bytes is None:
            host_bytes = set_now.host_memory_bytes
    else:
        problem = _simulated_problem(trace, preset_name, working_set, shared, deadline_s, host_memory)
        set_now = _named(DEFAULT_CURRENT)
    if current is not None:
        said = _named(current)
        set_now = msgspec.structs.replace(set_now, policy=said.policy, eviction=said.eviction, settings=said.settings)
    with progress("trying", quiet=as_json) as heard:
        result = tune(
            problem,
            set_now,
            pairs(set_now, _names(policies, POLICIES), _names(evictions, EVICTIONS)),
            Objective(objective),
            refine=[lambda best: other_tiers(best, host_bytes or 0), other_settings],
            seeds=shared["seeds"],
            first_seed=shared["first_seed"],
            seconds=seconds,
            progress=heard,
        )
    if save is not None:
        save.write_text(serve_config(result.choice, result.current), encoding="utf-8")
    if as_json:
        write_json(_as_json(result, deadline_s))
    else:
        _show(result, problem, shared["first_seed"])


tune_command.name = "tune"
# The options that describe a workload and a machine are those of `hotset simulate`, to the letter.
tune_command.params += [parameter for parameter in simulate.params if parameter.name in _SHARED]


def _recording(trace: Path | None, gateway: str) -> Recording | None:
    """The trace of a live server; None: the file is another trace."""
    if trace is None:
        with Remote(gateway) as remote:
            return read_recording(remote.raw_lines("/system/trace"), f"{gateway}/system/trace")
    with contextlib.suppress(msgspec.MsgspecError):
        msgspec.json.decode(first_line(trace), type=TraceHeader)
        with trace.open("rb") as lines:
            return read_recording(lines, str(trace))
    return None


def _recorded_problem(recording: Recording, shared: Mapping[str, Any], deadline_s: float | None) -> Problem:
    memory = shared["gpu_memory"]
    hardware = hardware_of(
        recording,
        gpus=shared["gpus"],
        gpu_memory_bytes=parse_bytes(memory, "--gpu-memory") if memory else None,
    )
    return Problem(
        workload=RecordedCalls(recording),
        hardware=lambda _: hardware,
        config=config_of(recording),
        deadline_s=deadline_s,
    )


def _simulated_problem(
    trace: Path | None,
    preset_name: str | None,
    working_set: int | None,
    shared: Mapping[str, Any],
    deadline_s: float | None,
    host_memory: str | None,
) -> Problem:
    options = simulate.make_context("simulate", []).params
    options |= {**shared, "trace_path": trace, "preset_name": preset_name or options["preset_name"]}
    options["host_memory"] = host_memory  # so that it is known how long copies to and from there take
    preset = PRESETS[options["preset_name"]]
    options["sizes"] = (working_set or preset.working_sets[-1],)
    spec = experiment(Options(**options))
    (workload,) = spec.workloads
    return Problem(
        workload=workload,
        hardware=lambda seed: spec.cluster.hardware(workload.functions, seed),
        deadline_s=deadline_s,
    )


def _recorded(recording: Recording) -> Candidate:
    """How the recorded server was run."""
    known = recording.header
    return Candidate(
        policy=known.policy,
        eviction=known.eviction,
        settings=known.settings,
        overlap=known.overlap,
        prefetch_recurring=known.prefetch_recurring,
        host_memory_bytes=known.host_memory_bytes,
    )


def _named(text: str) -> Candidate:
    policy, _, eviction = text.partition("+")
    return Candidate(policy=make_policy(policy).name, eviction=make_eviction(eviction).name)


def _names(text: str | None, known: Mapping[str, object]) -> list[str]:
    return list(known) if text is None else [name.strip() for name in text.split(",") if name.strip()]


def serve_settings(candidate: Candidate, current: Candidate) -> dict[str, str | int | bool]:
    """What to tell ``hotset serve`` to run like this, by the flags' names; of the tiers, what differs from now."""
    settings: dict[str, str | int | bool] = {"policy": candidate.policy, "eviction": candidate.eviction}
    for name, value in candidate.changed().items():
        settings[FLAGS[name]] = f"{value:g}s" if name.endswith("_s") else int(value)
    if candidate.overlap or current.overlap:
        settings["overlap"] = candidate.overlap
    if candidate.prefetch_recurring or current.prefetch_recurring:
        settings["prefetch-recurring"] = candidate.prefetch_recurring
    if candidate.host_memory_bytes or current.host_memory_bytes:
        settings["host-memory"] = f"{candidate.host_memory_bytes // MIB}MiB"
    return settings


def serve_flags(candidate: Candidate, current: Candidate) -> list[str]:
    """The same as arguments."""
    flags: list[str] = []
    for name, value in serve_settings(candidate, current).items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", str(value)]
    return flags


def serve_config(candidate: Candidate, current: Candidate) -> str:
    """The same as a file for ``hotset serve --config`` (TOML, whose texts and numbers are written as JSON's here)."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in serve_settings(candidate, current).items())


def _label(candidate: Candidate) -> str:
    changes = [f"{name.removesuffix('_s')} {value:g}" for name, value in candidate.changed().items()]
    if candidate.overlap:
        changes.append("overlap")
    if candidate.prefetch_recurring:
        changes.append("prefetch")
    if candidate.host_memory_bytes:
        changes.append(f"host {format_bytes(candidate.host_memory_bytes)}")
    return " ".join((f"{candidate.policy} + {candidate.eviction}", *changes))


def _as_json(result: Tuning, deadline_s: float | None) -> dict[str, Any]:
    return {
        "objective": result.objective.value,
        "deadline_s": deadline_s,
        "current": _candidate_json(result.current),
        "best": _candidate_json(result.best),
        "choice": _candidate_json(result.choice),
        "change": result.choice != result.current,
        "serve_flags": serve_flags(result.choice, result.current),
        "serve_config": serve_config(result.choice, result.current),
        "gain": msgspec.to_builtins(result.gain),
        "gain_over": "other seeds" if result.seeded else "later requests",
        "complete": result.complete,
        "candidates": [
            {
                **_candidate_json(score.candidate),
                **{name: getattr(score, name) for name in Score.__struct_fields__ if name != "candidate"},
            }
            for score in result.scores
        ],
    }


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    fields = ("policy", "eviction", "overlap", "prefetch_recurring", "host_memory_bytes")
    return {name: getattr(candidate, name) for name in fields} | candidate.changed()


def _show(result: Tuning, problem: Problem, seed: int) -> None:
    gpus = problem.hardware(seed).gpus
    click.echo(f"{problem.workload.name} on {len(gpus)} GPUs with {format_bytes(gpus[0].memory_bytes)} each")
    click.echo()
    goodput = result.objective is Objective.GOODPUT
    columns = ("setting", "requests", *(("in time",) if goodput else ()), "mean (s)", "p99 (s)", "misses")
    rows: list[Sequence[str]] = []
    for score in result.scores:
        share = (f"{score.objective:.2%}",) if goodput else ()
        figures = (f"{score.mean_latency_s:.3f}", f"{score.p99_latency_s:.3f}", f"{score.miss_ratio:.1%}")
        marks = " *" if score.candidate == result.current else ""
        rows.append((_label(score.candidate) + marks, str(score.requests), *share, *figures))
    show_table(Table(columns=columns, rows=rows))
    click.echo("* the current setting. Fewer requests: given up after so many.")
    if not result.complete:
        click.echo("Time ran out before the longest comparison; --seconds gives more.")
    click.echo()
    for line in _verdict(result):
        click.echo(line)


def _verdict(result: Tuning) -> list[str]:
    """What to do, and how sure that is."""
    if result.best == result.current:
        return [f"Stay with {_label(result.current)}: nothing that was tried is better."]
    gain = result.gain
    what = {
        Objective.MEAN: "of the mean latency saved",
        Objective.P99: "of the 99th percentile saved",
        Objective.GOODPUT: "more of all requests answered in time",
    }[result.objective]
    over = f"{gain.values} {'other seeds' if result.seeded else 'later parts of the trace'}"
    sure = f"95 % between {gain.ci95[0]:+.1%} and {gain.ci95[1]:+.1%}" if gain.ci95 else "one value, so nobody knows"
    measured = f"{gain.mean:+.1%} {what} against {_label(result.current)} ({sure}, over {over})"
    if result.worthwhile:
        flags = " ".join(serve_flags(result.best, result.current))
        config = serve_config(result.best, result.current).splitlines()
        return [
            f"Set {_label(result.best)}: {measured}.",
            *("", f"  hotset serve {flags}", "", "or, in a file for --config:", ""),
            *(f"  {line}" for line in config),
        ]
    return [
        f"Stay with {_label(result.current)}. The best was {_label(result.best)}, but that is within noise: {measured}."
    ]
