"""``hotset top`` and ``hotset explain``: what is hot now, and why a call went where it went."""

from __future__ import annotations

import time
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hotset.cli.options import gateway_option, json_option
from hotset.cli.output import write_json
from hotset.cli.remote import Remote
from hotset.functions.units import format_bytes

BAR_WIDTH = 30


@click.command()
@click.option(
    "--interval", default=1.0, show_default=True, type=click.FloatRange(min=0.1), help="Seconds between looks."
)
@click.option("--once", is_flag=True, help="Look once and end.")
@gateway_option
@json_option
def top(interval: float, once: bool, gateway: str, as_json: bool) -> None:
    """Watch the GPUs: what is in their memory, what runs, what waits, how often calls hit. Ctrl-C ends it."""
    with Remote(gateway) as remote:
        if as_json or once:
            state = remote.get("/system/state")
            if as_json:
                write_json(state)
            else:
                Console().print(render_state(state))
            return
        with Live(render_state(remote.get("/system/state")), screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                live.update(render_state(remote.get("/system/state")), refresh=True)


def render_state(state: dict[str, Any]) -> RenderableType:
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
    for host in state["hosts"]:
        used, capacity = format_bytes(host["used_bytes"]), format_bytes(host["capacity_bytes"])
        parts.append(Text(f"parked in the host memory of {host['node']}: {used} of {capacity}"))
    return Group(*parts)


def _gpus(state: dict[str, Any]) -> Table:
    table = Table("GPU", "memory", "used", "busy", "runs", "hot, least recently used first", "warm", expand=True)
    for gpu in state["gpus"]:
        share = gpu["used_bytes"] / gpu["capacity_bytes"] if gpu["capacity_bytes"] else 0.0
        filled = round(share * BAR_WIDTH)
        residents = ", ".join(
            f"{_short(each['model'])} {format_bytes(each['memory_bytes'])}" + ("*" if each["in_use"] else "")
            for each in gpu["residents"]
        )
        parked = ", ".join(f"{_short(each['model'])} {format_bytes(each['host_bytes'])}" for each in gpu["parked"])
        table.add_row(
            gpu["gpu_id"],
            "#" * filled + "." * (BAR_WIDTH - filled),
            f"{format_bytes(gpu['used_bytes'])} of {format_bytes(gpu['capacity_bytes'])}",
            f"{gpu['busy_ratio']:.0%}",
            _short(gpu["running"] or "-"),
            residents or "nothing",
            parked or "-",
        )
    return table


def _functions(state: dict[str, Any]) -> Table:
    columns = ("function", "tier", "calls", "waiting", "errors", "hits", "warm", "misses", "latency", "load", "restore")
    table = Table(*columns, expand=True)
    for each in sorted(state["functions"], key=lambda function: -function["requests"]):
        latency_s = each["mean_latency_s"]
        counts = [str(each[key]) for key in ("requests", "waiting", "errors", "hits", "restores", "misses")]
        medians = [_median(each["transitions"].get(name)) for name in ("load", "restore")]
        latency = "-" if latency_s is None else _ms(latency_s)
        table.add_row(each["name"], tier(each), *counts, latency, *medians)
    return table


def tier(function: dict[str, Any]) -> str:
    """Where a function of the state is, at best."""
    return "hot" if function["hot"] else "warm" if function["warm"] else "cold"


def _median(times: dict[str, Any] | None) -> str:
    return "-" if times is None else _ms(times["median_s"])


def transitions(function: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows that say what a function's changes of residency cost."""
    rows = [
        (name, f"last {_ms(times['last_s'])}, median {_ms(times['median_s'])} ({times['count']} times)")
        for name, times in function["transitions"].items()
    ]
    parts = function["last_load"]
    if parts is not None:
        first_s = parts["first_run_s"]
        spent = f"process {_ms(parts['process_s'])}, import {_ms(parts['import_s'])}, load {_ms(parts['load_s'])}"
        rows.append(("last load", spent + (f", first run {_ms(first_s)}" if first_s is not None else "")))
    return rows


def _short(model: str) -> str:
    """A model's function."""
    return model.rpartition("@")[0] or model


@click.command()
@click.argument("call_id")
@gateway_option
@json_option
def explain(call_id: str, gateway: str, as_json: bool) -> None:
    """Say why the call CALL_ID (its X-Call-Id header) went to its GPU, what was evicted, and what else it could do."""
    with Remote(gateway) as remote:
        report = remote.get(f"/system/explain/{call_id}")
    if as_json:
        write_json(report)
    else:
        Console().print(render_explanation(report))


def render_explanation(report: dict[str, Any]) -> RenderableType:
    """The explanation as text: one paragraph a decision, a table of its alternatives."""
    parts: list[RenderableType] = [Text(f"call {report['call_id']}", style="bold")]
    ended, decided = report["request"], report["decisions"]
    if ended is not None:
        parts.append(
            Text(
                f"{ended['function']}: status {ended['status']}, {'hit' if ended['hit'] else 'miss'} on "
                f"{ended['gpu_id'] or 'no GPU'}; waited {_ms(ended['queue_s'])}, loaded {_ms(ended['load_s'])}, "
                f"ran {_ms(ended['inference_s'])}, {_ms(ended['duration_s'])} in all"
            )
        )
    if decided is None:
        parts.append(Text("No decision is recorded: it runs on the CPU, or is too old."))
        return Group(*parts)
    for decision in decided["decisions"]:
        parts.append(Text(f"\n{decision['gpu_id']}, because: {decision['rule']}"))
        parts.append(
            Text(
                f"expected: wait {_ms(decision['wait_s'])}, load {_ms(decision['load_s'])}, "
                f"run {_ms(decision['inference_s'])}"
            )
        )
        if decision["evicted"]:
            parts.append(Text(f"evicted to make room: {', '.join(map(_short, decision['evicted']))}"))
        if decision["alternatives"]:
            parts.append(_alternatives(decision))
    if decided["rejected"] is not None:
        parts.append(Text(f"rejected ({decided['rejected']}): {decided['note']}"))
    return Group(*parts)


def _alternatives(decision: dict[str, Any]) -> Table:
    table = Table("instead", "wait", "load", "run", "total", title="alternatives at that moment", title_justify="left")
    for other in decision["alternatives"]:
        parts = (other["wait_s"], other["load_s"], other["inference_s"])
        table.add_row(other["gpu_id"], *map(_ms, parts), _ms(sum(parts)))
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
