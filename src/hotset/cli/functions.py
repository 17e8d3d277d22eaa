"""``hotset list``, ``describe``, ``invoke``, ``logs`` and ``remove``."""

from __future__ import annotations

import json
import mimetypes
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx

from hotset.cli.options import gateway_option, json_option, print_rows
from hotset.cli.output import write_json
from hotset.cli.remote import Remote, ServerError, error_text
from hotset.cli.residency import residency_rows
from hotset.errors import ConfigurationError
from hotset.functions.units import format_bytes

JSON = "application/json"
LOGS = "/system/logs"
ASK_AGAIN_S = 0.2
CALL_HEADERS = ("gpu", "cache", "queue-seconds", "load-seconds", "inference-seconds")


@click.command("list")
@gateway_option
@json_option
def list_functions(gateway: str, as_json: bool) -> None:
    """List the functions in service."""
    with Remote(gateway) as remote:
        functions = remote.get("/system/functions")
    if as_json:
        write_json(functions)
        return
    print_rows(
        ("function", "version", "runs on", "GPU memory", "hot on", "waiting", "calls", "problem"),
        [_row(each) for each in sorted(functions, key=lambda each: str(each["name"]))],
        empty="Nothing is deployed: hotset deploy FILE",
    )


def _row(function: dict[str, Any]) -> tuple[str, ...]:
    details = function["hotset"]
    return (
        function["name"],
        details["model"].rpartition("@")[2],
        details["kind"],
        _memory(details),
        ", ".join(details["gpus"]) or "-",
        str(details["waiting"]),
        str(function["invocationCount"]),
        details["problem"] or "",
    )


def _memory(details: dict[str, Any]) -> str:
    """Measured, with the margin for the next load, beside declared, as far as each is known."""
    if details["kind"] != "gpu":
        return "-"
    measured, declared = details["measured_memory_bytes"], details["gpu_memory_bytes"]
    said = f"declared {format_bytes(declared)}" if declared else "not declared"
    if not measured:
        return said
    margin = details["memory_margin_bytes"]
    return f"{format_bytes(measured)}{f' + {format_bytes(margin)} margin' if margin else ''} ({said})"


@click.command()
@click.argument("name")
@gateway_option
@json_option
def describe(name: str, gateway: str, as_json: bool) -> None:
    """Show everything about one function: its options, memory, schema and where it is hot."""
    with Remote(gateway) as remote:
        function = remote.function(name)
        seen = remote.get("/system/state", processes="true")
    details = function["hotset"]
    state = next((each for each in seen["functions"] if each["model"] == details["model"]), None)
    processes = [each for each in seen["processes"] if each["model"] == details["model"]]
    if as_json:
        write_json(function | {"state": state, "processes": processes})
        return
    on_gpu = details["kind"] == "gpu"
    rows = [
        ("function", function["name"]),
        ("version", details["model"]),
        ("entry", details["entry"]),
        ("runs on", details["kind"]),
        *([("GPU memory", _memory(details))] if on_gpu else []),
        *residency_rows(state, processes),
        ("waiting", str(details["waiting"])),
        ("calls", str(function["invocationCount"])),
        ("max batch", _batch(details)),
        ("timeout", f"{details['timeout_s']:g} s a run, {details['load_timeout_s']:g} s a load"),
        ("retry", "once, when its process died" if details["retry"] else "never"),
        *([("fast load", details["fast_load"] or "being checked")] if on_gpu else []),
        ("requirements", ", ".join(details["requirements"]) or "none"),
        ("bundle", details["bundle"]),
        ("created", function["createdAt"]),
        ("problem", details["problem"] or "none"),
        ("input", json.dumps(details["schema"].get("input"))),
        ("output", json.dumps(details["schema"].get("output"))),
    ]
    for key in ("envVars", "labels", "annotations"):
        rows += [(f"{key}: {name}", value) for name, value in function.get(key, {}).items()]
    print_rows(("", function["name"]), rows)


def _batch(details: dict[str, Any]) -> str:
    wait_s = details["max_batch_wait_s"]
    return f"{details['max_batch']}, filled for up to {wait_s * 1e3:g} ms" if wait_s else str(details["max_batch"])


@click.command()
@click.argument("name")
@click.argument("fields", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "body_json", metavar="TEXT", help="The body, as JSON; - reads it from standard input.")
@click.option(
    "--file", "body_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Send a file as the body."
)
@click.option("--content-type", help="Type of the body; default: told by the file's name.")
@click.option("--accept", default="*/*", help="Wanted type of the answer.")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Write the answer to a file.")
@click.option("--verbose", "-v", is_flag=True, help="Say on standard error where it ran and how long each part took.")
@gateway_option
def invoke(
    name: str,
    fields: tuple[str, ...],
    body_json: str | None,
    body_file: Path | None,
    content_type: str | None,
    accept: str,
    output: Path | None,
    verbose: bool,
    gateway: str,
) -> None:
    """Call the function NAME and print its answer.

    The body is --json, --file, or an object of the KEY=VALUE arguments (VALUE is JSON where it is valid JSON, else
    text); with none of these, standard input if it is piped.
    """
    body, body_type = _body(fields, body_json, body_file)
    headers = {"content-type": content_type or body_type, "accept": accept}
    with Remote(gateway) as remote, remote.stream(name, body, headers) as response:
        if verbose:
            parts = [f"{key} {response.headers.get(f'x-hotset-{key}', '-')}" for key in CALL_HEADERS]
            click.echo(f"call {response.headers.get('x-call-id', '-')}: {', '.join(parts)}", err=True)
        if response.is_error:
            response.read()
            raise ServerError(response.status_code, f"{name}: {error_text(response)}")
        _write(response, output)


def _body(fields: tuple[str, ...], body_json: str | None, body_file: Path | None) -> tuple[bytes, str]:
    given = sum((bool(fields), body_json is not None, body_file is not None))
    if given > 1:
        raise ConfigurationError("give the body once: KEY=VALUE arguments, --json or --file")
    if body_file is not None:
        guessed = mimetypes.guess_type(body_file.name)[0]
        return body_file.read_bytes(), guessed or "application/octet-stream"
    if body_json == "-":
        return sys.stdin.buffer.read(), JSON
    if body_json is not None:
        return body_json.encode(), JSON
    if fields:
        return json.dumps(dict(_field(field) for field in fields)).encode(), JSON
    return (b"" if sys.stdin.isatty() else sys.stdin.buffer.read()), JSON


def _field(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigurationError(f"{text!r}: write KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _write(response: httpx.Response, output: Path | None) -> None:
    if output is not None:
        with output.open("wb") as file:
            for piece in response.iter_bytes():
                file.write(piece)
        return
    textual = response.headers.get("content-type", "").startswith(("application/json", "application/x-ndjson", "text/"))
    if not textual and sys.stdout.isatty():
        raise ConfigurationError("the answer is not text: write it to a file with --output")
    last = b""
    for piece in response.iter_bytes():
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        last = piece or last
    if textual and not last.endswith(b"\n"):
        click.echo()


@click.command()
@click.argument("name")
@click.option("--follow", "-f", is_flag=True, help="Go on with new lines as they come.")
@click.option("--tail", type=click.IntRange(min=0), default=0, help="Only the newest lines; 0: all that are kept.")
@click.option("--since", metavar="TIME", help="Only lines after this time, such as 2030-01-31T12:00:00Z.")
@gateway_option
@json_option
def logs(name: str, follow: bool, tail: int, since: str | None, gateway: str, as_json: bool) -> None:
    """Print what the function NAME printed."""
    query: dict[str, str | int] = {"name": name, "follow": str(follow).lower(), "tail": tail or -1}
    if since:
        query["since"] = since
    with Remote(gateway) as remote:
        for line in _followed(remote, query) if follow else remote.lines(LOGS, **query):
            click.echo(json.dumps(line) if as_json else f"{line['timestamp']} {line['text']}")


def _followed(remote: Remote, query: dict[str, str | int]) -> Iterator[Any]:
    """Lines for as long as there is somebody to read them: a server serves a follower for a while, then is asked again
    from the last line on."""
    newest: list[Any] = []  # all lines of the newest moment: they come again with the next answer
    while True:
        for line in remote.lines(LOGS, **query):
            if line in newest:
                continue
            if newest and newest[0]["timestamp"] != line["timestamp"]:
                newest.clear()
            newest.append(line)
            yield line
        if newest:
            query |= {"since": newest[0]["timestamp"], "tail": -1}
        time.sleep(ASK_AGAIN_S)


@click.command()
@click.argument("name")
@gateway_option
@json_option
def remove(name: str, gateway: str, as_json: bool) -> None:
    """Take the function NAME out of service; calls in flight end first."""
    with Remote(gateway) as remote:
        remote.remove(name)
    if as_json:
        write_json({"removed": name})
    else:
        click.echo(f"Removed {name}.")
