"""A world around one Scheduler, driven by hand: it owes the scheduler what nodes owe it, and trusts it in nothing.

It keeps its own account of what is resident where and of which requests are open, from the actions alone, and fails as
soon as an action breaks a rule. After every event the scheduler's indexes are recomputed from scratch and compared.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from invariants import check

from hotset.scheduling.actions import Action, Load, Offload, Reject, Restore, Run, Unload
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.events import (
    Event,
    GpuJoined,
    GpuLost,
    LoadFailed,
    ModelAdded,
    ModelLoaded,
    ModelMeasured,
    ModelOffloaded,
    ModelRemoved,
    ModelRestored,
    ProcessLost,
    RequestArrived,
    RequestCancelled,
    RunFailed,
    RunFinished,
    TimeAdvanced,
)
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.parking import ParkedSize
from hotset.scheduling.policies import PolicySettings, make_policy
from hotset.scheduling.scheduler import Scheduler
from hotset.vocabulary import FailureKind, Gpu, Model, Profile, RejectReason, Request

GIB = 1024**3


class End(Enum):
    """How a request ended, other than by a rejection."""

    ANSWERED = "answered"
    CANCELLED = "cancelled"


@dataclass
class Device:
    """One GPU as a node sees it."""

    gpu: Gpu
    resident: dict[str, int] = field(default_factory=dict)
    parked: dict[str, ParkedSize] = field(default_factory=dict)
    restoring_bytes: dict[str, int] = field(default_factory=dict)
    """Host memory of models on their way back."""
    kept: dict[str, int] = field(default_factory=dict)
    """Of models that are resident or parked: what each is left at least, as runs were seen to need it."""
    lane: deque[Load | Restore | Offload] = field(default_factory=deque)
    """What is to be copied, in order."""
    running: Run | None = None

    @property
    def loading(self) -> Load | Restore | None:
        return next((copy for copy in self.lane if not isinstance(copy, Offload)), None)

    @property
    def in_use(self) -> list[str]:
        return [doing.model for doing in (self.loading, self.running) if doing is not None]

    @property
    def used_bytes(self) -> int:
        return sum(self.resident.values()) + sum(size.device_bytes for size in self.parked.values())

    @property
    def host_bytes(self) -> int:
        return sum(size.host_bytes for size in self.parked.values()) + sum(self.restoring_bytes.values())


def model(
    name: str,
    gib: float = 1.0,
    *,
    load_s: float | None = 4.0,
    inference_s: float | None = 1.0,
    max_batch: int = 1,
    max_batch_wait_s: float = 0.0,
    retry: bool = True,
    min_copies: int = 0,
    max_copies: int | None = None,
    sizes_bytes: tuple[int, ...] = (),
) -> Model:
    return Model(
        name=name,
        memory_bytes=int(gib * GIB),
        max_batch=max_batch,
        max_batch_wait_s=max_batch_wait_s,
        retry=retry,
        min_copies=min_copies,
        max_copies=max_copies,
        profile=Profile(load_s=load_s, inference_s=inference_s, sizes_bytes=sizes_bytes),
    )


class World:
    """Gateway, nodes and clock in one. Models are ``a``, ``b``, ...; GPUs are ``g0``, ``g1``, ..."""

    def __init__(
        self,
        policy: str = "lalb",
        *,
        eviction: str = "lru",
        gpus: Sequence[float] = (2.0,),
        models: Sequence[Model | str] = ("a", "b", "c", "d"),
        config: SchedulerConfig | None = None,
        o3_limit: int = 25,
    ) -> None:
        self.config = config or SchedulerConfig()
        self.scheduler = Scheduler(
            make_policy(policy, PolicySettings(o3_limit=o3_limit)), make_eviction(eviction), config
        )
        self.now_s = 0.0
        self.devices: dict[str, Device] = {}
        self.models: dict[str, Model] = {}
        self.open: dict[int, Request] = {}
        self.ends: dict[int, End | RejectReason] = {}
        self.rejects: dict[int, Reject] = {}
        self.log: list[Action] = []
        """Every action so far."""
        self.sizes: dict[str, ParkedSize] = {}
        """What models were measured to take while parked."""
        self._last_id = 0
        self._leaves = 0
        """The request whose client is just leaving."""
        self._joined = 0
        for gib in gpus:
            self.join(gib)
        for each in models:
            self.add(each if isinstance(each, Model) else model(each))

    # What happens

    def arrive(
        self, name: str, *, patience_s: float | None = None, caller: str = "", weight: float = 1.0, priority: int = 0
    ) -> int:
        self._last_id += 1
        deadline_s = None if patience_s is None else self.now_s + patience_s
        request = Request(
            request_id=self._last_id,
            model=name,
            arrival_s=self.now_s,
            deadline_s=deadline_s,
            caller=caller,
            weight=weight,
            priority=priority,
        )
        self.open[request.request_id] = request
        self.handle(RequestArrived(request))
        return request.request_id

    def cancel(self, request_id: int) -> None:
        if self.open.pop(request_id, None) is not None:
            self.ends[request_id] = End.CANCELLED
        self._leaves = request_id
        self.handle(RequestCancelled(request_id))
        self._leaves = 0

    def wait(self, seconds: float) -> None:
        """Time passes; ``TimeAdvanced`` comes when the scheduler asked to be woken."""
        until_s, woken_s = self.now_s + seconds, -math.inf
        while (wakeup_s := self.scheduler.next_wakeup_s()) is not None and wakeup_s <= until_s:
            assert wakeup_s >= self.now_s, "asked to be woken in the past"
            assert wakeup_s > woken_s, "asked to be woken again and again"
            self.now_s = woken_s = wakeup_s
            self.handle(TimeAdvanced())
        self.now_s = until_s

    def loaded(self, gpu_id: str, *, load_s: float = 4.0, memory_bytes: int | None = None) -> None:
        """A load or a restore is done, and whatever was to be copied before it."""
        device, copy = self._next_load(gpu_id)
        if isinstance(copy, Load):
            device.kept.pop(copy.model, None)  # what it kept when it was loaded before
        if memory_bytes is not None:
            most_bytes = device.resident[copy.model] + max(0, device.gpu.memory_bytes - device.used_bytes)
            growth_bytes = self.scheduler.profiles.footprints[copy.model].growth_bytes
            if isinstance(copy, Load):
                device.kept[copy.model] = min(memory_bytes + growth_bytes, most_bytes) if growth_bytes else 0
            device.resident[copy.model] = max(memory_bytes, min(device.kept.get(copy.model, 0), most_bytes))
        device.restoring_bytes.pop(copy.model, None)
        event = ModelLoaded if isinstance(copy, Load) else ModelRestored
        self.handle(event(gpu_id, copy.model, load_s, memory_bytes))

    def measured(self, gpu_id: str, name: str, memory_bytes: int) -> list[Action]:
        """A process has looked at what it takes; its model may have left meanwhile."""
        device = self.devices.get(gpu_id)
        if device is not None and name in device.resident and (device.loading is None or device.loading.model != name):
            before_bytes = device.resident[name]
            device.resident[name] = max(memory_bytes, device.kept.get(name, 0))
            if (size := self.sizes.get(name)) is not None:
                host_bytes = max(0, size.host_bytes + device.resident[name] - before_bytes)
                self.sizes[name] = ParkedSize(size.device_bytes, host_bytes)
        return self.handle(ModelMeasured(gpu_id, name, memory_bytes))

    def load_fails(
        self,
        gpu_id: str,
        kind: FailureKind = FailureKind.CRASH,
        reason: str = "it died",
        memory_bytes: int | None = None,
    ) -> None:
        device, copy = self._next_load(gpu_id)
        del device.resident[copy.model]
        device.restoring_bytes.pop(copy.model, None)
        self.handle(LoadFailed(gpu_id, copy.model, kind, reason, memory_bytes))

    def _next_load(self, gpu_id: str) -> tuple[Device, Load | Restore]:
        device = self.devices[gpu_id]
        while device.lane:
            copy = device.lane[0]
            if not isinstance(copy, Offload):
                device.lane.popleft()
                return device, copy
            self.offloaded(gpu_id)
        raise AssertionError(f"{gpu_id} loads nothing")

    def offloaded(self, gpu_id: str, *, size: ParkedSize | None = None, offload_s: float = 0.5) -> None:
        device = self.devices[gpu_id]
        copy = device.lane.popleft()
        assert isinstance(copy, Offload)
        size = size or device.parked.get(copy.model) or ParkedSize(0, GIB)
        self.sizes[copy.model] = size
        if copy.model in device.parked:
            device.parked[copy.model] = size
        self.handle(ModelOffloaded(gpu_id, copy.model, offload_s, size.device_bytes, size.host_bytes))

    def offload_fails(self, gpu_id: str, reason: str = "it died") -> None:
        device = self.devices[gpu_id]
        copy = device.lane.popleft()
        assert isinstance(copy, Offload)
        device.parked.pop(copy.model, None)
        self.handle(ProcessLost(gpu_id, copy.model, reason))

    def finish(self, gpu_id: str, *, inference_s: float = 1.0) -> None:
        device = self.devices[gpu_id]
        run = device.running
        assert run is not None, f"{gpu_id} runs nothing"
        device.running = None
        for request_id in run.request_ids:
            self._answered(request_id)
        self.handle(RunFinished(gpu_id, run.model, inference_s))

    def run_fails(
        self,
        gpu_id: str,
        kind: FailureKind = FailureKind.CRASH,
        reason: str = "it died",
        answered: tuple[int, ...] = (),
    ) -> None:
        device = self.devices[gpu_id]
        run = device.running
        assert run is not None, f"{gpu_id} runs nothing"
        device.running = None
        del device.resident[run.model]
        for request_id in answered:
            self._answered(request_id)
        self.handle(RunFailed(gpu_id, run.model, kind, reason, answered))

    def process_dies(self, gpu_id: str, name: str, reason: str = "it died") -> None:
        device = self.devices[gpu_id]
        assert name not in device.in_use, "a busy process dies by a failed load or run"
        if device.parked.pop(name, None) is None:
            del device.resident[name]
        self.handle(ProcessLost(gpu_id, name, reason))

    def join(self, gib: float, *, gpu_id: str | None = None, kind: str = "virtual", node: str = "local") -> str:
        if gpu_id is None:
            gpu_id = f"g{self._joined}"
            self._joined += 1
        gpu = Gpu(gpu_id=gpu_id, memory_bytes=int(gib * GIB), kind=kind, node=node)
        self.devices[gpu_id] = Device(gpu)
        self.handle(GpuJoined(gpu))
        return gpu_id

    def lose(self, gpu_id: str, reason: str = "unplugged") -> None:
        self.devices.pop(gpu_id, None)
        self.handle(GpuLost(gpu_id, reason))

    def add(self, each: Model) -> None:
        self.models[each.name] = each
        self.handle(ModelAdded(each))

    def remove(self, name: str) -> None:
        self.models.pop(name, None)
        self.handle(ModelRemoved(name))

    def serve(self, gpu_id: str, *, load_s: float = 4.0, inference_s: float = 1.0) -> None:
        """The GPU does what it was asked to, load and run, in the time that takes."""
        if self.devices[gpu_id].loading is not None:
            self.wait(load_s)
            self.loaded(gpu_id, load_s=load_s)
        self.wait(inference_s)
        self.finish(gpu_id, inference_s=inference_s)

    def drain(self) -> None:
        """Serve whatever is there until nobody waits."""
        for _ in range(10_000):
            busy = [device for device in self.devices.values() if device.in_use or device.lane]
            if not busy:
                if self.scheduler.cluster.gathering.next_s == math.inf:
                    break
                self.wait(self.scheduler.cluster.gathering.next_s - self.now_s)
                continue
            device = busy[0]
            if device.loading is not None:
                self.loaded(device.gpu.gpu_id)
            elif device.lane:
                self.offloaded(device.gpu.gpu_id)
            else:
                self.finish(device.gpu.gpu_id)

    def _nobody_may_leave(self, device: Device) -> None:
        """A GPU that was outgrown is left so only as long as nothing can be done about it, or until the next event."""
        if any(other.in_use or other.lane for other in self.devices.values()):
            return
        memory = self.scheduler.cache.memory(device.gpu.gpu_id)
        waited_for = self.scheduler.cluster.queues.models()
        may_leave = [
            resident.memory_bytes
            for name, resident in memory.residents.items()
            if name not in memory.pinned and name not in waited_for
        ]
        assert sum(may_leave) + memory.parked_bytes < device.used_bytes - device.gpu.memory_bytes

    # What came of it

    def doing(self, gpu_id: str) -> str:
        """``running a``, ``loading a``, ``restoring a``, or ``idle``; ``running a, loading b`` in two lanes."""
        device = self.devices[gpu_id]
        doing = [f"running {device.running.model}"] if device.running is not None else []
        if device.loading is not None:
            doing.append(f"{'loading' if isinstance(device.loading, Load) else 'restoring'} {device.loading.model}")
        return ", ".join(doing) or "idle"

    def running(self, gpu_id: str) -> tuple[int, ...]:
        run = self.devices[gpu_id].running
        return run.request_ids if run is not None else ()

    def local(self, gpu_id: str) -> list[int]:
        """The requests in the GPU's local queue."""
        return [entry.request.request_id for entry in self.scheduler.cluster.gpus[gpu_id].local_queue]

    def resident(self, gpu_id: str) -> list[str]:
        """The models on a GPU, least recently used first."""
        return list(self.scheduler.cache.memory(gpu_id).residents)

    def parked(self, gpu_id: str) -> list[str]:
        """The WARM models of a GPU, longest parked first."""
        return list(self.scheduler.cache.memory(gpu_id).parked)

    def actions(self, kind: type[Action]) -> list[Action]:
        return [action for action in self.log if isinstance(action, kind)]

    # The other side of the seam

    def handle(self, event: Event) -> list[Action]:
        pinned = {gpu_id: self.scheduler.cache.memory(gpu_id).pinned for gpu_id in self.scheduler.cluster.gpus}
        actions = self.scheduler.handle(event, self.now_s)
        for action in actions:
            self._carry_out(action, pinned)
        self.log += actions
        self.sizes = {name: size for name, size in self.sizes.items() if name in self.scheduler.cluster.models}
        check(self.scheduler, self.now_s)
        self._compare()
        return actions

    def _carry_out(self, action: Action, pinned: Mapping[str, Mapping[str, int]]) -> None:
        """``pinned``: before the event; a pin may be given for the room that a copy leaves in it."""
        match action:
            case Load() | Restore():
                device = self.devices[action.gpu_id]
                assert device.loading is None, f"{action} while {device} loads"
                assert self.config.overlap or device.running is None, f"{action} while {device} is busy"
                assert action.model not in device.resident, f"{action}: it is there"
                pinned = action.model in self.scheduler.cache.memory(action.gpu_id).pinned
                unasked = self.config.prefetch_recurring or (self.config.overlap and self.config.host_memory_bytes > 0)
                ahead = action.request_id is None and unasked
                assert action.request_id in self.open or pinned or ahead, f"{action} for a request that ended"
                others = (other for other in self.devices.values() if other is not device)
                if isinstance(action, Load):
                    assert action.model not in device.parked, f"{action}: it is parked there"
                    assert action.false_miss == any(action.model in other.resident for other in others)
                else:
                    device.restoring_bytes[action.model] = device.parked.pop(action.model).host_bytes
                device.lane.append(action)
                device.resident[action.model] = self.scheduler.cluster.models[action.model].memory_bytes
            case Offload():
                device = self.devices[action.gpu_id]
                assert action.model not in device.in_use, f"{action} while in use"
                assert action.model not in self.scheduler.cache.memory(action.gpu_id).pinned, f"{action}: it is pinned"
                reserved_bytes = device.resident.pop(action.model)
                device.lane.append(action)
                device.parked[action.model] = self.sizes.get(action.model) or ParkedSize(0, reserved_bytes)
            case Run():
                device = self.devices[action.gpu_id]
                assert device.running is None, f"{action} while {device} is busy"
                assert device.loading is None or self.config.overlap, f"{action} while {device} loads"
                assert device.loading is None or device.loading.model != action.model, f"{action}: not there yet"
                assert action.model in device.resident, f"{action}: it is not there"
                assert action.request_ids, f"{action} for nobody"
                assert len(set(action.request_ids)) == len(action.request_ids)
                for request_id in action.request_ids:
                    assert self.open[request_id].model == action.model
                    assert all(request_id not in self.running(gpu_id) for gpu_id in self.devices), "run twice"
                device.running = action
            case Unload():
                device = self.devices[action.gpu_id]
                assert action.model not in device.in_use, f"{action} while in use"
                if device.parked.pop(action.model, None) is None:
                    kept = self.scheduler.cache.memory(action.gpu_id).pinned.keys() & pinned[action.gpu_id]
                    outgrown = device.used_bytes > device.gpu.memory_bytes
                    assert action.model not in kept or outgrown, f"{action}: it is pinned"
                    del device.resident[action.model]
            case Reject():
                assert action.message, "a rejection says why"
                if self.open.pop(action.request_id, None) is None:  # given up before it is known that nobody waits
                    assert action.request_id == self._leaves, f"{action} of a request that ended"
                self.ends[action.request_id] = action.reason
                self.rejects[action.request_id] = action

    def _answered(self, request_id: int) -> None:
        if self.open.pop(request_id, None) is not None:
            assert request_id not in self.ends, "ended twice"
            self.ends[request_id] = End.ANSWERED

    def _compare(self) -> None:
        """The scheduler's view of the world is the world."""
        scheduler = self.scheduler
        assert set(scheduler.cluster.gpus) == set(self.devices)
        assert scheduler.open_requests == len(self.open)
        for gpu_id, device in self.devices.items():
            memory = scheduler.cache.memory(gpu_id)
            held: Mapping[str, int] = {name: resident.memory_bytes for name, resident in memory.residents.items()}
            assert held == device.resident
            assert set(memory.parked) == set(device.parked)
            for name, size in device.parked.items():
                resident = memory.parked[name]
                assert ParkedSize(resident.device_bytes, resident.host_bytes) == size
            work = scheduler.cluster.gpus[gpu_id].work
            working_on = [each for each in (memory.copying, work.model if work is not None else None) if each]
            assert working_on == device.in_use
            if device.used_bytes > device.gpu.memory_bytes:
                self._nobody_may_leave(device)
        for node in {device.gpu.node for device in self.devices.values()}:
            devices = [device for device in self.devices.values() if device.gpu.node == node]
            host_bytes = sum(device.host_bytes for device in devices)
            assert host_bytes <= self.config.host_memory_bytes
            assert {scheduler.cache.memory(device.gpu.gpu_id).host.used_bytes for device in devices} == {host_bytes}
