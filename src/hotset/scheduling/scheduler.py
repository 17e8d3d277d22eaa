"""The Scheduler: events in, actions out. The one object that the simulator and the live system both run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hotset.errors import InvariantError
from hotset.scheduling.actions import Action, Outbox, Run
from hotset.scheduling.admission import Admission
from hotset.scheduling.cache import CacheManager, EvictionPolicy
from hotset.scheduling.cluster import Cluster, GpuState, Work
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
from hotset.scheduling.journal import Journal, decision
from hotset.scheduling.parking import ParkedSize, Room
from hotset.scheduling.pins import Pins
from hotset.scheduling.policies.interface import Policy, Rule
from hotset.scheduling.prefetch import Prefetcher
from hotset.scheduling.profiles import Profiles
from hotset.scheduling.quarantine import Quarantine
from hotset.scheduling.queue import Entry, Place
from hotset.scheduling.recurrence import Recurrence
from hotset.scheduling.requests import Loss, OpenRequests
from hotset.scheduling.sizes import Sizes
from hotset.scheduling.transitions import Transitions
from hotset.vocabulary import FailureKind


class Scheduler:
    """The global Scheduler of the paper, with its Cache Manager.

    It owns all scheduling state; nothing else changes it. ``handle`` takes an event and the time it happened (seconds,
    never going back) and answers what to do now.
    """

    def __init__(self, policy: Policy, eviction: EvictionPolicy, config: SchedulerConfig | None = None) -> None:
        self.policy = policy
        config = self.config = config or SchedulerConfig()
        self.profiles = Profiles()
        self.cache = CacheManager(eviction, self.config.host_memory_bytes)
        self.cluster = eviction.cluster = Cluster(self.cache, self.profiles, overlap=self.config.overlap)
        self._outbox = Outbox()
        self._transitions = Transitions(self.cluster, self._outbox)
        self._recurrence = Recurrence(self.cluster) if config.prefetch_recurring else None
        self._prefetcher = Prefetcher(self.cluster, self._transitions, self._recurrence) if config.overlap else None
        self.prefetches = 0
        """Loads and restores that were started ahead."""
        self.journal = Journal(self.config.journal_capacity)
        self._burst_s = self.config.burst_s
        self._journalling = self.config.journal_capacity > 0
        self.quarantine = Quarantine(self.config.quarantine)
        self.pins = Pins(self.cluster, self._transitions, self.quarantine)
        self._admission = Admission(
            self.cluster, self.quarantine, max_queue=config.max_queue, max_queue_per_model=config.max_queue_per_model
        )
        self._requests = OpenRequests(
            self.cluster, self._admission, self.quarantine, self.journal, self._outbox, max_attempts=config.max_attempts
        )
        self._sizes = Sizes(self.cluster, self._transitions, self.pins, self._requests)
        self._entries = self._requests.entries
        self._queues = self.cluster.queues
        self._gathering = self.cluster.gathering
        self._gathers = False
        """Some model has asked for its requests to be held back until they fill a batch."""
        self._actions: list[Action] = []
        self._handlers: dict[type[Event], Callable[[Any, float], None]] = {
            RequestArrived: self._request_arrived,
            RunFinished: self._run_finished,
            ModelLoaded: self._model_loaded,
            ModelRestored: self._model_restored,
            ModelOffloaded: self._model_offloaded,
            RequestCancelled: self._request_cancelled,
            TimeAdvanced: self._time_advanced,
            ModelAdded: self._model_added,
            ModelRemoved: self._model_removed,
            GpuJoined: self._gpu_joined,
            GpuLost: self._gpu_lost,
            ModelMeasured: self._sizes.measured,
            LoadFailed: self._load_failed,
            RunFailed: self._run_failed,
            ProcessLost: self._process_lost,
        }

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take note of an event; returns the actions to carry out, in order."""
        self._actions = self._outbox.actions = []
        if self._requests.deadlines:
            self._requests.look(now_s)
        self._handlers[type(event)](event, now_s)
        if self._gathering.next_s <= now_s:
            self._gathering.release(now_s, self._queues.push)
        self._dispatch(now_s)
        return self._actions

    def next_wakeup_s(self) -> float | None:
        """When ``TimeAdvanced`` is due at the latest: the next deadline, a batch that was held for long enough, or a
        load for a pin that may be tried again. None: not before something happens."""
        soonest_s = self._gathering.next_s
        recurring_s = self._recurrence.wakeup_s if self._recurrence is not None else None
        for other_s in (self._requests.next_look_s(), self.pins.wakeup_s, recurring_s):
            if other_s is not None and other_s < soonest_s:
                soonest_s = other_s
        return soonest_s if soonest_s < math.inf else None

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._entries)

    # Requests

    def _request_arrived(self, event: RequestArrived, now_s: float) -> None:
        request = event.request
        if request.request_id in self._entries:
            raise InvariantError(f"request {request.request_id} arrived twice")
        entry = Entry(request, request.model)
        refusal = self._admission.refusal(request, now_s)
        if refusal is not None and not self._requests.make_place(request, refusal, now_s):
            self._requests.reject(entry, refusal, now_s)
            return
        self._requests.add(entry)
        if self._recurrence is not None:
            self._recurrence.arrived(request.model, now_s)
        if not (
            self._gathers and self.cluster.models[request.model].max_batch_wait_s and self._gathering.hold(entry, now_s)
        ):
            self._queues.push(entry)

    def _request_cancelled(self, event: RequestCancelled, now_s: float) -> None:
        entry = self._requests.end(event.request_id)
        if entry is not None:
            self._requests.withdraw(entry)

    def _time_advanced(self, event: TimeAdvanced, now_s: float) -> None:
        """Nothing more to do: ``handle`` looks at the deadlines first, whatever happened."""

    # Placement

    def _dispatch(self, now_s: float) -> None:
        if self._sizes.outgrown:
            self._sizes.settle(now_s)
        if self.pins.unsettled:
            self._load_pinned(now_s)
        if self._requests.retries and self.cluster.idle:
            self._dispatch_retries(now_s)
        if self._queues.several:
            for most in self._queues.in_turn():
                self._serve(now_s, most)
        else:
            self._serve(now_s)

    def _serve(self, now_s: float, most: int | None = None) -> None:
        """Place requests of the queue in turn; ``most``: so many."""
        cluster, policy, queue = self.cluster, self.policy, self.cluster.queue
        while cluster.idle and queue.waiting and most != 0:
            placement = policy.next_placement(cluster, now_s)
            if placement is None:
                break
            most = None if most is None else most - 1
            entry, gpu = placement.entry, placement.gpu
            if placement.local:
                queue.take(entry, Place.LOCAL, skips=placement.skips)
                if self._journalling:
                    self._note(entry, gpu, placement.rule, None, now_s)
                cluster.add_local(gpu, entry)
            else:
                queue.take(entry, Place.ASSIGNED, skips=placement.skips)
                self._start(gpu, entry, placement.rule, now_s)
        if self._prefetcher is not None:
            self._load_ahead(self._prefetcher, now_s)

    def _load_pinned(self, now_s: float) -> None:
        """Before anybody's request: a GPU that is never without work would never get to it."""
        for model in self.pins.models():
            self._shed(model)  # a pin that moved left a copy behind
        if self.pins.take_moved():  # and some who wait without room
            self._requests.reject_too_large(now_s)
        while (pin := self.pins.next_load(now_s)) is not None:
            if self.cluster.overlap:
                self._copy(pin.gpu, pin.model, pin.room, None, now_s)
            else:
                expected_s = self._transitions.bring(pin.gpu, pin.model, pin.room, None, now_s)
                work = Work(pin.model, [], hit=False, started_s=now_s, loading=True)
                self.cluster.set_busy(pin.gpu, work, now_s + expected_s)

    def _load_ahead(self, prefetcher: Prefetcher, now_s: float) -> None:
        while (ahead := prefetcher.next_load(now_s)) is not None:
            gpu, model, entry = ahead.gpu, ahead.model, ahead.entry
            if self._journalling and entry is not None:
                self._note(entry, gpu, Rule.AHEAD, ahead.room, now_s)
            self.prefetches += 1
            self._copy(gpu, model, ahead.room, entry, now_s)
            self.cache.loading_ahead(gpu.memory, model, guessed=entry is None)

    def _dispatch_retries(self, now_s: float) -> None:
        """Requests whose process died go first, to another GPU than that one unless there is no other."""
        for entry in list(self._requests.retries):
            if (gpu := self.cluster.gpu_for_retry(entry)) is not None:
                self._requests.retries.remove(entry)
                entry.place = Place.ASSIGNED
                self._start(gpu, entry, Rule.RETRY, now_s)

    def _start(self, gpu: GpuState, entry: Entry, rule: Rule, now_s: float) -> None:
        """Put a request on an idle GPU: run it if its model is there, else make room and load first."""
        cluster, memory, model = self.cluster, gpu.memory, entry.model
        self._queues.started(entry, gpu)
        if model in memory.residents and memory.copying != model:
            self._run(gpu, Work(model, [entry], hit=entry.loaded_on != gpu.gpu_id, started_s=now_s), rule, now_s)
            return
        room = self._transitions.room(gpu, model, now_s)
        if room is None and memory.copying is None:  # else it waits there for its own load, or for another's to end
            raise InvariantError(f"{self.policy.name} placed {model} on {gpu.gpu_id}, where it does not fit")
        if self._journalling:
            self._note(entry, gpu, rule, room, now_s)
        if cluster.overlap:
            entry.place = Place.LOCAL
            cluster.add_local(gpu, entry)
            if room is not None:
                entry.loaded_on = gpu.gpu_id
                self._copy(gpu, model, room, entry, now_s)
            return
        assert room is not None, "without overlap, nothing is on its way to an idle GPU"
        expected_s = self._transitions.bring(gpu, model, room, entry, now_s)
        work = Work(model, [entry], hit=False, started_s=now_s, loading=True)
        cluster.set_busy(gpu, work, now_s + expected_s + cluster.inference_s(model, gpu))

    def _copy(self, gpu: GpuState, model: str, room: Room, payer: Entry | None, now_s: float) -> None:
        """Bring a model to a GPU by its copy lane, whatever the GPU does meanwhile."""
        expected_s = self._transitions.bring(gpu, model, room, payer, now_s)
        self.cluster.copy_started(gpu, model, now_s + expected_s)

    def _run(self, gpu: GpuState, work: Work, rule: Rule | None, now_s: float) -> None:
        """The model is HOT: start the run, joined by whoever waits for the same model and may join. ``rule``: why its
        first request runs here; None: that was noted when its load was decided."""
        model, entries = work.model, work.entries
        if self._gathers or model in self._queues.models():
            self._join(gpu, model, entries)
        self.cache.use(gpu.memory, model, now_s)
        expected_s = self.cluster.inference_s(model, gpu, len(entries))
        self.cluster.set_busy(gpu, work, now_s + expected_s)
        if self._journalling:
            work.note = self.journal.started(entries, gpu.gpu_id, rule, now_s, expected_s)
        self._actions.append(Run(gpu.gpu_id, model, tuple([entry.request.request_id for entry in entries]), work.hit))

    def _join(self, gpu: GpuState, model: str, entries: list[Entry]) -> None:
        """Waiting requests for the model that a GPU is about to run may run with it."""
        limit = self.cluster.models[model].max_batch
        if self._burst_s and limit == 1:  # a batching function is never given more than it says it takes
            one_s = self.cluster.inference_s(model, gpu)
            limit = max(limit, min(self.config.max_burst, int(self._burst_s / one_s) if one_s else limit))
        queues = self._queues
        while len(entries) < limit:
            entry = queues.first_to_join(model, entries)
            if entry is not None:
                queues.take(entry, Place.ASSIGNED)
            elif self._gathers and (entry := self._gathering.take(model)) is not None:
                entry.place = Place.ASSIGNED
            else:
                return
            entry.gpu_id = gpu.gpu_id
            entries.append(entry)

    def _release(self, gpu: GpuState, model: str, now_s: float) -> None:
        """The GPU is done with a model, which stays there unless it was removed, or has too many copies, meanwhile."""
        self.cache.release(gpu.memory, model)
        if self.cluster.removed or self.cluster.models[model].max_copies is not None:
            self._shed(model)
        self._freed(gpu, now_s)

    def _freed(self, gpu: GpuState, now_s: float) -> None:
        """The GPU has nothing to do: its local queue comes first (LALB step 1), else it is idle."""
        self.cluster.set_idle(gpu)
        if self.pins.unsettled:
            self._load_pinned(now_s)
        if gpu.work is None and gpu.local_queue:
            self._serve_local_queue(gpu, now_s)

    def _serve_local_queue(self, gpu: GpuState, now_s: float) -> None:
        """Start its head; with overlap, requests whose model is HOT go before those whose model must be loaded."""
        cluster, waiting = self.cluster, list(gpu.local_queue)
        if cluster.overlap:
            waiting.sort(key=lambda entry: entry.model not in gpu.memory.residents)  # stable
        for entry in waiting:
            if entry.model not in gpu.memory.residents and not cluster.fits(gpu, entry.model):
                # Its model died here and has proved larger than this GPU, has lost its room to pins, or has all the
                # copies it may have by now.
                cluster.remove_local(gpu, entry)
                self._queues.give_back([entry])
            elif cluster.can_start(gpu, entry.model):
                cluster.remove_local(gpu, entry)
                entry.place = Place.ASSIGNED
                self._start(gpu, entry, Rule.LOCAL_QUEUE, now_s)
                if gpu.work is not None:
                    return

    # What GPUs report

    def _model_loaded(self, event: ModelLoaded, now_s: float) -> None:
        gpu = self.cluster.gpus[event.gpu_id]
        resident = gpu.memory.residents.get(event.model)
        near = resident is not None and resident.near
        self.profiles.observe_load(event.model, gpu.kind, event.load_s, near=near)
        self._became_hot(gpu, event, event.load_s, now_s)

    def _model_restored(self, event: ModelRestored, now_s: float) -> None:
        gpu = self.cluster.gpus[event.gpu_id]
        copied_bytes = gpu.memory.residents[event.model].host_bytes
        self.profiles.observe_restore(event.model, gpu.kind, event.restore_s, copied_bytes)
        self._became_hot(gpu, event, event.restore_s, now_s)

    def _became_hot(self, gpu: GpuState, event: ModelLoaded | ModelRestored, load_s: float, now_s: float) -> None:
        model = event.model
        work = None if gpu.memory.copying == model else self._work_of(gpu, model)
        resident = self._sizes.became_hot(gpu, event)
        self.cluster.prices.moved(model)
        self._queues.loaded(resident, load_s, now_s)
        self._sizes.loaded(event, resident, now_s)
        if work is None:
            resident.in_use = False
            self.cluster.copy_ended(gpu, model)
            self._shed(model)
            if gpu.work is None:
                self._serve_local_queue(gpu, now_s)
            return
        work.loading = False
        work.load_s = load_s
        work.entries = [entry for entry in work.entries if not entry.cancelled]
        rule = None
        if not work.entries:
            rule = Rule.JOINED
            self._join(gpu, model, work.entries)
        if work.entries:
            self._run(gpu, work, rule, now_s)
        else:
            self._release(gpu, model, now_s)

    def _model_offloaded(self, event: ModelOffloaded, now_s: float) -> None:
        gpu = self.cluster.gpus[event.gpu_id]
        self.profiles.observe_offload(event.model, gpu.kind, event.offload_s, event.host_bytes)
        size = ParkedSize(event.device_bytes, event.host_bytes)
        if event.model in self.cluster.models and not self.cache.offloaded(gpu.memory, event.model, size):
            self._transitions.forget(gpu, event.model)

    def _run_finished(self, event: RunFinished, now_s: float) -> None:
        gpu = self.cluster.gpus[event.gpu_id]
        work = self._work_of(gpu, event.model)
        self._queues.ran(work.entries, event.inference_s, now_s)
        for entry in work.entries:
            self._requests.end(entry.request.request_id)
        if work.note is not None:
            work.note.finished_s = now_s
        self.cluster.thrash.run_s += event.inference_s
        self.profiles.observe_run(event.model, gpu.kind, len(work.entries), event.inference_s)
        self.quarantine.succeeded(event.model)
        self._release(gpu, event.model, now_s)

    def _load_failed(self, event: LoadFailed, now_s: float) -> None:
        gpu, name = self.cluster.gpus[event.gpu_id], event.model
        learned = event.memory_bytes is not None and event.memory_bytes > self.cluster.models[name].memory_bytes
        if gpu.memory.copying == name:
            self.cluster.copy_ended(gpu, name)
            entries = [entry for entry in gpu.local_queue if entry.model == name]
            for entry in entries:
                self.cluster.remove_local(gpu, entry)
                entry.place = Place.ASSIGNED
        else:
            entries = self._work_of(gpu, name).entries
        if event.memory_bytes is not None:
            self._sizes.learn(name, event.memory_bytes, now_s)
        # Knowing better what it needs, the same GPU is as good as any, and nobody is to blame.
        avoid = "" if learned else gpu.gpu_id
        self._process_gone(gpu, name, entries, Loss(event.kind, event.reason, avoid, not learned), now_s)

    def _run_failed(self, event: RunFailed, now_s: float) -> None:
        gpu = self.cluster.gpus[event.gpu_id]
        work = self._work_of(gpu, event.model)
        for request_id in event.answered:
            self._requests.end(request_id)
        self._process_gone(gpu, work.model, work.entries, Loss(event.kind, event.reason, gpu.gpu_id, True), now_s)

    def _process_lost(self, event: ProcessLost, now_s: float) -> None:
        gpu, name = self.cluster.gpus.get(event.gpu_id), event.model
        if gpu is not None and name in gpu.memory.parked:
            self.cache.unpark(gpu.memory, name)
        elif gpu is not None and name in gpu.memory.residents and not gpu.memory.residents[name].in_use:
            self.cluster.drop_resident(gpu, name)
        else:
            return  # it was evicted, or is being reported as a failed load or run
        self.pins.changed(name)
        if self.quarantine.failed(name, now_s, event.reason):
            self._requests.reject_quarantined(name, now_s)

    def _work_of(self, gpu: GpuState, model: str) -> Work:
        work = gpu.work
        if work is None or work.model != model:
            raise InvariantError(f"{gpu.gpu_id} reports on {model}, which it was not asked to run")
        return work

    def _process_gone(self, gpu: GpuState, name: str, entries: list[Entry], loss: Loss, now_s: float) -> None:
        """The process is gone, the GPU is not."""
        self.cluster.drop_resident(gpu, name)
        self.pins.changed(name)
        self._requests.lost(name, entries, loss, now_s)
        self._forget_if_gone(name)
        if gpu.work is not None and gpu.work.model == name:
            self._freed(gpu, now_s)
        elif gpu.work is None:
            self._serve_local_queue(gpu, now_s)

    # Models and GPUs come and go

    def _model_added(self, event: ModelAdded, now_s: float) -> None:
        self.cluster.add_model(event.model)
        self._gathers = self._gathers or event.model.max_batch_wait_s > 0.0
        self._gathering.let_go(event.model.name, now_s)
        self.cluster.removed.discard(event.model.name)
        self.pins.want(event.model.name, event.model.min_copies)
        self._shed(event.model.name)
        self._requests.reject_too_large(now_s)

    def _model_removed(self, event: ModelRemoved, now_s: float) -> None:
        name = event.name
        if name not in self.cluster.models:
            return
        self.cluster.removed.add(name)
        self.pins.want(name, 0)
        self._requests.reject_removed(name, now_s)
        self._shed(name)
        for gpu_id in list(self.cache.parked_on(name)):
            self._transitions.forget(self.cluster.gpus[gpu_id], name)
        self._forget_if_gone(name)

    def _gpu_joined(self, event: GpuJoined, now_s: float) -> None:
        if event.gpu.gpu_id in self.cluster.gpus:
            raise InvariantError(f"GPU {event.gpu.gpu_id} joined twice")
        self.cluster.join(event.gpu)
        self.pins.plan()
        self._requests.reject_too_large(now_s)

    def _gpu_lost(self, event: GpuLost, now_s: float) -> None:
        if event.gpu_id not in self.cluster.gpus:
            return
        gpu = self.cluster.leave(event.gpu_id)
        self.pins.plan()
        for entry in gpu.local_queue:
            entry.loaded_on = ""
        self._queues.give_back(list(gpu.local_queue))
        if gpu.work is not None:
            reason = f"{gpu.gpu_id} was lost{': ' + event.reason if event.reason else ''}"
            loss = Loss(FailureKind.DEVICE, reason, "", False)
            self._requests.lost(gpu.work.model, gpu.work.entries, loss, now_s)
            self._forget_if_gone(gpu.work.model)
        self._requests.reject_too_large(now_s)

    # Ends

    def _shed(self, model: str) -> None:
        """Copies that are no longer wanted leave, unless they are in use: then they do once they are not."""
        if surplus := self.cluster.surplus(model):
            for gpu in surplus:
                self._transitions.unload(gpu, model)
            self.pins.changed(model)
        self._forget_if_gone(model)

    def _forget_if_gone(self, name: str) -> None:
        """Drop the last traces of a removed model once no GPU has it."""
        if name in self.cluster.removed and not self.cache.copies(name):
            self.cluster.removed.discard(name)
            self.cluster.forget_model(name)
            if self._recurrence is not None:
                self._recurrence.forget(name)
            self.quarantine.succeeded(name)

    def _note(self, entry: Entry, gpu: GpuState, rule: Rule, room: Room | None, now_s: float) -> None:
        """Write a decision down, before it is carried out."""
        victims = room.victims if room is not None else ()
        self.journal.decided(entry.request, decision(self.cluster, entry.model, gpu, rule, now_s, victims))
