"""Runs the commands of a Markdown document as its reader would: top to bottom, in one shell, in an empty folder.

A fenced block counts when the line before it is a comment of one of these forms:

    <!-- test -->               a ``console`` block: each line after ``$ `` is run; the lines below it, if any, are what
                                it must print, "..." standing for anything
    <!-- test: file NAME -->    the block is the content of file NAME

A command that ends in ``&`` is a server: the next one runs once the server's port answers. The default port, 8080, is
replaced by a free one throughout; whatever still runs at the end is ended.
"""

from __future__ import annotations

import doctest
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

DEFAULT_PORT = "8080"
TIME_LIMIT_S = 120.0

_BLOCK = re.compile(r"^<!-- test(?:: file (?P<file>\S+))? -->\n```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
_MATCHING = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass
class Step:
    """One command and what it must print (nothing given: anything), or a file to write."""

    command: str = ""
    expected: str = ""
    file: str = ""
    content: str = ""


def steps_of(text: str) -> list[Step]:
    """What a document asks its reader to do, in its order."""
    steps: list[Step] = []
    for block in _BLOCK.finditer(text):
        if block["file"]:
            steps.append(Step(file=block["file"], content=block["body"]))
            continue
        assert block["language"] == "console", f"a tested block must be ```console, not ```{block['language']}"
        for line in block["body"].splitlines():
            if line.startswith("$ "):
                steps.append(Step(command=line[2:]))
            elif steps and steps[-1].command.endswith("\\"):
                steps[-1].command += f"\n{line}"
            else:
                assert steps, f"a console block must begin with a command, not {line!r}"
                steps[-1].expected += f"{line}\n"
    return steps


def run_document(text: str, folder: Path, time_limit_s: float = TIME_LIMIT_S) -> int:
    """Do what the document says, in ``folder``; returns the number of commands. Fails, naming the command, when one
    does or prints something else than the document shows.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    steps = steps_of(text.replace(DEFAULT_PORT, port))
    commands = [step for step in steps if step.command]
    if not commands:
        return 0
    outputs = folder / ".outputs"
    outputs.mkdir()
    # Servers are asked to end, and waited for, however the script ends: they have children of their own.
    script = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT"]
    for step in steps:
        if step.file:
            (folder / step.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / step.file).write_text(step.content)
    for number, step in enumerate(commands):
        output = outputs / str(number)
        if step.command.rstrip().endswith("&"):
            script.append(f"{step.command.rstrip().removesuffix('&')} >{output} 2>&1 &")
            script.append(f"until (exec 3<>/dev/tcp/127.0.0.1/{port}) 2>/dev/null; do kill -0 $!; sleep 0.05; done")
        else:
            script.append(f"{{ {step.command}\n}} >{output} 2>&1")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "HOTSET_DATA": str(folder / ".hotset"),
        "HOTSET_GATEWAY": f"http://127.0.0.1:{port}",
        "HOTSET_PORT": port,
        "NO_COLOR": "1",
    }
    shell = subprocess.Popen(["bash", "-c", "\n".join(script)], cwd=folder, env=environment, start_new_session=True)
    try:
        status = shell.wait(time_limit_s)
    except subprocess.TimeoutExpired:
        status = -1
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
    printed = {int(path.name): path.read_text(errors="replace") for path in outputs.iterdir()}
    last = max(printed, default=0)
    if status != 0:
        ended = f"took longer than {time_limit_s:g} s" if status == -1 else f"ended with status {status}"
        everything = "\n".join(f"$ {commands[n].command}\n{text}" for n, text in sorted(printed.items()))
        raise AssertionError(f"`{commands[last].command}` {ended}\n{everything}")
    checker = doctest.OutputChecker()
    for number, step in enumerate(commands):
        if step.expected and not checker.check_output(step.expected, printed[number], _MATCHING):
            raise AssertionError(f"`{step.command}` printed\n{printed[number]}\nand not\n{step.expected}")
    return len(commands)
