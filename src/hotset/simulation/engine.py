"""The simulator: virtual time around the scheduling core.

It plays the world's part: it hands arrivals and completions to the Scheduler in order of time and carries the actions
out by asking the hardware profile how long they take. It decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import heappop, heappush

import msgspec

from hotset.errors import ConfigurationError, InvariantError
from hotset.scheduling.actions import Action, Load, Reject, Run, Unload
from hotset.scheduling.events import Event, GpuJoined, GpuLost, ModelAdded, ModelLoaded, RequestArrived, RunFinished
from hotset.scheduling.scheduler import Scheduler
from hotset.simulation.hardware import Hardware, ModelCost
from hotset.simulation.metrics import Recorder, RunMetrics
from hotset.simulation.workloads import Arrival
from hotset.vocabulary import Gpu, Request


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

    def __init__(self, scheduler: Scheduler, hardware: Hardware, faults: Sequence[Fault] = ()) -> None:
        self.scheduler = scheduler
        self.costs: Mapping[str, ModelCost] = hardware.costs
        self.gpus: dict[str, Gpu] = {gpu.gpu_id: gpu for gpu in hardware.gpus}
        self.recorder = Recorder(hardware.costs, len(hardware.gpus))
        self.now_s = 0.0
        self._agenda: list[tuple[float, int, Event]] = []
        self._counter = 0
        self._open: dict[int, Arrival] = {}
        self._runs: dict[str, tuple[int, ...]] = {}
        """GPU id -> the requests of its newest run."""
        self._due: dict[str, int] = {}
        """GPU id -> number of the event that ends what it does now."""
        for model in hardware.models():
            scheduler.handle(ModelAdded(model), 0.0)
        for gpu in hardware.gpus:
            scheduler.handle(GpuJoined(gpu), 0.0)
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
        if self._open and not self.scheduler.cluster.gpus:
            raise ConfigurationError(
                f"every GPU failed and {len(self._open)} requests wait for ever; let one come back"
            )
        if self._open:
            raise InvariantError(f"{len(self._open)} requests never ended")
        return self.recorder.result()

    def _arrive(self, request_id: int, arrival: Arrival) -> None:
        self.now_s = now_s = arrival.time_s
        function = arrival.function
        self.recorder.arrived += 1
        self._open[request_id] = arrival
        request = Request(request_id=request_id, model=function, arrival_s=now_s, caller=arrival.caller)
        self._carry_out(self.scheduler.handle(RequestArrived(request), now_s))

    def _happen(self, item: tuple[float, int, Event]) -> None:
        self.now_s, number, event = item
        kind = type(event)
        if kind is RunFinished or kind is ModelLoaded:
            gpu_id: str = event.gpu_id  # type: ignore[attr-defined]
            if self._due.get(gpu_id) != number:
                return  # its GPU was lost meanwhile
            if kind is RunFinished:
                now_s, opened, recorder = self.now_s, self._open, self.recorder
                for request_id in self._runs[gpu_id]:
                    arrival = opened.pop(request_id)
                    recorder.finished(arrival.function, now_s - arrival.time_s, now_s)
        elif isinstance(event, GpuLost):
            self._lose(event.gpu_id)
        self._carry_out(self.scheduler.handle(event, self.now_s))

    def _lose(self, gpu_id: str) -> None:
        self._due.pop(gpu_id, None)
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
                self._start(action.gpu_id, now_s + inference_s, RunFinished(action.gpu_id, action.model, inference_s))
            elif type(action) is Load:
                load_s = self.costs[action.model].load_s
                recorder.misses += 1
                recorder.false_misses += action.false_miss
                recorder.load_s += load_s
                recorder.tallies[action.model].change_copies(1, now_s)
                self._start(action.gpu_id, now_s + load_s, ModelLoaded(action.gpu_id, action.model, load_s))
            elif type(action) is Unload:
                recorder.evictions += 1
                recorder.tallies[action.model].change_copies(-1, now_s)
            elif type(action) is Reject:
                recorder.rejected += 1
                del self._open[action.request_id]

    def _run_s(self, action: Run) -> float:
        """Duration of a run: the recorded one of its requests where the trace has it, else the profile's."""
        ids = action.request_ids
        recorded = self._open[ids[0]].inference_s
        cost = self.costs[action.model]
        if recorded is None:
            return cost.inference_s if len(ids) == 1 else cost.run_s(len(ids))
        rest = sum(self._open[request_id].inference_s or cost.inference_s for request_id in ids[1:])
        return recorded + rest * cost.batch_marginal

    def _start(self, gpu_id: str, end_s: float, event: Event) -> None:
        self._schedule(end_s, event)
        self._due[gpu_id] = self._counter

    def _schedule(self, time_s: float, event: Event) -> None:
        self._counter += 1
        heappush(self._agenda, (time_s, self._counter, event))
