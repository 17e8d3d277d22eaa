"""Design rule R3: whatever happens, in whatever order, under every policy with every eviction, the invariants hold.

Hypothesis makes up the story; ``World`` and ``invariants.check`` judge every step of it.
"""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from scheduling_world import GIB, Device, World, model

from hotset.scheduling import holders
from hotset.scheduling.actions import Action, Offload
from hotset.scheduling.cluster import Cluster
from hotset.scheduling.config import SchedulerConfig
from hotset.scheduling.events import Event
from hotset.scheduling.eviction import EVICTIONS, make_eviction
from hotset.scheduling.parking import ParkedSize
from hotset.scheduling.policies import POLICIES, PolicySettings, make_policy
from hotset.scheduling.policies.interface import Placement, Policy
from hotset.scheduling.quarantine import QuarantineSettings
from hotset.scheduling.scheduler import Scheduler
from hotset.vocabulary import FailureKind

NAMES = "abcdef"
O3_LIMIT = 3
COMBINATIONS = [(policy, eviction) for policy in POLICIES for eviction in EVICTIONS]
STORIES = max(4, 60 // len(COMBINATIONS))
"""Per combination; a few thousand make a good night's work."""

seconds = st.sampled_from((0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 30.0))
kinds = st.sampled_from(FailureKind)
callers = st.sampled_from(("", "", "heavy", "other"))
priorities = st.sampled_from((0, 0, 0, 1, -2))


class Watched:
    """A policy under watch: who was passed over by whom, on a GPU that could have taken him."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.name = policy.name
        self.most_skips: int | None = getattr(policy, "most_skips", None)
        self.passed_by: defaultdict[int, set[int]] = defaultdict(set)

    def __getattr__(self, name: str) -> object:
        return getattr(self.policy, name)

    def next_placement(self, cluster: Cluster, now_s: float) -> Placement | None:
        placement = self.policy.next_placement(cluster, now_s)
        if placement is not None:
            self._watch(cluster, placement)
        return placement

    def _watch(self, cluster: Cluster, placement: Placement) -> None:
        waiting = list(cluster.queue.in_order())
        assert placement.entry in waiting, "only a waiting request can be placed"
        awaited = placement.gpu.memory.copying == placement.entry.model
        assert placement.local == (placement.gpu not in cluster.idle) or awaited, "now on an idle GPU, later on another"
        for entry in waiting:
            # One that came back from a lost GPU passes nobody any more.
            self.passed_by[entry.seq] -= {other.seq for other in waiting}
        # If its GPU is lost it will wait anew.
        self.passed_by.pop(placement.entry.seq, None)
        lane_taken = placement.gpu.memory.copying is not None
        for entry in waiting:
            if lane_taken and not cluster.can_start(placement.gpu, entry.model):
                continue
            if entry.seq < placement.entry.seq and cluster.fits(placement.gpu, entry.model):
                self.passed_by[entry.seq].add(placement.entry.seq)
                if self.most_skips is not None:
                    assert len(self.passed_by[entry.seq]) <= self.most_skips, "passed over more often than allowed"


class Recording(World):
    """Keeps the events, so that the same story can be told again."""

    def handle(self, event: Event) -> list[Action]:
        self.__dict__.setdefault("story", []).append((event, self.now_s))
        return super().handle(event)


class ClusterStory(RuleBasedStateMachine):
    """Everything that can happen to a cluster."""

    policy = ""
    eviction = ""
    tiers = SchedulerConfig()

    @initialize(
        gpus=st.lists(st.sampled_from((2.0, 3.0, 8.0)), min_size=1, max_size=5),
        max_queue=st.sampled_from((None, None, 6)),
        per_model=st.sampled_from((None, None, 3)),
        burst_s=st.sampled_from((0.0, 2.5)),
        journal=st.sampled_from((0, 5)),
        many_copies=st.sampled_from((0, 1, 8)),
    )
    def begin(
        self,
        gpus: list[float],
        max_queue: int | None,
        per_model: int | None,
        burst_s: float,
        journal: int,
        many_copies: int,
    ):
        holders.MANY_COPIES = many_copies
        self.config = SchedulerConfig(
            max_queue=max_queue,
            max_queue_per_model=per_model,
            burst_s=burst_s,
            journal_capacity=journal,
            quarantine=QuarantineSettings(after=2, first_s=2.0, longest_s=8.0),
            host_memory_bytes=self.tiers.host_memory_bytes,
            overlap=self.tiers.overlap,
            prefetch_recurring=self.tiers.prefetch_recurring,
        )
        self.world = world = Recording(
            self.policy, eviction=self.eviction, gpus=(), models=(), config=self.config, o3_limit=O3_LIMIT
        )
        world.scheduler.policy = Watched(world.scheduler.policy)
        for name, gib in zip("abcd", (1.0, 1.0, 2.0, 5.0), strict=True):
            world.add(model(name, gib))
        for number, gib in enumerate(gpus):
            world.join(gib, node=f"node{number % 2}")

    # Clients

    @rule(name=st.sampled_from(NAMES), patience_s=st.none() | seconds, caller=callers, priority=priorities)
    def arrive(self, name: str, patience_s: float | None, caller: str, priority: int):
        weight = 2.5 if caller == "heavy" else 1.0
        self.world.arrive(name, patience_s=patience_s, caller=caller, weight=weight, priority=priority)

    @rule(names=st.lists(st.sampled_from("aaabbcd"), min_size=4, max_size=12), caller=callers)
    def crowd(self, names: list[str], caller: str):
        for name in names:
            self.world.arrive(name, caller=caller)

    @precondition(lambda self: self.world.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject):
        self.world.cancel(data.draw(st.sampled_from(sorted(self.world.open))))

    @rule(elapsed_s=seconds)
    def wait(self, elapsed_s: float):
        self.world.wait(elapsed_s)

    # Nodes

    def _some(self, data: st.DataObject, devices: list[Device]) -> Device:
        return data.draw(st.sampled_from(devices))

    @property
    def loading(self) -> list[Device]:
        return [device for device in self.world.devices.values() if device.loading is not None]

    @property
    def running(self) -> list[Device]:
        return [device for device in self.world.devices.values() if device.running is not None]

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), load_s=seconds, share=st.sampled_from((None, 0.5, 1.0, 1.5)))
    def loaded(self, data: st.DataObject, load_s: float, share: float | None):
        device = self._some(data, self.loading)
        assert device.loading is not None
        reserved_bytes = device.resident[device.loading.model]
        free_bytes = max(0, device.gpu.memory_bytes - device.used_bytes)
        if any(isinstance(copy, Offload) for copy in device.lane):
            share = None if share is None else min(share, 1.0)
        measured = None if share is None else min(int(reserved_bytes * share), reserved_bytes + free_bytes)
        self.world.loaded(device.gpu.gpu_id, load_s=load_s, memory_bytes=measured)

    @rule(data=st.data(), name=st.sampled_from(NAMES), share=st.sampled_from((0.25, 1.0, 1.5, 4.0)))
    def measured(self, data: st.DataObject, name: str, share: float):
        """Runs have made it larger, or smaller; it may have left since."""
        gpu_id = data.draw(st.sampled_from((*self.world.devices, "nobody's")))
        device = self.world.devices.get(gpu_id)
        before_bytes = GIB if device is None else device.resident.get(name, GIB)
        self.world.measured(gpu_id, name, int(before_bytes * share))

    @property
    def offloading(self) -> list[Device]:
        return [device for device in self.world.devices.values() if device.lane and device.lane[0] != device.loading]

    @precondition(lambda self: self.offloading)
    @rule(data=st.data(), device_gib=st.sampled_from((0.0, 0.25, 1.0)), host_gib=st.sampled_from((0.5, 1.0, 4.0)))
    def offloaded(self, data: st.DataObject, device_gib: float, host_gib: float):
        size = ParkedSize(device_bytes=int(device_gib * GIB), host_bytes=int(host_gib * GIB))
        self.world.offloaded(self._some(data, self.offloading).gpu.gpu_id, size=size)

    @precondition(lambda self: self.offloading)
    @rule(data=st.data())
    def offload_fails(self, data: st.DataObject):
        self.world.offload_fails(self._some(data, self.offloading).gpu.gpu_id)

    @precondition(lambda self: self.loading or self.running)
    @rule(turns=st.integers(1, 6), elapsed_s=seconds)
    def all_goes_well(self, turns: int, elapsed_s: float):
        """The GPUs do what they were asked to, one after the other."""
        self.world.wait(elapsed_s)
        for _ in range(turns):
            for device in self.loading:
                self.world.loaded(device.gpu.gpu_id)
            for device in self.running[:2]:
                self.world.finish(device.gpu.gpu_id)

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), kind=kinds, needs_gib=st.sampled_from((None, 1.5, 2.5, 7.0, 90.0)))
    def load_fails(self, data: st.DataObject, kind: FailureKind, needs_gib: float | None):
        needs_bytes = None if needs_gib is None else int(needs_gib * GIB)
        self.world.load_fails(self._some(data, self.loading).gpu.gpu_id, kind, memory_bytes=needs_bytes)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), inference_s=seconds)
    def finish(self, data: st.DataObject, inference_s: float):
        self.world.finish(self._some(data, self.running).gpu.gpu_id, inference_s=inference_s)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), kind=kinds)
    def run_fails(self, data: st.DataObject, kind: FailureKind):
        device = self._some(data, self.running)
        assert device.running is not None
        ids = device.running.request_ids
        answered = ids[: data.draw(st.integers(0, len(ids)))]
        self.world.run_fails(device.gpu.gpu_id, kind, answered=answered)

    @precondition(lambda self: any(self._idle_processes()))
    @rule(data=st.data())
    def process_dies(self, data: st.DataObject):
        self.world.process_dies(*data.draw(st.sampled_from(self._idle_processes())))

    def _idle_processes(self) -> list[tuple[str, str]]:
        return [
            (gpu_id, name)
            for gpu_id, device in self.world.devices.items()
            for name in (*device.resident, *device.parked)
            if name not in device.in_use and all(copy.model != name for copy in device.lane)
        ]

    # Machines and models come and go, seldom enough that there is something to lose

    @rule(data=st.data(), what=st.sampled_from(("gpu joins", "gpu is lost", "model is added", "model is removed")))
    def upheaval(self, data: st.DataObject, what: str):
        world = self.world
        name = data.draw(st.sampled_from(NAMES))
        match what:
            case "gpu joins" if len(world.devices) < 6:
                world.join(data.draw(st.sampled_from((2.0, 3.0, 8.0))))
            case "gpu is lost":
                world.lose(data.draw(st.sampled_from((*world.devices, "nobody's"))))
            case "model is added":
                gib, retry = data.draw(st.sampled_from((1.0, 2.0, 5.0))), data.draw(st.booleans())
                max_batch, inference_s = data.draw(st.sampled_from(((1, 1.0), (1, 0.0), (4, 1.0), (4, None))))
                world.add(
                    model(
                        name,
                        gib,
                        max_batch=max_batch,
                        max_batch_wait_s=data.draw(st.sampled_from((0.0, 2.0))) if max_batch > 1 else 0.0,
                        retry=retry,
                        inference_s=inference_s,
                        min_copies=data.draw(st.sampled_from((0, 0, 0, 1, 2))),
                        max_copies=data.draw(st.sampled_from((None, None, 1, 2))),
                    )
                )
            case "model is removed":
                world.remove(name)

    # The end of the story

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        if not world.devices:
            world.join(8.0)
        world.drain()
        assert not world.open, "once the GPUs have done all they were asked to, nobody waits"
        assert set(world.ends) == set(range(1, world._last_id + 1)), "every request ended"
        self._tell_it_again()

    def _tell_it_again(self) -> None:
        """Equal events, equal actions."""
        policy = make_policy(self.policy, PolicySettings(o3_limit=O3_LIMIT))
        scheduler = Scheduler(policy, make_eviction(self.eviction), self.config)
        again = [action for event, now_s in self.world.story for action in scheduler.handle(event, now_s)]
        assert again == self.world.log


TIERS = {
    "paper": SchedulerConfig(),
    "warm": SchedulerConfig(host_memory_bytes=5 * GIB // 2),
    "overlap": SchedulerConfig(overlap=True),
    "warm-overlap": SchedulerConfig(host_memory_bytes=4 * GIB, overlap=True, prefetch_recurring=True),
}


@pytest.mark.parametrize("tiers", TIERS.values(), ids=TIERS)
@pytest.mark.parametrize(("policy", "eviction"), COMBINATIONS, ids=["-".join(pair) for pair in COMBINATIONS])
def test_the_invariants_hold(policy: str, eviction: str, tiers: SchedulerConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(holders, "MANY_COPIES", holders.MANY_COPIES)  # stories set it as they like
    story = type("Story", (ClusterStory,), {"policy": policy, "eviction": eviction, "tiers": tiers})
    run_state_machine_as_test(
        story,
        settings=settings(
            max_examples=STORIES,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            report_multiple_bugs=False,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
