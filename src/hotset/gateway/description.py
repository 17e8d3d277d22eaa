"""What a deployed bundle holds: its function's options, entry and schema, read by importing it in its own environment.

Importing runs the user's code, so it happens in a process of its own (``node/inspection.py``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from hotset.errors import BundleError, FunctionError
from hotset.functions.description import Description, Failure
from hotset.node.inspection import inspect
from hotset.node.spawner import ProcessSource

IMPORT_TIMEOUT_S = 120.0
TAIL_LINES = 30
MOST_LINE = 500
"""Characters that are kept of one line."""
GUESSES = ("function.py", "main.py", "app.py", "handler.py")


def guess_module(folder: Path) -> str:
    """The module of a bundle that names no entry: its only Python file, or one with a usual name."""
    files = sorted(path.name for path in folder.glob("*.py"))
    found = files if len(files) == 1 else [name for name in GUESSES if name in files]
    if not found:
        listed = f" of {', '.join(files[:10])}" if files else ", and the bundle holds none"
        raise BundleError(f"name the file that holds the function (--entry module:Name){listed}")
    return found[0].removesuffix(".py")


async def describe(
    source: ProcessSource,
    python: str,
    code_path: Path,
    entry: str,
    env: Mapping[str, str],
    progress: Callable[[str], None],
    *,
    timeout_s: float = IMPORT_TIMEOUT_S,
) -> Description:
    """Import the function in a process of ``python`` from this source; ``progress`` gets each line it prints meanwhile.

    Raises ``FunctionError`` with what is wrong: the contract's sentence, or the end of the user's own traceback.
    """
    lines = _Lines(progress)
    try:
        answer = await inspect(source, python, code_path, entry, env, lines.write, timeout_s)
    except TimeoutError:
        raise FunctionError(f"importing {entry} took longer than {timeout_s:g} s: move slow work into load") from None
    except OSError as error:
        reason = f"no process could be started ({error.strerror}): free what the system lacks, then deploy again"
        raise FunctionError(f"importing {entry}: {reason}") from None
    try:
        described = msgspec.json.decode(answer or b"", type=Description | Failure)
    except msgspec.DecodeError:
        raise FunctionError("\n".join([f"importing {entry} failed", *lines.end()])) from None
    if isinstance(described, Failure):
        raise FunctionError(described.error)
    return described


class _Lines:
    """What a process prints, by lines; the last few are kept."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._progress = progress
        self._rest = b""

    def write(self, piece: bytes) -> None:
        *lines, rest = (self._rest + piece).split(b"\n")
        for line in lines:
            self._tail.append(line.decode("utf-8", "replace")[:MOST_LINE])
            self._progress(self._tail[-1])
        self._rest = rest[-MOST_LINE:]

    def end(self) -> list[str]:
        return [*self._tail, self._rest.decode("utf-8", "replace")] if self._rest else list(self._tail)
