"""The comparison of fast and ordinary loads, in the background, one after the other (node/worker/check.py)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import psutil  # type: ignore[import-untyped]

from hotset.functions.contract import FunctionKind, LoadCheck
from hotset.functions.http_envelope import PROCESS_ENTRY
from hotset.node.spawner import child_environment
from hotset.store import supervised
from hotset.store.datastore import FunctionRecord

SPARE_S = 60.0
"""On top of two loads: an interpreter must start and import a framework."""

MOST_ANSWER_BYTES = 1 << 16

NOTHING_TO_CHECK = "nothing to check: it loads neither torch nor ONNX models on a GPU"

Checked = Callable[[LoadCheck], Awaitable[None]]


class LoadChecks:
    """Runs them on the server's event loop; ``close`` ends what is under way, which then is done at the next start."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)
        self._tasks: dict[asyncio.Task[None], str] = {}
        """And the version that each checks."""

    def outcome(self, record: FunctionRecord) -> str | None:
        """What came of the version's check, for people; None: nothing yet, it is under way or waits for its turn."""
        if record.load_check is not None:
            return record.load_check.text
        return None if record.model in self._tasks.values() else NOTHING_TO_CHECK

    def start(self, record: FunctionRecord, path: Path, python: str, checked: Checked) -> None:
        """Have ``checked`` called with what comes of it, if this version has loads that could be made fast."""
        fits = record.options.kind is FunctionKind.GPU and record.entry != PROCESS_ENTRY
        made_fast = "torch" in record.frameworks or any(path.rglob("*.onnx"))
        if fits and made_fast and record.load_check is None:
            task = asyncio.get_running_loop().create_task(self._run(record, path, python, checked))
            self._tasks[task] = record.model
            task.add_done_callback(self._tasks.pop)

    async def _run(self, record: FunctionRecord, path: Path, python: str, checked: Checked) -> None:
        async with self._turn:
            timeout_s = 2 * record.options.load_timeout_s + SPARE_S
            env = child_environment(record.options.env)
            await checked(await check_load(python, path, record.entry, env, timeout_s))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


async def check_load(python: str, code_path: Path, entry: str, env: Mapping[str, str], timeout_s: float) -> LoadCheck:
    """Compare the function's fast load with its ordinary one, in a process of their own."""
    free_bytes = psutil.virtual_memory().available // 2
    module = "hotset.node.worker.check"
    try:
        command = [python, "-P", "-m", module, str(code_path), entry, str(free_bytes)]
        output = await _output_of(command, {**env, "CUDA_VISIBLE_DEVICES": ""}, timeout_s)
        return msgspec.json.decode(output, type=LoadCheck)
    except TimeoutError:
        return LoadCheck(fast=True, text=f"not checked: it took longer than {timeout_s:g} s")
    except msgspec.DecodeError:
        return LoadCheck(fast=True, text="not checked: the process that loaded it both ways did not survive")


async def _output_of(command: Sequence[str], env: Mapping[str, str], timeout_s: float) -> bytes:
    """Run it in a session that ends with the server and with the answer; raises ``TimeoutError``."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", supervised.__file__, *command),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=dict(env),
        start_new_session=True,
    )
    assert process.stdout is not None
    output = b""
    try:
        async with asyncio.timeout(timeout_s):
            while len(output) <= MOST_ANSWER_BYTES and (piece := await process.stdout.read(MOST_ANSWER_BYTES)):
                output += piece
        return output
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
