"""``hotset top``: what is in the memory of each GPU, what runs, what waits."""

from __future__ import annotations

import time
from typing import Any

import click
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hotset.cli.options import gateway_option, json_option
from hotset.cli.output import function_of, write_json
from hotset.cli.remote import Remote
from hotset.cli.residency import LOAD_PARTS, TRANSITIONS, brief_transitions, host_memory, tier
from hotset.functions.units import format_bytes

BAR_WIDTH = 10
MOST_CALLERS = 10


@click.command()
@click.option(
    "--interval", default=1.0, show_default=True, type=click.FloatRange(min=0.1), help="Seconds between looks."
)
@click.option("--once", is_flag=True, help="Look once and end.")
@click.option(
    "--processes", is_flag=True, help="With the host memory of the GPU processes: the kernel counts every page for it."
)
@click.option(
    "--transitions", is_flag=True, help="With what moving each model took, and where the time of its last load went."
)
@gateway_option
@json_option
def top(interval: float, once: bool, processes: bool, transitions: bool, gateway: str, as_json: bool) -> None:
    """Watch the GPUs: what is in their memory, what runs, what waits, how often calls hit. Ctrl-C ends it.

    Models are listed with those first that have not been used for longest; a * is in use.
    """
    query = {"processes": "true"} if processes else {}
    with Remote(gateway) as remote:
        if as_json:
            write_json(remote.get("/system/state", **query))
            return

        def look() -> RenderableType:
            return render_state(remote.get("/system/state", **query), transitions=transitions)

        if once:
            Console().print(look())
            return
        with Live(look(), screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                live.update(look(), refresh=True)


def render_state(state: dict[str, Any], *, transitions: bool = False) -> RenderableType:
    """The state as ``top`` shows it."""
    ratio = state["hit_ratio"]
    healthy = "healthy" if state["healthy"] else "NOT HEALTHY"
    title = Text(
        f"hotset {healthy}, {state['policy']} + {state['eviction']}, up {state['uptime_s']:.0f} s, "
        f"{state['requests']} calls, {state['waiting']} waiting, "
        f"hit ratio {'-' if ratio is None else f'{ratio:.1%}'}",
        style="bold" if state["healthy"] else "bold red",
    )
    parts: list[RenderableType] = [title, _gpus(state), _functions(state)]
    if state["thrashing"] is not None:
        parts.insert(1, Text(_thrashing(state["thrashing"]), style="bold red"))
    if transitions:
        parts += [_transitions(state), _last_loads(state)]
    if len(state["callers"]) > 1:
        parts.append(_callers(state["callers"][:MOST_CALLERS]))
    for host in state["hosts"]:
        used, capacity = format_bytes(host["used_bytes"]), format_bytes(host["capacity_bytes"])
        parts.append(Text(f"parked in the host memory of {host['node']}: {used} of {capacity}"))
    if state["processes"] is not None:
        of_gpus = [each for each in state["processes"] if each["gpu_id"]]
        parts.append(Text(f"{len(of_gpus)} GPU processes take {host_memory(*of_gpus)}"))
    return Group(*parts)


def _thrashing(episode: dict[str, Any]) -> str:
    return (
        f"THRASHING: {episode['swapping']:.0%} of the GPUs' time went into swapping models: more of them are called "
        "than fit. Each GPU now stays with a model for longer; give it more GPUs or fewer functions."
    )


def _callers(callers: list[dict[str, Any]]) -> Table:
    """Shares of GPU time since the start, of those that most was spent on."""
    table = _table("caller", "calls", "GPU time", "of it loads", "share")
    total_s = sum(each["run_s"] + each["load_s"] for each in callers) or 1.0
    for each in callers:
        spent_s = each["run_s"] + each["load_s"]
        row = (each["name"] or "(nobody)", str(each["requests"]), f"{spent_s:.1f} s", f"{each['load_s']:.1f} s")
        table.add_row(*row, f"{spent_s / total_s:.0%}")
    return table


def _gpus(state: dict[str, Any]) -> Table:
    table = _table("GPU", "memory", "used", "busy", "runs", "hot", "warm")
    table.columns[2].no_wrap = True
    for gpu in state["gpus"]:
        share = gpu["used_bytes"] / gpu["capacity_bytes"] if gpu["capacity_bytes"] else 0.0
        filled = round(share * BAR_WIDTH)
        residents = ", ".join(
            f"{function_of(each['model'])} {format_bytes(each['memory_bytes'])}" + ("*" if each["in_use"] else "")
            for each in gpu["residents"]
        )
        parked = ", ".join(f"{function_of(each['model'])} {format_bytes(each['host_bytes'])}" for each in gpu["parked"])
        table.add_row(
            gpu["gpu_id"],
            "#" * filled + "." * (BAR_WIDTH - filled),
            f"{format_bytes(gpu['used_bytes'])} / {format_bytes(gpu['capacity_bytes'])}",
            f"{gpu['busy_ratio']:.0%}",
            function_of(gpu["running"] or "-"),
            residents or "nothing",
            parked or "nothing",
        )
    return table


def _functions(state: dict[str, Any]) -> Table:
    columns = ("function", "tier", "calls", "wait", "errors", "hits", "warm", "misses", "mean ms", "load ms", "back ms")
    table = _table(*columns)
    for column in table.columns[2:]:
        column.justify = "right"
    for each in sorted(state["functions"], key=lambda function: -function["requests"]):
        latency_s = each["mean_latency_s"]
        counts = [str(each[key]) for key in ("requests", "waiting", "errors", "hits", "restores", "misses")]
        medians = [_ms(each["transitions"].get(name, {}).get("median_s")) for name in ("load", "restore")]
        table.add_row(each["name"], tier(each), *counts, _ms(latency_s), *medians)
    return table


def _transitions(state: dict[str, Any]) -> Table:
    """What moving each model took, the last time and in the median."""
    table = _table("last (median), ms", *TRANSITIONS)
    for column in table.columns[1:]:
        column.justify = "right"
    for each in state["functions"]:
        if each["transitions"]:
            table.add_row(each["name"], *brief_transitions(each))
    return table


def _last_loads(state: dict[str, Any]) -> Table:
    """Where the time of each model's last load went."""
    table = _table("last load, ms", *LOAD_PARTS, "first run")
    for column in table.columns[1:]:
        column.justify = "right"
    for each in state["functions"]:
        if each["last_load"] is not None:
            parts = [each["last_load"][f"{name}_s"] for name in (*LOAD_PARTS, "first_run")]
            table.add_row(each["name"], *map(_ms, parts))
    return table


def _table(*columns: str) -> Table:
    """Columns without rules between them, the first never cut: what a terminal of 80 columns has room for."""
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.columns[0].no_wrap = True
    return table


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"
