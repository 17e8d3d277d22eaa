"""More calls than there is room or time for, and a stop in the middle of it."""

from __future__ import annotations

import os
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from live_server import ENDS_WITHIN_S, LiveServer, all_gone, live_server

GATE = """
import os
import hotset

@hotset.function(gpu_memory="30MiB", timeout="60s")
class Gate:
    def predict(self, number: int) -> int:
        if number == 0:
            open(os.environ["GATE"]).close()  # a named pipe: waits until the test opens it too
        return number
"""
MAX_QUEUE = 3


def test_who_finds_no_room_or_time_is_told_and_all_others_are_answered(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with (
        live_server(tmp_path / "data", "--virtual-gpus", "1", "--max-queue", str(MAX_QUEUE)) as server,
        httpx.Client(base_url=server.url, timeout=ENDS_WITHIN_S) as client,
        ThreadPoolExecutor(MAX_QUEUE) as callers,
    ):
        server.deploy("gate", GATE, tmp_path, GATE=str(gate))

        def call(number: int, **headers: str) -> httpx.Response:
            return client.post("/function/gate", json={"number": number}, headers=headers)

        running = callers.submit(call, 0)
        until(server, running=True)
        waiting = callers.submit(call, 1)
        until(server, waiting=1)

        late = call(2, **{"x-hotset-timeout": "0.2"})
        assert late.status_code == 504
        assert late.json()["reason"] == "deadline"

        leaving = [hung_up_later(server) for _ in range(MAX_QUEUE - 1)]
        until(server, waiting=MAX_QUEUE)
        full = call(3)
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1

        for connection in leaving:
            connection.close()
        until(server, waiting=1)
        in_their_place = callers.submit(call, 4)
        until(server, waiting=2)

        server.process.terminate()
        family = server.family()
        refused(server)
        gate.open("w").close()
        for answer, number in ((running, 0), (waiting, 1), (in_their_place, 4)):
            reply = result(answer)
            assert (reply.status_code, reply.json()) == (200, number)
        assert server.process.wait(ENDS_WITHIN_S) == 0
        assert all_gone(family)


def result(answer: Future[httpx.Response]) -> httpx.Response:
    return answer.result(ENDS_WITHIN_S)


def until(server: LiveServer, *, waiting: int = 0, running: bool = True) -> None:
    """Ask until that many calls wait and one runs; the server answers each time, so this is no busy loop."""
    for _ in range(2000):
        state = server.state()
        (gpu,) = state["gpus"]
        at_work = any(resident["uses"] and resident["in_use"] for resident in gpu["residents"])
        if state["waiting"] == waiting and at_work is running:
            return
    pytest.fail(f"not {waiting} waiting calls but {state['waiting']}")


def hung_up_later(server: LiveServer) -> socket.socket:
    """A connection with a call on it whose answer nobody will read."""
    url = urlsplit(server.url)
    connection = socket.create_connection((url.hostname, url.port))
    body = b'{"number": 9}'
    head = b"POST /function/gate HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
    connection.sendall(head + body)
    return connection


def refused(server: LiveServer) -> None:
    """Try new connections until the stopping server takes none."""
    url = urlsplit(server.url)
    for _ in range(2000):
        try:
            socket.create_connection((url.hostname, url.port), timeout=ENDS_WITHIN_S).close()
        except (ConnectionRefusedError, ConnectionResetError):  # reset: it was closed while the connection was made
            return
    pytest.fail("a server that was told to stop still takes connections")
