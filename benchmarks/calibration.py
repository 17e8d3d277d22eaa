"""How fast this machine is at plain Python: figures of two machines compare only beside theirs."""

from __future__ import annotations

import heapq
import statistics
import time
from collections import Counter, OrderedDict, deque

REFERENCE_PER_S = 1_180_000
"""What the loop below does on the machine for which the bars were set."""


class _Ticket:
    __slots__ = ("deadline_s", "model", "time_s")

    def __init__(self, model: int, time_s: float, deadline_s: float) -> None:
        self.model = model
        self.time_s = time_s
        self.deadline_s = deadline_s


def decisions_per_s(count: int = 50_000) -> float:
    """A decision stripped to its bones: a queue per model, a heap of deadlines, an LRU list, a counter."""
    lines: dict[int, deque[_Ticket]] = {model: deque() for model in range(200)}
    resident = OrderedDict.fromkeys(range(40))
    deadlines: list[tuple[float, int, _Ticket]] = []
    outcomes: Counter[str] = Counter()
    started_s = time.process_time()
    for number in range(count):
        now_s = time.monotonic()
        ticket = _Ticket(number * 7919 % 200, now_s, now_s + 1.0)
        lines[ticket.model].append(ticket)
        heapq.heappush(deadlines, (ticket.deadline_s, number, ticket))
        if len(deadlines) > 32:
            model = heapq.heappop(deadlines)[2].model
            lines[model].popleft()
            if model in resident:
                resident.move_to_end(model)
                outcomes["hit"] += 1
            else:
                resident.popitem(last=False)
                resident[model] = None
                outcomes["miss"] += 1
    return count / (time.process_time() - started_s)


def machine_speed(runs: int = 5) -> float:
    """This machine's speed as a share of the reference's; the median of a few runs."""
    return statistics.median(decisions_per_s() for _ in range(runs)) / REFERENCE_PER_S
