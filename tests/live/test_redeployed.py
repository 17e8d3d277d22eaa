"""A function is deployed again and again while it is called."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil
from live_server import ENDS_WITHIN_S, LiveServer, all_gone, live_server

from hotset.cli.load import LoadClient

VERSION = """
import hotset

@hotset.function(gpu_memory="10MiB")
class Version:
    def predict(self) -> int:
        return {number}
"""
VERSIONS = 5
CALLERS = 4


def test_no_call_fails_and_no_old_version_stays(tmp_path: Path) -> None:
    with live_server(tmp_path / "data") as server:
        server.deploy("version", VERSION.format(number=0), tmp_path)
        answers, replaced = asyncio.run(redeployed_under_load(server, tmp_path))

        for of_caller in answers:
            assert of_caller == sorted(of_caller)  # nobody is answered by an older version than before
            assert (of_caller[0], of_caller[-1]) == (0, VERSIONS)
        assert replaced
        assert all_gone(replaced)
        (function,) = server.state()["functions"]
        assert function["errors"] == 0
        models = {process["model"] for process in server.state(processes=True)["processes"]}
        assert models == {function["model"]}


async def redeployed_under_load(server: LiveServer, folder: Path) -> tuple[list[list[int]], list[psutil.Process]]:
    """What each caller was answered, in order, and the processes of the versions that were replaced."""
    client = LoadClient(server.url)
    newest = 0
    replaced: list[psutil.Process] = []

    async def caller() -> list[int]:
        answers = [-1]
        while answers[-1] < VERSIONS:
            answer = await client.call("version", b"{}", "application/json")
            assert answer.status == 200, answer.body
            answers.append(int(answer.body))
        return answers[1:]

    async def deployer() -> None:
        nonlocal newest
        for newest in range(1, VERSIONS + 1):
            replaced.extend(await asyncio.to_thread(lambda: list(processes(server))))
            await asyncio.to_thread(server.deploy, "version", VERSION.format(number=newest), folder)

    async with asyncio.timeout(3 * ENDS_WITHIN_S):
        *answers, _ = await asyncio.gather(*(caller() for _ in range(CALLERS)), deployer())
    client.close()
    return answers, replaced


def processes(server: LiveServer) -> Iterator[psutil.Process]:
    for pid in server.gpu_pids():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since it was listed
            yield psutil.Process(pid)
