"""What a fork of the zygote does while it waits: it loads and calls a function of a few numbers, and forgets it.

A fork shares its parent's memory until it writes, and Python writes to whatever it uses: each page is copied then, at
a few microseconds. The load and the first call of a model touch some 1,500 pages, most of which any load touches. So
they are touched in the pool, before anybody waits, and so is memory for the objects of a model of usual size.
"""

from __future__ import annotations

import contextlib
import sys

import hotset
from hotset.functions.runtime import Runtime
from hotset.node.worker.fast_load import fast_load
from hotset.node.worker.memory import measure, private_bytes


@hotset.function
class Rehearsal:
    """As functions are, in what it imports, holds and does."""

    def load(self, device: str) -> None:
        torch = sys.modules.get("torch")
        if torch is not None:
            layer = torch.nn.TransformerEncoderLayer
            self.net = torch.nn.Sequential(*(layer(2, 1, 2, dropout=0.0, batch_first=True) for _ in range(2)))
            self.net.load_state_dict({name: torch.zeros_like(value) for name, value in self.net.state_dict().items()})
            self.net.to(device).eval()

    def predict(self, number: int) -> float:
        torch = sys.modules.get("torch")
        if torch is None:
            return float(number)
        with torch.inference_mode():
            return float(self.net(torch.zeros(1, 1, 2)).sum())


_ARENA_BYTES = 1 << 20
_SMALL_BYTES, _LARGE_BYTES = 480, 1024
"""Up to 512 bytes an object lies in an arena of Python's, above on the heap of the C library."""
_kept: list[bytes] = []
"""What keeps arenas and heap from being given back to the system as empty."""


def _touch_memory(size_bytes: int) -> None:
    """Own so much memory for small objects, and as much for large ones, that nothing is in yet."""
    in_arena = _ARENA_BYTES // _SMALL_BYTES
    small = [bytes(_SMALL_BYTES - sys.getsizeof(b"")) for _ in range((size_bytes // _ARENA_BYTES + 1) * in_arena)]
    _kept.extend(small[in_arena // 2 : -in_arena : in_arena])  # none of the last arena, which is not touched to its end
    _kept.append([bytes(_LARGE_BYTES) for _ in range(size_bytes // _LARGE_BYTES)][-1])


def rehearse() -> None:
    """Only warms up: whatever goes wrong here, a real load will say."""
    _touch_memory(1 << 20)
    with contextlib.suppress(Exception):
        runtime = Runtime(Rehearsal)
        private_bytes()
        with fast_load():
            runtime.load()
        measure(runtime.instance, 0)
        runtime.call(b"1")
