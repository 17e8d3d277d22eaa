"""``hotset key``: keys that calls of a function must show."""

from __future__ import annotations

import click

from hotset.cli.options import gateway_option, json_option, print_rows
from hotset.cli.output import write_json
from hotset.cli.remote import Remote


@click.group()
def key() -> None:
    """Keys that calls of a function must show: from the first one on, it answers nobody else."""


@key.command("create")
@click.argument("function")
@click.option("--name", help="To tell it from others; one is made up.")
@gateway_option
@json_option
def create(function: str, name: str | None, gateway: str, as_json: bool) -> None:
    """Make a key for FUNCTION and print it, this once."""
    with Remote(gateway) as remote:
        made = remote.change("POST", "/system/keys", {"function": function, "name": name})
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
        rows = [(each["name"], each["function"], each["created_at"]) for each in keys]
        print_rows(("key", "function", "created"), rows, empty="There are no keys: hotset key create FUNCTION")


@key.command("remove")
@click.argument("name")
@gateway_option
def remove(name: str, gateway: str) -> None:
    """Take the key NAME back."""
    with Remote(gateway) as remote:
        remote.change("DELETE", f"/system/keys/{name}")
    click.echo(f"Removed {name}.")
