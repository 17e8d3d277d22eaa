"""A function that parks itself."""

from __future__ import annotations

import os
import signal
import sys
import time

import hotset


@hotset.function
class Hooked:
    """Parks itself, or does what its environment says in place of it."""

    def load(self, device: str) -> None:
        self.log: list[str] = []
        held = int(os.environ.get("HOLDS_BYTES", "0"))
        if held:
            import numpy

            self.held = numpy.ones(held // 8)

    def offload(self) -> None:
        self._do("OFFLOAD")
        self.log.append("offload")

    def restore(self, device: str) -> None:
        self._do("RESTORE")
        self.log.append(f"restore {device}")

    def unload(self) -> None:
        self._do("UNLOAD")

    def predict(self, ignored: int) -> list[str]:
        return self.log

    def _do(self, which: str) -> None:
        match os.environ.get(which):
            case "raise":
                raise RuntimeError(f"no {which.lower()}")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(60)
            case "memory":
                raise MemoryError
            case "exit":
                print("leaving", file=sys.stderr)
                os._exit(3)
