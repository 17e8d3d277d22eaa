"""Runs one command and ends it, with all its children, when the server is gone. Run by its path, not imported.

The server holds the other end of this process's standard input: however the server ends, that end closes. This process
leads a process group of its own, so one signal reaches whatever the command started.
"""

import os
import signal
import subprocess
import sys
import threading


def _end_with_server() -> None:
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_server, daemon=True).start()
    status = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, check=False).returncode
    # The watching thread sits in a read that never returns: leave without waiting for it.
    os._exit(status if status >= 0 else 128 - status)
