"""How commands tell where a model is, what it takes there, and what moving it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hotset.cli.output import milliseconds
from hotset.functions.units import format_bytes

TRANSITIONS = ("load", "restore", "offload", "unload")
"""In the order they are told."""
LOAD_PARTS = ("room", "process", "import", "load")
"""What a load consists of, in this order; ``room``: until whoever was to leave first had left."""


def tier(function: dict[str, Any]) -> str:
    """Where a function of the state is, at best."""
    if function["kind"] != "gpu":
        return "-"
    return "hot" if function["hot"] else "warm" if function["warm"] else "cold"


def residency_rows(function: dict[str, Any] | None, processes: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Rows of ``describe``: where the function of the state is, what moving it cost, and its processes. ``None``: it is
    not in service."""
    rows: list[tuple[str, str]] = []
    if function is not None and function["kind"] == "gpu":
        rows += [(f"{level} on", ", ".join(function[level]) or "no GPU now") for level in ("hot", "warm")]
        rows = [("tier", tier(function)), *rows, *transitions(function)]
    return rows + [(f"process {each['pid']}", _process(each)) for each in processes]


def transitions(function: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows that say what a function's changes of residency took, and where the time of its last load went."""
    known = function["transitions"]
    rows = [(name, _times(known[name])) for name in TRANSITIONS if name in known]
    if function["last_load"] is not None:
        rows.append(("last load", _parts(function["last_load"])))
    return rows


def brief_transitions(function: dict[str, Any]) -> list[str]:
    """``last (median)`` of each of ``TRANSITIONS``, in milliseconds."""
    return [_last_and_median(function["transitions"].get(name)) for name in TRANSITIONS]


def host_memory(*processes: dict[str, Any]) -> str:
    """What processes take of the machine: what each has written for itself, and their shares of what is mapped."""
    private_bytes = sum(each["private_bytes"] for each in processes)
    shared_bytes = sum(each["shared_bytes"] for each in processes)
    return (
        f"{format_bytes(private_bytes + shared_bytes)} of host memory: {format_bytes(private_bytes)} private, "
        f"{format_bytes(shared_bytes)} its share of what is shared"
    )


def _process(process: dict[str, Any]) -> str:
    if not process["gpu_id"]:
        return host_memory(process)
    return f"{format_bytes(process['device_bytes'])} of {process['gpu_id']}, {host_memory(process)}"


def _times(times: dict[str, Any]) -> str:
    count = "once" if times["count"] == 1 else f"{times['count']} times"
    return f"last {milliseconds(times['last_s'])}, median {milliseconds(times['median_s'])} ({count})"


def _last_and_median(times: dict[str, Any] | None) -> str:
    return "-" if times is None else f"{times['last_s'] * 1e3:.1f} ({times['median_s'] * 1e3:.1f})"


def _parts(parts: dict[str, Any]) -> str:
    """``43.0 ms: room 10.1 ms, ...``. What was done ahead, while there was no room, is not a part of the sum."""
    steps = {name: parts[f"{name}_s"] for name in LOAD_PARTS}
    total_s = sum(steps.values()) - (steps["import"] if parts["ahead"] else 0.0)
    told = [f"{name} {milliseconds(spent_s)}" for name, spent_s in steps.items()]
    if parts["ahead"]:
        told[2] += " (while there was no room)"
    first_run_s = parts["first_run_s"]
    after = "" if first_run_s is None else f"; first run {milliseconds(first_run_s)}"
    return f"{milliseconds(total_s)}: {', '.join(told)}{after}"
