"""The tables that ``hotset simulate`` prints."""

from __future__ import annotations

from collections.abc import Sequence

from hotset.cli.output import Table
from hotset.simulation.experiment import RunResult
from hotset.simulation.report import by_workload, variant_label


def tables(runs: Sequence[RunResult]) -> list[Table]:
    """How long requests took, and what the GPUs did; working sets are set apart, each with its bounds last."""
    latency = Table(
        title="Latency (s)",
        columns=(
            "working set",
            "policy",
            "mean",
            "± 95%",
            "p50",
            "p95",
            "p99",
            "variance",
            "queueing",
            "load",
            "inference",
            "fairness",
            "vs lb",
            "speed-up",
        ),
        rows=[],
        left=2,
    )
    memory = Table(
        title="Memory and GPUs",
        columns=(
            "working set",
            "policy",
            "misses",
            "± 95%",
            "false misses",
            "vs lb",
            "evictions",
            "copies of top",
            "utilisation",
            "busy",
            "requests/s",
            "requests",
            "completed",
        ),
        rows=[],
        left=2,
    )
    breaks: list[int] = []
    for group in by_workload(runs):
        breaks.append(len(latency.rows))
        for number, run in enumerate(group):
            first = str(run.working_set) if number == 0 else ""
            versus = run.vs_lb
            latency.rows.append(
                (
                    first,
                    variant_label(run, group),
                    f"{run.mean_latency_s:.2f}",
                    _half(run, "mean_latency_s", 2),
                    f"{run.p50_latency_s:.2f}",
                    f"{run.p95_latency_s:.2f}",
                    f"{run.p99_latency_s:.2f}",
                    f"{run.latency_variance:.1f}",
                    f"{run.mean_queueing_s:.2f}",
                    f"{run.mean_load_s:.2f}",
                    f"{run.mean_inference_s:.2f}",
                    f"{run.fairness:.2f}",
                    _change(versus.latency_reduction) if versus else "",
                    f"{versus.speedup:.1f}x" if versus else "",
                )
            )
            memory.rows.append(
                (
                    first,
                    variant_label(run, group),
                    f"{run.miss_ratio:.1%}",
                    _half(run, "miss_ratio", 1, percent=True),
                    f"{run.false_miss_ratio:.1%}",
                    _change(versus.miss_reduction) if versus else "",
                    f"{run.evictions:.0f}",
                    f"{run.top_model_copies:.1f}",
                    f"{run.gpu_utilisation:.1%}",
                    f"{run.gpu_busy:.1%}",
                    f"{run.throughput_per_s:.2f}",
                    f"{run.requests:.0f}",
                    f"{run.completed:.0f}",
                )
            )
        some = group[0]
        latency.rows.append(("", "no loads at all", f"{some.ideal_mean_latency_s:.2f}", *[""] * 11))
        memory.rows.append(("", "clairvoyant", f"{some.clairvoyant_miss_ratio:.1%}", *[""] * 10))
    latency.breaks = memory.breaks = breaks
    return [latency, memory]


def _change(reduction: float) -> str:
    return f"{-reduction:+.1%}" if reduction else ""


def _half(run: RunResult, figure: str, digits: int, *, percent: bool = False) -> str:
    if run.ci95 is None:
        return ""
    low, high = run.ci95[figure]
    return f"{(high - low) / 2:.{digits}{'%' if percent else 'f'}}"
