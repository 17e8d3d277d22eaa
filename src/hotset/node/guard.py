"""The guard: a tiny process that outlives its node by a moment and ends the process groups the node leaves behind.

A GPU process dies with its node (worker/orphans.py), but the kernel does not extend that to the processes its function
started. The node tells the guard ``+PID`` for each process group it starts and ``-PID`` when it is gone; the end of
that pipe means that the node is gone, however it ended.

Run as a script, without site-packages (``python -I -S guard.py``): a few milliseconds, a few megabytes.
"""

from __future__ import annotations

import contextlib
import os
import signal


def watch(pipe: int) -> set[int]:
    """Read until the node is gone; the groups it left."""
    groups: set[int] = set()
    rest = b""
    while chunk := os.read(pipe, 65536):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            group = int(line[1:])
            if line.startswith(b"+"):
                groups.add(group)
            else:
                groups.discard(group)
    return groups


def end(groups: set[int]) -> None:
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end(watch(0))
