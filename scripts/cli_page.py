"""Writes docs/cli.md: every command and option of `hotset`, from what the commands say of themselves.

python scripts/cli_page.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from hotset.cli.main import main

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
BAR = "\\|"
SAID_AT_THE_TOP = ("gateway", "as_json")
HEAD = """# The command line

Made by `python scripts/cli_page.py` from what the commands say of themselves; `hotset COMMAND --help` says the same.

Commands of a running server take its URL from `--gateway` (`-g`), `HOTSET_GATEWAY` or `OPENFAAS_URL`, else
`http://127.0.0.1:8080`. `--json` prints JSON, where nothing else is said of it. An error is one sentence on standard
error, and the exit status 2 where other input would help, else 1.
"""


def page() -> str:
    """The page as it should be."""
    root = click.Context(main, info_name="hotset")
    names = main.list_commands(root)
    parts = [HEAD]
    for name in names:
        command = main.get_command(root, name)
        assert command is not None
        parts += _sections(command, f"hotset {name}")
    return "\n".join(parts)


def _sections(command: click.Command, path: str) -> Iterator[str]:
    """Its section, and one for each command below it."""
    context = click.Context(command, info_name=path)
    below = command.commands if isinstance(command, click.Group) else {}
    usage = " ".join(part for part in command.collect_usage_pieces(context) if part != "[OPTIONS]")
    yield f"## `{path}{f' {usage}' if usage and not below else ''}`\n\n{_text(command.help or '')}\n"
    options = [each for each in command.params if isinstance(each, click.Option) and not each.hidden]
    rows = [_row(each, context) for each in options if each.name not in SAID_AT_THE_TOP]
    if rows and not below:
        yield "| option | meaning | default |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"
    for name in sorted(below):
        yield from _sections(below[name], f"{path} {name}")


def _text(docstring: str) -> str:
    """One line for each paragraph."""
    paragraphs = re.split(r"\n\s*\n", docstring.strip().replace("``", "`"))
    return "\n\n".join(" ".join(each.split()) for each in paragraphs)


def _value(option: click.Option, context: click.Context) -> str:
    if option.is_flag:
        return ""
    kind = option.type
    if isinstance(kind, click.Choice):
        return "\\|".join(f"`{choice}`" for choice in kind.choices)
    if option.metavar is None and isinstance(kind, click.IntRange | click.FloatRange):
        least = "" if kind.min is None else f" > {kind.min:g}" if kind.min_open else f" >= {kind.min:g}"
        return f"N{least}"
    return option.make_metavar(context).replace("|", "\\|")


def _row(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    value = _value(option, context)
    default = option.default
    shown = f"`{default}`" if isinstance(default, str | int | float) and not option.is_flag else ""
    return f"| {f'{names} {value}'.strip()} | {(option.help or '').replace('|', BAR)} | {shown} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
