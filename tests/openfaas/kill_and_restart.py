"""A server is killed in the middle of its asynchronous calls and started again: a test's, and a benchmark's, story."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import msgspec

from hotset.store.bundles import make_bundle

PAYLOAD = b"payload %d"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What the callbacks said."""

    accepted: set[str]
    called_back: Counter[str]
    """Call id -> how often."""
    before_kill: int
    statuses: Counter[str]


class Receiver(ThreadingHTTPServer):
    """Takes callbacks on a free port of this machine."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.news = threading.Condition()
        self.most: float = math.inf
        """Callbacks beyond so many are not answered before this is raised; then it is too late."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/done"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A server that is killed leaves its callbacks unfinished."""

    def open_again(self) -> None:
        with self.news:
            self.most = math.inf
            self.news.notify_all()

    def wait_for(self, calls: int, within_s: float) -> bool:
        """Until so many different calls were called back."""
        with self.news:
            return self.news.wait_for(lambda: len(self.seen) >= calls, within_s)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        receiver = self.server
        assert isinstance(receiver, Receiver)
        with receiver.news:
            if len(receiver.seen) >= receiver.most:
                receiver.news.wait_for(lambda: receiver.most == math.inf)
                self.close_connection = True
                return
            receiver.seen[self.headers["x-call-id"]] += 1
            receiver.statuses[self.headers["x-function-status"]] += 1
            receiver.news.notify_all()
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def receiving() -> Iterator[Receiver]:
    with Receiver() as receiver:
        thread = threading.Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield receiver
        finally:
            receiver.shutdown()
            thread.join()


@contextmanager
def serving(data: Path, **settings: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """``hotset serve`` on one virtual GPU; killed at the end if it still runs."""
    command = [sys.executable, "-m", "hotset", "serve", "--port", "0", "--virtual-gpus", "1", "--gpu-memory", "256MiB"]
    env = {**os.environ, "HOTSET_DATA_DIR": str(data), "HOTSET_LOG_LEVEL": "error", **settings}
    process = subprocess.Popen([*command, "--json"], env=env, stdout=subprocess.PIPE, process_group=0)
    assert process.stdout is not None
    try:
        url = next(line.split(b'"')[3].decode() for line in process.stdout if b'"url"' in line)
        with httpx.Client(base_url=url, timeout=30) as client:
            yield client, process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)
        process.stdout.close()


def push_and_deploy(client: httpx.Client, folder: Path, name: str, command: str) -> None:
    source = folder / "image"
    source.mkdir(exist_ok=True)
    (source / "README").write_text("an image without code")
    with (folder / "image.zip").open("w+b") as archive:
        digest = make_bundle(source, archive).digest
        archive.seek(0)
        client.put(f"/system/bundles/{digest}", content=archive.read()).raise_for_status()
    wanted = {"service": name, "image": f"sha256:{digest}", "envProcess": command}
    client.post("/system/functions", json=wanted).raise_for_status()


def kill_in_the_middle(folder: Path, calls: int, within_s: float = 120.0) -> Outcome:
    """Send ``calls`` calls, kill the server with SIGKILL when half of them were called back, start it again, wait."""
    settings = {"HOTSET_ALLOW_CALLBACKS": "127.0.0.0/8"}
    accepted: set[str] = set()
    with receiving() as receiver:
        receiver.most = calls // 2
        with serving(folder / "data", **settings) as (client, process):
            push_and_deploy(client, folder, "cat", "cat")

            def send(number: int) -> str:
                reply = client.post(
                    "/async-function/cat", content=PAYLOAD % number, headers={"x-callback-url": receiver.url}
                )
                assert reply.status_code == 202, reply.text
                return str(reply.headers["x-call-id"])

            with ThreadPoolExecutor(8) as clients:
                accepted.update(clients.map(send, range(calls)))
            assert receiver.wait_for(calls // 2, within_s)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            before_kill = len(receiver.seen)
            receiver.open_again()
        with serving(folder / "data", **settings) as (client, _):
            assert receiver.wait_for(calls, within_s), f"{len(receiver.seen)} of {calls} were called back"
            assert client.get("/system/async", params={"state": "dead"}).json() == []
        return Outcome(
            accepted=accepted,
            called_back=Counter(receiver.seen),
            before_kill=before_kill,
            statuses=Counter(receiver.statuses),
        )
