"""Batching, live and simulated: four functions that batch on two virtual GPUs.

Calls are served and recorded; the recording is replayed through the simulator and the mean latencies are compared (bar:
within 15 %). At the highest rate, calls one by one would be 2.5 times what the GPUs can do.

A run of n calls sleeps for 20 + 5 n ms, so the comparison is of scheduling and joining, not of how busy the machine is.
Calls are open loop, Poisson, Zipf(1.0). A load is what differs most from its mean: read the ratios of a machine that
has nothing else to do. Ends by itself in about three minutes (``--quick``: less than two).
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
from hotset.cli.replay import batches_of, hardware_of, measured, read_recording, simulated
from hotset.simulation.workloads import Arrival, Popularity, Process, Synthetic
from hotset.store.bundles import make_bundle

BAR = 0.15
SEED = 1
CALL = b'{"numbers": 1}'
NAMES = tuple(f"batching-{index}" for index in range(4))
FUNCTION = '''
import time

import hotset


@hotset.function(gpu_memory="20MiB", max_batch=8)
class Batching:
    """Sleeps once for all."""

    def predict(self, numbers: list[int]) -> list[int]:
        time.sleep(0.020 + 0.005 * len(numbers))
        return numbers
'''
POLICIES = (("lalb_o3", "lru"), ("hotset", "hotset"))
RATES_PER_S = (60.0, 120.0, 200.0)


class Compared(msgspec.Struct, frozen=True):
    """One policy at one rate."""

    policy: str
    rate_per_s: float
    calls: int
    mean_batch: float
    measured_mean_s: float
    simulated_mean_s: float
    measured_p99_s: float
    simulated_p99_s: float

    @property
    def ratio(self) -> float:
        return self.measured_mean_s / self.simulated_mean_s


def deploy(server: Server, folder: Path) -> None:
    code = folder / "batching.py"
    code.write_text(FUNCTION)
    with Remote(server.url) as remote, tempfile.TemporaryFile() as archive:
        bundle = make_bundle(code, archive)
        archive.seek(0)
        remote.upload(bundle.digest, archive, lambda _: None)
        for name in NAMES:
            remote.deploy({"service": name, "image": f"sha256:{bundle.digest}"}, lambda _: None)


def compare(policy: str, eviction: str, rate_per_s: float, seconds: float) -> Compared:
    """Serve, record, replay."""
    popularity = Popularity(NAMES, Popularity.zipf(len(NAMES), 1.0).weights)
    workload = Synthetic(
        popularity=popularity, rate_per_minute=rate_per_s * 60, minutes=seconds / 60, process=Process.POISSON
    )
    calls = list(workload.arrivals(SEED))
    loads = [Arrival(0.0, name) for name in NAMES]  # one call of each, before the clock runs
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder) / "data", "200MiB", policy, eviction, "--host-memory", "0") as server,
    ):
        deploy(server, Path(folder))
        bodies = dict.fromkeys(NAMES, Body(CALL))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(drive(LoadClient(server.url), loads, bodies, GPUS, lambda: None))
            report = runner.run(drive(LoadClient(server.url), calls, bodies, GPUS, lambda: None))
        if set(report.statuses) != {"200"}:
            raise SystemExit(f"calls failed: {report.statuses}")
        with Remote(server.url) as remote:
            recording = read_recording(remote.raw_lines("/system/trace"), server.url)
    runs = sum(len(batches_of(recording, name)) for name in NAMES)
    real, predicted = measured(recording), simulated(recording, hardware_of(recording), policy, eviction)
    return Compared(
        policy=f"{policy} + {eviction}",
        rate_per_s=rate_per_s,
        calls=len(recording.rows),
        mean_batch=len(recording.rows) / runs,
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
    seconds = 8.0 if arguments.quick else 20.0
    results = [compare(*policy, rate, seconds) for rate in RATES_PER_S for policy in POLICIES]
    heads = ("calls/s", "calls", "a run", "mean ms", "simulated", "ratio", "p99 ms", "simulated")
    print("policy".ljust(18) + "".join(head.rjust(10) for head in heads))
    for each in results:
        figures = (
            *(f"{each.rate_per_s:g}", str(each.calls), f"{each.mean_batch:.2f}"),
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
