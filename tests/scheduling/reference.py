"""The paper's rules a second time, written from their text alone: plain lists, scans from end to end, no index.

Shares no code with the core. ``simulate`` plays a workload on equal GPUs and says what happened to every request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Costs:
    memory_bytes: int
    load_s: float
    inference_s: float


@dataclass
class Waiting:
    number: int
    model: str
    arrival_s: float
    skips: int = 0


@dataclass(frozen=True)
class Served:
    """What became of a request: where it ran, what it cost the cache, when it was done."""

    number: int
    gpu: int
    hit: bool
    evicted: tuple[str, ...]
    end_s: float


@dataclass
class ReferenceGpu:
    number: int
    memory_bytes: int
    lru: list[str] = field(default_factory=list)
    """Resident models, least recently used first."""
    current: Waiting | None = None
    loading: bool = False
    run_starts_s: float = 0.0
    ends_s: float = 0.0
    begun: int = 0
    """Order in which its load or run was begun, among those of all GPUs."""
    idle_since: int = 0
    """Order in which it became idle, among all GPUs."""
    local: list[Waiting] = field(default_factory=list)

    def next_s(self) -> float:
        """When its load ends, else when its run does."""
        return self.run_starts_s if self.loading else self.ends_s


class Reference:
    """LB, LALB and LALB+O3 with LRU."""

    def __init__(self, policy: str, gpus: int, memory_bytes: int, costs: Mapping[str, Costs], o3_limit: int) -> None:
        self.policy, self.costs, self.o3_limit = policy, costs, o3_limit
        self.gpus = [ReferenceGpu(number, memory_bytes, idle_since=number) for number in range(gpus)]
        self.queue: list[Waiting] = []
        self.served: list[Served] = []
        self.now_s = 0.0
        self.order = gpus

    def simulate(self, arrivals: Sequence[tuple[float, str]]) -> list[Served]:
        """Requests in the order in which their placement on a GPU was decided."""
        upcoming = [Waiting(number, model, time_s) for number, (time_s, model) in enumerate(arrivals, 1)]
        while upcoming or any(gpu.current for gpu in self.gpus):
            # Of what ends at one moment, what was begun first ends first, and requests arrive after that.
            busy = [gpu for gpu in self.gpus if gpu.current is not None]
            gpu = min(busy, key=lambda gpu: (gpu.next_s(), gpu.begun), default=None)
            if gpu is not None and (not upcoming or gpu.next_s() <= upcoming[0].arrival_s):
                self.now_s = gpu.next_s()
                if gpu.loading:
                    gpu.loading = False
                    gpu.begun = self.count()
                else:
                    self.complete(gpu)
            else:
                request = upcoming.pop(0)
                self.now_s = request.arrival_s
                self.queue.append(request)
            self.dispatch()
        return self.served

    def complete(self, gpu: ReferenceGpu) -> None:
        gpu.current = None
        gpu.idle_since = self.count()
        if gpu.local:  # LALB, step 1
            self.place(gpu, gpu.local.pop(0))

    def count(self) -> int:
        self.order += 1
        return self.order

    def dispatch(self) -> None:
        while self.queue and (idle := sorted(self.idle(), key=lambda gpu: gpu.idle_since)):
            here, request = idle[0], self.queue[0]
            if self.policy == "lalb_o3":
                request = self.first_hit(here) or request
            for older in self.queue[: self.queue.index(request)]:
                older.skips += 1
            self.queue.remove(request)
            if self.policy == "lb" or request.model in here.lru:  # LB; LALB 2a
                self.place(here, request)
                continue
            holders = [gpu for gpu in self.gpus if request.model in gpu.lru]
            idle_holders = [gpu for gpu in idle if gpu in holders]
            if not holders:  # 2b
                self.place(here, request)
            elif idle_holders:  # 2c
                self.place(idle_holders[0], request)
            else:  # 2d
                busy = min(holders, key=lambda gpu: (self.wait_s(gpu), gpu.number))
                if self.wait_s(busy) < self.costs[request.model].load_s:
                    busy.local.append(request)
                else:
                    self.place(here, request)

    def first_hit(self, gpu: ReferenceGpu) -> Waiting | None:
        """O3: the first request whose model is there, but nobody is taken past one that was skipped often enough."""
        for request in self.queue:
            if request.skips >= self.o3_limit:
                return None
            if request.model in gpu.lru:
                return request
        return None

    def idle(self) -> list[ReferenceGpu]:
        return [gpu for gpu in self.gpus if gpu.current is None]

    def wait_s(self, gpu: ReferenceGpu) -> float:
        """Remaining time of its running request and of its local queue."""
        return gpu.ends_s - self.now_s + sum(self.costs[request.model].inference_s for request in gpu.local)

    def place(self, gpu: ReferenceGpu, request: Waiting) -> None:
        costs = self.costs[request.model]
        hit = request.model in gpu.lru
        evicted: list[str] = []
        if hit:
            gpu.lru.remove(request.model)
        else:
            while sum(self.costs[model].memory_bytes for model in gpu.lru) + costs.memory_bytes > gpu.memory_bytes:
                evicted.append(gpu.lru.pop(0))
        gpu.lru.append(request.model)
        gpu.current, gpu.loading = request, not hit
        gpu.run_starts_s = self.now_s if hit else self.now_s + costs.load_s
        gpu.ends_s = gpu.run_starts_s + costs.inference_s
        gpu.begun = self.count()
        self.served.append(Served(request.number, gpu.number, hit, tuple(evicted), gpu.ends_s))
