"""The ``hotset`` command. A command's module is imported when it runs, so that ``hotset --help`` is instant."""

from __future__ import annotations

import errno
import importlib
from typing import Any

import click
import msgspec

from hotset.errors import (
    BundleError,
    ConfigurationError,
    FunctionError,
    HotsetError,
    TraceError,
    UnknownNameError,
)


class Lazy(msgspec.Struct, frozen=True):
    """Where a command is, and its line in ``hotset --help``."""

    target: str
    """``module:attribute`` of a click command or group."""
    summary: str


# To add a command, add a line.
COMMANDS: dict[str, Lazy] = {
    "async": Lazy("hotset.cli.async_:async_", "Look after asynchronous calls that wait or were given up."),
    "key": Lazy("hotset.cli.key:key", "Make, list and remove the keys of functions."),
    "login": Lazy("hotset.cli.login:login", "Keep a user and password for a server."),
    "logout": Lazy("hotset.cli.login:logout", "Forget them."),
    "push": Lazy("hotset.cli.push:push", "Send files to the server under an image name."),
    "secret": Lazy("hotset.cli.secret:secret", "Keep, list and remove values that functions get as files."),
    "bench": Lazy("hotset.cli.bench:bench", "Call deployed functions as a workload says, and measure."),
    "deploy": Lazy("hotset.cli.deploy:deploy", "Deploy a function from a file or a folder."),
    "describe": Lazy("hotset.cli.functions:describe", "Show everything about one function."),
    "dev": Lazy("hotset.cli.dev:dev", "Run one function in the foreground, reloading it when it changes."),
    "explain": Lazy("hotset.cli.explain:explain", "Say why a call went where it went."),
    "invoke": Lazy("hotset.cli.functions:invoke", "Call a function."),
    "list": Lazy("hotset.cli.functions:list_functions", "List the functions in service."),
    "logs": Lazy("hotset.cli.functions:logs", "Print what a function printed."),
    "remove": Lazy("hotset.cli.functions:remove", "Take a function out of service."),
    "replay": Lazy("hotset.cli.replay:replay", "What if? Re-run a live trace in the simulator."),
    "serve": Lazy("hotset.cli.serve:serve", "Serve functions on GPUs, real or virtual."),
    "top": Lazy("hotset.cli.top:top", "Watch the GPUs: what is hot, what runs, what waits."),
    "tune": Lazy("hotset.cli.tune:tune_command", "Say which policy and settings would serve your traffic best."),
    "paper": Lazy("hotset.cli.paper:paper", "Reproduce the paper's evaluation: tables, plots, one HTML report."),
    "simulate": Lazy("hotset.cli.simulate:simulate", "Compare scheduling and eviction policies in simulation."),
}

_USERS_MISTAKE = (ConfigurationError, TraceError, UnknownNameError, FunctionError, BundleError)


class _Failure(click.ClickException):
    """One sentence on stderr and an exit status: 2 where other input would help, else 1."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]


class LazyGroup(click.Group):
    """Commands are known by name and imported on use; none of their errors reaches the user as a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].summary) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HotsetError as error:
            raise _Failure(str(error), 2 if isinstance(error, _USERS_MISTAKE) else 1) from error
        except OSError as error:
            if error.errno == errno.EPIPE or error.strerror is None:  # click ends quietly when nobody reads on
                raise
            raise _Failure(f"{error.filename or 'system'}: {error.strerror}", 1) from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="hotset", prog_name="hotset", message="%(prog)s %(version)s")
def main() -> None:
    """Function-as-a-Service for ML inference on GPUs: many models, few GPUs."""
