"""Plots as PNG bytes: grouped bars and lines, in colours that colour-blind people can tell apart (Okabe and Ito)."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from hotset.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"lb": "#9a9a9a", "lalb": "#0072b2", "lalb_o3": "#d55e00"}
"""The paper's policies keep their colours in every plot."""
_OTHERS = ("#009e73", "#cc79a7", "#56b4e9", "#b8a200", "#4b3f72")
_MARKERS = "osD^vPX"
_INK, _SOFT, _GRID = "#1f2933", "#66727f", "#e4e7eb"
_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _SOFT,
    "legend.frameon": False,
}
_SIZE = (7.4, 3.7)
_DPI = 150


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One policy's values, one for each group or x."""

    key: str
    """Decides the colour: the policy's name."""
    label: str
    values: Sequence[float]
    intervals: Sequence[tuple[float, float] | None] = ()
    """Low and high end of each value's confidence interval."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One number here and elsewhere; all are ratios."""

    label: str
    key: str
    value: float
    lowest: float
    highest: float
    reference: float


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of chart share."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log: bool = False
    """A logarithmic y axis: for values that differ by orders of magnitude."""
    percent: bool = False
    """Values are ratios and shown as per cent."""
    zoom: bool = False
    """The y axis need not start at zero."""
    bound: Sequence[float] = ()
    """What no policy can beat, for each group or x."""
    bound_label: str = ""


def bars(chart: Chart, groups: Sequence[str]) -> bytes:
    """Grouped bars, each with its value above it and its confidence interval; the bound is a dash across each group."""
    with _figure(chart) as (figure, axes):
        count = len(chart.series)
        width = 0.8 / count
        small = count * len(groups) > 15
        for number, series in enumerate(chart.series):
            at = [group + (number - (count - 1) / 2) * width for group in range(len(groups))]
            axes.bar(at, series.values, width * 0.92, color=_colour(series.key, number), label=series.label, zorder=2)
            tops = list(series.values)
            for index, interval in enumerate(series.intervals):
                if interval is not None:
                    low, high = interval
                    value = series.values[index]
                    errors = [[max(value - low, 0.0)], [max(high - value, 0.0)]]
                    axes.errorbar([at[index]], [value], yerr=errors, color=_INK, lw=1, capsize=2.5, zorder=3)
                    tops[index] = max(high, value)
            if not small:
                for x, top, value in zip(at, tops, series.values, strict=True):
                    axes.annotate(
                        _short(value, percent=chart.percent),
                        (x, top),
                        xytext=(0, 3),
                        textcoords="offset points",
                        ha="center",
                        fontsize=8.5,
                    )
        for group, value in enumerate(chart.bound):
            axes.plot(
                [group - 0.43, group + 0.43],
                [value, value],
                color=_INK,
                lw=1.4,
                ls=(0, (4, 2)),
                label=chart.bound_label if group == 0 else None,
                zorder=4,
            )
        axes.set_xticks(range(len(groups)), groups)
        axes.tick_params(axis="x", length=0)
        return _finish(chart, figure, axes)


def lines(chart: Chart, x: Sequence[float], *, log_x: bool = False) -> bytes:
    """Lines with a marker at each x and a band for the confidence interval."""
    with _figure(chart) as (figure, axes):
        for number, series in enumerate(chart.series):
            colour = _colour(series.key, number)
            axes.plot(
                x,
                series.values,
                color=colour,
                marker=_MARKERS[number % len(_MARKERS)],
                ms=5,
                lw=1.8,
                label=series.label,
            )
            known = [(at, interval) for at, interval in zip(x, series.intervals, strict=False) if interval is not None]
            if known:
                # A logarithmic axis has no place for an interval that reaches below zero: cut it at the bound.
                floor = min([*chart.bound, *series.values]) if chart.log else float("-inf")
                axes.fill_between(
                    [at for at, _ in known],
                    [max(interval[0], floor) for _, interval in known],
                    [interval[1] for _, interval in known],
                    color=colour,
                    alpha=0.13,
                    lw=0,
                )
        if chart.bound:
            axes.plot(x, chart.bound, color=_INK, lw=1.4, ls=(0, (4, 2)), label=chart.bound_label)
        if log_x:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.set_xticks(x, [f"{value:g}" for value in x])
        return _finish(chart, figure, axes)


def comparison(title: str, rows: Sequence[Comparison], *, value_label: str, reference_label: str) -> bytes:
    """One row for each number: a dot and its range for ours, a diamond for the reference."""
    chart = Chart(title=title, x_label="", y_label="", series=(), percent=True, zoom=True)
    with _figure(chart) as (figure, axes):
        for at, row in enumerate(reversed(rows)):
            colour = _colour(row.key, 0)
            axes.plot([row.lowest, row.highest], [at, at], color=colour, lw=5, alpha=0.3, solid_capstyle="round")
            axes.plot(row.value, at, "o", color=colour, ms=8)
            axes.plot(row.reference, at, "D", mfc="white", mec=_INK, ms=7)
        axes.set_yticks(range(len(rows)), [row.label for row in reversed(rows)], color=_INK)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(axis="x", color=_GRID, lw=0.8)
        axes.xaxis.set_major_formatter(lambda value, _: _short(value, percent=True))
        axes.plot([], [], "o", color=_SOFT, ms=8, label=value_label)
        axes.plot([], [], "D", mfc="white", mec=_INK, ms=7, label=reference_label)
        _legend(axes)
        return _png(figure)


@contextmanager
def _figure(chart: Chart) -> Iterator[tuple[Figure, Axes]]:
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigurationError("plots need matplotlib: pip install 'hotset[sim]'") from None
    # No pyplot: it keeps figures in a global list.
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_title(chart.title, pad=30)
        axes.set_xlabel(chart.x_label)
        axes.set_ylabel(chart.y_label, color=_SOFT)
        axes.grid(axis="y", color=_GRID, lw=0.8)
        axes.set_axisbelow(True)
        yield figure, axes


def _finish(chart: Chart, figure: Figure, axes: Axes) -> bytes:
    formatter: Callable[[float, Any], str] = lambda value, _: _short(value, percent=chart.percent)  # noqa: E731
    if chart.log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low / 1.3, high * 1.7)
        axes.minorticks_off()
    elif not chart.zoom:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.06)
    axes.yaxis.set_major_formatter(formatter)
    _legend(axes)
    return _png(figure)


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=5, fontsize=9, handlelength=1.6, borderaxespad=0.3)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _colour(key: str, number: int) -> str:
    return _COLOURS.get(key, _OTHERS[number % len(_OTHERS)])


def _short(value: float, *, percent: bool) -> str:
    if percent:
        whole = abs(value) >= 0.0995 or abs(value * 100 - round(value * 100)) < 1e-9
        return f"{value:.0%}" if whole else f"{value:.1%}"
    return f"{value:.0f}" if abs(value) >= 99.5 else f"{value:.3g}"
