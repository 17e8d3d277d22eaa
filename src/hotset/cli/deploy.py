"""``hotset deploy``: bundle, upload, install, put in service; the old version serves until the new one does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from hotset.cli.model_bundle import model_folder
from hotset.cli.options import DEFAULT_GATEWAY, gateway_option, json_option, status_line
from hotset.cli.output import write_json
from hotset.cli.push import push_image, send_bundle
from hotset.cli.remote import Remote
from hotset.cli.stack import deployment as deployment_of
from hotset.cli.stack import read_stack
from hotset.errors import ConfigurationError
from hotset.functions.contract import function_name
from hotset.functions.model_files import SUFFIXES, FileSettings
from hotset.functions.units import parse_bytes, parse_duration


@click.command()
@click.argument("source", required=False, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--file",
    "-f",
    "stack_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Deploy what this stack.yml says, instead of SOURCE.",
)
@click.option("--image", metavar="NAME[:TAG]", help="Deploy what was pushed under this name, instead of SOURCE.")
@click.option("--fprocess", metavar="COMMAND", help="A command that serves it, instead of Python code.")
@click.option("--secret", "secrets", multiple=True, metavar="NAME", help="A secret it gets as a file; repeatable.")
@click.option("--name", help="The function's name in URLs; default: the file's or folder's name.")
@click.option("--entry", metavar="MODULE[:NAME]", help="Where the function is, when the bundle has several.")
@click.option("--gpu-memory", metavar="SIZE", help="GPU memory it takes while resident, such as 600MiB.")
@click.option("--max-batch", type=click.IntRange(min=1), help="Most requests that one run may join.")
@click.option("--max-batch-wait", metavar="TIME", help="How long a request may be held back for others to join it.")
@click.option("--timeout", metavar="TIME", help="Longest one call may run, such as 30s.")
@click.option("--load-timeout", metavar="TIME", help="Longest the model may take to load.")
@click.option("--retry/--no-retry", default=None, help="Whether a call may run again when its process died.")
@click.option("--env", "env", multiple=True, metavar="KEY=VALUE", help="An environment variable; repeatable.")
@click.option("--module", metavar="FILE.py:CLASS", help="The class that a .safetensors file belongs to.")
@click.option("--trust-pickle", is_flag=True, help="Open a model file that is a pickle, which runs the code it holds.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label; repeatable.")
@click.option("--annotation", "annotations", multiple=True, metavar="KEY=VALUE", help="An annotation; repeatable.")
@gateway_option
@json_option
def deploy(
    source: Path | None,
    stack_file: Path | None,
    image: str | None,
    fprocess: str | None,
    secrets: tuple[str, ...],
    name: str | None,
    entry: str | None,
    gpu_memory: str | None,
    max_batch: int | None,
    max_batch_wait: str | None,
    timeout: str | None,
    load_timeout: str | None,
    retry: bool | None,
    env: tuple[str, ...],
    module: str | None,
    trust_pickle: bool,
    labels: tuple[str, ...],
    annotations: tuple[str, ...],
    gateway: str,
    as_json: bool,
) -> None:
    """Deploy the function in SOURCE, a Python file or a folder, or the model in it, a file from a framework.

    A requirements.txt in the folder or beside the file, or a PEP 723 header, is installed once for all functions with
    the same requirements. Deploying a name again replaces it: calls in flight end on the old version.

    A model file (.onnx, TorchScript .pt, torch.export .pt2, .safetensors with its class) needs no code: its inputs and
    outputs are read from it. With --max-batch above 1 its first dimension is the batch.
    """
    if sum(each is not None for each in (source, stack_file, image)) != 1:
        raise ConfigurationError("say what to deploy: a file or folder, --image NAME or --file stack.yml, one of them")
    if stack_file is not None:
        _deploy_stack(stack_file, name, gateway, as_json)
        return
    service = name or function_name(source.resolve().stem if source is not None else _last_part(image or ""))
    if gpu_memory is not None:
        parse_bytes(gpu_memory, "--gpu-memory")
    durations = ((max_batch_wait, "--max-batch-wait"), (timeout, "--timeout"), (load_timeout, "--load-timeout"))
    for value, flag in durations:
        if value is not None:
            parse_duration(value, flag)
    is_model = source is not None and source.is_file() and source.suffix in SUFFIXES
    if not is_model and (module or trust_pickle):
        raise ConfigurationError(f"--module and --trust-pickle are for model files ({', '.join(SUFFIXES)})")
    overrides = {
        "entry": entry or (source.stem if source is not None and source.is_file() and not is_model else None),
        "gpu_memory": gpu_memory,
        "max_batch": None if is_model else max_batch,
        "max_batch_wait": max_batch_wait,
        "timeout": timeout,
        "load_timeout": load_timeout,
        "retry": retry,
    }
    deployment: dict[str, Any] = {
        "service": service,
        "envVars": _pairs(env, "--env"),
        "labels": _pairs(labels, "--label"),
        "annotations": _pairs(annotations, "--annotation"),
        "secrets": list(secrets),
        "envProcess": fprocess or "",
        "hotset": {key: value for key, value in overrides.items() if value is not None},
    }
    with Remote(gateway) as remote, status_line(f"Deploying {service}", quiet=as_json) as say:
        if source is None:
            deployment["image"] = image
        else:
            with contextlib.ExitStack() as stack:
                if is_model:
                    rows = max_batch or 0
                    settings = FileSettings(max_rows=rows, join=rows > 1, module=module, trust_pickle=trust_pickle)
                    source = stack.enter_context(model_folder(source, settings))
                deployment["image"] = f"sha256:{send_bundle(remote, source, say)}"
        status = remote.deploy(deployment, lambda line: say(f"{service}: {line}"))
    if as_json:
        write_json(status)
    else:
        click.echo(
            f"Deployed {service} ({status['hotset']['model']}). Call it: {gateway.rstrip('/')}/function/{service}"
        )


def _deploy_stack(file: Path, only: str | None, gateway: str, as_json: bool) -> None:
    """Push the handler of each function that has one under its image's name, and deploy them in order."""
    stack = read_stack(file)
    chosen = {name: function for name, function in stack.functions.items() if only in (None, name)}
    if not chosen:
        raise ConfigurationError(f"{file} has no function {only!r}; it has: {', '.join(stack.functions) or 'none'}")
    statuses = []
    if gateway == DEFAULT_GATEWAY and stack.provider.gateway:
        gateway = stack.provider.gateway
    with Remote(gateway) as remote, status_line(f"Deploying {file}", quiet=as_json) as say:
        for name, function in chosen.items():
            wanted = deployment_of(name, function, file.parent)
            handler = file.parent / function.handler
            if function.handler and handler.exists() and function.image:
                push_image(remote, handler, function.image, say)
            elif function.handler and handler.exists():
                wanted["image"] = f"sha256:{send_bundle(remote, handler, say)}"
            statuses.append(remote.deploy(wanted, partial(_say_of, say, name)))
    if as_json:
        write_json(statuses)
        return
    for status in statuses:
        click.echo(f"Deployed {status['name']} ({status['hotset']['model']}).")


def _say_of(say: Callable[[str], None], name: str, line: str) -> None:
    say(f"{name}: {line}")


def _last_part(image: str) -> str:
    """``me/echo:1.0@sha256:...`` -> ``echo``."""
    return image.partition("@")[0].rpartition("/")[2].partition(":")[0]


def _pairs(values: tuple[str, ...], flag: str) -> dict[str, str]:
    pairs = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise ConfigurationError(f"{flag} {value!r}: write KEY=VALUE")
        pairs[key] = text
    return pairs
