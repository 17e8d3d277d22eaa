"""More models than memory: 12 models of 100 MB on 2 GPUs that hold 3 each, under every policy, beside its prediction.

Each run is open loop: Poisson arrivals, Zipf(1.0) over the models, latency counted from the moment a call was due, the
same calls for every policy. Three loads:

    1   60 % of what the same server does with every model resident and 4 callers that wait for their answers
    2   55.3/s, the load at which other servers were measured (the references below)
    3   18.4/s with loads that take 250 ms longer

The server has its defaults, so a model that leaves a GPU is parked in host memory. ``--serve "--host-memory 0"`` turns
that off: models are unloaded, as in the paper, and every miss is a load. ``--serve "--virtual-copy-bandwidth 12GB/s"``
gives the GPUs a bus that parking and coming back must cross. First of each load the default policy is called in turns
with a server whose GPUs hold all the models (``resident_control.py``).

Beside what was measured stands what the simulator predicts for the recorded trace with the learned costs, as ``hotset
replay`` prints it. A sampler watches the reported memory and that of the processes. Everything shares the machine, the
load generator too: on one that others use, read the ratios. Ends by itself: ``--quick`` in about 6 minutes, otherwise
in about 22. ``--folder`` keeps what was prepared, and each run's recording, so that ``--only`` and ``--policies`` can
divide it into parts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import shlex
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import uvloop
from calibration import machine_speed
from many_models import (
    AMPLE_MEMORY,
    CALL,
    GPU_MEMORY,
    GPUS,
    MIB,
    MODELS,
    Server,
    deploy,
    deployed,
    invoke,
    make_weights,
    names,
    serving,
    wait_for_load_checks,
    weights_path,
)
from memory_sampler import MemoryReport, MemorySampler
from resident_control import Control, Turn, in_turns, show_turn
from resident_control import show as show_control

from hotset.cli.bench import Body, Report, drive
from hotset.cli.load import LoadClient
from hotset.cli.replay import Recording, hardware_of, measured, read_recording, simulated
from hotset.cli.serve import serve
from hotset.scheduling.eviction import EVICTIONS
from hotset.scheduling.policies import POLICIES
from hotset.simulation.workloads import Arrival, Popularity, Process, Synthetic

CALLERS = 4
RATIO_BAR = 0.2
"""How far the measured mean latency and miss ratio may be from the predicted ones."""
DEFAULT_RATIO_BAR = 0.15
"""The same under the default policy."""
RESIDENT_MEAN_BAR, RESIDENT_P99_BAR = 1.15, 2.0
"""How many times the latency with every model resident the default policy may take."""
TURN_S = 10.0
"""How long each server is called before it is the other's turn."""
LOOK_S = 5.0
"""How long the same load goes on, after what was measured, while the memory of the processes is looked at."""
SEED = 1
DEFAULT_POLICY, DEFAULT_EVICTION = (
    str(next(parameter.default for parameter in serve.params if parameter.name == name))
    for name in ("policy", "eviction")
)


class Scenario(msgspec.Struct, frozen=True):
    """One load."""

    title: str
    rate_per_s: float
    more_load_s: float = 0.0
    """Added to each load."""
    mean_bar_s: float | None = None
    p99_bar_s: float | None = None
    references: Sequence[str] = ()
    """What others did with this load on the reference machine."""


class Run(msgspec.Struct, frozen=True):
    """One policy under one load."""

    scenario: str
    policy: str
    eviction: str
    calls: int
    failed: int
    mean_s: float
    p50_s: float
    p99_s: float
    loads_per_call: float
    restores_per_call: float
    server_mean_s: float
    """From arrival at the server, as recorded since its start: this and what follows counts the first calls too."""
    predicted_mean_s: float
    server_p99_s: float
    predicted_p99_s: float
    server_miss_ratio: float
    """Loads and restores over calls."""
    predicted_miss_ratio: float
    mean_load_s: float
    """Of the calls that caused a load: eviction, process, import and weights."""
    mean_restore_s: float
    mean_inference_s: float
    late_s: float
    memory: MemoryReport
    load_average: float

    @property
    def latency_ratio(self) -> float:
        return self.server_mean_s / self.predicted_mean_s

    @property
    def miss_ratio_ratio(self) -> float:
        return self.server_miss_ratio / self.predicted_miss_ratio if self.predicted_miss_ratio else 1.0


class Outcome(msgspec.Struct, frozen=True):
    """All that was measured, for ``--json``."""

    machine_speed: float
    serve: str
    """Arguments of the servers beside the defaults."""
    resident_rate_per_s: float
    seconds: float
    controls: list[Control]
    runs: list[Run]


def scenarios(resident_rate_per_s: float) -> list[Scenario]:
    return [
        Scenario("60 % of the all-resident rate", 0.6 * resident_rate_per_s),
        Scenario(
            "55.3/s",
            55.3,
            mean_bar_s=0.028,
            p99_bar_s=0.075,
            references=(
                "Ray Serve, multiplexed: mean 90.9, p99 318 ms",
                "Ray Serve, fast mode: mean 37.0, p99 119 ms",
                "LitServe, LRU by hand, no routing: mean 40.7, p99 151 ms",
            ),
        ),
        Scenario(
            "18.4/s, 250 ms more a load",
            18.4,
            more_load_s=0.25,
            mean_bar_s=0.3,
            p99_bar_s=1.0,
            references=("Ray Serve, multiplexed: mean 2806, p99 8125 ms",),
        ),
    ]


def schedule(rate_per_s: float, seconds: float, seed: int = SEED) -> list[Arrival]:
    """The calls; the same for equal arguments."""
    popularity = Popularity(tuple(names()), Popularity.zipf(MODELS, 1.0).weights)
    workload = Synthetic(
        popularity=popularity, rate_per_minute=rate_per_s * 60, minutes=seconds / 60, process=Process.POISSON
    )
    return list(workload.arrivals(seed))


async def closed_loop(url: str, seconds: float) -> float:
    """Calls a second of callers that wait for each answer."""
    client = LoadClient(url)
    order = itertools.cycle(arrival.function for arrival in schedule(100, 10))
    answered = 0
    end_s = time.perf_counter() + seconds

    async def caller() -> None:
        nonlocal answered
        while time.perf_counter() < end_s:
            answer = await client.call(next(order), CALL, "application/json")
            if answer.status != 200:
                raise SystemExit(f"a call failed with every model resident: {answer.status} {answer.body!r}")
            answered += 1

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    client.close()
    return answered / seconds


class Prepared(msgspec.Struct, frozen=True):
    """A data directory with the functions deployed and their costs learned."""

    data: Path
    resident_rate_per_s: float
    """Calls a second with every model resident and ``CALLERS`` callers."""


def prepare(folder: Path, more_load_s: float, seconds: float) -> Prepared:
    """Make it, or take what an earlier run left in the folder."""
    data, done = folder / f"prepared-{more_load_s:g}", folder / f"prepared-{more_load_s:g}.json"
    if done.exists():
        return Prepared(data, msgspec.json.decode(done.read_bytes(), type=float))
    with (
        serving(data, AMPLE_MEMORY, DEFAULT_POLICY, DEFAULT_EVICTION) as server,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        deploy(server, folder, more_load_s)
        for name in names():
            invoke(server, name)
        wait_for_load_checks(server)
        runner.run(closed_loop(server.url, 3.0))  # whatever is popular comes to be on both GPUs
        prepared = Prepared(data, runner.run(closed_loop(server.url, seconds)))
    done.write_bytes(msgspec.json.encode(prepared.resident_rate_per_s))
    return prepared


class Plan(msgspec.Struct, frozen=True):
    """One run to make."""

    scenario: Scenario
    policy: str
    seconds: float
    more: Sequence[str] = ()
    """Arguments of the server."""


def measure(prepared: Prepared, plan: Plan) -> Run:
    eviction = plan.policy if plan.policy in EVICTIONS else "lru"
    calls = schedule(plan.scenario.rate_per_s, plan.seconds)
    bodies = dict.fromkeys(names(), Body(CALL))
    with (
        deployed(prepared.data, GPU_MEMORY, plan.policy, eviction, *plan.more) as server,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        MemorySampler(server.url) as sampler,
    ):
        report = runner.run(drive(LoadClient(server.url), calls, bodies, GPUS, lambda: None))
        recording = recorded(server, prepared.data.parent / f"{plan.policy}.ndjson")
        sampler.looking = True
        more_calls = schedule(plan.scenario.rate_per_s, LOOK_S)
        runner.run(drive(LoadClient(server.url), more_calls, bodies, GPUS, lambda: None))
    return result(plan, eviction, report, recording, sampler.report)


def control(prepared: Prepared, plan: Plan) -> Control:
    """The plan's server and one that holds all the models, in turns of ``TURN_S``."""
    schedules = [
        schedule(plan.scenario.rate_per_s, TURN_S, SEED + number) for number in range(round(plan.seconds / TURN_S))
    ]
    with (
        deployed(prepared.data, AMPLE_MEMORY, plan.policy, DEFAULT_EVICTION) as resident,
        deployed(prepared.data, GPU_MEMORY, plan.policy, DEFAULT_EVICTION, *plan.more) as limited,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(closed_loop(resident.url, 3.0))  # whatever is popular comes to be on both GPUs
        turns: list[Turn] = runner.run(in_turns(resident, limited, schedules, show_turn))
        recording = recorded(limited, prepared.data.parent / "control.ndjson")
    predicted = simulated(recording, hardware_of(recording), plan.policy, DEFAULT_EVICTION)
    return Control(turns, measured(recording).mean_latency_s, predicted.mean_latency_s)


def recorded(server: Server, path: Path) -> Recording:
    """All calls since the server's start: a replay begins with empty memory, as the server did."""
    with urllib.request.urlopen(f"{server.url}/system/trace", timeout=30) as trace:
        path.write_bytes(trace.read())
    with path.open("rb") as lines:
        return read_recording(lines, str(path))


def result(plan: Plan, eviction: str, report: Report, recording: Recording, memory: MemoryReport) -> Run:
    metrics, lived = report.metrics, measured(recording)
    predicted = simulated(recording, hardware_of(recording), plan.policy, eviction)
    rows = recording.rows[-int(metrics.requests) :]
    loads = [row.load_s for row in rows if not row.hit and not row.warm]
    restores = [row.load_s for row in rows if not row.hit and row.warm]
    return Run(
        scenario=plan.scenario.title,
        policy=plan.policy,
        eviction=eviction,
        calls=int(metrics.requests),
        failed=int(metrics.requests) - report.statuses.get("200", 0),
        mean_s=metrics.mean_latency_s,
        p50_s=metrics.p50_latency_s,
        p99_s=metrics.p99_latency_s,
        loads_per_call=len(loads) / len(rows),
        restores_per_call=len(restores) / len(rows),
        server_mean_s=lived.mean_latency_s,
        predicted_mean_s=predicted.mean_latency_s,
        server_p99_s=lived.p99_latency_s,
        predicted_p99_s=predicted.p99_latency_s,
        server_miss_ratio=lived.miss_ratio,
        predicted_miss_ratio=predicted.miss_ratio,
        mean_load_s=sum(loads) / max(1, len(loads)),
        mean_restore_s=sum(restores) / max(1, len(restores)),
        mean_inference_s=lived.mean_inference_s,
        late_s=report.late_s,
        memory=memory,
        load_average=os.getloadavg()[0],
    )


HEADING = (
    f"  {'policy':<10}{'mean':>7}{'p50':>7}{'p99':>7}{'loads':>7}{'rest.':>6}{'failed':>7} |"
    f"{'at the server':>14}{'predicted':>10}{'ratio':>6}{'misses':>7}{'predicted':>10}{'ratio':>6} |"
    f"{'load':>6}{'rest.':>6}{'run':>6}{'late':>6}{'busy':>6}"
)


def show(run: Run) -> None:
    print(
        f"  {run.policy:<10}{run.mean_s * 1e3:>7.1f}{run.p50_s * 1e3:>7.1f}{run.p99_s * 1e3:>7.1f}"
        f"{run.loads_per_call:>7.2f}{run.restores_per_call:>6.2f}{run.failed:>7} |"
        f"{run.server_mean_s * 1e3:>14.1f}{run.predicted_mean_s * 1e3:>10.1f}{run.latency_ratio:>6.2f}"
        f"{run.server_miss_ratio:>7.3f}{run.predicted_miss_ratio:>10.3f}{run.miss_ratio_ratio:>6.2f} |"
        f"{run.mean_load_s * 1e3:>6.1f}{run.mean_restore_s * 1e3:>6.1f}{run.mean_inference_s * 1e3:>6.1f}"
        f"{run.late_s * 1e3:>6.1f}{run.load_average:>6.1f}",
        flush=True,
    )


def judge(scenario: Scenario, runs: Sequence[Run]) -> None:
    """The bars, each with a yes or a no."""
    for reference in scenario.references:
        print(f"    {reference}")
    default = next((run for run in runs if run.policy == DEFAULT_POLICY), None)
    if default is not None:
        judge_default(scenario, default)
    verdict("no failed call", not any(run.failed for run in runs))
    of_paper = [run for policy in ("lalb_o3", "lalb", "lb") for run in runs if run.policy == policy]
    if len(of_paper) > 1:
        in_order = all(
            a.mean_s <= b.mean_s and a.server_miss_ratio <= b.server_miss_ratio for a, b in itertools.pairwise(of_paper)
        )
        verdict(f"mean and misses: {' <= '.join(run.policy for run in of_paper)}", in_order)
    off = max(abs(ratio - 1) for run in runs for ratio in (run.latency_ratio, run.miss_ratio_ratio))
    verdict(f"measured within {RATIO_BAR:.0%} of predicted (the furthest is {off:.0%} off)", off <= RATIO_BAR)
    show_memory([run.memory for run in runs])


def judge_control(found: Control) -> None:
    mean, p99 = found.mean_ratio, found.p99_ratio
    verdict(f"{DEFAULT_POLICY}: {mean:.2f} of the resident mean (<= {RESIDENT_MEAN_BAR})", mean <= RESIDENT_MEAN_BAR)
    verdict(f"{DEFAULT_POLICY}: {p99:.2f} of the resident p99 (<= {RESIDENT_P99_BAR:g})", p99 <= RESIDENT_P99_BAR)
    judge_prediction(found.server_mean_s, found.predicted_mean_s)


def judge_prediction(server_mean_s: float, predicted_mean_s: float) -> None:
    off = abs(server_mean_s / predicted_mean_s - 1)
    verdict(
        f"{DEFAULT_POLICY}: mean of {server_mean_s * 1e3:.1f} ms at the server within {DEFAULT_RATIO_BAR:.0%} of the"
        f" {predicted_mean_s * 1e3:.1f} ms predicted ({off:.0%})",
        off <= DEFAULT_RATIO_BAR,
    )


def judge_default(scenario: Scenario, run: Run) -> None:
    if scenario.mean_bar_s is not None and scenario.p99_bar_s is not None:
        verdict(f"{run.policy}: mean <= {scenario.mean_bar_s * 1e3:.0f} ms", run.mean_s <= scenario.mean_bar_s)
        verdict(f"{run.policy}: p99 <= {scenario.p99_bar_s * 1e3:.0f} ms", run.p99_s <= scenario.p99_bar_s)
    judge_prediction(run.server_mean_s, run.predicted_mean_s)


def show_memory(reports: Sequence[MemoryReport]) -> None:
    samples, looks = sum(each.samples for each in reports), sum(each.looks for each in reports)
    for what, accounts in (
        (f"hot: a GPU within {GPU_MEMORY}", [each.hot for each in reports]),
        ("parked: the node within its host memory", [each.parked for each in reports]),
    ):
        reported = max(each.most_reported_bytes for each in accounts) / MIB
        held = max(each.most_held_bytes for each in accounts) / MIB
        over = any(each.over_budget or each.unaccounted for each in accounts)
        verdict(f"{what} in {samples} samples (reported {reported:.0f} MiB, {held:.0f} MiB of weights held)", not over)
    fullest = max(reports, key=lambda each: each.most_pss_bytes)
    print(
        f"            at most {fullest.most_processes} GPU processes: {fullest.most_pss_bytes / MIB:.0f} MiB of the"
        f" machine (PSS), of which {fullest.most_private_bytes / MIB:.0f} MiB are their own, in {looks} looks"
    )


def verdict(bar: str, holds: bool) -> None:
    print(f"    {'holds ' if holds else 'MISSED'}  {bar}")


@contextlib.contextmanager
def kept(folder: Path | None) -> Iterator[Path]:
    """That folder, or one that is removed in the end; with the weights in it."""
    with contextlib.ExitStack() as removed:
        if folder is None:
            folder = Path(removed.enter_context(tempfile.TemporaryDirectory(prefix="hotset-bench-")))
        folder.mkdir(exist_ok=True)
        if not weights_path(folder, names()[-1]).exists():
            make_weights(folder)
        yield folder.absolute()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each run lasts (60)")
    parser.add_argument("--quick", action="store_true", help="15 s each")
    parser.add_argument("--policies", default="resident,hotset,lalb_o3,lalb,lb", help="which, comma-separated")
    parser.add_argument("--only", type=int, choices=(1, 2, 3), help="only this one of the three loads")
    parser.add_argument("--serve", default="", metavar="ARGUMENTS", help="further arguments of the servers")
    parser.add_argument("--folder", type=Path, help="prepare there, and keep it for further runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()
    seconds = 15.0 if arguments.quick else arguments.seconds
    policies = arguments.policies.split(",")
    unknown = set(policies) - {"resident", *POLICIES}
    if unknown:
        parser.error(f"there is no policy {', '.join(unknown)}")
    speed = machine_speed()
    print(f"this machine: {speed:.2f} times the reference, load average {os.getloadavg()[0]:.1f}", flush=True)
    runs: list[Run] = []
    controls: list[Control] = []
    with kept(arguments.folder) as folder:
        resident_rate_per_s = prepare(folder, 0.0, 10.0).resident_rate_per_s
        print(f"every model resident, {CALLERS} callers: {resident_rate_per_s:.1f} calls/s")
        for number, scenario in enumerate(scenarios(resident_rate_per_s), start=1):
            if arguments.only not in (None, number):
                continue
            prepared = prepare(folder, scenario.more_load_s, 1.0)
            print(f"\n{scenario.title}: {scenario.rate_per_s:.1f} calls/s for {seconds:.0f} s; times in ms")
            if "resident" in policies:
                plan = Plan(scenario, DEFAULT_POLICY, seconds, shlex.split(arguments.serve))
                controls.append(control(prepared, plan))
                show_control(controls[-1])
                judge_control(controls[-1])
            of_scenario: list[Run] = []
            for policy in [policy for policy in policies if policy != "resident"]:
                if not of_scenario:
                    print(HEADING)
                of_scenario.append(measure(prepared, Plan(scenario, policy, seconds, shlex.split(arguments.serve))))
                show(of_scenario[-1])
            if of_scenario:
                judge(scenario, of_scenario)
            runs += of_scenario
    if arguments.json is not None:
        outcome = Outcome(speed, arguments.serve, resident_rate_per_s, seconds, controls, runs)
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(outcome)))


if __name__ == "__main__":
    main()
