"""The HTTP server under the gateway: uvicorn with httptools on the running loop, and a stop that answers everybody."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

import hotset
from hotset.errors import ConfigurationError
from hotset.gateway.app import Application
from hotset.gateway.control import Control
from hotset.gateway.direct import DirectProtocol
from hotset.gateway.intake import READ_BYTES, Intake

KEEP_ALIVE_S = 75
"""Longer than the clients' own pools keep a connection, so that it is they who close it, never in mid-request."""
CLOSING_S = 2.0
"""What the last answers get to leave once draining is over."""

log = logging.getLogger("hotset.gateway")


def bind(host: str, port: int) -> socket.socket:
    """Take the address now, before anything slow is started; port 0 picks a free one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ConfigurationError(f"the host {host!r} is no address of this machine ({error.strerror})") from None
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise ConfigurationError(
            f"{host}:{port} cannot be listened on ({error.strerror}): stop what does, or choose another with --port"
        ) from None
    listening.setblocking(False)
    return listening


class Listener(uvicorn.Server):
    """Serves the gateway until it is told to stop.

    The first SIGTERM or SIGINT stops accepting and drains: calls in flight have ``drain_s`` seconds to end, then get a
    503. The second ends that wait at once; a third kills, as if nobody had caught it.
    """

    def __init__(
        self, application: Application, control: Control, connect: Callable[..., DirectProtocol], *, drain_s: float
    ) -> None:
        """``connect`` makes a connection, of what uvicorn gives it; what it does not serve goes to ``application``."""
        buffer = memoryview(bytearray(READ_BYTES))
        config = uvicorn.Config(
            application,
            http=lambda **uvicorns: Intake(connect(**uvicorns), buffer),  # type: ignore[arg-type] # any maker of protocols will do
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            proxy_headers=False,
            server_header=False,
            headers=[("x-served-by", f"hotset/{hotset.__version__}")],
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(drain_s + CLOSING_S + 1),
        )
        super().__init__(config)
        self._control = control
        self._drain_s = drain_s
        self._draining: asyncio.Task[None] | None = None
        self._ready: Callable[[], None] = lambda: None

    def when_started(self, ready: Callable[[], None]) -> None:
        """Call back once connections are taken."""
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def stop(self) -> None:
        """What a signal does; harmless when repeated."""
        if self._draining is None:
            log.info("stopping: calls in flight have %g s to end", self._drain_s)
            self.should_exit = True
            self._draining = asyncio.get_running_loop().create_task(self._control.drain(self._drain_s))
        elif not self.force_exit:
            log.info("stopping at once")
            self.force_exit = True
            self._draining.cancel()
            self._release_signals()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await super().serve(sockets)
        if self._draining is not None:
            await asyncio.wait([self._draining])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            self._release_signals()

    def _release_signals(self) -> None:
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """uvicorn's own way of being told."""
        self.stop()
