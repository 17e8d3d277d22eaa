"""Calls that wait for one function run together, and a replay of the recording joins them too."""

from __future__ import annotations

import asyncio
from pathlib import Path

from live_server import live_server

from hotset.cli.load import LoadClient
from hotset.cli.remote import Remote
from hotset.cli.replay import batches_of, hardware_of, read_recording, simulated

FUNCTION = '''
import time

import hotset


@hotset.function(gpu_memory="8MiB", max_batch=5)
class Together:
    """Says with how many it ran."""

    def predict(self, numbers: list[int]) -> list[int]:
        time.sleep(0.02 + 0.002 * len(numbers))
        return [len(numbers) for _ in numbers]
'''
CALLS = 41


async def crowd(url: str) -> list[int]:
    client = LoadClient(url)
    calls = (client.call("together", b'{"numbers": %d}' % number, "application/json") for number in range(CALLS))
    answers = await asyncio.gather(*calls)
    client.close()
    assert {answer.status for answer in answers} == {200}
    return [int(answer.body) for answer in answers]


def test_waiting_calls_share_runs_live_and_in_the_replay(tmp_path: Path) -> None:
    with live_server(tmp_path / "data") as server:
        server.deploy("together", FUNCTION, tmp_path)
        said = asyncio.run(crowd(server.url))
        with Remote(server.url) as remote:
            recording = read_recording(remote.raw_lines("/system/trace"), server.url)

    assert recording.header.models["together"].max_batch == 5
    batches = batches_of(recording, "together")
    sizes = sorted(len(batch) for batch in batches)
    assert sum(sizes) == CALLS
    assert sizes[-1] == 5
    assert sorted(said) == sorted(size for size in sizes for _ in range(size))

    cost = hardware_of(recording).costs["together"]
    assert cost.max_batch == 5
    metrics = simulated(recording, hardware_of(recording), recording.header.policy, recording.header.eviction)
    assert metrics.completed == CALLS
    runs_s = metrics.gpu_utilisation * len(recording.header.gpus) * metrics.makespan_s
    assert runs_s < CALLS * cost.inference_s / 2
