"""What a deployed bundle holds: its function's options, entry and schema, read by importing it in its own environment.

Importing runs the user's code, so it happens in a process of its own: ``describe`` starts one with the interpreter of
the function's environment, and this very module, run with ``-m``, is what that process does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil  # type: ignore[import-untyped]

from hotset.errors import BundleError, FunctionError
from hotset.functions.contract import FunctionOptions, LoadCheck
from hotset.store import supervised

IMPORT_TIMEOUT_S = 120.0
MAX_DESCRIPTION_BYTES = 1 << 20
TAIL_LINES = 30
GUESSES = ("function.py", "main.py", "app.py", "handler.py")


class Description(msgspec.Struct, frozen=True, kw_only=True, tag="description"):
    """What importing a function tells."""

    entry: str
    """``module:Name``."""
    options: FunctionOptions
    schema: dict[str, Any]
    frameworks: tuple[str, ...] = ()
    """What the import brought in that takes long."""


class _Failure(msgspec.Struct, frozen=True, tag="failure"):
    error: str


def guess_module(folder: Path) -> str:
    """The module of a bundle that names no entry: its only Python file, or one with a usual name."""
    files = sorted(path.name for path in folder.glob("*.py"))
    found = files if len(files) == 1 else [name for name in GUESSES if name in files]
    if not found:
        listed = f" of {', '.join(files[:10])}" if files else ", and the bundle holds none"
        raise BundleError(f"name the file that holds the function (--entry module:Name){listed}")
    return found[0].removesuffix(".py")


async def describe(
    python: str,
    code_path: Path,
    entry: str,
    env: Mapping[str, str],
    progress: Callable[[str], None],
    *,
    timeout_s: float = IMPORT_TIMEOUT_S,
) -> Description:
    """Import the function with ``python``; ``progress`` gets each line it prints meanwhile.

    Raises ``FunctionError`` with what is wrong: the contract's sentence, or the end of the user's own traceback.
    """
    try:
        output, tail = await run_supervised(
            [python, "-P", "-m", "hotset.gateway.description", str(code_path), entry], env, progress, timeout_s
        )
    except TimeoutError:
        raise FunctionError(f"importing {entry} took longer than {timeout_s:g} s: move slow work into load") from None
    try:
        answer = msgspec.json.decode(output, type=Description | _Failure)
    except msgspec.DecodeError:
        raise FunctionError("\n".join([f"importing {entry} failed", *tail])) from None
    if isinstance(answer, _Failure):
        raise FunctionError(answer.error)
    return answer


async def run_supervised(
    command: Sequence[str], env: Mapping[str, str], progress: Callable[[str], None], timeout_s: float
) -> tuple[bytes, Sequence[str]]:
    """Run it in a session that ends with it; what it wrote to its output, and its last lines of errors.

    ``progress`` gets each of these lines. Raises ``TimeoutError``.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", supervised.__file__, *command),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=dict(env),
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    try:
        async with asyncio.timeout(timeout_s):
            output, _ = await asyncio.gather(_read(process.stdout), _follow(process.stderr, tail, progress))
            await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    return output, tail


async def check_load(python: str, code_path: Path, entry: str, env: Mapping[str, str], timeout_s: float) -> LoadCheck:
    """Compare the function's fast load with its ordinary one, in a process of their own."""
    free_bytes = psutil.virtual_memory().available // 2
    module = "hotset.node.worker.check"
    try:
        output, _ = await run_supervised(
            [python, "-P", "-m", module, str(code_path), entry, str(free_bytes)],
            {**env, "CUDA_VISIBLE_DEVICES": ""},
            lambda _: None,
            timeout_s,
        )
        return msgspec.json.decode(output, type=LoadCheck)
    except TimeoutError:
        return LoadCheck(fast=True, text=f"not checked: it took longer than {timeout_s:g} s")
    except msgspec.DecodeError:
        return LoadCheck(fast=True, text="not checked: the process that loaded it both ways did not survive")


async def _read(stream: asyncio.StreamReader) -> bytes:
    """All of it, up to the limit; the rest is read and dropped, so that the writer does not hang."""
    kept = bytearray()
    while piece := await stream.read(65536):
        if len(kept) <= MAX_DESCRIPTION_BYTES:
            kept += piece
    return bytes(kept[: MAX_DESCRIPTION_BYTES + 1])


async def _follow(stream: asyncio.StreamReader, tail: deque[str], progress: Callable[[str], None]) -> None:
    rest = b""
    while piece := await stream.read(65536):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            tail.append(line.decode("utf-8", "replace")[:500])
            progress(tail[-1])
        rest = rest[-500:]
    if rest:
        tail.append(rest.decode("utf-8", "replace"))


def _main(code_path: str, entry: str) -> bytes:
    """In the function's environment: nothing of the server may be imported here but the function contract."""
    from hotset.functions.contract import options_of
    from hotset.functions.inspection import signature_of
    from hotset.functions.loading import load_entry
    from hotset.functions.v2_types import tensors_of
    from hotset.node.worker.environment import imported_frameworks

    try:
        target = load_entry(code_path, entry)
        options = options_of(target)
        assert options is not None
        full_entry = f"{entry.partition(':')[0]}:{target.__name__}"
        signature = signature_of(target, options)
        schema = signature.schema() | {"tensors": msgspec.to_builtins(tensors_of(signature))}
        return msgspec.json.encode(
            Description(entry=full_entry, options=options, schema=schema, frameworks=imported_frameworks())
        )
    except FunctionError as error:
        return msgspec.json.encode(_Failure(str(error)))


if __name__ == "__main__":
    # What the user's code prints must not mix with the answer.
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(answer_fd, "wb") as out:
        out.write(_main(sys.argv[1], sys.argv[2]))
