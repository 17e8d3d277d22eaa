"""What a fork of the zygote does while it waits: it loads and calls a function of a few numbers, and forgets it.

A fork shares its parent's memory until it writes, and Python writes to whatever it uses: each page is copied then, at
a few microseconds. The load and the first call of a model touch some 1,500 pages, most of which any load touches. So
they are touched in the pool, before anybody waits.
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
            self.net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
            self.net.load_state_dict({name: torch.zeros_like(value) for name, value in self.net.state_dict().items()})
            self.net.to(device).eval()

    def predict(self, number: int) -> float:
        torch = sys.modules.get("torch")
        if torch is None:
            return float(number)
        with torch.inference_mode():
            return float(self.net(torch.zeros(1, 2)).sum())


def rehearse() -> None:
    """Only warms up: whatever goes wrong here, a real load will say."""
    with contextlib.suppress(Exception):
        runtime = Runtime(Rehearsal)
        private_bytes()
        with fast_load():
            runtime.load()
        measure(runtime.instance, 0)
        runtime.call(b"1")
