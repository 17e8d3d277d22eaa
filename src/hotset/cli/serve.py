"""``hotset serve``: the server, from flags, HOTSET_* environment variables and a configuration file, in that order."""

from __future__ import annotations

import logging
import os
import tomllib
from pathlib import Path
from typing import Any

import click
import msgspec

from hotset.cli.options import json_option
from hotset.cli.output import write_json
from hotset.errors import ConfigurationError
from hotset.functions.units import parse_bytes, parse_duration
from hotset.scheduling.eviction import EVICTIONS
from hotset.scheduling.policies import POLICIES

PROFILES = "hotset.profiles"
"""Where the configuration file's ``[profiles.NAME]`` tables are kept, which no flag can give."""


def _default_data() -> Path:
    """Where a user's data belongs (XDG base directories)."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "hotset"


def _read_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """The configuration file's settings become the flags' defaults."""
    if path is None:
        return
    try:
        settings: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as TOML: {error}") from None
    context.meta[PROFILES] = settings.pop("profiles", {})
    known = {parameter.name for parameter in context.command.params}
    normal = {key.replace("-", "_"): value for key, value in settings.items()}
    for key in normal:
        if key not in known:
            raise ConfigurationError(
                f"{path}: there is no setting {key!r}; settings are named as the flags of `hotset serve --help`"
            )
    context.default_map = {**(context.default_map or {}), **normal}


@click.command(context_settings={"auto_envvar_prefix": "HOTSET"})
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="TOML file whose keys are these flags' names.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0: any free port.")
@click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Where functions are kept.")
@click.option("--policy", default="hotset", show_default=True, type=click.Choice(list(POLICIES)))
@click.option("--o3-limit", default=25, show_default=True, type=click.IntRange(min=0), help="Most times passed over.")
@click.option("--max-skips", default=10_000, show_default=True, type=click.IntRange(min=1), help="The same, of hotset.")
@click.option(
    "--max-wait", default="60s", show_default=True, metavar="TIME", help="Then hotset passes it over no more."
)
@click.option(
    "--overrun",
    default="10s",
    show_default=True,
    metavar="TIME",
    help="How far mqfq_sticky lets a function run ahead of the least served one.",
)
@click.option("--eviction", default="hotset", show_default=True, type=click.Choice(list(EVICTIONS)))
@click.option(
    "--virtual-gpus",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Run on this many memory budgets on the CPU; 0: on this machine's CUDA GPUs.",
)
@click.option("--gpu-memory", metavar="SIZE", help="What models may use of each GPU, such as 7800MiB.")
@click.option(
    "--virtual-copy-bandwidth",
    metavar="RATE",
    help="How fast weights get to a virtual GPU, such as 12GB/s; default: at once.",
)
@click.option(
    "--host-memory",
    metavar="SIZE",
    help="Where models that must leave a GPU wait to come back; default: half of what is free; 0: they are unloaded.",
)
@click.option("--overlap/--no-overlap", default=False, show_default=True, help="Load models while the GPU computes.")
@click.option(
    "--prefetch-recurring/--no-prefetch-recurring",
    default=False,
    show_default=True,
    help="Also load models that are about to be called, by habit; with --overlap.",
)
@click.option(
    "--pool-contexts",
    default=1,
    show_default=True,
    type=click.IntRange(0, 8),
    help="Processes that wait for a model with the context of their GPU open, for each CUDA GPU; 0: none.",
)
@click.option("--max-queue", default=10_000, show_default=True, type=click.IntRange(min=1), help="Most waiting calls.")
@click.option("--max-queue-per-function", type=click.IntRange(min=1), help="Most waiting calls of one function.")
@click.option(
    "--caller-header",
    default="",
    metavar="NAME",
    help="Trust this header of a proxy to name the caller of calls that show no key.",
)
@click.option("--burst", default="2ms", show_default=True, metavar="TIME", help="Calls this short share a run.")
@click.option("--max-body", default="64MiB", show_default=True, metavar="SIZE", help="Largest request body.")
@click.option(
    "--grpc-port",
    type=click.IntRange(0, 65535),
    help="Serve the v2 protocol over gRPC too, usually on 8001; 0: any free port.",
)
@click.option(
    "--model-repository",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Serve the models of this directory: NAME/VERSION/model.onnx, model.pt, ...",
)
@click.option(
    "--auth", metavar="FILE", help="Ask for this user:password under /system; in HOTSET_AUTH the text itself."
)
@click.option("--insecure", is_flag=True, help="Listen beyond this machine without asking for credentials.")
@click.option("--allow-local-images", is_flag=True, help="Let an image be an absolute path on this machine.")
@click.option(
    "--allow-callbacks",
    multiple=True,
    metavar="HOST|NETWORK",
    help="The only places callbacks may go; default: any but this machine and link-local; *: any. Repeatable.",
)
@click.option(
    "--secrets-path",
    type=click.Path(file_okay=False, path_type=Path),
    help="Show all functions' secrets in this one folder, such as /var/openfaas/secrets.",
)
@click.option(
    "--role",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "gateway", "provider"]),
    help="What /system/info says; auto: provider to requests that an OpenFaaS gateway forwards.",
)
@click.option("--drain", default="30s", show_default=True, metavar="TIME", help="What open calls get at a stop.")
@click.option(
    "--log-level", default="info", show_default=True, type=click.Choice(["debug", "info", "warning", "error"])
)
@json_option
def serve(
    host: str,
    port: int,
    data_dir: Path | None,
    policy: str,
    o3_limit: int,
    max_skips: int,
    max_wait: str,
    overrun: str,
    eviction: str,
    virtual_gpus: int,
    gpu_memory: str | None,
    virtual_copy_bandwidth: str | None,
    host_memory: str | None,
    overlap: bool,
    prefetch_recurring: bool,
    pool_contexts: int,
    max_queue: int,
    max_queue_per_function: int | None,
    caller_header: str,
    burst: str,
    max_body: str,
    grpc_port: int | None,
    model_repository: Path | None,
    auth: str | None,
    insecure: bool,
    allow_local_images: bool,
    allow_callbacks: tuple[str, ...],
    secrets_path: Path | None,
    role: str,
    drain: str,
    log_level: str,
    as_json: bool,
) -> None:
    """Serve functions until SIGTERM or Ctrl-C; calls in flight end first.

    Every flag can be set as HOTSET_NAME in the environment, or in a --config file.
    """
    from hotset.gateway.auth import read_credentials
    from hotset.gateway.openfaas.info import Role
    from hotset.gateway.openfaas.resources import GpuProfile
    from hotset.gateway.openfaas.service import AccessConfig
    from hotset.gateway.server import ServerConfig
    from hotset.gateway.server import serve as run_server

    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        profiles = msgspec.convert(click.get_current_context().meta.get(PROFILES, {}), dict[str, GpuProfile])
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"profiles: {error}; write [profiles.NAME] with gpu_memory and gpu") from None
    access = AccessConfig(
        credentials=read_credentials(auth, os.environ),
        insecure=insecure,
        allow_local_images=allow_local_images,
        allow_callbacks=allow_callbacks,
        secrets_path=secrets_path,
        profiles=profiles,
        role=Role(role),
    )
    config = ServerConfig(
        host=host,
        port=port,
        data=data_dir or _default_data(),
        policy=policy,
        o3_limit=o3_limit,
        max_skips=max_skips,
        max_wait_s=parse_duration(max_wait, "--max-wait"),
        overrun_s=parse_duration(overrun, "--overrun"),
        eviction=eviction,
        virtual_gpus=virtual_gpus,
        gpu_memory_bytes=parse_bytes(gpu_memory, "--gpu-memory") if gpu_memory is not None else None,
        copy_bandwidth=_rate(virtual_copy_bandwidth),
        host_memory_bytes=parse_bytes(host_memory, "--host-memory") if host_memory is not None else None,
        overlap=overlap,
        prefetch_recurring=prefetch_recurring,
        pool_contexts=pool_contexts,
        max_queue=max_queue,
        max_queue_per_function=max_queue_per_function,
        caller_header=caller_header,
        burst_s=parse_duration(burst, "--burst"),
        max_body_bytes=parse_bytes(max_body, "--max-body"),
        grpc_port=grpc_port,
        model_repository=model_repository,
        drain_s=parse_duration(drain, "--drain"),
        access=access,
    )

    def ready(url: str) -> None:
        if as_json:
            write_json({"url": url, "policy": policy, "eviction": eviction})
        else:
            click.echo(f"hotset serves at {url} ({policy}, {eviction}). Next: hotset deploy FILE --gateway {url}")

    run_server(config, ready=ready)


def _rate(text: str | None) -> float | None:
    """Bytes a second: ``12GB/s``, or a bare size."""
    if text is None:
        return None
    size = parse_bytes(text.removesuffix("/s"), "--virtual-copy-bandwidth")
    if not size:
        raise ConfigurationError("--virtual-copy-bandwidth must be more than 0, such as 12GB/s")
    return float(size)
