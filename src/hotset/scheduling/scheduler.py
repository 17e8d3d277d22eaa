"""The Scheduler: events in, actions out. The one object that the simulator and the live system both run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

import msgspec

from hotset.errors import InvariantError
from hotset.scheduling.actions import Action, Load, Reject, Run, Unload
from hotset.scheduling.admission import Admission, Refusal
from hotset.scheduling.cache import CacheManager, EvictionPolicy
from hotset.scheduling.cluster import Cluster, GpuState, Work
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
from hotset.scheduling.journal import Decision, Journal, alternatives, estimate
from hotset.scheduling.policies.interface import Policy, Rule
from hotset.scheduling.profiles import Profiles
from hotset.scheduling.quarantine import Quarantine, QuarantineSettings
from hotset.scheduling.queue import Entry, Place
from hotset.vocabulary import FailureKind, RejectReason


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds and switches. The defaults are the paper's system: unbounded queue, one request a run, no journal."""

    max_queue: int | None = None
    """Most requests that may wait; one more is rejected with QUEUE_FULL."""
    max_queue_per_model: int | None = None
    burst_s: float = 0.0
    """Waiting requests of one model join a run while the run stays shorter than this, even if the model does not batch:
    they run one after the other, and a decision is paid once for all of them. 0: never."""
    max_burst: int = 64
    max_attempts: int = 2
    """Times a request may be tried when processes or GPUs are lost."""
    journal_capacity: int = 0
    quarantine: QuarantineSettings = QuarantineSettings()


class Scheduler:
    """The global Scheduler of the paper, with its Cache Manager.

    It owns all scheduling state; nothing else changes it. ``handle`` takes an event and the time it happened (seconds,
    never going back) and answers what to do now.
    """

    def __init__(self, policy: Policy, eviction: EvictionPolicy, config: SchedulerConfig | None = None) -> None:
        self.policy = policy
        self.config = config or SchedulerConfig()
        self.profiles = Profiles()
        self.cache = CacheManager(eviction)
        self.cluster = eviction.cluster = Cluster(self.cache, self.profiles)
        self.journal = Journal(self.config.journal_capacity)
        self._burst_s = self.config.burst_s
        self._journalling = self.config.journal_capacity > 0
        self.quarantine = Quarantine(self.config.quarantine)
        self._admission = Admission(
            self.cluster,
            self.quarantine,
            max_queue=self.config.max_queue,
            max_queue_per_model=self.config.max_queue_per_model,
        )
        self._entries: dict[int, Entry] = {}
        self._deadlines: list[tuple[float, int, Entry]] = []
        self._retries: deque[Entry] = deque()
        self._seq = 0
        self._actions: list[Action] = []
        self._handlers: dict[type[Event], Callable[[Any, float], None]] = {
            RequestArrived: self._request_arrived,
            RunFinished: self._run_finished,
            ModelLoaded: self._model_loaded,
            RequestCancelled: self._request_cancelled,
            TimeAdvanced: self._time_advanced,
            ModelAdded: self._model_added,
            ModelRemoved: self._model_removed,
            GpuJoined: self._gpu_joined,
            GpuLost: self._gpu_lost,
            LoadFailed: self._load_failed,
            RunFailed: self._run_failed,
            ProcessLost: self._process_lost,
        }

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take note of an event; returns the actions to carry out, in order."""
        self._actions = []
        if self._deadlines:
            self._expire(now_s)
        self._handlers[type(event)](event, now_s)
        self._dispatch(now_s)
        return self._actions

    def next_wakeup_s(self) -> float | None:
        """When ``TimeAdvanced`` is due at the latest (the next deadline); None: not before something happens."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][2].request.request_id not in self._entries:
            heappop(deadlines)
        return deadlines[0][0] if deadlines else None

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._entries)

    # Requests

    def _request_arrived(self, event: RequestArrived, now_s: float) -> None:
        request = event.request
        if request.request_id in self._entries:
            raise InvariantError(f"request {request.request_id} arrived twice")
        self._seq += 1
        entry = Entry(request, request.model, self._seq)
        refusal = self._admission.refusal(request, now_s)
        if refusal is not None:
            self._reject(entry, refusal, now_s)
            return
        self._entries[request.request_id] = entry
        if request.deadline_s is not None:
            heappush(self._deadlines, (request.deadline_s, entry.seq, entry))
        self.cluster.rates.arrived(request.model, now_s)
        self.cluster.queue.push(entry)

    def _request_cancelled(self, event: RequestCancelled, now_s: float) -> None:
        entry = self._entries.pop(event.request_id, None)
        if entry is not None:
            self._withdraw(entry)

    def _time_advanced(self, event: TimeAdvanced, now_s: float) -> None:
        """Nothing more to do: ``handle`` looks at the deadlines first, whatever happened."""

    def _expire(self, now_s: float) -> None:
        """End the requests that nothing may start any more."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= now_s:
            entry = heappop(deadlines)[2]
            if entry.request.request_id in self._entries and not self._is_running(entry):
                self._withdraw(entry)
                self._reject(entry, self._admission.late(entry.request, now_s), now_s)

    def _is_running(self, entry: Entry) -> bool:
        if entry.place is not Place.ASSIGNED:
            return False
        work = self.cluster.gpus[entry.gpu_id].work
        return work is not None and not work.loading

    def _withdraw(self, entry: Entry) -> None:
        """Take a request out of wherever it waits; on a GPU it is only marked, and its result goes unread."""
        if entry.place is Place.QUEUED:
            self.cluster.queue.take(entry, Place.ASSIGNED, skips=False)
        elif entry.place is Place.RETRY:
            self._retries.remove(entry)
        elif entry.place is Place.LOCAL:
            self.cluster.remove_local(self.cluster.gpus[entry.gpu_id], entry)
        entry.cancelled = True

    # Placement

    def _dispatch(self, now_s: float) -> None:
        cluster = self.cluster
        if self._retries and cluster.idle:
            self._dispatch_retries(now_s)
        queue, policy = cluster.queue, self.policy
        while cluster.idle and queue.waiting:
            placement = policy.next_placement(cluster, now_s)
            if placement is None:
                return
            entry, gpu = placement.entry, placement.gpu
            if placement.local:
                queue.take(entry, Place.LOCAL, skips=placement.skips)
                if self._journalling:
                    self._note(entry, gpu, placement.rule, (), now_s)
                cluster.add_local(gpu, entry)
            else:
                queue.take(entry, Place.ASSIGNED, skips=placement.skips)
                self._start(gpu, entry, placement.rule, now_s)

    def _dispatch_retries(self, now_s: float) -> None:
        """Requests whose process died go first, to another GPU than that one unless there is no other."""
        for entry in list(self._retries):
            gpu = self._retry_gpu(entry)
            if gpu is not None:
                self._retries.remove(entry)
                entry.place = Place.ASSIGNED
                self._start(gpu, entry, Rule.RETRY, now_s)

    def _retry_gpu(self, entry: Entry) -> GpuState | None:
        cluster, need_bytes = self.cluster, self.cluster.models[entry.model].memory_bytes
        fitting = [gpu for gpu in cluster.gpus.values() if gpu.memory.capacity_bytes >= need_bytes]
        others = [gpu for gpu in fitting if gpu.gpu_id != entry.avoid_gpu]
        idle = [gpu for gpu in others or fitting if gpu in cluster.idle]
        return next((gpu for gpu in idle if entry.model in gpu.memory.residents), idle[0] if idle else None)

    def _start(self, gpu: GpuState, entry: Entry, rule: Rule, now_s: float) -> None:
        """Put a request on an idle GPU: run it if its model is there, else make room and load first."""
        cluster, model = self.cluster, entry.model
        entry.gpu_id = gpu.gpu_id
        entry.attempts += 1
        if model in gpu.memory.residents:
            if self._journalling:
                self._note(entry, gpu, rule, (), now_s)
            self._run(gpu, Work(model, [entry], hit=True, now_s=now_s), now_s)
            return
        memory_bytes = cluster.models[model].memory_bytes
        victims = self.cache.choose_victims(gpu.memory, memory_bytes, now_s)
        if victims is None:
            raise InvariantError(f"{self.policy.name} placed {model} on {gpu.gpu_id}, where it does not fit")
        if self._journalling:
            self._note(entry, gpu, rule, tuple(victim.model for victim in victims), now_s)
        for victim in victims:
            self.cache.evict(gpu.memory, victim)
            self._unload(gpu, victim.model)
        false_miss = self.cache.copies(model) > 0
        self.cache.reserve(gpu.memory, model, memory_bytes, now_s).in_use = True
        work = Work(model, [entry], hit=False, now_s=now_s)
        cluster.set_busy(gpu, work, now_s + cluster.load_s(model, gpu) + cluster.inference_s(model, gpu))
        self._actions.append(Load(gpu.gpu_id, model, entry.request.request_id, false_miss))

    def _run(self, gpu: GpuState, work: Work, now_s: float) -> None:
        """The model is HOT: start the run, joined by whoever waits for the same model and may join."""
        model, entries = work.model, work.entries
        self._join(gpu, model, entries, now_s)
        self.cache.use(gpu.memory, model, now_s)
        self.cluster.set_busy(gpu, work, now_s + self.cluster.inference_s(model, gpu, len(entries)))
        if self._journalling:
            for entry in entries:
                self.journal.started(entry.request.request_id, now_s)
        self._actions.append(Run(gpu.gpu_id, model, tuple([entry.request.request_id for entry in entries]), work.hit))

    def _join(self, gpu: GpuState, model: str, entries: list[Entry], now_s: float) -> None:
        """Waiting requests for the model that a GPU is about to run may run with it."""
        limit = self.cluster.models[model].max_batch
        if self._burst_s:
            one_s = self.cluster.inference_s(model, gpu)
            limit = max(limit, min(self.config.max_burst, int(self._burst_s / one_s) if one_s else limit))
        queue = self.cluster.queue
        while len(entries) < limit:
            entry = queue.first_of(model)
            if entry is None:
                return
            queue.take(entry, Place.ASSIGNED, skips=False)
            entry.gpu_id = gpu.gpu_id
            entry.attempts += 1
            entries.append(entry)
            if self._journalling:
                inference_s = self.cluster.inference_s(model, gpu, len(entries))
                decision = Decision(now_s, gpu.gpu_id, Rule.JOINED, True, 0.0, 0.0, inference_s)
                self.journal.decided(entry.request.request_id, model, entry.request.arrival_s, decision)

    def _release(self, gpu: GpuState, model: str, now_s: float) -> None:
        """The GPU is done with a model, which stays there unless it was removed meanwhile."""
        self.cache.release(gpu.memory, model)
        if model in self.cluster.removed:
            self._unload(gpu, model)
        self._freed(gpu, now_s)

    def _freed(self, gpu: GpuState, now_s: float) -> None:
        """The GPU has nothing to do: its local queue comes first (LALB step 1), else it is idle."""
        cluster = self.cluster
        cluster.set_idle(gpu)
        while gpu.local_queue:
            entry = gpu.local_queue[0]
            cluster.remove_local(gpu, entry)
            if (
                entry.model in gpu.memory.residents
                or cluster.models[entry.model].memory_bytes <= gpu.memory.capacity_bytes
            ):
                entry.place = Place.ASSIGNED
                self._start(gpu, entry, Rule.LOCAL_QUEUE, now_s)
                return
            # Its model died here and has proved larger than this GPU: others are larger still.
            cluster.queue.give_back([entry])

    # What GPUs report

    def _model_loaded(self, event: ModelLoaded, now_s: float) -> None:
        gpu = self.cluster.gpus[event.gpu_id]
        work = self._work_of(gpu, event.model)
        work.loading = False
        work.load_s = event.load_s
        resident = self.cache.loaded(gpu.memory, event.model, event.memory_bytes)
        self.profiles.observe_load(event.model, gpu.kind, event.load_s)
        if event.memory_bytes is not None:
            self._learn_memory(event.model, resident.memory_bytes)
        work.entries = [entry for entry in work.entries if not entry.cancelled]
        if not work.entries:
            self._join(gpu, event.model, work.entries, now_s)
        if work.entries:
            self._run(gpu, work, now_s)
        else:
            self._release(gpu, event.model, now_s)

    def _run_finished(self, event: RunFinished, now_s: float) -> None:
        gpu = self.cluster.gpus[event.gpu_id]
        work = self._work_of(gpu, event.model)
        entries = work.entries
        for entry in entries:
            self._entries.pop(entry.request.request_id, None)
        if self._journalling:
            for entry in entries:
                self.journal.finished(entry.request.request_id, now_s)
        self.profiles.observe_run(event.model, gpu.kind, len(entries), event.inference_s)
        self.quarantine.succeeded(event.model)
        self._release(gpu, event.model, now_s)

    def _load_failed(self, event: LoadFailed, now_s: float) -> None:
        gpu = self.cluster.gpus[event.gpu_id]
        work = self._work_of(gpu, event.model)
        learned = event.memory_bytes is not None and event.memory_bytes > self.cluster.models[event.model].memory_bytes
        if event.memory_bytes is not None:
            self._learn_memory(event.model, event.memory_bytes)
            self._reject_too_large(now_s)
        # Knowing better what it needs, the same GPU is as good as any, and nobody is to blame.
        avoid = "" if learned else gpu.gpu_id
        self._work_lost(gpu, work, event.kind, event.reason, now_s, avoid=avoid, blame=not learned)

    def _run_failed(self, event: RunFailed, now_s: float) -> None:
        gpu = self.cluster.gpus[event.gpu_id]
        work = self._work_of(gpu, event.model)
        for request_id in event.answered:
            self._entries.pop(request_id, None)
        self._work_lost(gpu, work, event.kind, event.reason, now_s, avoid=gpu.gpu_id, blame=True)

    def _process_lost(self, event: ProcessLost, now_s: float) -> None:
        gpu = self.cluster.gpus.get(event.gpu_id)
        if gpu is None or event.model not in gpu.memory.residents or gpu.memory.residents[event.model].in_use:
            return  # it was evicted, or is being reported as a failed run
        self.cluster.drop_resident(gpu, event.model)
        if self.quarantine.failed(event.model, now_s, event.reason):
            self._reject_quarantined(event.model, now_s)

    def _work_of(self, gpu: GpuState, model: str) -> Work:
        work = gpu.work
        if work is None or work.model != model:
            raise InvariantError(f"{gpu.gpu_id} reports on {model}, which it was not asked to run")
        return work

    def _work_lost(
        self, gpu: GpuState, work: Work, kind: FailureKind, reason: str, now_s: float, *, avoid: str, blame: bool
    ) -> None:
        """The process is gone, the GPU is not."""
        self.cluster.drop_resident(gpu, work.model)
        self._end_or_retry(work, kind, reason, now_s, avoid=avoid, blame=blame)
        self._freed(gpu, now_s)

    def _end_or_retry(
        self, work: Work, kind: FailureKind, reason: str, now_s: float, *, avoid: str, blame: bool
    ) -> None:
        """Decide for each unanswered request: once more, or an error; and whether its model is to be left alone."""
        name = work.model
        quarantined = blame and self.quarantine.failed(name, now_s, reason)
        if quarantined:
            self._reject_quarantined(name, now_s)
        cluster = self.cluster
        again = cluster.models[name].retry and kind is not FailureKind.ERROR
        again = again and not quarantined and name not in cluster.removed
        too_large = cluster.too_large(name)
        for entry in work.entries:
            if entry.request.request_id not in self._entries:
                continue  # answered, or nobody waits for it
            if too_large:
                self._reject(entry, self._admission.too_large(name), now_s)
            elif again and entry.attempts < self.config.max_attempts:
                entry.avoid_gpu = avoid
                entry.place = Place.RETRY
                self._retries.append(entry)
            else:
                self._reject(entry, Refusal(RejectReason.FAILED, reason), now_s)
        self._forget_if_gone(name)

    # Models and GPUs come and go

    def _model_added(self, event: ModelAdded, now_s: float) -> None:
        self.cluster.models[event.model.name] = event.model
        self.profiles.add(event.model)
        self.cluster.removed.discard(event.model.name)
        self._reject_too_large(now_s)

    def _model_removed(self, event: ModelRemoved, now_s: float) -> None:
        name = event.name
        if name not in self.cluster.models:
            return
        self.cluster.removed.add(name)
        for entry in self._waiting(name):
            self._withdraw(entry)
            self._reject(entry, Refusal(RejectReason.REMOVED, f"{name} was removed while the request waited"), now_s)
        for gpu_id in list(self.cache.holders(name)):
            gpu = self.cluster.gpus[gpu_id]
            if not gpu.memory.residents[name].in_use:
                self._unload(gpu, name)
        self._forget_if_gone(name)

    def _gpu_joined(self, event: GpuJoined, now_s: float) -> None:
        if event.gpu.gpu_id in self.cluster.gpus:
            raise InvariantError(f"GPU {event.gpu.gpu_id} joined twice")
        self.cluster.join(event.gpu)
        self._reject_too_large(now_s)

    def _gpu_lost(self, event: GpuLost, now_s: float) -> None:
        if event.gpu_id not in self.cluster.gpus:
            return
        gpu = self.cluster.leave(event.gpu_id)
        self.cluster.queue.give_back(list(gpu.local_queue))
        if gpu.work is not None:
            reason = f"{gpu.gpu_id} was lost{': ' + event.reason if event.reason else ''}"
            self._end_or_retry(gpu.work, FailureKind.DEVICE, reason, now_s, avoid="", blame=False)
        self._reject_too_large(now_s)

    # Ends

    def _unload(self, gpu: GpuState, model: str) -> None:
        self.cluster.drop_resident(gpu, model)
        self._actions.append(Unload(gpu.gpu_id, model))
        self._forget_if_gone(model)

    def _forget_if_gone(self, name: str) -> None:
        """Drop the last traces of a removed model once no GPU has it."""
        if name in self.cluster.removed and not self.cache.copies(name):
            self.cluster.removed.discard(name)
            self.cluster.models.pop(name, None)
            self.profiles.remove(name)
            self.cluster.rates.forget(name)
            self.cluster.prices.forget(name)
            self.quarantine.succeeded(name)

    def _learn_memory(self, name: str, memory_bytes: int) -> None:
        model = self.cluster.models.get(name)
        if model is not None and model.memory_bytes != memory_bytes:
            self.cluster.models[name] = msgspec.structs.replace(model, memory_bytes=memory_bytes)

    def _reject_too_large(self, now_s: float) -> None:
        """End the waiting requests that no GPU can hold (any more): a size was learned, the largest GPU was lost."""
        for entry in self._waiting():
            if self.cluster.too_large(entry.model):
                self._withdraw(entry)
                self._reject(entry, self._admission.too_large(entry.model), now_s)

    def _reject_quarantined(self, name: str, now_s: float) -> None:
        for entry in self._waiting(name):
            self._withdraw(entry)
            self._reject(entry, self._admission.quarantined(name, now_s), now_s)

    def _waiting(self, name: str | None = None) -> list[Entry]:
        """Requests that are on no GPU, of one model or of all. Linear in the open requests, for rare events only."""
        return [
            entry
            for entry in self._entries.values()
            if entry.place is not Place.ASSIGNED and (name is None or entry.model == name)
        ]

    def _reject(self, entry: Entry, refusal: Refusal, now_s: float) -> None:
        request, reason, message = entry.request, refusal.reason, refusal.message
        self._entries.pop(request.request_id, None)
        if self._journalling:
            self.journal.rejected(request.request_id, request.model, request.arrival_s, now_s, reason, message)
        self._actions.append(Reject(request.request_id, reason, message, refusal.retry_after_s))

    def _note(self, entry: Entry, gpu: GpuState, rule: Rule, evicted: tuple[str, ...], now_s: float) -> None:
        """Write a decision down, before it is carried out."""
        cluster, model = self.cluster, entry.model
        chosen = estimate(cluster, model, gpu, now_s)
        hit = not chosen.load_s
        # A hit on an idle GPU has no cheaper alternative: do not pay for listing them on the hot path.
        others = () if hit and not chosen.wait_s else alternatives(cluster, model, gpu, now_s)
        decision = Decision(
            now_s, gpu.gpu_id, rule, hit, chosen.wait_s, chosen.load_s, chosen.inference_s, evicted, others
        )
        self.journal.decided(entry.request.request_id, model, entry.request.arrival_s, decision)
