"""Processor time and host memory of functions' processes, as the operating system counts them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import msgspec
import psutil  # type: ignore[import-untyped]


class Used(msgspec.Struct, frozen=True, kw_only=True):
    """What the processes of one function use, with those that they started."""

    cpu_s: float = 0.0
    """Of those that live: it falls when one ends."""
    memory_bytes: int = 0
    """Resident set."""


def used(pids: Mapping[int, str]) -> dict[str, Used]:
    """Whose process each is (a model's) -> what is used. Reads every process of the machine: for a thread."""
    children: defaultdict[int, list[psutil.Process]] = defaultdict(list)
    for process in psutil.process_iter(["ppid"]):
        children[process.info["ppid"]].append(process)
    totals: defaultdict[str, Used] = defaultdict(Used)
    for pid, model in pids.items():
        family = [pid]
        for each in family:
            family += [child.pid for child in children[each]]
            try:
                process = psutil.Process(each)
                times, memory = process.cpu_times(), process.memory_info()
            except psutil.Error:
                continue  # it ended meanwhile
            total = totals[model]
            totals[model] = Used(
                cpu_s=total.cpu_s + times.user + times.system, memory_bytes=total.memory_bytes + memory.rss
            )
    return totals
