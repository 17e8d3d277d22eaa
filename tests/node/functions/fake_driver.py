"""A device to be opened ahead, and the function that uses it. What happens is up to ``FAKE_DRIVER``, a folder: each
opening adds a line to ``opened`` there, and does what ``does`` says."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import hotset

opened: list[str] = []
"""By this process."""


def open_device() -> None:
    folder, gpu = Path(os.environ["FAKE_DRIVER"]), os.environ["CUDA_VISIBLE_DEVICES"]
    with (folder / "opened").open("a") as lines:
        lines.write(f"{gpu}\n")
    while (does := (folder / "does").read_text()) == "wait":
        time.sleep(0.005)
    if does == "raise":
        raise RuntimeError("CUDA error: out of memory")
    if does == "exit":
        os._exit(3)
    if does == "babble":
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            try:
                if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                    os.write(descriptor, b"?" * 40)
            except OSError:
                continue
    opened.append(gpu)


@hotset.function
class Broken:
    """Every call meets an error of the device."""

    def predict(self, question: str) -> str:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
