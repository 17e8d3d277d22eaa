"""The simulator: virtual time around the scheduling core.

It plays the world's part: it hands arrivals and completions to the Scheduler in order of time and carries the actions
out by asking the hardware profile how long they take. It decides nothing. Each GPU has two lanes, one that computes and
one that copies (loads, restores, offloads), each of which does one thing at a time, in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import heappop, heappush

import msgspec

from hotset.errors import ConfigurationError, InvariantError
from hotset.scheduling.actions import Action, Load, Offload, Reject, Restore, Run, Unload
from hotset.scheduling.events import (
    Event,
    GpuJoined,
    GpuLost,
    ModelAdded,
    ModelLoaded,
    ModelOffloaded,
    ModelRestored,
    RequestArrived,
    RunFinished,
    TimeAdvanced,
)
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.hardware import Hardware, ModelCost
from hotset.simulation.metrics import Recorder, RunMetrics
from hotset.simulation.workloads import Arrival
from hotset.vocabulary import Gpu, RejectReason, Request


class Fault(msgspec.Struct, frozen=True):
    """A GPU leaves at ``time_s`` and, if ``back_s`` is given, joins again, empty, at that time."""

    time_s: float
    gpu_id: str
    back_s: float | None = None


def _checked(faults: Sequence[Fault], gpus: Mapping[str, Gpu]) -> Sequence[Fault]:
    """Faults in order of time; ``ConfigurationError`` if one names no GPU, or one that has not come back yet."""
    back_s = dict.fromkeys(gpus, 0.0)
    in_order = sorted(faults, key=lambda fault: fault.time_s)
    for fault in in_order:
        if fault.time_s < back_s.get(fault.gpu_id, math.inf):
            raise ConfigurationError(f"{fault.gpu_id} cannot fail at {fault.time_s:g} s: it is not there then")
        back_s[fault.gpu_id] = math.inf if fault.back_s is None else fault.back_s
    return in_order


class Engine:
    """One run: one scheduler, one cluster, one stream of arrivals."""

    def __init__(
        self,
        scheduler: Scheduler,
        hardware: Hardware,
        faults: Sequence[Fault] = (),
        *,
        deadline_s: float | None = None,
        load_pace: Callable[[float], float] = lambda _: 1.0,
    ) -> None:
        """``deadline_s``: after its arrival, within which every request is to be answered; None: whenever.
        ``load_pace``: how many times as long as usual a load takes that begins at a time (seconds)."""
        self.scheduler = scheduler
        self.costs: Mapping[str, ModelCost] = hardware.costs
        self.gpus: dict[str, Gpu] = {gpu.gpu_id: gpu for gpu in hardware.gpus}
        tiers = scheduler.config.overlap or scheduler.config.host_memory_bytes > 0
        self.recorder = Recorder(hardware.costs, len(hardware.gpus), tiers=tiers)
        self.recorder.deadline_s = math.inf if deadline_s is None else deadline_s
        self._deadline_s = deadline_s
        self._load_pace = load_pace
        self.now_s = 0.0
        self._agenda: list[tuple[float, int, Event]] = []
        self._counter = 0
        self._open: dict[int, Arrival] = {}
        self._runs: dict[str, tuple[int, ...]] = {}
        """GPU id -> the requests of its newest run."""
        self._copying_until_s: dict[str, float] = {}
        """GPU id -> when its copy lane is free."""
        self._parked: set[tuple[str, str]] = set()
        """GPU id and model: what is in host memory."""
        self._places: dict[str, set[str]] = {}
        """Model -> GPU ids where it is in GPU or host memory, all of it."""
        self._run_ends_s: dict[str, float] = {}
        """GPU id -> when its newest run ends."""
        self._timed = scheduler.config.prefetch_recurring or any(
            cost.max_batch_wait_s for cost in hardware.costs.values()
        )
        """Time itself is an event: batches are held back, or models expected."""
        self._wakeup_s = math.inf
        """When it is one next."""
        self._void_until: dict[str, int] = {}
        """GPU id -> completions up to that number never come: it was lost."""
        for model in hardware.models():
            scheduler.handle(ModelAdded(model), 0.0)
        for gpu in hardware.gpus:
            self._carry_out(scheduler.handle(GpuJoined(gpu), 0.0))
        for fault in _checked(faults, self.gpus):
            self._schedule(fault.time_s, GpuLost(fault.gpu_id, "fault"))
            if fault.back_s is not None:
                self._schedule(fault.back_s, GpuJoined(self.gpus[fault.gpu_id]))

    def run(self, arrivals: Iterable[Arrival], progress: Callable[[float], None] | None = None) -> RunMetrics:
        """Play all arrivals and everything that follows; ``progress`` hears the virtual time now and then."""
        upcoming = iter(arrivals)
        arrival = next(upcoming, None)
        agenda, request_id = self._agenda, 0
        while arrival is not None or agenda:
            # What ends at the very moment of an arrival has ended before it.
            if arrival is None or (agenda and agenda[0][0] <= arrival.time_s):
                self._happen(heappop(agenda))
                continue
            if arrival.time_s < self.now_s:
                raise InvariantError(f"the workload goes back in time at {arrival.time_s} s")
            request_id += 1
            self._arrive(request_id, arrival)
            if not request_id & 0xFFF:
                self.recorder.latency.fold()
                if progress is not None:
                    progress(self.now_s)
            arrival = next(upcoming, None)
        while not self.scheduler.cluster.gpus and (deadline_s := self.scheduler.next_wakeup_s()) is not None:
            # No event comes any more: what waits can only expire.
            self.now_s = deadline_s
            self._carry_out(self.scheduler.handle(TimeAdvanced(), deadline_s))
        if self._open and not self.scheduler.cluster.gpus:
            raise ConfigurationError(
                f"every GPU failed and {len(self._open)} requests wait for ever; let one come back"
            )
        if self._open:
            raise InvariantError(f"{len(self._open)} requests never ended")
        self.recorder.prefetches = self.scheduler.prefetches
        self.recorder.useless_prefetches = self.scheduler.cache.useless_prefetches
        usage = self.scheduler.cluster.queues.usage.values()
        return self.recorder.result([each.run_s + each.load_s for each in usage])

    def _arrive(self, request_id: int, arrival: Arrival) -> None:
        self.now_s = now_s = arrival.time_s
        function = arrival.function
        self.recorder.arrived += 1
        self._open[request_id] = arrival
        deadline_s = None if self._deadline_s is None else now_s + self._deadline_s
        request = Request(
            request_id=request_id,
            model=function,
            arrival_s=now_s,
            deadline_s=deadline_s,
            caller=arrival.caller,
            weight=arrival.weight,
            priority=arrival.priority,
        )
        self._carry_out(self.scheduler.handle(RequestArrived(request), now_s))

    def _happen(self, item: tuple[float, int, Event]) -> None:
        self.now_s, number, event = item
        kind = type(event)
        if kind is GpuLost:
            self._lose(event.gpu_id)  # type: ignore[attr-defined]
        elif kind is TimeAdvanced:
            self._wakeup_s = math.inf
        elif kind is not GpuJoined:
            gpu_id: str = event.gpu_id  # type: ignore[attr-defined]
            if self._void_until and number <= self._void_until.get(gpu_id, 0):
                return
            if kind is ModelLoaded:
                self._places.setdefault(event.model, set()).add(gpu_id)  # type: ignore[attr-defined]
            elif kind is RunFinished:
                now_s, opened, recorder = self.now_s, self._open, self.recorder
                for request_id in self._runs[gpu_id]:
                    arrival = opened.pop(request_id)
                    recorder.finished(arrival.function, now_s - arrival.time_s, now_s)
                    if arrival.caller:
                        recorder.finished_for(arrival.caller, now_s - arrival.time_s)
        self._carry_out(self.scheduler.handle(event, self.now_s))

    def _lose(self, gpu_id: str) -> None:
        """What it was doing is cut short: time that it will not spend was counted when it began."""
        self._void_until[gpu_id] = self._counter
        unrun_s = max(self._run_ends_s.pop(gpu_id, 0.0) - self.now_s, 0.0)
        self.recorder.run_s -= unrun_s
        self.recorder.inference_s -= unrun_s * len(self._runs.get(gpu_id, ()))
        self.recorder.load_s -= max(self._copying_until_s.pop(gpu_id, 0.0) - self.now_s, 0.0)
        self._parked = {place for place in self._parked if place[0] != gpu_id}
        for gpu_ids in self._places.values():
            gpu_ids.discard(gpu_id)
        for model in self.scheduler.cache.memory(gpu_id).residents:
            self.recorder.tallies[model].change_copies(-1, self.now_s)

    def _carry_out(self, actions: list[Action]) -> None:
        now_s, recorder = self.now_s, self.recorder
        for action in actions:
            if type(action) is Run:
                inference_s = self._run_s(action)
                recorder.run_s += inference_s
                recorder.inference_s += inference_s * len(action.request_ids)
                self._runs[action.gpu_id] = action.request_ids
                self._run_ends_s[action.gpu_id] = end_s = now_s + inference_s
                self._schedule(end_s, RunFinished(action.gpu_id, action.model, inference_s))
            elif type(action) is Load:
                load_s = self._load_s(action) * self._load_pace(now_s)
                recorder.misses += action.request_id is not None  # else a copy that is kept without being asked for
                recorder.false_misses += action.false_miss
                recorder.tallies[action.model].change_copies(1, now_s)
                self._copy(action.gpu_id, load_s, ModelLoaded(action.gpu_id, action.model, load_s))
            elif type(action) is Unload:
                recorder.evictions += 1
                self._places.get(action.model, set()).discard(action.gpu_id)
                if (action.gpu_id, action.model) in self._parked:
                    self._parked.remove((action.gpu_id, action.model))
                else:
                    recorder.tallies[action.model].change_copies(-1, now_s)
            elif type(action) is Reject:
                recorder.rejected += 1
                recorder.expired += action.reason in (RejectReason.DEADLINE, RejectReason.HOPELESS)
                del self._open[action.request_id]
            elif type(action) is Restore:
                self._restore(action)
            elif type(action) is Offload:
                self._offload(action)
        if self._timed:
            wakeup_s = self.scheduler.next_wakeup_s()
            if wakeup_s is not None and wakeup_s < self._wakeup_s:
                self._wakeup_s = wakeup_s
                self._schedule(wakeup_s, TimeAdvanced())

    def _load_s(self, action: Load) -> float:
        """From the node's host memory, if another of its GPUs has the model, or it is parked for one."""
        cost, gpus = self.costs[action.model], self.gpus
        if cost.reload_s is not None:
            node = gpus[action.gpu_id].node
            if any(gpus[gpu_id].node == node for gpu_id in self._places.get(action.model, ())):
                return cost.reload_s
        return cost.load_s

    def _restore(self, action: Restore) -> None:
        gpu_id, model, cost = action.gpu_id, action.model, self.costs[action.model]
        restore_s = cost.load_s if cost.restore_s is None else cost.restore_s
        self.recorder.misses += 1
        self.recorder.restores += 1
        self.recorder.tallies[model].change_copies(1, self.now_s)
        self._parked.remove((gpu_id, model))
        self._copy(gpu_id, restore_s, ModelRestored(gpu_id, model, restore_s))

    def _offload(self, action: Offload) -> None:
        gpu_id, model, cost = action.gpu_id, action.model, self.costs[action.model]
        self.recorder.offloads += 1
        self.recorder.tallies[model].change_copies(-1, self.now_s)
        self._parked.add((gpu_id, model))
        event = ModelOffloaded(gpu_id, model, cost.offload_s, cost.residue_bytes, cost.memory_bytes)
        self._copy(gpu_id, cost.offload_s, event)

    def _copy(self, gpu_id: str, seconds: float, event: Event) -> None:
        """The next thing that the copy lane does."""
        self.recorder.load_s += seconds
        end_s = max(self.now_s, self._copying_until_s.get(gpu_id, 0.0)) + seconds
        self._copying_until_s[gpu_id] = end_s
        self._schedule(end_s, event)

    def _run_s(self, action: Run) -> float:
        """Duration of a run: the recorded one of its requests where the trace has it, else the profile's."""
        ids = action.request_ids
        recorded = self._open[ids[0]].inference_s
        cost = self.costs[action.model]
        if recorded is None:
            return cost.inference_s if len(ids) == 1 else cost.run_s(len(ids))
        rest = sum(self._open[request_id].inference_s or cost.inference_s for request_id in ids[1:])
        return recorded + rest * cost.batch_marginal

    def _schedule(self, time_s: float, event: Event) -> None:
        self._counter += 1
        heappush(self._agenda, (time_s, self._counter, event))
