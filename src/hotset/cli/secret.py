"""``hotset secret``: values that functions get as files."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import click

from hotset.cli.options import gateway_option, json_option, print_rows
from hotset.cli.output import write_json
from hotset.cli.remote import Remote
from hotset.errors import ConfigurationError


@click.group()
def secret() -> None:
    """Values that functions get as files: they go in and never come out again."""


def _namespace_option(command: click.decorators.FC) -> click.decorators.FC:
    return click.option("--namespace", "-n", default="", help="Another namespace than the default one.")(command)


@secret.command("create")
@click.argument("name")
@click.option(
    "--from-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Its value; else standard input."
)
@click.option("--replace", is_flag=True, help="Give it another value if it is there.")
@_namespace_option
@gateway_option
@json_option
def create(name: str, from_file: Path | None, replace: bool, namespace: str, gateway: str, as_json: bool) -> None:
    """Keep a value under NAME."""
    value = from_file.read_bytes() if from_file is not None else sys.stdin.buffer.read()
    if not value:
        raise ConfigurationError("the secret is empty: give its value with --from-file or on standard input")
    body = {"name": name, "namespace": namespace, "rawValue": base64.b64encode(value).decode()}
    with Remote(gateway) as remote:
        known = [each["name"] for each in remote.get("/system/secrets", namespace=namespace)]
        remote.change("PUT" if replace and name in known else "POST", "/system/secrets", body)
    if as_json:
        write_json({"kept": name})
    else:
        click.echo(f"Kept {name}.")


@secret.command("list")
@_namespace_option
@gateway_option
@json_option
def list_secrets(namespace: str, gateway: str, as_json: bool) -> None:
    """List names; values are never shown."""
    with Remote(gateway) as remote:
        secrets = remote.get("/system/secrets", namespace=namespace)
    if as_json:
        write_json(secrets)
    else:
        rows = [(each["name"], each["namespace"]) for each in secrets]
        print_rows(("secret", "namespace"), rows, empty="There are no secrets: hotset secret create NAME")


@secret.command("remove")
@click.argument("name")
@_namespace_option
@gateway_option
@json_option
def remove(name: str, namespace: str, gateway: str, as_json: bool) -> None:
    """Forget the value of NAME."""
    with Remote(gateway) as remote:
        remote.change("DELETE", "/system/secrets", {"name": name, "namespace": namespace})
    if as_json:
        write_json({"removed": name})
    else:
        click.echo(f"Removed {name}.")
