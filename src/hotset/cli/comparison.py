"""The tables that ``hotset simulate`` prints; each fits a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hotset.cli.output import Table
from hotset.simulation.experiment import RunResult, VersusLb
from hotset.simulation.report import by_workload, variant_label

Cell = Callable[[RunResult], str]


def tables(runs: Sequence[RunResult]) -> list[Table]:
    """How long requests took, what that time was spent on, what GPU memory had to do with it, and deadlines if missed.

    Working sets are set apart; below each is what no policy can beat.
    """
    shown = [
        _table(
            "Latency (s)",
            runs,
            {
                "mean": lambda run: f"{run.mean_latency_s:.2f}",
                "± 95%": lambda run: _half(run, "mean_latency_s"),
                "p50": lambda run: f"{run.p50_latency_s:.2f}",
                "p95": lambda run: f"{run.p95_latency_s:.2f}",
                "p99": lambda run: f"{run.p99_latency_s:.2f}",
                "variance": lambda run: f"{run.latency_variance:.1f}",
                "vs lb": lambda run: _gain(run, lambda versus: _change(versus.latency_reduction)),
                "speed-up": lambda run: _gain(run, lambda versus: f"{versus.speedup:.1f}x"),
            },
            "no loads",
            {"mean": lambda run: f"{run.ideal_mean_latency_s:.2f}"},
        ),
        _table(
            "Time (s a request; GPU time)",
            runs,
            {
                "queueing": lambda run: f"{run.mean_queueing_s:.2f}",
                "load": lambda run: f"{run.mean_load_s:.2f}",
                "inference": lambda run: f"{run.mean_inference_s:.2f}",
                "fairness": lambda run: f"{run.fairness:.2f}",
                "utilisation": lambda run: f"{run.gpu_utilisation:.1%}",
                "busy": lambda run: f"{run.gpu_busy:.1%}",
                "requests/s": lambda run: f"{run.throughput_per_s:.2f}",
            },
        ),
        _table(
            "Memory",
            runs,
            {
                "misses": lambda run: f"{run.miss_ratio:.1%}",
                "± 95%": lambda run: _half(run, "miss_ratio", percent=True),
                "false": lambda run: f"{run.false_miss_ratio:.1%}",
                "vs lb": lambda run: _gain(run, lambda versus: _change(versus.miss_reduction)),
                "evictions": lambda run: f"{run.evictions:.0f}",
                "top copies": lambda run: f"{run.top_model_copies:.1f}",
                "completed": _completed,
            },
            "clairvoyant",
            {"misses": lambda run: f"{run.clairvoyant_miss_ratio:.1%}"},
        ),
    ]
    if any(run.deadline_misses for run in runs):
        shown.append(
            _table(
                "Deadlines",
                runs,
                {
                    "in time/s": lambda run: f"{run.goodput_per_s:.2f}",
                    "missed": lambda run: f"{run.deadline_misses:.0f}",
                    "rejected": lambda run: f"{run.rejected:.0f}",
                    "of all": lambda run: f"{run.deadline_misses / run.requests:.1%}",
                },
            )
        )
    if any(run.jain_index is not None for run in runs):
        shown.append(
            _table(
                "Callers",
                runs,
                {
                    "others' p99": lambda run: f"{run.others_p99_latency_s or 0.0:.2f}",
                    "Jain's index": lambda run: f"{run.jain_index or 0.0:.2f}",
                    "rejected": lambda run: f"{run.rejected:.0f}",
                },
            )
        )
    return shown


def _table(
    title: str,
    runs: Sequence[RunResult],
    columns: Mapping[str, Cell],
    bound: str = "",
    bound_columns: Mapping[str, Cell] | None = None,
) -> Table:
    rows: list[Sequence[str]] = []
    breaks: list[int] = []
    for group in by_workload(runs):
        breaks.append(len(rows))
        for number, run in enumerate(group):
            size = str(run.working_set) if number == 0 else ""
            rows.append((size, variant_label(run, group), *(cell(run) for cell in columns.values())))
        if bound_columns is not None:
            rows.append(
                ("", bound, *(bound_columns[name](group[0]) if name in bound_columns else "" for name in columns))
            )
    return Table(title=title, columns=("set", "policy", *columns), rows=rows, breaks=breaks, left=2)


def _gain(run: RunResult, show: Callable[[VersusLb], str]) -> str:
    return show(run.vs_lb) if run.vs_lb else ""


def _completed(run: RunResult) -> str:
    done, all_requests = f"{run.completed:.0f}", f"{run.requests:.0f}"
    return done if done == all_requests else f"{done} of {all_requests}"


def _change(reduction: float) -> str:
    return f"{-reduction:+.1%}" if reduction else ""


def _half(run: RunResult, figure: str, *, percent: bool = False) -> str:
    if run.ci95 is None:
        return ""
    low, high = run.ci95[figure]
    return f"{(high - low) / 2:.1%}" if percent else f"{(high - low) / 2:.2f}"
