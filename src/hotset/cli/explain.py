"""``hotset explain``: why a call went where it went."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from hotset.cli.options import gateway_option, json_option
from hotset.cli.output import function_of, milliseconds, write_json
from hotset.cli.remote import Remote


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
                f"{ended['gpu_id'] or 'no GPU'}; waited {milliseconds(ended['queue_s'])}, "
                f"loaded {milliseconds(ended['load_s'])}, ran {milliseconds(ended['inference_s'])}, "
                f"{milliseconds(ended['duration_s'])} in all"
            )
        )
    if decided is None:
        parts.append(Text("No decision is recorded: it runs on the CPU, or is too old."))
        return Group(*parts)
    for decision in decided["decisions"]:
        parts.append(Text(f"\n{decision['gpu_id']}, because: {decision['rule']}"))
        parts.append(
            Text(
                f"expected: wait {milliseconds(decision['wait_s'])}, load {milliseconds(decision['load_s'])}, "
                f"run {milliseconds(decision['inference_s'])}"
            )
        )
        if decision["evicted"]:
            parts.append(Text(f"evicted to make room: {', '.join(map(function_of, decision['evicted']))}"))
        if decision["alternatives"]:
            parts.append(_alternatives(decision))
    if decided["rejected"] is not None:
        parts.append(Text(f"rejected ({decided['rejected']}): {decided['note']}"))
    return Group(*parts)


def _alternatives(decision: dict[str, Any]) -> Table:
    table = Table("instead", "wait", "load", "run", "total", title="alternatives at that moment", title_justify="left")
    for other in decision["alternatives"]:
        parts = (other["wait_s"], other["load_s"], other["inference_s"])
        table.add_row(other["gpu_id"], *map(milliseconds, parts), milliseconds(sum(parts)))
    return table
