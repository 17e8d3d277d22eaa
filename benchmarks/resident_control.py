"""The default policy beside a server that never has to load, under the same calls, in turns.

What one machine does from minute to minute differs by more than what is to be shown. So both servers are up at once,
one idle while the other is called; each turn's calls are made on both, who is first alternates, and what counts is the
ratio within a turn: its median over the turns, and its range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, median

import msgspec
from many_models import CALL, GPUS, Server, names

from hotset.cli.bench import Body, drive
from hotset.cli.load import LoadClient
from hotset.simulation.metrics import RunMetrics
from hotset.simulation.workloads import Arrival


class Turn(msgspec.Struct, frozen=True):
    """The same calls on both servers, within seconds of each other."""

    resident: RunMetrics
    limited: RunMetrics

    @property
    def mean_ratio(self) -> float:
        return self.limited.mean_latency_s / self.resident.mean_latency_s

    @property
    def p99_ratio(self) -> float:
        return self.limited.p99_latency_s / self.resident.p99_latency_s


class Control(msgspec.Struct, frozen=True):
    """All turns."""

    turns: Sequence[Turn]
    server_mean_s: float
    """Of the limited server, from arrival there, as recorded since its start."""
    predicted_mean_s: float

    @property
    def mean_ratio(self) -> float:
        return median(turn.mean_ratio for turn in self.turns)

    @property
    def p99_ratio(self) -> float:
        return median(turn.p99_ratio for turn in self.turns)


async def in_turns(
    resident: Server, limited: Server, schedules: Sequence[Sequence[Arrival]], told: Callable[[Turn], None]
) -> list[Turn]:
    """One turn for each schedule. Raises ``SystemExit`` where a call fails."""
    turns = []
    for number, calls in enumerate(schedules):
        order = (resident, limited) if number % 2 == 0 else (limited, resident)
        of = {server.url: await _called(server, calls) for server in order}
        turns.append(Turn(of[resident.url], of[limited.url]))
        told(turns[-1])
    return turns


async def _called(server: Server, calls: Sequence[Arrival]) -> RunMetrics:
    report = await drive(LoadClient(server.url), calls, dict.fromkeys(names(), Body(CALL)), GPUS, lambda: None)
    if set(report.statuses) != {"200"}:
        raise SystemExit(f"calls failed: {report.statuses}\n{server.log.read_text()}")
    return report.metrics


def show_turn(turn: Turn) -> None:
    """Means in ms: all, and the parts that add up to it."""
    for who, metrics in (("resident", turn.resident), ("limited", turn.limited)):
        print(f"  {who:<10}{_parts([metrics])}", end="")
    print(f"  | mean {turn.mean_ratio:.2f}, p99 {turn.p99_ratio:.2f} of resident", flush=True)


def show(control: Control) -> None:
    """Both servers' figures over all turns, and the ratios with their spread."""
    print(f"  over {len(control.turns)} turns: mean = queue + load + run, and p99, in ms")
    for who, of in (
        ("all resident", [turn.resident for turn in control.turns]),
        ("three a GPU", [turn.limited for turn in control.turns]),
    ):
        misses, restores = fmean(each.miss_ratio for each in of), sum(each.restores or 0 for each in of)
        calls = sum(each.completed for each in of)
        print(f"  {who:<14}{_parts(of)}; {misses:.3f} misses a call, restores {restores / calls:.3f}")
    for what, ratios in (
        ("mean", [turn.mean_ratio for turn in control.turns]),
        ("p99", [turn.p99_ratio for turn in control.turns]),
    ):
        print(f"  {what} of resident: {median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})")


def _parts(of: Sequence[RunMetrics]) -> str:
    mean, queue, load, run, p99 = (
        1e3 * fmean(getattr(each, name) for each in of)
        for name in ("mean_latency_s", "mean_queueing_s", "mean_load_s", "mean_inference_s", "p99_latency_s")
    )
    return f"{mean:6.1f} = {queue:5.1f} + {load:4.1f} + {run:4.1f}, {p99:6.1f}"
