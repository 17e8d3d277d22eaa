"""Functions for the tests of the node: each does something right, or wrong on demand."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import hotset


@hotset.function
class Echo:
    """Gives back what it got."""

    def predict(self, data: bytes) -> bytes:
        return data


@hotset.function
class Holder:
    """Takes 8 MiB."""

    def load(self, device: str) -> None:
        import numpy

        self.device = device
        self.weights = numpy.ones(1 << 20)

    def predict(self, word: str) -> str:
        print("predicting", word)
        return f"{self.device} {word} {os.environ.get('GREETING', '')}".strip()


@hotset.function(max_batch=8)
class Batch:
    """Says how many calls it was given together."""

    def predict(self, number: list[int]) -> list[list[int]]:
        return [[value, len(number)] for value in number]


@hotset.function
class Numbers:
    """Streams; with a count of -1 it never ends by itself."""

    def predict(self, count: int) -> Iterator[int]:
        number = 0
        try:
            while number != count:
                yield number
                number += 1
        finally:
            print("closed")


@hotset.function
class Trouble:
    """Does what it is told."""

    def predict(self, what: str) -> str:
        return str(getattr(self, what)())

    def fine(self) -> str:
        return "fine"

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def crash(self) -> None:
        print("about to read address 0", file=sys.stderr)
        ctypes.string_at(0)

    def leave(self) -> None:
        os.write(2, b"no newline at the end")
        os._exit(3)

    def hang(self) -> None:
        time.sleep(60)

    def hang_in_c(self) -> None:
        ctypes.CDLL(None).sleep(60)

    def chatter(self) -> None:
        for number in range(2_000):
            print("line", number)

    def start_a_child(self) -> int:
        child = subprocess.Popen(["sleep", "60"])
        return child.pid

    def device_error(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def garbage(self) -> None:
        os.write(_socket(), b"\xff" * 1000)

    def close_socket(self) -> None:
        os.close(_socket())
        time.sleep(60)


@hotset.function
class Stubborn:
    """Does not want to end."""

    def predict(self, what: str) -> str:
        return what

    def unload(self) -> None:
        time.sleep(60)


@hotset.function
class LoadTrouble:
    """Loads, or does not, as its environment says."""

    def load(self, device: str) -> None:
        what = os.environ["LOAD"]
        if what == "raise":
            raise ValueError("no weights\nin sight")
        if what == "exit":
            os._exit(7)
        if what == "hang":
            time.sleep(60)
        if what == "memory":
            raise MemoryError

    def predict(self, what: str) -> str:
        return what


@hotset.function
def shout(text: str) -> str:
    """A plain function."""
    if text == "die":
        os._exit(9)
    if text == "hang":
        time.sleep(60)
    if text == "pid":
        return str(os.getpid())
    return text.upper()


def _socket() -> int:
    return int(sys.argv[sys.argv.index("--socket") + 1])


@hotset.function
class Keeper:
    """Keeps so many MiB more from now on, or lets go of all it has kept; ``peak``: keeps them until it answers."""

    def load(self, device: str) -> None:
        self.kept: list[bytes] = []

    def predict(self, mib: int, peak: bool = False) -> int:
        piece = b"x" * (mib << 20)
        if mib < 0:
            self.kept.clear()
        elif not peak:
            self.kept.append(piece)
        return len(piece)
