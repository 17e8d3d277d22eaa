"""From a bare process to a GPU process: the same for a fresh interpreter and for a fork of the zygote."""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import NoReturn

from hotset.node.worker.channel import Channel
from hotset.node.worker.loop import Worker
from hotset.node.worker.orphans import die_with, volunteer_for_oom


def become_worker(socket_fd: int, arena_fd: int, parent_pid: int) -> NoReturn:
    """Serve the node on that socket until it says bye; never returns. ``parent_pid``: who started this process."""
    die_with(parent_pid)
    volunteer_for_oom()
    # Ctrl-C in the server's terminal is the server's to handle: it drains first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for descriptor in (socket_fd, arena_fd):
        os.set_inheritable(descriptor, False)
    code = Worker(Channel(socket.socket(fileno=socket_fd), arena_fd)).main()
    # No interpreter shutdown: it can take a framework seconds, and the next model waits for this one's memory.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
