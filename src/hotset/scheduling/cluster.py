"""ClusterState: what is where, who is busy, until when. Policies read it; only the Scheduler changes it.

Idle GPUs, the idle holders of each model and the earliest finishing busy holder of each model are kept as indexes, so a
decision looks at a few GPUs, not at all of them.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

import msgspec

from hotset.scheduling.cache import CacheManager, GpuMemory, Resident
from hotset.scheduling.gathering import Gathering
from hotset.scheduling.holders import HolderIndex
from hotset.scheduling.prices import GpuPrices, Prices
from hotset.scheduling.profiles import Profiles
from hotset.scheduling.queue import Entry, GlobalQueue
from hotset.scheduling.rates import ArrivalRates
from hotset.scheduling.standing import Queues
from hotset.scheduling.thrash import ThrashGuard
from hotset.vocabulary import Gpu, Model

if TYPE_CHECKING:
    from hotset.scheduling.journal import Started


class Work(msgspec.Struct, gc=False, eq=False):
    """What a busy GPU is doing: one load and run, or one run."""

    model: str
    entries: list[Entry]
    hit: bool
    started_s: float
    loading: bool = False
    load_s: float = 0.0
    """Measured time of the load that came first; 0 for a hit."""
    note: Started | None = None
    """What the journal keeps of the run."""


class GpuState:
    """One GPU as the scheduler sees it. One run at a time (paper)."""

    __slots__ = (
        "busy_until_s",
        "gpu",
        "gpu_id",
        "idle_rank",
        "index",
        "kind",
        "local_backlog_s",
        "local_queue",
        "memory",
        "prices",
        "stamp",
        "work",
    )

    def __init__(self, gpu: Gpu, index: int, memory: GpuMemory) -> None:
        self.gpu = gpu
        self.gpu_id = gpu.gpu_id
        self.kind = gpu.kind
        self.index = index
        """Order of joining; ties break by it."""
        self.memory = memory
        self.work: Work | None = None
        self.busy_until_s = 0.0
        """Estimated end of ``work``."""
        self.local_queue: deque[Entry] = deque()
        self.local_backlog_s = 0.0
        """Estimated inference time of the local queue."""
        self.stamp = 0
        """Version of what the holder index knows of it; older records are stale."""
        self.idle_rank = 0
        """Order of becoming idle: the lowest of two idle GPUs has been idle longer."""
        self.prices: GpuPrices | None = None
        """Of what it holds; ``prices.py`` keeps them here."""

    @property
    def finish_s(self) -> float:
        """Estimated time at which the running work and the local queue are done; may lie in the past if overdue."""
        return self.busy_until_s + self.local_backlog_s


class Cluster:
    """Everything a policy may look at."""

    def __init__(self, cache: CacheManager, profiles: Profiles, *, overlap: bool = False) -> None:
        self.cache = cache
        self.profiles = profiles
        self.overlap = overlap
        """Loads and restores have a lane of their own on each GPU: it may compute meanwhile."""
        self.queue = GlobalQueue()
        """The queue in turn; policies know no other."""
        self.rates = ArrivalRates()
        self.models: dict[str, Model] = {}
        self.removed: set[str] = set()
        """Models that are to be forgotten once no GPU uses them."""
        self.gpus: dict[str, GpuState] = {}
        self.kinds: set[str] = set()
        """Of these GPUs."""
        self.largest_bytes = 0
        """The most memory that a GPU has beside what is pinned there; 0: there is none."""
        self._capacity_bytes = 0
        """Of the largest GPU."""
        self.overload_until_s = 0.0
        """So long, as a waiting request was given up lately, more is taken to be asked for than can be answered in
        time: for as long as that request had."""
        self.idle: OrderedDict[GpuState, None] = OrderedDict()
        """GPUs with nothing to do, the one idle longest first."""
        self.prices = Prices(self)
        self.queues = Queues(self)
        self.thrash = ThrashGuard(self)
        self.gathering = Gathering(self)
        self._holders = HolderIndex(cache, self.gpus)
        self._joined = 0
        self._idle_ranks = 0

    def is_deployed(self, model: str) -> bool:
        """Whether requests for the model are taken."""
        return model in self.models and model not in self.removed

    def too_large(self, model: str) -> bool:
        """No GPU can hold the model beside its pins; False while there is no GPU at all, as the next one may."""
        if self.models[model].memory_bytes <= self.largest_bytes or not self.gpus:
            return False
        return not any(self.fits(gpu, model) for gpu in self.gpus.values())

    def fits(self, gpu: GpuState, model: str) -> bool:
        """Whether the GPU could hold the model, were nothing there but its pins, and the model may have a copy more."""
        memory = gpu.memory
        if not memory.can_hold(model, self.models[model].memory_bytes):
            return False
        return model in memory.residents or model in memory.pinned or not self.is_spread(model)

    def is_spread(self, model: str) -> bool:
        """Whether as many GPUs hold the model as may, but for those that are to keep it: ``Model.max_copies``.

        Linear in its copies, where they are bounded.
        """
        known = self.models[model]
        return known.max_copies is not None and len(self._unpinned_holders(model)) >= self._most_unpinned(known)

    def surplus(self, model: str) -> list[GpuState]:
        """GPUs that hold a copy which nobody uses now and nobody may: of a model that was removed, or one too many.

        Of those, the copies used longest ago.
        """
        removed, known = model in self.removed, self.models[model]
        if not removed and known.max_copies is None:
            return []
        unpinned = self._unpinned_holders(model)
        many = len(unpinned) - (0 if removed else self._most_unpinned(known))
        spare = [gpu for gpu in unpinned if many > 0 and not gpu.memory.residents[model].in_use]
        return sorted(spare, key=lambda gpu: gpu.memory.residents[model].last_used_s)[:many]

    def _unpinned_holders(self, model: str) -> list[GpuState]:
        holders = map(self.gpus.__getitem__, self.cache.holders(model))
        return [gpu for gpu in holders if model not in gpu.memory.pinned]

    def _most_unpinned(self, model: Model) -> int:
        """What the pins leave of ``max_copies``, loaded yet or not."""
        assert model.max_copies is not None
        return max(0, model.max_copies - model.min_copies)

    # What policies ask

    def first_idle(self, model: str | None = None) -> GpuState | None:
        """The GPU idle longest; with a model: the first on which it fits (a scan only where GPUs differ in size)."""
        if model is None:
            return next(iter(self.idle), None)
        if self.overlap or self.cache.parked_on(model):
            return self._first_idle_of_tiers(model)
        if self.models[model].max_copies is not None:
            return next((gpu for gpu in self.idle if self.fits(gpu, model)), None)
        need_bytes = self.models[model].memory_bytes
        for gpu in self.idle:
            if gpu.memory.can_hold(model, need_bytes):
                return gpu
        return None

    def _first_idle_of_tiers(self, model: str) -> GpuState | None:
        """The GPU idle longest, unless one of the others has the model WARM. Where its copy lane is taken, a GPU can
        only run what it holds."""
        first: GpuState | None = None
        for gpu in self.idle:
            if self.can_start(gpu, model):
                first = gpu
                break
        if first is None or model in first.memory.residents:
            return first
        parked = [self.gpus[gpu_id] for gpu_id in self.cache.parked_on(model)]
        idle = [gpu for gpu in parked if gpu.work is None and self.can_start(gpu, model)]
        return min(idle, key=lambda gpu: gpu.idle_rank, default=first)

    def can_start(self, gpu: GpuState, model: str) -> bool:
        """Whether the GPU, idle, could start on the model: it is there, or could be brought there, now."""
        memory = gpu.memory
        if model in memory.residents:
            return memory.copying != model
        return memory.copying is None and self.fits(gpu, model)

    def idle_holder(self, model: str) -> GpuState | None:
        """The idle GPU that holds the model; of several, the one idle longest."""
        return self._holders.idle_longest(model)

    def earliest_holder(self, model: str) -> GpuState | None:
        """The busy holder of the model with the least estimated finish time."""
        return self._holders.earliest(model)

    def idle_residents(self) -> Iterator[str]:
        """The models on idle GPUs; those on several of them more than once."""
        return chain.from_iterable(gpu.memory.residents for gpu in self.idle)

    def first_waiting_hit(self, gpu: GpuState) -> Entry | None:
        """The oldest waiting request whose model is resident on this GPU.

        Linear in the models resident there, or in the models waited for if those are fewer: the heads of their lines
        are compared, not the requests. A model on its way there alone, by the copy lane, does not count yet.
        """
        best: Entry | None = None
        residents, lines = gpu.memory.residents, self.queue.models
        copying = gpu.memory.copying
        if copying is not None and copying in lines:
            ready = [lines[model][0] for model in residents if model in lines and model != copying]
            return min(ready, key=lambda entry: entry.seq, default=None)
        if len(lines) < len(residents):
            for model, line in lines.items():
                if model in residents and (best is None or line[0].seq < best.seq):
                    best = line[0]
        else:
            for model in residents:
                waiting = lines.get(model)
                if waiting is not None and (best is None or waiting[0].seq < best.seq):
                    best = waiting[0]
        return best

    def load_s(self, model: str, gpu: GpuState) -> float:
        """Expected seconds until the model is HOT on that GPU: of a restore where it is WARM there, else of a load."""
        memory = gpu.memory
        if memory.parked and model in memory.parked:
            return self.profiles.restore_s(model, gpu.kind)
        if not self.cache.host_memory_bytes:
            return self.profiles.load_s(model, gpu.kind)
        return self.profiles.load_s(model, gpu.kind, near=self.cache.is_near(model, memory))

    def inference_s(self, model: str, gpu: GpuState, batch: int = 1) -> float:
        """Expected seconds of one run of that many requests there."""
        return self.profiles.inference_s(model, gpu.kind, batch)

    def each_s(self, model: str, gpu: GpuState, count: int) -> float:
        """Expected seconds of a GPU for each of so many requests, which run together as far as the model batches."""
        batch = min(count, self.models[model].max_batch)
        return self.profiles.inference_s(model, gpu.kind, batch) / batch

    def gpu_for_retry(self, entry: Entry) -> GpuState | None:
        """An idle GPU for a request whose process died: not the one it died on unless there is no other. Linear."""
        # One that holds its model may be too small for another load of it, and can run it all the same.
        model = entry.model
        fitting = [gpu for gpu in self.gpus.values() if model in gpu.memory.residents or self.fits(gpu, model)]
        others = [gpu for gpu in fitting if gpu.gpu_id != entry.avoid_gpu]
        idle = [gpu for gpu in others or fitting if gpu in self.idle and self.can_start(gpu, model)]
        return next((gpu for gpu in idle if model in gpu.memory.residents), idle[0] if idle else None)

    # What the Scheduler changes

    def add_model(self, model: Model) -> None:
        """A model is new, or declared anew; what was measured of its memory counts for more than what is declared."""
        self.models[model.name] = model
        self.profiles.add(model)
        self.size(model.name)

    def forget_model(self, name: str) -> None:
        """The last traces of a model that no GPU has any more."""
        self.models.pop(name, None)
        self.profiles.remove(name)
        self.cache.forget(name)
        self.rates.forget(name)
        self.prices.forget(name)

    def size(self, name: str) -> bool:
        """Bring what is kept free for a model up to date with its footprint; returns whether that is news. The margin,
        and what runs may add, end where the largest GPU does: a model that is alone there crowds nobody, and what was
        seen to fit is not refused."""
        model, known = self.models[name], self.profiles.footprints[name]
        need_bytes = max(known.least_bytes, min(known.need_bytes, self._capacity_bytes)) or model.memory_bytes
        if need_bytes != model.memory_bytes:
            self.models[name] = msgspec.structs.replace(model, memory_bytes=need_bytes)
        return need_bytes != model.memory_bytes

    def _measure_capacity(self) -> None:
        """GPUs came or went. Linear in models only where the largest one did."""
        capacity_bytes = max((gpu.memory.capacity_bytes for gpu in self.gpus.values()), default=0)
        if capacity_bytes != self._capacity_bytes:
            self._capacity_bytes = capacity_bytes
            for name in self.models:
                self.size(name)

    def join(self, gpu: Gpu) -> GpuState:
        self._joined += 1
        state = GpuState(gpu, self._joined, self.cache.add_gpu(gpu.gpu_id, gpu.memory_bytes, gpu.node))
        self.gpus[gpu.gpu_id] = state
        self.kinds.add(gpu.kind)
        self.largest_bytes = max(self.largest_bytes, gpu.memory_bytes)
        self._holders.joined(state)
        self.set_idle(state)
        self._measure_capacity()
        return state

    def leave(self, gpu_id: str) -> GpuState:
        gpu = self.gpus.pop(gpu_id)
        self.kinds = {other.kind for other in self.gpus.values()}
        self.idle.pop(gpu, None)
        self._holders.left(gpu)
        self.cache.drop_gpu(gpu_id)
        self._measure_capacity()
        self.measure_room()
        return gpu

    def measure_room(self) -> None:
        """GPUs went, or what is pinned on them changed."""
        self.largest_bytes = max((gpu.memory.unpinned_bytes for gpu in self.gpus.values()), default=0)

    def set_idle(self, gpu: GpuState) -> None:
        gpu.work = None
        self._idle_ranks += 1
        gpu.idle_rank = self._idle_ranks
        self.idle[gpu] = None
        self._holders.became_idle(gpu)

    def set_busy(self, gpu: GpuState, work: Work, busy_until_s: float) -> None:
        """The GPU starts something (or goes on from a load to its run), expected to end then."""
        gpu.work = work
        gpu.busy_until_s = busy_until_s
        self.idle.pop(gpu, None)
        self._holders.became_busy(gpu)

    def add_local(self, gpu: GpuState, entry: Entry) -> None:
        """Put a request at the end of a busy GPU's local queue."""
        entry.gpu_id = gpu.gpu_id
        entry.local_cost_s = self.inference_s(entry.model, gpu)
        gpu.local_queue.append(entry)
        gpu.local_backlog_s += entry.local_cost_s
        self._backlog_changed(gpu)

    def remove_local(self, gpu: GpuState, entry: Entry) -> None:
        """Take a request out of a GPU's local queue, from wherever it stands."""
        gpu.local_queue.remove(entry)
        gpu.local_backlog_s = gpu.local_backlog_s - entry.local_cost_s if gpu.local_queue else 0.0
        self._backlog_changed(gpu)

    def _backlog_changed(self, gpu: GpuState) -> None:
        if gpu.work is not None:
            self._holders.became_busy(gpu)
        elif gpu.memory.copying is not None:
            self._holders.forget(gpu.memory.copying)

    def copy_started(self, gpu: GpuState, model: str, until_s: float) -> None:
        """The copy lane brings a model there, expected to be done then; the GPU goes on computing, or waits for hits.

        An idle GPU goes to the end of the idle ones: the others have no load to wait for.
        """
        gpu.memory.copying = model
        self._holders.forget(model)
        if gpu.work is None:
            del self.idle[gpu]
            gpu.busy_until_s = until_s
            self._holders.became_busy(gpu)
            self.set_idle(gpu)

    def copy_ended(self, gpu: GpuState, model: str) -> None:
        """The copy lane is free: its model is HOT, or did not make it."""
        gpu.memory.copying = None
        self._holders.forget(model)

    def drop_resident(self, gpu: GpuState, model: str) -> Resident:
        """The model left this GPU's memory."""
        self._holders.dropped(gpu, model)
        resident = self.cache.drop(gpu.memory, model)
        if self.cache.host_memory_bytes:
            self.prices.moved(model)
        return resident
