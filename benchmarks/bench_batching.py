"""Batching, live and simulated: four functions that batch on two virtual GPUs.

Calls are served and recorded; the recording is replayed through the simulator and the mean latencies are compared (bar:
within 15 %). At the highest rate, calls one by one would be 2.5 times what the GPUs can do. Some cells hold calls back
for up to 20 ms to fill their batches (``max_batch_wait``).

A run of n calls sleeps for 20 + 5 n ms, so the comparison is of scheduling and joining, not of how busy the machine is.
Calls are open loop, Poisson, Zipf(1.0). The first three seconds, at the highest rate, bring models to the GPUs
and are not compared: what a load takes, and whether one more copy is made, differs from run to run, and a single load
delays as many calls as a second of traffic has. Ends by itself in about three minutes (``--quick``: two).
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

import msgspec
import uvloop
from many_models import GPUS, Server, serving

from hotset.cli.bench import Body, drive
from hotset.cli.load import LoadClient
from hotset.cli.remote import Remote
from hotset.cli.replay import Recording, arrivals_of, batches_of, engine_of, hardware_of, measured, read_recording
from hotset.simulation.metrics import Recorder
from hotset.simulation.workloads import Arrival, Popularity, Process, Synthetic
from hotset.store.bundles import make_bundle

BAR = 0.15
SEED = 1
CALL = b'{"numbers": 1}'
NAMES = tuple(f"batching-{index}" for index in range(4))
FUNCTION = '''
import time

import hotset


@hotset.function(gpu_memory="20MiB", max_batch=8, max_batch_wait={wait!r})
class Batching:
    """Sleeps once for all."""

    def predict(self, numbers: list[int]) -> list[int]:
        time.sleep(0.020 + 0.005 * len(numbers))
        return numbers
'''
WARM_UP_S = 3.0
WARM_UP_PER_S = 200.0
CELLS = (
    ("lalb_o3", "lru", 0.0, 60.0),
    ("hotset", "hotset", 0.0, 60.0),
    ("hotset", "hotset", 0.02, 60.0),
    ("lalb_o3", "lru", 0.0, 120.0),
    ("hotset", "hotset", 0.0, 120.0),
    ("hotset", "hotset", 0.02, 120.0),
    ("lalb_o3", "lru", 0.0, 200.0),
    ("hotset", "hotset", 0.0, 200.0),
)
"""Policy, eviction, ``max_batch_wait`` in seconds, calls a second."""


class Compared(msgspec.Struct, frozen=True):
    """One policy at one rate, after the warm-up."""

    policy: str
    max_batch_wait_s: float
    rate_per_s: float
    calls: int
    mean_batch: float
    loads: int
    """That the warm-up left to be made."""
    measured_mean_s: float
    simulated_mean_s: float
    measured_p99_s: float
    simulated_p99_s: float

    @property
    def ratio(self) -> float:
        return self.measured_mean_s / self.simulated_mean_s


class Later(Recorder):
    """Counts only the calls that arrived after the warm-up."""

    from_s = 0.0

    def finished(self, function: str, latency_s: float, now_s: float) -> None:
        if now_s - latency_s >= self.from_s:
            super().finished(function, latency_s, now_s)


def deploy(server: Server, folder: Path, max_batch_wait_s: float) -> None:
    code = folder / "batching.py"
    code.write_text(FUNCTION.format(wait=max_batch_wait_s))
    with Remote(server.url) as remote, tempfile.TemporaryFile() as archive:
        bundle = make_bundle(code, archive)
        archive.seek(0)
        remote.upload(bundle.digest, archive, lambda _: None)
        for name in NAMES:
            remote.deploy({"service": name, "image": f"sha256:{bundle.digest}"}, lambda _: None)


def compare(policy: str, eviction: str, max_batch_wait_s: float, rate_per_s: float, seconds: float) -> Compared:
    """Serve, record, replay."""
    popularity = Popularity(NAMES, Popularity.zipf(len(NAMES), 1.0).weights)

    def calls(rate: float, length_s: float, seed: int) -> list[Arrival]:
        minutes = length_s / 60
        workload = Synthetic(popularity=popularity, rate_per_minute=rate * 60, minutes=minutes, process=Process.POISSON)
        return list(workload.arrivals(seed))

    loads = [Arrival(0.0, name) for name in NAMES]
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder) / "data", "200MiB", policy, eviction) as server,
    ):
        deploy(server, Path(folder), max_batch_wait_s)
        bodies = dict.fromkeys(NAMES, Body(CALL))
        client = LoadClient(server.url)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            for warming in (loads, calls(WARM_UP_PER_S, WARM_UP_S, SEED)):
                runner.run(drive(client, warming, bodies, GPUS, lambda: None))
            report = runner.run(drive(client, calls(rate_per_s, seconds, SEED + 1), bodies, GPUS, lambda: None))
        if set(report.statuses) != {"200"}:
            raise SystemExit(f"calls failed: {report.statuses}")
        with Remote(server.url) as remote:
            recording = read_recording(remote.raw_lines("/system/trace"), server.url)
    compared = Recording(recording.header, recording.rows[-report.statuses["200"] :])
    runs = sum(len(batches_of(compared, name)) for name in NAMES)
    engine = engine_of(recording, hardware_of(recording), policy, eviction)
    engine.recorder = later = Later(engine.costs, GPUS)
    later.from_s = compared.rows[0].arrival_s - recording.rows[0].arrival_s - 1e-6
    real, predicted = measured(compared), engine.run(arrivals_of(recording))
    return Compared(
        policy=f"{policy} + {eviction}",
        max_batch_wait_s=max_batch_wait_s,
        rate_per_s=rate_per_s,
        calls=len(compared.rows),
        mean_batch=len(compared.rows) / runs,
        loads=sum(not row.hit for row in compared.rows),
        measured_mean_s=real.mean_latency_s,
        simulated_mean_s=predicted.mean_latency_s,
        measured_p99_s=real.p99_latency_s,
        simulated_p99_s=predicted.p99_latency_s,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer calls")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    arguments = parser.parse_args()
    seconds = 6.0 if arguments.quick else 15.0
    results = [compare(*cell, seconds) for cell in CELLS]
    heads = ("held ms", "calls/s", "calls", "a run", "loads", "mean ms", "simulated", "ratio", "p99 ms", "simulated")
    print("policy".ljust(18) + "".join(head.rjust(10) for head in heads))
    for each in results:
        figures = (
            *(f"{each.max_batch_wait_s * 1e3:g}", f"{each.rate_per_s:g}", str(each.calls), f"{each.mean_batch:.2f}"),
            str(each.loads),
            *(f"{each.measured_mean_s * 1e3:.1f}", f"{each.simulated_mean_s * 1e3:.1f}", f"{each.ratio:.3f}"),
            *(f"{each.measured_p99_s * 1e3:.1f}", f"{each.simulated_p99_s * 1e3:.1f}"),
        )
        print(each.policy.ljust(18) + "".join(figure.rjust(10) for figure in figures))
    if arguments.json is not None:
        arguments.json.write_bytes(
            msgspec.json.encode([{**msgspec.to_builtins(each), "ratio": each.ratio} for each in results])
        )
    worst = max(abs(each.ratio - 1) for each in results)
    print(f"largest difference of means: {worst:.1%} (bar: {BAR:.0%})")
    if worst > BAR:
        raise SystemExit("live and simulation disagree")


if __name__ == "__main__":
    main()
