"""A world around one Scheduler, driven by hand: it owes the scheduler what nodes owe it, and trusts it in nothing.

It keeps its own account of what is resident where and of which requests are open, from the actions alone, and fails as
soon as an action breaks a rule. After every event the scheduler's indexes are recomputed from scratch and compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from invariants import check

from hotset.scheduling.actions import Action, Load, Reject, Run, Unload
from hotset.scheduling.events import (
    Event,
    GpuJoined,
    GpuLost,
    LoadFailed,
    ModelAdded,
    ModelLoaded,
    ModelRemoved,
    ProcessLost,
    RequestArrived,
    RequestCancelled,
    RunFailed,
    RunFinished,
    TimeAdvanced,
)
from hotset.scheduling.eviction import make_eviction
from hotset.scheduling.policies import PolicySettings, make_policy
from hotset.scheduling.scheduler import Scheduler, SchedulerConfig
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
    loading: Load | None = None
    running: Run | None = None

    @property
    def busy_model(self) -> str | None:
        doing = self.loading or self.running
        return doing.model if doing is not None else None


def model(
    name: str,
    gib: float = 1.0,
    *,
    load_s: float | None = 4.0,
    inference_s: float | None = 1.0,
    max_batch: int = 1,
    retry: bool = True,
) -> Model:
    return Model(
        name=name,
        memory_bytes=int(gib * GIB),
        max_batch=max_batch,
        retry=retry,
        profile=Profile(load_s=load_s, inference_s=inference_s),
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
        self._last_id = 0
        self._joined = 0
        for gib in gpus:
            self.join(gib)
        for each in models:
            self.add(each if isinstance(each, Model) else model(each))

    # What happens

    def arrive(self, name: str, *, patience_s: float | None = None) -> int:
        self._last_id += 1
        deadline_s = None if patience_s is None else self.now_s + patience_s
        request = Request(request_id=self._last_id, model=name, arrival_s=self.now_s, deadline_s=deadline_s)
        self.open[request.request_id] = request
        self.handle(RequestArrived(request))
        return request.request_id

    def cancel(self, request_id: int) -> None:
        if self.open.pop(request_id, None) is not None:
            self.ends[request_id] = End.CANCELLED
        self.handle(RequestCancelled(request_id))

    def wait(self, seconds: float) -> None:
        """Time passes; ``TimeAdvanced`` comes when the scheduler asked to be woken."""
        until_s = self.now_s + seconds
        while (wakeup_s := self.scheduler.next_wakeup_s()) is not None and wakeup_s <= until_s:
            assert wakeup_s >= self.now_s, "asked to be woken in the past"
            self.now_s = wakeup_s
            self.handle(TimeAdvanced())
        self.now_s = until_s

    def loaded(self, gpu_id: str, *, load_s: float = 4.0, memory_bytes: int | None = None) -> None:
        device = self.devices[gpu_id]
        load = device.loading
        assert load is not None, f"{gpu_id} loads nothing"
        device.loading = None
        if memory_bytes is not None:
            device.resident[load.model] = memory_bytes
        self.handle(ModelLoaded(gpu_id, load.model, load_s, memory_bytes))

    def load_fails(
        self,
        gpu_id: str,
        kind: FailureKind = FailureKind.CRASH,
        reason: str = "it died",
        memory_bytes: int | None = None,
    ) -> None:
        device = self.devices[gpu_id]
        load = device.loading
        assert load is not None, f"{gpu_id} loads nothing"
        device.loading = None
        del device.resident[load.model]
        self.handle(LoadFailed(gpu_id, load.model, kind, reason, memory_bytes))

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
        assert device.busy_model != name, "a busy process dies by a failed load or run"
        del device.resident[name]
        self.handle(ProcessLost(gpu_id, name, reason))

    def join(self, gib: float, *, gpu_id: str | None = None, kind: str = "virtual") -> str:
        if gpu_id is None:
            gpu_id = f"g{self._joined}"
            self._joined += 1
        gpu = Gpu(gpu_id=gpu_id, memory_bytes=int(gib * GIB), kind=kind)
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
            busy = [device for device in self.devices.values() if device.busy_model is not None]
            if not busy:
                break
            device = busy[0]
            if device.loading is not None:
                self.loaded(device.gpu.gpu_id)
            else:
                self.finish(device.gpu.gpu_id)

    # What came of it

    def doing(self, gpu_id: str) -> str:
        """``loading a``, ``running a``, or ``idle``."""
        device = self.devices[gpu_id]
        if device.loading is not None:
            return f"loading {device.loading.model}"
        return f"running {device.running.model}" if device.running is not None else "idle"

    def running(self, gpu_id: str) -> tuple[int, ...]:
        run = self.devices[gpu_id].running
        return run.request_ids if run is not None else ()

    def local(self, gpu_id: str) -> list[int]:
        """The requests in the GPU's local queue."""
        return [entry.request.request_id for entry in self.scheduler.cluster.gpus[gpu_id].local_queue]

    def resident(self, gpu_id: str) -> list[str]:
        """The models on a GPU, least recently used first."""
        return list(self.scheduler.cache.memory(gpu_id).residents)

    def actions(self, kind: type[Action]) -> list[Action]:
        return [action for action in self.log if isinstance(action, kind)]

    # The other side of the seam

    def handle(self, event: Event) -> list[Action]:
        actions = self.scheduler.handle(event, self.now_s)
        for action in actions:
            self._carry_out(action)
        self.log += actions
        check(self.scheduler, self.now_s)
        self._compare()
        return actions

    def _carry_out(self, action: Action) -> None:
        match action:
            case Load():
                device = self.devices[action.gpu_id]
                assert device.busy_model is None, f"{action} while {device} is busy"
                assert action.model not in device.resident, f"{action}: it is there"
                assert action.request_id in self.open, f"{action} for a request that ended"
                others = (other for other in self.devices.values() if other is not device)
                assert action.false_miss == any(action.model in other.resident for other in others)
                device.loading = action
                device.resident[action.model] = self.scheduler.cluster.models[action.model].memory_bytes
            case Run():
                device = self.devices[action.gpu_id]
                assert device.busy_model is None, f"{action} while {device} is busy"
                assert action.model in device.resident, f"{action}: it is not there"
                assert action.request_ids, f"{action} for nobody"
                assert len(set(action.request_ids)) == len(action.request_ids)
                for request_id in action.request_ids:
                    assert self.open[request_id].model == action.model
                    assert all(request_id not in self.running(gpu_id) for gpu_id in self.devices), "run twice"
                device.running = action
            case Unload():
                device = self.devices[action.gpu_id]
                assert device.busy_model != action.model, f"{action} while in use"
                del device.resident[action.model]
            case Reject():
                assert action.message, "a rejection says why"
                del self.open[action.request_id]
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
            work = scheduler.cluster.gpus[gpu_id].work
            assert (work.model if work is not None else None) == device.busy_model
            assert sum(device.resident.values()) <= device.gpu.memory_bytes
