"""Design rule R3, and every index of the core recomputed from scratch. Slow on purpose: plain scans, no shortcuts."""

from __future__ import annotations

import pytest

from hotset.scheduling.cluster import Cluster
from hotset.scheduling.queue import Entry, GlobalQueue, Place, Share, Standing
from hotset.scheduling.scheduler import Scheduler
from hotset.vocabulary import Residency


def check(scheduler: Scheduler, now_s: float) -> None:
    """Fail if anything the scheduler believes contradicts anything else."""
    check_memory(scheduler)
    check_footprints(scheduler)
    check_pins(scheduler, now_s)
    check_bounds(scheduler.cluster)
    check_gpus(scheduler.cluster)
    check_requests(scheduler)
    for queue in scheduler.cluster.queues.all:
        check_queue(queue)
    check_standing(scheduler)
    check_holders(scheduler.cluster)
    check_deadlines(scheduler, now_s)
    assert scheduler.cluster.gathering.next_s > now_s, "a batch that is due is not held"


def check_memory(scheduler: Scheduler) -> None:
    hosts = {id(gpu.memory.host): gpu.memory.host for gpu in scheduler.cluster.gpus.values()}
    held = dict.fromkeys(hosts, 0)
    for gpu in scheduler.cluster.gpus.values():
        memory = gpu.memory
        assert memory.parked_bytes == sum(resident.device_bytes for resident in memory.parked.values())
        resident_bytes = sum(resident.memory_bytes for resident in memory.residents.values())
        assert memory.used_bytes == resident_bytes + memory.parked_bytes
        assert memory.used_bytes >= 0
        assert memory.used_bytes <= memory.capacity_bytes or gpu in scheduler._sizes.outgrown
        in_use = {name for name, resident in memory.residents.items() if resident.in_use}
        working_on = {gpu.work.model if gpu.work is not None else None, memory.copying} - {None}
        assert in_use == working_on, "in use = what the GPU works on"
        states = {name: resident.state for name, resident in memory.residents.items()}
        loading = [name for name, state in states.items() if state is Residency.LOADING]
        loading_for = gpu.work.model if gpu.work is not None and gpu.work.loading else memory.copying
        assert loading == ([loading_for] if loading_for is not None else [])
        assert set(states.values()) <= {Residency.HOT, Residency.LOADING}
        assert not memory.residents.keys() & memory.parked.keys(), "one level at a time"
        assert sum(resident.ahead for resident in memory.residents.values()) <= 1, "useless prefetches are bounded"
        assert sum(resident.guessed for resident in memory.residents.values()) <= 1, "so are useless guesses"
        held[id(memory.host)] += sum(
            resident.host_bytes for resident in (*memory.residents.values(), *memory.parked.values())
        )
        for name, resident in memory.parked.items():
            assert (resident.model, resident.state) == (name, Residency.WARM)
            assert memory.host.parked[resident] is memory
            assert scheduler.cluster.is_deployed(name)
            assert gpu.gpu_id in scheduler.cache.parked_on(name)
    for number, host in hosts.items():
        assert host.used_bytes == held[number]
        assert 0 <= host.used_bytes <= host.capacity_bytes
        assert all(resident.model in memory.parked for resident, memory in host.parked.items())
    parked = [name for gpu in scheduler.cluster.gpus.values() for name in gpu.memory.parked]
    assert sum(len(held) for held in scheduler.cache._parked_on.values()) == len(parked)


def check_footprints(scheduler: Scheduler) -> None:
    """What was measured is kept free; a margin neither exceeds what was learned nor the largest GPU."""
    models, footprints = scheduler.cluster.models, scheduler.profiles.footprints
    assert set(models) == set(footprints)
    largest_bytes = max((gpu.memory.capacity_bytes for gpu in scheduler.cluster.gpus.values()), default=0)
    for name, footprint in footprints.items():
        if footprint.sizes_bytes:
            margin_bytes = models[name].memory_bytes - footprint.least_bytes
            assert 0 <= margin_bytes <= footprint.need_bytes - footprint.least_bytes
            assert not margin_bytes or models[name].memory_bytes <= largest_bytes


def check_pins(scheduler: Scheduler, now_s: float) -> None:
    """Pins fit, are what models ask for, and what is missing is on its way or waits for something."""
    cluster, quarantine = scheduler.cluster, scheduler.quarantine
    for gpu in cluster.gpus.values():
        memory = gpu.memory
        assert memory.unpinned_bytes == memory.capacity_bytes - sum(memory.pinned.values()) >= 0
        for name, resident in memory.residents.items():
            assert resident.pinned == (name in memory.pinned)
        for name, pinned_bytes in memory.pinned.items():
            assert cluster.is_deployed(name)
            assert pinned_bytes >= cluster.models[name].memory_bytes
            if name in memory.residents:
                assert pinned_bytes >= memory.residents[name].memory_bytes
            elif not quarantine.remaining_s(name, now_s):
                waits = gpu.work is not None or memory.copying is not None
                assert waits or has_all_copies(cluster, name), "a missing copy is loaded first"
    for name, model in cluster.models.items():
        wanted = model.min_copies if cluster.is_deployed(name) else 0
        assert scheduler.pins.placed(name) <= wanted
        if scheduler.pins.placed(name) < wanted:
            spare = [gpu for gpu in cluster.gpus.values() if name not in gpu.memory.pinned]
            for gpu in spare:
                resident = gpu.memory.residents.get(name)
                need_bytes = max(model.memory_bytes, 0 if resident is None else resident.memory_bytes)
                assert gpu.memory.unpinned_bytes < need_bytes, "all that has room has a place"


def check_bounds(cluster: Cluster) -> None:
    """A model has no more copies than it may, but for one too many that is in use until its run ends."""
    for name, model in cluster.models.items():
        if model.max_copies is None or not cluster.is_deployed(name):
            continue
        holders = [gpu.memory for gpu in cluster.gpus.values() if name in gpu.memory.residents]
        unpinned = [memory for memory in holders if name not in memory.pinned]
        most = max(model.max_copies - model.min_copies, 0)
        assert cluster.is_spread(name) == (len(unpinned) >= most)
        if len(unpinned) > most:
            assert all(memory.residents[name].in_use for memory in unpinned)
        else:
            assert len(holders) <= max(model.max_copies, model.min_copies)


def has_all_copies(cluster: Cluster, name: str) -> bool:
    model = cluster.models[name]
    return model.max_copies is not None and cluster.cache.copies(name) >= max(model.max_copies, model.min_copies)


def check_gpus(cluster: Cluster) -> None:
    idle = [gpu for gpu in cluster.gpus.values() if gpu.work is None]
    assert list(cluster.idle) == sorted(idle, key=lambda gpu: gpu.idle_rank), "idle set, longest first"
    assert cluster.largest_bytes == max(
        (gpu.memory.capacity_bytes - sum(gpu.memory.pinned.values()) for gpu in cluster.gpus.values()), default=0
    )
    for gpu in cluster.gpus.values():
        if gpu.work is None:
            assert not any(cluster.can_start(gpu, entry.model) for entry in gpu.local_queue), "local queues go first"
            assert gpu.memory.copying is not None or not gpu.local_queue
        assert gpu.memory.copying is None or cluster.overlap
        assert gpu.local_backlog_s == pytest.approx(sum(entry.local_cost_s for entry in gpu.local_queue))


def check_requests(scheduler: Scheduler) -> None:
    """Every open request is in exactly one place."""
    cluster = scheduler.cluster
    places: list[tuple[int, Place]] = [
        (id_of(entry), Place.QUEUED) for queue in cluster.queues.all for entry in queue.in_order()
    ]
    places += [(id_of(entry), Place.RETRY) for entry in scheduler._requests.retries]
    for name, batch in cluster.gathering._batches.items():
        assert 0 < len(batch.entries) < cluster.models[name].max_batch, "a full batch is not held"
        places += [(id_of(entry), Place.GATHERING) for entry in batch.entries]
    for gpu in cluster.gpus.values():
        places += [(id_of(entry), Place.LOCAL) for entry in gpu.local_queue]
        for entry in [*gpu.local_queue, *(gpu.work.entries if gpu.work is not None else ())]:
            assert entry.gpu_id == gpu.gpu_id
        if gpu.work is not None:
            places += [(id_of(entry), Place.ASSIGNED) for entry in gpu.work.entries if not entry.cancelled]
    assert len(places) == len(scheduler._entries), "no request is in two places, none is lost"
    assert dict(places) == {request_id: entry.place for request_id, entry in scheduler._entries.items()}
    for entry in scheduler._entries.values():
        assert entry.model in cluster.models, "a request's model is known until the request ends"
        assert not entry.cancelled
        assert entry.place is Place.ASSIGNED or cluster.is_deployed(entry.model), "nobody waits for what is gone"
        assert entry.place is Place.ASSIGNED or not cluster.too_large(entry.model), "nobody waits for ever"


def check_standing(scheduler: Scheduler) -> None:
    """Queues are in order, everybody is in his own, and the accounts add up."""
    queues = scheduler.cluster.queues
    assert scheduler.cluster.queue is queues.main, "between events it is nobody's turn"
    standings = [queue.standing for queue in queues.all]
    assert standings == sorted(set(standings))
    for queue in queues.all:
        for entry in queue.in_order():
            assert entry.queue is queue
            assert queue.standing == Standing(-entry.request.priority, entry.share, not entry.pressed)
    for priority, shares in queues._shares.items():
        opened = [entry for entry in scheduler._entries.values() if entry.request.priority == priority]
        for caller, account in shares.accounts.items():
            own = [entry for entry in opened if entry.account is account]
            assert account.open == len(own)
            assert all(entry.request.caller == caller for entry in own)
            assert (caller in shares._idle) == (not own)
            assert account.promised_s == pytest.approx(sum(entry.promised_s for entry in own), abs=1e-6)
            assert account.waiting_s == pytest.approx(sum(entry.run_s for entry in account.waiting), abs=1e-6)
            assert account.beyond == (account in shares._beyond)
            assert set(map(id, account.waiting)) <= set(map(id, own))
            queued = [entry for entry in own if entry.place is Place.QUEUED]
            if shares.contended:
                assert set(map(id, queued)) <= set(map(id, account.waiting)), "nobody is forgotten"
                assert all((entry.share is Share.WITHIN) != account.beyond for entry in queued)
        weights = sum(account.weight for account in shares.accounts.values() if account.open)
        assert shares._open_weight == pytest.approx(weights, abs=1e-6)


def check_queue(queue: GlobalQueue) -> None:
    waiting = list(queue.in_order())
    assert queue.waiting == len(waiting)
    assert waiting == sorted(waiting, key=lambda entry: entry.seq), "in order of arrival"
    lines: dict[str, list[Entry]] = {}
    for entry in waiting:
        lines.setdefault(entry.model, []).append(entry)
    assert {name: list(line) for name, line in queue.models.items()} == lines
    for name, line in lines.items():
        assert queue.first_of(name) is line[0]
        assert queue.waiting_for(name) == len(line)
    assert queue.head() is (waiting[0] if waiting else None)
    holes = [entry for entry in queue._fifo if entry.place is not Place.QUEUED]
    assert queue._holes == len(holes)
    assert queue.skips_of_head == sum(entry.skipped_over for entry in holes)
    assert not waiting or queue._fifo[0] is waiting[0], "no hole before the head"
    assert all(entry.in_fifo for entry in queue._fifo)


def check_holders(cluster: Cluster) -> None:
    """The index of idle and busy holders says what looking at every GPU says."""
    names = {name for gpu in cluster.gpus.values() for name in gpu.memory.residents}
    for name in names:
        holders = [gpu for gpu in cluster.gpus.values() if name in gpu.memory.residents]
        assert sorted(cluster.cache.holders(name)) == sorted(gpu.gpu_id for gpu in holders)
        assert cluster.cache.copies(name) == len(holders)
        idle = [gpu for gpu in holders if gpu.work is None and gpu.memory.copying != name]
        busy = [gpu for gpu in holders if gpu not in idle]
        assert cluster.idle_holder(name) is min(idle, key=lambda gpu: gpu.idle_rank, default=None)
        assert cluster.earliest_holder(name) is min(busy, key=lambda gpu: (gpu.finish_s, gpu.index), default=None)
    for gpu in cluster.idle:
        ready = gpu.memory.residents.keys() - {gpu.memory.copying}
        first = next((entry for entry in cluster.queue.in_order() if entry.model in ready), None)
        assert cluster.first_waiting_hit(gpu) is first


def check_deadlines(scheduler: Scheduler, now_s: float) -> None:
    """Only a request whose run has begun may be past its deadline."""
    for entry in scheduler._entries.values():
        deadline_s = entry.request.deadline_s
        if deadline_s is not None and deadline_s <= now_s:
            assert entry.place is Place.ASSIGNED
            work = scheduler.cluster.gpus[entry.gpu_id].work
            assert work is not None
            assert not work.loading


def id_of(entry: Entry) -> int:
    return entry.request.request_id
