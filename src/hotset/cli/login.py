"""``hotset login`` and ``hotset logout``."""

from __future__ import annotations

import sys

import click

from hotset.cli import credentials
from hotset.cli.options import gateway_option, json_option
from hotset.cli.output import write_json
from hotset.cli.remote import Remote, ServerError
from hotset.errors import ConfigurationError


@click.command()
@click.option("--username", "-u", default="admin", show_default=True, help="The user.")
@click.option("--password", "-p", help="The password; better not given here, where others can see it.")
@click.option("--password-stdin", "-s", is_flag=True, help="Read the password from standard input.")
@gateway_option
@json_option
def login(username: str, password: str | None, password_stdin: bool, gateway: str, as_json: bool) -> None:
    """Try a user and password on the server, and keep them for the commands to come."""
    if password_stdin:
        password = sys.stdin.read().strip()
    elif password is None:
        password = click.prompt("Password", hide_input=True, err=as_json)
    if not password:
        raise ConfigurationError("the password is empty: give it with --password-stdin")
    wanted = credentials.Login(user=username, password=password)
    with Remote(gateway, login=wanted) as remote:
        try:
            remote.get("/system/functions")
        except ServerError as error:
            if error.status == 401:
                raise ConfigurationError(f"{gateway} does not know this user and password") from None
            raise
    kept = credentials.save(gateway, wanted)
    if as_json:
        write_json({"gateway": credentials.origin(gateway), "user": username, "kept_in": str(kept)})
    else:
        click.echo(f"Logged in to {gateway}; kept in {kept}.")


@click.command()
@gateway_option
@json_option
def logout(gateway: str, as_json: bool) -> None:
    """Forget the user and password of the server."""
    if not credentials.forget(gateway):
        raise ConfigurationError(f"nothing is kept for {gateway}")
    if as_json:
        write_json({"logged_out": credentials.origin(gateway)})
    else:
        click.echo(f"Logged out of {gateway}.")
