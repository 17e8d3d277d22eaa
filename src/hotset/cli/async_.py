"""``hotset async``: asynchronous calls that have not ended well."""

from __future__ import annotations

import click

from hotset.cli.options import gateway_option, json_option, print_rows
from hotset.cli.output import write_json
from hotset.cli.remote import Remote


@click.group("async")
def async_() -> None:
    """Asynchronous calls that wait, or were given up."""


@async_.command("list")
@click.option("--state", type=click.Choice(["queued", "dead"]), help="Only those; dead ones were given up.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 1000), help="At most so many.")
@gateway_option
@json_option
def list_calls(state: str | None, limit: int, gateway: str, as_json: bool) -> None:
    """List calls, the newest first."""
    query: dict[str, str | int] = {"limit": limit} | ({"state": state} if state else {})
    with Remote(gateway) as remote:
        calls = remote.get("/system/async", **query)
    if as_json:
        write_json(calls)
        return
    rows = [
        (
            *(each["call_id"], each["function"], each["state"], str(each["attempts"])),
            *(str(each["status"] or "-"), each["accepted_at"], each["reason"]),
        )
        for each in calls
    ]
    columns = ("call", "function", "state", "attempts", "status", "accepted", "reason")
    print_rows(columns, rows, empty="Every asynchronous call has ended well.")


@async_.command("retry")
@click.argument("call_id")
@gateway_option
@json_option
def retry(call_id: str, gateway: str, as_json: bool) -> None:
    """Try a call that was given up again."""
    with Remote(gateway) as remote:
        remote.change("POST", f"/system/async/{call_id}/retry")
    if as_json:
        write_json({"retried": call_id})
    else:
        click.echo(f"Trying {call_id} again.")


@async_.command("remove")
@click.argument("call_id")
@gateway_option
@json_option
def remove(call_id: str, gateway: str, as_json: bool) -> None:
    """Forget a call that waits or was given up."""
    with Remote(gateway) as remote:
        remote.change("DELETE", f"/system/async/{call_id}")
    if as_json:
        write_json({"removed": call_id})
    else:
        click.echo(f"Removed {call_id}.")
