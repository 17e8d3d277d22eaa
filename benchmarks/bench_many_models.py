"""More models than memory: 12 models of 100 MB on 2 GPUs that hold 3 each, under every policy, beside its prediction.

Each run is open loop: Poisson arrivals, Zipf(1.0) over the models, latency counted from the moment a call was due, the
same calls for every policy. Three loads:

    60 %    of what the same server does with every model resident and 4 callers that wait for their answers
    55.3/s  the load at which other servers were measured (the references below)
    18.4/s  the same with loads that take 250 ms longer

Beside what was measured stands what the simulator predicts for the recorded trace with the learned profiles, as
``hotset replay`` prints it. A sampler watches the reported memory and that of the processes. Everything shares the
machine, the load generator too: on one that others use, read the ratios. Ends by itself: ``--quick`` in about 5
minutes, otherwise in about 15.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import tempfile
import time
import urllib.request
from collections.abc import Sequence
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
    MemoryReport,
    MemorySampler,
    Server,
    deploy,
    deployed,
    invoke,
    make_weights,
    names,
    serving,
)

from hotset.cli.bench import Body, Report, drive
from hotset.cli.load import LoadClient
from hotset.cli.replay import Recording, hardware_of, measured, read_recording, simulated
from hotset.cli.serve import serve
from hotset.scheduling.eviction import EVICTIONS
from hotset.scheduling.policies import POLICIES
from hotset.simulation.workloads import Arrival, Popularity, Process, Synthetic

CALLERS = 4
RESIDENT_AT_START = 6
RATIO_BAR = 0.2
"""How far the measured mean latency and miss ratio may be from the predicted ones."""
SEED = 1
DEFAULTS = {str(parameter.name): parameter.default for parameter in serve.params}


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
    server_mean_s: float
    """From arrival at the server, as recorded; with the calls that filled the memory before."""
    predicted_mean_s: float
    server_miss_ratio: float
    predicted_miss_ratio: float
    mean_load_s: float
    """Of the calls that caused a load: eviction, process, import and weights."""
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
    resident_rate_per_s: float
    seconds: float
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


def schedule(rate_per_s: float, seconds: float) -> list[Arrival]:
    """The calls; the same for equal arguments."""
    popularity = Popularity(tuple(names()), Popularity.zipf(MODELS, 1.0).weights)
    workload = Synthetic(
        popularity=popularity, rate_per_minute=rate_per_s * 60, minutes=seconds / 60, process=Process.POISSON
    )
    return list(workload.arrivals(SEED))


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


def prepare(folder: Path, more_load_s: float, seconds: float) -> float:
    """Deploy the functions and learn their profiles in a data directory; calls a second with every model resident."""
    with (
        serving(folder / prepared_name(more_load_s), AMPLE_MEMORY, DEFAULTS["policy"], DEFAULTS["eviction"]) as server,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        deploy(server, folder, more_load_s)
        for name in names():
            invoke(server, name)
        runner.run(closed_loop(server.url, 3.0))  # whatever is popular comes to be on both GPUs
        return runner.run(closed_loop(server.url, seconds))


def prepared_name(more_load_s: float) -> str:
    return f"prepared-{more_load_s:g}"


def measure(prepared: Path, scenario: Scenario, policy: str, seconds: float) -> Run:
    eviction = policy if policy in EVICTIONS else "lru"
    calls = schedule(scenario.rate_per_s, seconds)
    with deployed(prepared, GPU_MEMORY, policy, eviction) as server:
        for name in reversed(names()):
            invoke(server, name)
        with MemorySampler(server) as sampler:
            bodies = dict.fromkeys(names(), Body(CALL))
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                report: Report = runner.run(drive(LoadClient(server.url), calls, bodies, GPUS, lambda: None))
        recording = recorded(server, len(calls) + RESIDENT_AT_START)
    return result(scenario, policy, eviction, report, recording, sampler.report)


def recorded(server: Server, newest: int) -> Recording:
    """The trace of the newest calls: those of the run, and those that made resident what the run found so."""
    with urllib.request.urlopen(f"{server.url}/system/trace", timeout=30) as lines:
        recording = read_recording((line.rstrip() for line in lines), server.url)
    return Recording(recording.header, recording.rows[-newest:])


def result(
    scenario: Scenario, policy: str, eviction: str, report: Report, recording: Recording, memory: MemoryReport
) -> Run:
    metrics, lived = report.metrics, measured(recording)
    predicted = simulated(recording, hardware_of(recording), policy, eviction)
    misses = [row for row in recording.rows if row.load_s]
    return Run(
        scenario=scenario.title,
        policy=policy,
        eviction=eviction,
        calls=int(metrics.requests),
        failed=int(metrics.requests) - report.statuses.get("200", 0),
        mean_s=metrics.mean_latency_s,
        p50_s=metrics.p50_latency_s,
        p99_s=metrics.p99_latency_s,
        loads_per_call=metrics.miss_ratio,
        server_mean_s=lived.mean_latency_s,
        predicted_mean_s=predicted.mean_latency_s,
        server_miss_ratio=lived.miss_ratio,
        predicted_miss_ratio=predicted.miss_ratio,
        mean_load_s=sum(row.load_s for row in misses) / max(1, len(misses)),
        mean_inference_s=lived.mean_inference_s,
        late_s=report.late_s,
        memory=memory,
        load_average=os.getloadavg()[0],
    )


HEADING = (
    f"  {'policy':<10}{'mean':>7}{'p50':>7}{'p99':>7}{'loads':>7}{'failed':>7} |{'predicted mean':>15}{'ratio':>6}"
    f"{'misses':>8}{'ratio':>6} |{'a load':>7}{'a run':>6}{'late':>6}{'busy':>6}"
)


def show(run: Run) -> None:
    print(
        f"  {run.policy:<10}{run.mean_s * 1e3:>7.1f}{run.p50_s * 1e3:>7.1f}{run.p99_s * 1e3:>7.1f}"
        f"{run.loads_per_call:>7.2f}{run.failed:>7} |{run.predicted_mean_s * 1e3:>15.1f}{run.latency_ratio:>6.2f}"
        f"{run.predicted_miss_ratio:>8.2f}{run.miss_ratio_ratio:>6.2f} |{run.mean_load_s * 1e3:>7.1f}"
        f"{run.mean_inference_s * 1e3:>6.1f}{run.late_s * 1e3:>6.1f}{run.load_average:>6.1f}",
        flush=True,
    )


def judge(scenario: Scenario, runs: Sequence[Run]) -> None:
    """The bars, each with a yes or a no."""
    for reference in scenario.references:
        print(f"    {reference}")
    chosen = next((run for run in runs if run.policy == DEFAULTS["policy"]), runs[-1])
    if scenario.mean_bar_s is not None and scenario.p99_bar_s is not None:
        verdict(f"{chosen.policy}: mean <= {scenario.mean_bar_s * 1e3:.0f} ms", chosen.mean_s <= scenario.mean_bar_s)
        verdict(f"{chosen.policy}: p99 <= {scenario.p99_bar_s * 1e3:.0f} ms", chosen.p99_s <= scenario.p99_bar_s)
    verdict("no failed call", not any(run.failed for run in runs))
    of_paper = [run for policy in ("lalb_o3", "lalb", "lb") for run in runs if run.policy == policy]
    in_order = all(
        a.mean_s <= b.mean_s and a.loads_per_call <= b.loads_per_call for a, b in itertools.pairwise(of_paper)
    )
    verdict(f"mean and loads: {' <= '.join(run.policy for run in of_paper)}", in_order)
    off = max(abs(ratio - 1) for run in runs for ratio in (run.latency_ratio, run.miss_ratio_ratio))
    verdict(f"measured within {RATIO_BAR:.0%} of predicted (the furthest is {off:.0%} off)", off <= RATIO_BAR)
    show_memory([run.memory for run in runs])


def show_memory(reports: Sequence[MemoryReport]) -> None:
    samples, looks = sum(each.samples for each in reports), sum(each.looks for each in reports)
    reported = max(each.most_reported_bytes for each in reports) / MIB
    weights = max(each.most_weights_bytes for each in reports) / MIB
    own = max(each.most_own_bytes for each in reports) / MIB
    verdict(
        f"memory within {GPU_MEMORY} in {samples} samples (at most {reported:.0f} MiB reported)",
        not any(each.over_budget for each in reports),
    )
    verdict(
        f"no more in the processes than reported in {looks} looks (at most {weights:.0f} MiB of weights; "
        f"a process's own, apart from them: at most {own:.0f} MiB)",
        not any(each.unaccounted for each in reports),
    )


def verdict(bar: str, holds: bool) -> None:
    print(f"    {'holds ' if holds else 'MISSED'}  {bar}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each run lasts (60)")
    parser.add_argument("--quick", action="store_true", help="15 s each")
    parser.add_argument("--policies", default="lb,lalb,lalb_o3,hotset", help="which, comma-separated")
    parser.add_argument("--only", type=int, choices=(1, 2, 3), help="only this one of the three loads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()
    seconds = 15.0 if arguments.quick else arguments.seconds
    policies = [name for name in arguments.policies.split(",") if name in POLICIES]
    speed = machine_speed()
    print(f"this machine: {speed:.2f} times the reference, load average {os.getloadavg()[0]:.1f}", flush=True)
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="hotset-bench-") as name:
        folder = Path(name)
        make_weights(folder)
        resident_rate_per_s = prepare(folder, 0.0, min(seconds, 10.0))
        print(f"every model resident, {CALLERS} callers: {resident_rate_per_s:.1f} calls/s")
        for number, scenario in enumerate(scenarios(resident_rate_per_s), start=1):
            if arguments.only not in (None, number):
                continue
            prepared = folder / prepared_name(scenario.more_load_s)
            if not prepared.exists():
                prepare(folder, scenario.more_load_s, 1.0)
            print(f"\n{scenario.title}: {scenario.rate_per_s:.1f} calls/s for {seconds:.0f} s; times in ms")
            print(HEADING)
            of_scenario = []
            for policy in policies:
                of_scenario.append(measure(prepared, scenario, policy, seconds))
                show(of_scenario[-1])
            judge(scenario, of_scenario)
            runs += of_scenario
    if arguments.json is not None:
        arguments.json.write_bytes(
            msgspec.json.format(msgspec.json.encode(Outcome(speed, resident_rate_per_s, seconds, runs)))
        )


if __name__ == "__main__":
    main()
