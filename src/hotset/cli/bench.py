"""``hotset bench``: an open-loop load against a live server, and the simulator's figures from real calls."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
import uvloop
from rich.console import Console
from rich.progress import Progress

from hotset.cli.load import LoadClient
from hotset.cli.options import gateway_option, json_option, print_rows
from hotset.cli.output import miss_ratio_text, write_json
from hotset.cli.remote import Remote
from hotset.errors import ConfigurationError
from hotset.functions.units import parse_duration
from hotset.simulation.metrics import Recorder, RunMetrics
from hotset.simulation.traces import open_trace
from hotset.simulation.traces.replay import Replay
from hotset.simulation.traces.replay import replay as replay_trace
from hotset.simulation.working_set import WorkingSet
from hotset.simulation.workloads import Arrival, Popularity, Process, Synthetic

MOST_CALLS = 1_000_000


class Body(msgspec.Struct, frozen=True):
    """What is sent to a function."""

    content: bytes
    content_type: str = "application/json"


class Report(msgspec.Struct, frozen=True):
    """What came of it. Latencies count from when a call was due, so a client that lags hides nothing."""

    metrics: RunMetrics
    statuses: Mapping[str, int]
    """HTTP status, or ``lost`` for a broken connection -> calls."""
    late_s: float
    """How late the latest call was sent: more than a few milliseconds means the load generator was the limit."""


@click.command()
@click.option("--function", "functions", multiple=True, help="Functions to call, most popular first; default: all.")
@click.option("--input", "inputs", multiple=True, metavar="[NAME=]JSON|@FILE", help="Body, for all or NAME.")
@click.option("--zipf", default=1.0, show_default=True, type=click.FloatRange(min=0), help="Exponent of the skew.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Calls a second; default: 10, or as traced.")
@click.option("--duration", default="30s", show_default=True, metavar="TIME", help="How long to call.")
@click.option("--arrivals", type=click.Choice([each.value for each in Process]), default="poisson", show_default=True)
@click.option("--trace", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Replay this trace.")
@click.option("--seed", default=0, show_default=True)
@gateway_option
@json_option
def bench(
    functions: tuple[str, ...],
    inputs: tuple[str, ...],
    zipf: float,
    rate: float | None,
    duration: str,
    arrivals: str,
    trace: Path | None,
    seed: int,
    gateway: str,
    as_json: bool,
) -> None:
    """Call deployed functions as a workload or a trace says, whether or not earlier calls have ended, and measure.

    A trace's functions stand for the deployed ones in order of popularity.
    """
    duration_s = parse_duration(duration, "--duration")
    with Remote(gateway) as remote:
        known = [each["name"] for each in remote.get("/system/functions")]
        state = remote.get("/system/state")
    called = list(functions) or sorted(known)
    unknown = [name for name in called if name not in known]
    if unknown or not called:
        raise ConfigurationError(f"nothing named {', '.join(unknown) or 'anything'} is deployed: hotset list")
    bodies = _bodies(inputs, called)
    schedule = _schedule(called, zipf, rate, duration_s, Process(arrivals), trace, seed)
    with Progress(console=Console(stderr=True), transient=True, disable=as_json) as progress:
        task = progress.add_task("calling", total=len(schedule))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            report = runner.run(
                drive(LoadClient(gateway), schedule, bodies, len(state["gpus"]), lambda: progress.advance(task))
            )
    if as_json:
        write_json(msgspec.to_builtins(report))
    else:
        _print(report)


async def drive(
    client: LoadClient,
    schedule: Sequence[Arrival],
    bodies: Mapping[str, Body],
    gpus: int,
    answered: Callable[[], object],
) -> Report:
    """Make every call when it is due and wait for all answers."""
    recorder = Recorder(bodies, gpus, tiers=True)
    statuses: Counter[str] = Counter()
    late_s = 0.0
    started_s = time.perf_counter()

    async def call(arrival: Arrival) -> None:
        body = bodies[arrival.function]
        answer = await client.call(arrival.function, body.content, body.content_type)
        now_s = time.perf_counter() - started_s
        answered()
        statuses[str(answer.status or "lost")] += 1
        if answer.status == 200:
            _record(recorder, arrival, answer.headers, now_s)

    async with asyncio.TaskGroup() as calls:
        for arrival in schedule:
            wait_s = started_s + arrival.time_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            late_s = max(late_s, -wait_s)
            recorder.arrived += 1
            calls.create_task(call(arrival))
    client.close()
    return Report(recorder.result(), dict(sorted(statuses.items())), late_s)


def _record(recorder: Recorder, arrival: Arrival, headers: Mapping[bytes, bytes], now_s: float) -> None:
    inference_s = float(headers.get(b"x-hotset-inference-seconds", b"0"))
    where = headers.get(b"x-hotset-cache")
    recorder.misses += where in (b"miss", b"warm")
    recorder.restores += where == b"warm"
    recorder.load_s += float(headers.get(b"x-hotset-load-seconds", b"0"))
    recorder.inference_s += inference_s
    recorder.run_s += inference_s
    recorder.finished(arrival.function, now_s - arrival.time_s, now_s)


def _schedule(
    called: Sequence[str],
    zipf: float,
    rate: float | None,
    duration_s: float,
    process: Process,
    trace: Path | None,
    seed: int,
) -> list[Arrival]:
    if trace is None:
        popularity = Popularity.zipf(len(called), zipf)
        workload: Any = Synthetic(
            popularity=Popularity(tuple(called), popularity.weights),
            rate_per_minute=(rate or 10.0) * 60.0,
            minutes=duration_s / 60.0,
            process=process,
        )
        names = dict(zip(called, called, strict=True))
    else:
        workload = replay_trace(
            open_trace(trace),
            Replay(
                working_set=WorkingSet(size=len(called)),
                minutes=duration_s / 60.0,
                rate_per_minute=rate * 60.0 if rate else None,
            ),
        )
        names = dict(zip(workload.functions, called, strict=False))
    schedule = []
    for arrival in workload.arrivals(seed):
        schedule.append(msgspec.structs.replace(arrival, function=names[arrival.function]))
        if len(schedule) > MOST_CALLS:
            raise ConfigurationError(f"that is more than {MOST_CALLS} calls: lower --rate or --duration")
    return schedule


def _bodies(inputs: Sequence[str], called: Sequence[str]) -> dict[str, Body]:
    bodies = dict.fromkeys(called, Body(b"{}"))
    for text in inputs:
        name, equals, value = text.partition("=")
        if equals and name in bodies:
            bodies[name] = _body(value)
        elif equals and name.replace("-", "").isalnum() and not text.startswith(("@", "{", "[", '"')):
            raise ConfigurationError(f"--input {name}=...: {name} is not among the functions that are called")
        else:
            bodies = dict.fromkeys(called, _body(text)) | {k: v for k, v in bodies.items() if v.content != b"{}"}
    return bodies


def _body(text: str) -> Body:
    if text.startswith("@"):
        path = Path(text[1:])
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"--input {text}: {error.strerror}") from None
        return Body(content, "application/json" if path.suffix == ".json" else "application/octet-stream")
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"--input {text!r} is not JSON: {error}") from None
    return Body(text.encode())


def _print(report: Report) -> None:
    metrics = report.metrics
    percentiles = (metrics.p50_latency_s, metrics.p95_latency_s, metrics.p99_latency_s)
    parts = (metrics.mean_queueing_s, metrics.mean_load_s, metrics.mean_inference_s)
    rows = [
        ("calls", f"{metrics.requests}, answered {metrics.completed}"),
        ("statuses", ", ".join(f"{status}: {count}" for status, count in report.statuses.items())),
        ("throughput", f"{metrics.throughput_per_s:.1f} a second"),
        ("mean latency", _ms(metrics.mean_latency_s)),
        ("p50 / p95 / p99", _ms(*percentiles)),
        ("queueing / load / inference", _ms(*parts)),
        ("miss ratio", miss_ratio_text(metrics)),
        ("GPU utilisation", f"{metrics.gpu_utilisation:.1%}"),
        ("fairness", f"slowest function {metrics.fairness:.2f} times the mean"),
        ("sent late by at most", _ms(report.late_s)),
    ]
    print_rows(("figure", "measured"), rows)


def _ms(*seconds: float) -> str:
    return " / ".join(f"{value * 1e3:.1f}" for value in seconds) + " ms"
