"""The comparison of fast and ordinary loads, in the background, one after the other (node/worker/check.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from hotset.functions.contract import FunctionKind, LoadCheck
from hotset.functions.http_envelope import PROCESS_ENTRY
from hotset.gateway.description import check_load
from hotset.node.spawner import child_environment
from hotset.store.datastore import FunctionRecord

SPARE_S = 60.0
"""On top of two loads: an interpreter must start and import a framework."""

Checked = Callable[[LoadCheck], Awaitable[None]]


class LoadChecks:
    """Runs them on the server's event loop; ``close`` ends what is under way, which then is done at the next start."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, record: FunctionRecord, path: Path, python: str, checked: Checked) -> None:
        """Have ``checked`` called with what comes of it, if this version has loads that could be made fast."""
        fits = record.options.kind is FunctionKind.GPU and record.entry != PROCESS_ENTRY
        if fits and "torch" in record.frameworks and record.load_check is None:
            task = asyncio.get_running_loop().create_task(self._run(record, path, python, checked))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

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
