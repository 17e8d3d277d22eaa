"""What a process's model takes of its device: measured once it is loaded, and looked at again after runs.

A run may leave it larger (activations that a framework keeps, caches, whatever the function does not let go of). What a
run frees before it ends does not count on a virtual GPU. On CUDA torch keeps it for the next run, and nobody else can
have it, so there it does.
"""

from __future__ import annotations

import os
from time import perf_counter, thread_time
from typing import Any

from hotset.functions.http_envelope import PROCESS_ENTRY
from hotset.node.frames import NEWS_BYTES, LoadOrder, Measured, is_news
from hotset.node.worker.memory import children_bytes, cuda_bytes, measure, private_bytes, trim_heap

LOOK_AGAIN_S = 1.0
"""Between two looks, at least."""
_RARELY = 1000
"""A look that takes long is taken less often: the pause is so many times its processor time, up to the longest."""
_SELDOM_S = 60.0
"""The longest pause. On CUDA every look is a question to the driver, and looks that show nothing become as seldom."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class ModelMemory:
    """Of one process; made before its model is loaded. ``look`` is for when nothing waits for the process."""

    def __init__(self, order: LoadOrder) -> None:
        self.on_cuda = order.device.startswith("cuda")
        self.counted = order.limit_bytes is not None
        """False: a CPU function, whose memory is on no account."""
        self.memory_bytes = 0
        """As last said to the node."""
        self.ran = False
        """Since it was last looked at."""
        self.due_s = 0.0
        """When the next look may be (``perf_counter``)."""
        self._is_command = order.entry == PROCESS_ENTRY
        self._before_bytes = private_bytes()
        self._mapped_bytes = 0
        self._instance: Any = None
        self._resident_bytes = 0
        self._pause_s = LOOK_AGAIN_S

    def loaded(self, instance: Any, mapped_bytes: int) -> int:
        """Its load is done, and its sessions have mapped so much; what it takes."""
        self._instance, self._mapped_bytes = instance, mapped_bytes
        if self.counted:
            self.memory_bytes = self._taken(emptied=True) or 0
        return self.memory_bytes

    def look(self) -> Measured | None:
        """What it takes now, if that is news; on CUDA always, as only the node can ask the driver."""
        begin_s = thread_time()
        self.ran = False
        taken_bytes = self._taken() if self.on_cuda or self._is_command or self._has_changed() else self.memory_bytes
        news = taken_bytes is not None and is_news(self.memory_bytes, taken_bytes)
        if news and not self.on_cuda and not self._is_command:
            # The heap keeps what was freed, and that is not the model's.
            trim_heap()
            taken_bytes = self._taken()
            news = taken_bytes is not None and is_news(self.memory_bytes, taken_bytes)
            self._resident_bytes = _resident_bytes()
        if news and taken_bytes is not None:
            self.memory_bytes = taken_bytes
        self._pause_s = min(2 * self._pause_s, _SELDOM_S) if self.on_cuda and not news else LOOK_AGAIN_S
        self.due_s = perf_counter() + max(self._pause_s, min(_RARELY * (thread_time() - begin_s), _SELDOM_S))
        return Measured(memory_bytes=taken_bytes) if news or self.on_cuda else None

    def _has_changed(self) -> bool:
        """Whether the process's memory has, which costs next to nothing to know: going through all that a function
        holds does not."""
        resident_bytes = _resident_bytes()
        changed = abs(resident_bytes - self._resident_bytes) >= NEWS_BYTES
        if changed:
            self._resident_bytes = resident_bytes
        return changed

    def _taken(self, *, emptied: bool = False) -> int | None:
        """None: only the driver can say."""
        if self._is_command:
            return None if self.on_cuda else children_bytes()
        reserved_bytes = cuda_bytes(emptied=emptied)
        if reserved_bytes or (self.on_cuda and not emptied):
            return reserved_bytes
        growth_bytes = max(0, private_bytes() - self._before_bytes) + self._mapped_bytes
        return measure(self._instance, growth_bytes)


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * _PAGE_BYTES
