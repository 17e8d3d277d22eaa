"""Standing: which of the waiting requests a policy is asked about first.

Requests wait in one queue for each standing. The policy is asked about the first queue that holds anybody until it
places no more of it, then, if a GPU is still idle, about the next one; so every policy heeds standing, and none needs
to know of it. Highest first:

1. by *priority*, strictly, but for one request in ``MOST_PASSED + 1``: so low ones wait long, not for ever;
2. within a priority, requests of callers within their shares before all others (``fairness.py``);
3. within these, requests whose *deadline presses* before those with time to spare (``requests.py``).

Where all is equal, as with one caller and no deadline near, there is one queue, in order of arrival.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterable, Iterator
from collections.abc import Set as AbstractSet
from itertools import chain
from typing import TYPE_CHECKING

from hotset.scheduling.fairness import Account, FairShares, Usage
from hotset.scheduling.queue import Entry, GlobalQueue, Place, Share, Standing
from hotset.vocabulary import NORMAL_PRIORITY, Request

if TYPE_CHECKING:
    from hotset.scheduling.cache import Resident
    from hotset.scheduling.cluster import Cluster, GpuState

MOST_PASSED = 50
"""Requests of higher priorities that go before a waiting one of a lower priority until one of that priority goes."""
MOST_CALLERS = 200
"""Callers whose usage is told apart; all others are ``OTHERS``."""
OTHERS = "(others)"


class Queues:
    """All queues of requests that are bound to no GPU. The one in turn is ``Cluster.queue``."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.main = cluster.queue
        """Where everybody waits who has no standing in particular."""
        self.all = [self.main]
        """In the order in which policies are asked about them; there are others only once they were needed."""
        self.several = False
        """Whether there is more than the main queue to look at (read only)."""
        self.contended = False
        """Whether there is anybody to be fair to, at any priority (read only)."""
        self.usage: dict[str, Usage] = {}
        """By caller."""
        self._shares = {NORMAL_PRIORITY: FairShares(self._unit_s)}
        """By priority."""
        self._passed: dict[int, int] = {}
        """Priority -> requests of higher ones that were placed while it waited."""
        self._seq = 0

    # Requests come and go

    def arrived(self, entry: Entry) -> None:
        """A request was admitted; it need not be queued yet."""
        request = entry.request
        shares = self._shares.get(request.priority)
        if shares is None:
            shares = self._shares[request.priority] = FairShares(self._unit_s)
        contended = shares.contended
        usage = self.usage.get(request.caller) or self._usage_of(request.caller)
        usage.requests += 1
        entry.account = shares.open(request, usage)
        entry.since_s = request.arrival_s
        if shares.contended and not contended:
            self.contended = True
            self._contend(shares, request.priority)
            self._look(shares, request.arrival_s, shares.accounts.values())
        if not shares.contended:
            self._expect(entry, request.arrival_s)

    def _expect(self, entry: Entry, now_s: float) -> None:
        """The request counts for how often its model is asked for. Those beyond their callers' shares do not: what a
        flood asks for is no reason to keep its models in memory rather than the others'."""
        if not entry.expected:
            entry.expected = True
            self._cluster.rates.arrived(entry.model, now_s)
            self._cluster.prices.arrived(entry.model, now_s)

    def _contend(self, shares: FairShares, priority: int) -> None:
        """There is, or wants to be, a second caller: from now on it is known who holds what."""
        shares.clear()
        for queue in self.all:
            if queue.standing.priority == priority:
                for waiting in queue.in_order():
                    assert waiting.account is not None
                    shares.wait(waiting, waiting.account, self._run_s(waiting))

    def _usage_of(self, caller: str) -> Usage:
        return self.usage.setdefault(caller if len(self.usage) < MOST_CALLERS else OTHERS, Usage())

    def push(self, entry: Entry) -> None:
        """A request begins to wait, behind all others of its standing."""
        priority, account = entry.request.priority, entry.account
        assert account is not None
        shares = self._shares[priority]
        if shares.contended:
            self._wait(shares, entry, account, entry.request.arrival_s)
        self._seq += 1
        entry.seq = self._seq
        if priority == NORMAL_PRIORITY and not entry.share and not entry.pressed:
            self.main.push(entry)
        else:
            self._queue_of(entry).push(entry)

    def ended(self, entry: Entry) -> None:
        """A request is over, however it ended."""
        assert entry.account is not None
        self._shares[entry.request.priority].ended(entry, entry.account)
        if self.contended:
            self.contended = any(shares.contended for shares in self._shares.values())

    # What policies and the Scheduler ask

    @property
    def waiting(self) -> int:
        """Requests in all queues."""
        return self.main.waiting if not self.several else sum(queue.waiting for queue in self.all)

    def waiting_for(self, model: str) -> int:
        """Of them, those for a model."""
        return sum(queue.waiting_for(model) for queue in self.all)

    def models(self) -> Collection[str]:
        """The models that anybody waits for."""
        return self.main.models if not self.several else set().union(*(queue.models for queue in self.all))

    def wanted(self) -> AbstractSet[str]:
        """Those that anybody waits for whose standing is at least that of the queue in turn."""
        least = self._cluster.queue.standing
        return set().union(*(queue.models for queue in self.all if queue.standing <= least))

    @property
    def sparing(self) -> bool:
        """Whether what is placed now is for a caller beyond his share while others are within theirs: it should not
        cost them their models. Never while all GPUs are idle, so that something always goes on."""
        cluster = self._cluster
        standing = cluster.queue.standing
        return (
            standing.share is not Share.WITHIN
            and len(cluster.idle) < len(cluster.gpus)
            and self._shares[standing.priority].others_within
        )

    def first_of(self, model: str) -> Entry | None:
        """The first to be served of those who wait for a model."""
        if not self.several:
            return self.main.first_of(model)
        for queue in self.all:
            entry = queue.first_of(model)
            if entry is not None:
                return entry
        return None

    def take(self, entry: Entry, place: Place, *, skips: bool = False) -> None:
        """Remove a waiting request."""
        assert entry.queue is not None
        entry.queue.take(entry, place, skips=skips)

    def started(self, entry: Entry, gpu: GpuState) -> None:
        """A request has got a GPU: from now on its caller pays for what it is expected to take."""
        cluster, model, account, shares = (
            self._cluster,
            entry.model,
            entry.account,
            self._shares[entry.request.priority],
        )
        entry.gpu_id = gpu.gpu_id
        if shares.contended and not entry.charged_s:
            assert account is not None
            cost_s = cluster.inference_s(model, gpu)
            if model not in gpu.memory.residents and model not in cluster.cache.evictors:
                cost_s += cluster.load_s(model, gpu)
            shares.begin(entry, account, cost_s)

    def first_to_join(self, model: str, run: list[Entry]) -> Entry | None:
        """Who may join a run next: nobody who is to go after it makes it take longer."""
        entry = self.first_of(model)
        return None if entry is not None and run and run[0].share < entry.share else entry

    def give_back(self, entries: list[Entry]) -> None:
        """Take back requests that had left their queues; whoever came out of a batch that gathered never was in one."""
        for queue in self.all:
            queue.give_back([entry for entry in entries if entry.queue is queue])
        for entry in entries:
            account, shares = entry.account, self._shares[entry.request.priority]
            if entry.queue is None:
                self.push(entry)
            elif shares.contended:
                assert account is not None
                shares.wait(entry, account, self._run_s(entry))
                if account.beyond is (entry.share is Share.WITHIN):  # that has changed meanwhile
                    self._move(entry, Share.BEYOND if account.beyond else Share.WITHIN, entry.since_s)

    # Turns

    def in_turn(self) -> Iterator[int | None]:
        """Makes one queue after the other that of the cluster, highest standing first: those that hold somebody, and
        the main one. Yields how many of its requests may be placed; None: as many as the policy likes."""
        cluster = self._cluster
        overdue = [priority for priority, passed in self._passed.items() if passed >= MOST_PASSED]
        turns: list[tuple[GlobalQueue, int | None]] = [
            (queue, 1) for queue in self.all if queue.standing.priority in overdue
        ]
        turns += [(queue, None) for queue in self.all]
        for queue, most in turns:
            before = queue.waiting
            if (before or queue is self.main) and (most is None or self._passed.get(queue.standing.priority)):
                cluster.queue = queue
                yield most
                self._count_passed(queue.standing.priority, before - queue.waiting)
        cluster.queue = self.main

    def _count_passed(self, by_priority: int, placed: int) -> None:
        if not placed:
            return
        self._passed.pop(by_priority, None)
        for priority in {queue.standing.priority for queue in self.all if queue.waiting}:
            if priority < by_priority:
                self._passed[priority] = self._passed.get(priority, 0) + placed

    # Standing changes

    def ran(self, entries: list[Entry], run_s: float, now_s: float) -> None:
        """A GPU has run these requests together."""
        share_s = run_s / len(entries)
        for entry in entries:
            account, shares = entry.account, self._shares[entry.request.priority]
            assert account is not None
            account.usage.run_s += share_s
            if shares.contended:
                shares.begun(entry, account)  # if it joined the run of another
                shares.settle(entry, account, share_s)
                self._look(shares, now_s, shares.beyond())

    def loaded(self, resident: Resident, load_s: float, now_s: float) -> None:
        """A GPU has loaded, or restored, a model: who caused it pays. That is the request for which the model had to
        go, where its last copy went for another; else the one that it was loaded for."""
        payer, resident.payer = resident.payer, None
        if payer is None:
            return
        payer = self._cluster.cache.evictors.pop(resident.model, payer)
        assert payer.account is not None
        payer.account.usage.load_s += load_s
        shares = self._shares[payer.request.priority]
        if shares.contended:
            shares.settle(payer, payer.account, load_s)
            self._look(shares, now_s, shares.beyond())

    def _wait(self, shares: FairShares, entry: Entry, account: Account, now_s: float) -> None:
        """A caller waits for one request more: how does it stand, and those before it?"""
        shares.wait(entry, account, self._run_s(entry))
        self._weigh(shares, account, now_s)
        if not account.beyond:
            entry.share = Share.WITHIN
        else:
            entry.share = Share.BEHIND if self._promise(shares, entry, account) else Share.BEYOND
        if entry.share is not Share.BEYOND:
            self._expect(entry, now_s)

    def _weigh(self, shares: FairShares, account: Account, now_s: float) -> None:
        """What a caller waits for has changed: if he is beyond his share now, or within it again, so is all of it."""
        if shares.turns(account):
            share = Share.BEYOND if account.beyond else Share.WITHIN
            for entry in account.waiting:
                if entry.place is Place.QUEUED and entry.queue is not None:
                    shares.unpromise(entry, account)
                    self._move(entry, share, now_s)

    def _look(self, shares: FairShares, now_s: float, accounts: Iterable[Account]) -> None:
        """Accounts have changed: who of these is beyond his share now, and who of those behind?"""
        for account in accounts:
            self._weigh(shares, account, now_s)
            for entry in account.waiting if account.beyond else ():
                if entry.place is Place.QUEUED and entry.share is Share.BEYOND:
                    if not self._promise(shares, entry, account):
                        break
                    self._move(entry, Share.BEHIND, now_s)

    def _promise(self, shares: FairShares, entry: Entry, account: Account) -> bool:
        """Whether the request may go before others that are beyond their callers' shares."""
        if not shares.is_behind(account):
            return False
        shares.promise(entry, account, self._cost_s(entry))
        return True

    def press(self, entry: Entry) -> None:
        """A waiting request's deadline presses from now on."""
        entry.pressed = True
        if entry.place is Place.QUEUED:
            self._requeue(entry)

    def displaced_by(self, request: Request) -> Entry | None:
        """Whose place in a full queue a new request may take: of a lower priority the newest, else the newest of the
        caller with most open requests for his weight, if those are more than the new one's caller would have."""
        for queue in reversed(self.all):
            if queue.standing.priority < request.priority and queue.waiting:
                return queue.last()
        shares = self._shares.get(request.priority)
        if shares is None:
            return None
        if not shares.contended and request.caller not in shares.accounts:
            self._contend(shares, request.priority)
        return shares.displaced_by(request)

    def displaced_in_line(self, request: Request) -> Entry | None:
        """The same where it is the queue of its model that is full: one of those who wait for that. Linear in these."""
        lines = [line for queue in self.all if (line := queue.models.get(request.model))]
        if lines and lines[-1][-1].request.priority < request.priority:
            return lines[-1][-1]
        by_caller: dict[str, list[Entry]] = {}
        for entry in chain(*lines):
            if entry.request.priority == request.priority:
                by_caller.setdefault(entry.request.caller, []).append(entry)
        own = len(by_caller.pop(request.caller, ())) + 1
        most, displaced = own / request.weight, None
        for entries in by_caller.values():
            newest = max(entries, key=lambda entry: entry.seq)
            if len(entries) / newest.request.weight > most:
                most, displaced = len(entries) / newest.request.weight, newest
        return displaced

    def _move(self, entry: Entry, share: Share, now_s: float) -> None:
        if share < entry.share:
            entry.since_s = now_s
            self._expect(entry, now_s)
        entry.share = share
        self._requeue(entry)

    def _requeue(self, entry: Entry) -> None:
        assert entry.queue is not None
        entry.queue.leave(entry)
        self._seq += 1
        entry.seq = self._seq
        self._queue_of(entry).push(entry)

    def _queue_of(self, entry: Entry) -> GlobalQueue:
        standing = Standing(-entry.request.priority, entry.share, not entry.pressed)
        for queue in self.all:
            if queue.standing == standing:
                return queue
        queue = GlobalQueue(standing)
        insort(self.all, queue, key=lambda one: one.standing)
        self.several = True
        return queue

    def _unit_s(self) -> float:
        profiles = self._cluster.profiles
        return len(self._cluster.gpus) * (profiles.typical_load_s() + profiles.typical_inference_s())

    def _run_s(self, entry: Entry) -> float:
        """GPU seconds that the request's run is expected to take."""
        kind = next((gpu.kind for gpu in self._cluster.gpus.values()), "")
        return self._cluster.profiles.inference_s(entry.model, kind)

    def _cost_s(self, entry: Entry) -> float:
        """The same with its load, if no GPU holds its model."""
        cluster, model = self._cluster, entry.model
        kind = next((gpu.kind for gpu in cluster.gpus.values()), "")
        run_s = self._run_s(entry)
        return run_s if cluster.cache.copies(model) else run_s + cluster.profiles.load_s(model, kind)
