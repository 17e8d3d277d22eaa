"""``python -m hotset.node.worker --socket FD --arena FD``: the process of one model, as the node starts it."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys

from hotset.node.worker.channel import Channel
from hotset.node.worker.loop import Worker
from hotset.node.worker.orphans import die_with, volunteer_for_oom


def main() -> None:
    parser = argparse.ArgumentParser(prog="hotset.node.worker", description="Started by a hotset node, not by hand.")
    parser.add_argument("--socket", type=int, required=True, help="descriptor of the stream socket to the node")
    parser.add_argument("--arena", type=int, required=True, help="descriptor of the shared-memory slots")
    parser.add_argument("--parent", type=int, required=True, help="process id of the node")
    arguments = parser.parse_args()
    die_with(arguments.parent)
    volunteer_for_oom()
    # Ctrl-C in the server's terminal is the server's to handle: it drains first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for descriptor in (arguments.socket, arguments.arena):
        os.set_inheritable(descriptor, False)
    code = Worker(Channel(socket.socket(fileno=arguments.socket), arguments.arena)).main()
    # No interpreter shutdown: it can take a framework seconds, and the next model waits for this one's memory.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


main()
