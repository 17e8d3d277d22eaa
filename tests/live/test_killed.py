"""SIGKILL, to GPU processes and to the server itself."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
from collections import Counter
from pathlib import Path

import psutil
import pytest
from live_server import ENDS_WITHIN_S, all_gone, live_server

from hotset.cli.load import LoadClient
from hotset.cli.remote import Remote
from hotset.scheduling.profiles import DEFAULT_LOAD_S

DOUBLE = """
import os
import hotset
import numpy

@hotset.function(gpu_memory="10MiB")
class Double:
    def load(self, device: str) -> None:
        self.share = numpy.ones(10 << 17)  # what it takes is measured: 10 MiB
        self.offset = int(os.environ["OFFSET"])

    def predict(self, value: int) -> int:
        return 2 * value + self.offset
"""
FAMILY = """
import subprocess
import hotset

@hotset.function(gpu_memory="10MiB")
class Family:
    def load(self, device: str) -> None:
        self.child = subprocess.Popen(["sleep", "600"])

    def predict(self) -> int:
        return self.child.pid
"""
FUNCTIONS = 8
"""Two more than both GPUs hold: processes are killed while they load, run, wait, and make room for others."""
CALLERS = 8
KILLS = 10
PARKING = {"offloads": (), "evictions": ("--host-memory", "0")}


@pytest.mark.parametrize("makes_room", PARKING)
def test_gpu_processes_are_killed_at_random_and_every_call_is_answered(makes_room: str, tmp_path: Path) -> None:
    dice = random.Random(5)

    with live_server(tmp_path / "data", *PARKING[makes_room]) as server:
        for number in range(FUNCTIONS):
            server.deploy(f"double-{number}", DOUBLE, tmp_path, OFFSET=str(number))
        client = LoadClient(server.url)
        calls = itertools.count()
        answers: dict[int, tuple[int, bytes]] = {}
        killed: list[int] = []
        since_kill: Counter[int] = Counter()
        """Caller -> answers since the last kill."""

        async def kill() -> None:
            since_kill.clear()
            victim = dice.choice(await asyncio.to_thread(server.gpu_pids))
            with contextlib.suppress(ProcessLookupError):  # it has just made room for another
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)

        async def caller(who: int) -> None:
            while len(killed) < KILLS:
                number = next(calls)
                # A call is tried twice: none that is open may have met the last kill already.
                if all(since_kill[each] > 1 for each in range(CALLERS)):
                    await kill()
                body = b'{"value": %d}' % number
                answer = await client.call(f"double-{number % FUNCTIONS}", body, "application/json")
                answers[number] = answer.status, answer.body
                since_kill[who] += 1

        async def load() -> None:
            async with asyncio.timeout(3 * ENDS_WITHIN_S):
                await asyncio.gather(*map(caller, range(CALLERS)))
            client.close()

        asyncio.run(load())
        assert answers == {number: (200, b"%d" % (2 * number + number % FUNCTIONS)) for number in range(next(calls))}
        state = server.state()
        assert (state["waiting"], state["healthy"]) == (0, True)
        functions = state["functions"]
        assert sum(function["errors"] for function in functions) == 0
        # Each GPU has room for three of the eight, and what is killed is loaded again.
        assert sum(function["misses"] + function["restores"] for function in functions) > FUNCTIONS + len(killed)
        assert sum(function[makes_room] for function in functions) > 0


def test_a_killed_server_leaves_no_process_and_comes_back_with_all_it_knew(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with live_server(data) as server:
        server.deploy("family", FAMILY, tmp_path)
        with Remote(server.url) as remote:
            (child,) = [psutil.Process(int(remote.invoke("family", b"{}", {}).content))]
        family = server.family()
        assert child in family
        server.process.terminate()
        assert server.process.wait(ENDS_WITHIN_S) == 0
        assert all_gone(family)

    with live_server(data) as server:
        learned = server.learned("family")
        with Remote(server.url) as remote:
            assert remote.invoke("family", b"{}", {}).status_code == 200
        family = server.family()
        assert len(family) >= 3  # the guard, a GPU process, the function's own child
        server.process.kill()
        server.process.wait()
        assert all_gone(family)

    with live_server(data) as server, Remote(server.url) as remote:
        assert server.learned("family") == learned
        assert learned["load_s"] != DEFAULT_LOAD_S
        assert remote.invoke("family", b"{}", {}).status_code == 200


def test_two_servers_do_not_share_a_data_directory(tmp_path: Path) -> None:
    with (
        live_server(tmp_path / "data"),
        pytest.raises(AssertionError, match="another hotset server uses"),
        live_server(tmp_path / "data"),
    ):
        pass
