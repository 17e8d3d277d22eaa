"""``hotset key``: keys that calls of a function must show."""

from __future__ import annotations

import click

from hotset.cli.options import gateway_option, json_option, print_rows
from hotset.cli.output import write_json
from hotset.cli.remote import Remote
from hotset.vocabulary import HIGHEST_PRIORITY, LOWEST_PRIORITY, NORMAL_PRIORITY


@click.group()
def key() -> None:
    """Keys that calls of a function must show: from the first one on, it answers nobody else."""


@key.command("create")
@click.argument("function")
@click.option("--name", help="To tell it from others, and its caller's name; one is made up.")
@click.option(
    "--weight",
    type=click.FloatRange(0, 1000, min_open=True),
    default=1.0,
    show_default=True,
    help="Its caller's share of the GPUs' time, relative to others'.",
)
@click.option(
    "--priority",
    type=click.IntRange(LOWEST_PRIORITY, HIGHEST_PRIORITY),
    default=NORMAL_PRIORITY,
    show_default=True,
    help="Of its calls, and the most that they may ask for; the higher goes first.",
)
@gateway_option
@json_option
def create(function: str, name: str | None, weight: float, priority: int, gateway: str, as_json: bool) -> None:
    """Make a key for FUNCTION and print it, this once."""
    with Remote(gateway) as remote:
        wanted = {"function": function, "name": name, "weight": weight, "priority": priority}
        made = remote.change("POST", "/system/keys", wanted)
    if as_json:
        write_json(made)
    else:
        click.echo(f"Key {made['name']} of {made['function']}, shown this once:", err=True)
        click.echo(made["key"])


@key.command("list")
@gateway_option
@json_option
def list_keys(gateway: str, as_json: bool) -> None:
    """List all keys, without the keys themselves."""
    with Remote(gateway) as remote:
        keys = remote.get("/system/keys")
    if as_json:
        write_json(keys)
    else:
        columns = ("name", "function", "weight", "priority", "created_at")
        rows = [tuple(str(each[column]) for column in columns) for each in keys]
        print_rows(
            ("key", "function", "weight", "priority", "created"),
            rows,
            empty="There are no keys: hotset key create FUNCTION",
        )


@key.command("remove")
@click.argument("name")
@gateway_option
@json_option
def remove(name: str, gateway: str, as_json: bool) -> None:
    """Take the key NAME back."""
    with Remote(gateway) as remote:
        remote.change("DELETE", f"/system/keys/{name}")
    if as_json:
        write_json({"removed": name})
    else:
        click.echo(f"Removed {name}.")
