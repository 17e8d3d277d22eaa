"""A look, while a benchmark runs, at what a server says its models take and at what its processes really have.

    hot      models on a GPU       at most the GPU's memory
    parked   models that left one  at most the node's host memory (``--host-memory``)

Each account must stay within its budget, and the pages of weights that the processes have within the accounts.
"""

from __future__ import annotations

import json
import mmap
import re
import threading
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec

from hotset.node.host_memory import host_memory


class Account(msgspec.Struct):
    """One budget, as seen so far."""

    over_budget: int = 0
    """Samples in which what was reported exceeded the budget."""
    most_reported_bytes: int = 0
    most_held_bytes: int = 0
    """Pages of weights that the processes had in memory."""
    unaccounted: int = 0
    """Looks in which that was more than was ever reported."""

    def reported(self, reported_bytes: int, budget_bytes: int) -> None:
        self.over_budget += reported_bytes > budget_bytes
        self.most_reported_bytes = max(self.most_reported_bytes, reported_bytes)

    def held(self, held_bytes: int) -> None:
        # Models move between the two looks, so it is compared with the most there was, not with the moment's figure.
        self.most_held_bytes = max(self.most_held_bytes, held_bytes)
        self.unaccounted += held_bytes > self.most_reported_bytes


class MemoryReport(msgspec.Struct):
    """What the sampler saw. ``hot``: of the fullest GPU; ``parked``: of the node."""

    samples: int = 0
    looks: int = 0
    """At the processes themselves."""
    hot: Account = msgspec.field(default_factory=Account)
    parked: Account = msgspec.field(default_factory=Account)
    most_pss_bytes: int = 0
    """Proportional set size of all GPU processes together: what they take of the machine, shared pages counted once."""
    most_private_bytes: int = 0
    """What they have written for themselves: all that would be free if they ended, but for pages of files."""
    most_processes: int = 0


class ProcessMemory(msgspec.Struct, frozen=True):
    """What the kernel says of one process; zeros once it is gone."""

    weights_bytes: int = 0
    """Pages of weights files that it has in memory."""
    private_bytes: int = 0
    pss_bytes: int = 0


class MemorySampler(threading.Thread):
    """Compares ``/system/state`` with the budgets and, while ``looking``, with what the kernel says of the processes.

    A look costs hundreds of milliseconds of CPU, as the kernel counts every page: none while calls are measured.
    """

    EVERY_S = 0.25

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.report = MemoryReport()
        self.looking = False
        self.error: Exception | None = None
        self._url = url
        self._ended = threading.Event()

    def __enter__(self) -> MemorySampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()
        if self.error is not None:
            raise self.error

    def run(self) -> None:
        try:
            while not self._ended.wait(self.EVERY_S):
                self._sample(look=self.looking)
        except Exception as error:  # noqa: BLE001 - raised again by the thread that waits for this one
            self.error = error

    def _sample(self, *, look: bool) -> None:
        state = self._state("?processes=true" if look else "")
        report = self.report
        report.samples += 1
        for gpu in state["gpus"]:
            residents_bytes = sum(resident["memory_bytes"] for resident in gpu["residents"])
            report.hot.reported(max(residents_bytes, gpu["used_bytes"]), gpu["capacity_bytes"])
        for host in state["hosts"]:
            report.parked.reported(host["used_bytes"], host["capacity_bytes"])
        if look:
            parked = {(gpu["gpu_id"], model["model"]) for gpu in state["gpus"] for model in gpu["parked"]}
            self._look(state["processes"], parked)

    def _look(self, processes: list[dict[str, Any]], parked: set[tuple[str, str]]) -> None:
        report = self.report
        report.looks += 1
        hot: defaultdict[str, int] = defaultdict(int)
        parked_bytes = pss_bytes = private_bytes = 0
        for process in processes:
            memory = memory_of(process["pid"])
            pss_bytes += memory.pss_bytes
            private_bytes += memory.private_bytes
            if (process["gpu_id"], process["model"]) in parked:
                parked_bytes += memory.weights_bytes
            else:
                hot[process["gpu_id"]] += memory.weights_bytes
        for held_bytes in hot.values():
            report.hot.held(held_bytes)
        report.parked.held(parked_bytes)
        report.most_pss_bytes = max(report.most_pss_bytes, pss_bytes)
        report.most_private_bytes = max(report.most_private_bytes, private_bytes)
        report.most_processes = max(report.most_processes, len(processes))

    def _state(self, query: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self._url}/system/state{query}", timeout=10) as answer:
            state: dict[str, Any] = json.load(answer)
        return state


_MAPPING = re.compile(rb"^[0-9a-f]+-[0-9a-f]+ ")


def memory_of(pid: int) -> ProcessMemory:
    """Counted as the node counts it (``node/host_memory.py``), and its pages of weights besides."""
    try:
        lines = Path(f"/proc/{pid}/smaps").read_bytes().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return ProcessMemory()
    weights_bytes = 0
    in_weights = False
    for line in lines:
        if _MAPPING.match(line):
            in_weights = line.endswith(b".safetensors")
        elif line.startswith(b"Rss:") and in_weights:
            weights_bytes += max(0, int(line.split()[1]) * 1024 - mmap.PAGESIZE)  # the file's header
    memory = host_memory(pid)
    return ProcessMemory(weights_bytes, memory.private_bytes, memory.private_bytes + memory.shared_bytes)
