"""Fair shares: who waits for more of the GPUs' time than is his, and goes after all others.

Whoever waits for more work than his part of ``CROWD`` loads and runs on every GPU is *beyond* his share, with all that
he waits for, until it is half as much; his requests are considered after those of callers *within* theirs. So nobody
waits behind another's backlog, and a flood is served with what the others leave.

Those who are beyond go by what they have had. Every caller has an account of the GPU seconds spent on him, the loads
that he caused included, divided by his weight. One who, with what he was promised already, has had less than the one
who has had *most*, by more than a slack, is *behind*: his next request goes before all others of those beyond. What is
remembered is bounded: nobody is ever more than ``CREDIT`` behind, so neither a long silence nor an old flood counts for
long. Who asks, and when: ``standing.py``.

The accounts are those of Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996: virtual time is clocked by the
service itself, and work is charged for when it begins. Different from it: the order of requests with the same standing
is the policy's business, as locality is worth more than the exact order; and who asks for little does not wait his
turn, but goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice

import msgspec

from hotset.scheduling.queue import Entry, Place
from hotset.vocabulary import Request

CROWD = 4.0
"""In units of the cluster, a load and a run, as they usually are, on every GPU: of so much waiting work, a caller's
part is not beyond his share. With less, a caller whose models are not loaded yet is taken for a flood."""
LEAST = 0.85
"""In the same: so much waiting work is not beyond anybody's share, however small that is. Less is no crowd: everybody's
turn comes within the time that a good order is worth, a load."""
CREDIT = 1.5
"""In units of the cluster. Who comes back from silence is owed no
more than that."""
SLACK = 0.1
"""In units of the caller's part of the cluster: that much does not matter, as locality needs some play."""
MOST_LOOKED_AT = 16
"""Callers beyond their shares that are looked at when time was spent; where there are more, in turn."""
MOST_IDLE = 1_000
"""Callers without open requests whose accounts are kept."""


class Usage(msgspec.Struct, gc=False):
    """What was spent on a caller since the start."""

    run_s: float = 0.0
    """GPU seconds of runs; of one that is shared, a part."""
    load_s: float = 0.0
    """Of the loads and restores that the caller's requests caused."""
    requests: int = 0


class Account:
    """One caller's share of the GPUs' time, at one priority."""

    __slots__ = ("beyond", "open", "promised_s", "spent_s", "usage", "waiting", "waiting_s", "weight")

    def __init__(self, spent_s: float, usage: Usage) -> None:
        self.weight = 1.0
        self.spent_s = spent_s
        """GPU seconds over weight."""
        self.promised_s = 0.0
        """Expected GPU seconds of the requests that were found to be behind and have not begun."""
        self.open = 0
        """Requests that have not ended."""
        self.waiting: dict[Entry, None] = {}
        """Those of them that have not begun, oldest first; kept while there is another caller."""
        self.waiting_s = 0.0
        """Expected GPU seconds of their runs."""
        self.beyond = False
        """That is more than his share (read only)."""
        self.usage = usage

    def newest(self) -> Entry | None:
        """The newest request in a queue."""
        return next((entry for entry in reversed(self.waiting) if entry.place is Place.QUEUED), None)


class FairShares:
    """The accounts of all callers of one priority. Each step takes constant time, but for ``displaced_by``."""

    def __init__(self, unit_s: Callable[[], float]) -> None:
        """``unit_s``: GPU seconds of a load and a run, as they usually are, on every GPU of the cluster."""
        self._unit_s = unit_s
        self.accounts: dict[str, Account] = {}
        self.most_s = 0.0
        """What the caller who has had most has had, GPU seconds over weight."""
        self.contended = False
        """Whether there is anybody to be fair to: one caller alone has no accounts to balance (read only)."""
        self._open_weight = 0.0
        self._idle: OrderedDict[str, Account] = OrderedDict()
        self._beyond: OrderedDict[Account, None] = OrderedDict()

    def open(self, request: Request, usage: Usage) -> Account:
        """The account that a request which has arrived goes on."""
        caller = request.caller
        account = self.accounts.get(caller)
        if account is None:
            if len(self._idle) >= MOST_IDLE:
                del self.accounts[self._idle.popitem(last=False)[0]]
            account = self.accounts[caller] = Account(self.most_s - self._credit_s if self.accounts else 0.0, usage)
            self._idle[caller] = account
            self.contended = len(self.accounts) > 1
        if not account.open:
            del self._idle[caller]
            account.spent_s = max(account.spent_s, self.most_s - self._credit_s)
        else:
            self._open_weight -= account.weight
        account.weight = request.weight
        self._open_weight += account.weight
        account.open += 1
        return account

    @property
    def _credit_s(self) -> float:
        return CREDIT * self._unit_s()

    def is_behind(self, account: Account) -> bool:
        """Whether the caller has had less than others, with what he was promised already."""
        return (
            account.spent_s + account.promised_s / account.weight
            < self.most_s - SLACK * self._unit_s() / self._open_weight
        )

    def turns(self, account: Account) -> bool:
        """Whether a caller who was within his share is beyond it now, or the other way round."""
        part = account.weight / max(self._open_weight, account.weight)
        most_s = max(CROWD * part, LEAST) * self._unit_s()
        if account.waiting_s > most_s if not account.beyond else account.waiting_s < most_s / 2:
            account.beyond = not account.beyond
            if account.beyond:
                self._beyond[account] = None
            else:
                del self._beyond[account]
            return True
        return False

    @property
    def others_within(self) -> bool:
        """Whether anybody is within his share; meant for when somebody is not."""
        return len(self._beyond) < len(self.accounts)

    def beyond(self) -> list[Account]:
        """The next few callers who are beyond their shares; where they are many, they take turns."""
        accounts = list(islice(self._beyond, MOST_LOOKED_AT))
        if len(self._beyond) > MOST_LOOKED_AT:
            for account in accounts:
                self._beyond.move_to_end(account)
        return accounts

    def clear(self) -> None:
        """Nobody waits."""
        for account in self.accounts.values():
            for entry in account.waiting:
                entry.run_s = entry.promised_s = 0.0
            account.waiting.clear()
            account.waiting_s = account.promised_s = 0.0

    def wait(self, entry: Entry, account: Account, run_s: float) -> None:
        """The caller waits for a request, maybe once more, whose run is expected to take so many GPU seconds."""
        if entry not in account.waiting:
            account.waiting[entry] = None
            entry.run_s = run_s
            account.waiting_s += run_s

    def promise(self, entry: Entry, account: Account, cost_s: float) -> None:
        """The request, expected to take so many GPU seconds, goes before others that are beyond."""
        entry.promised_s = cost_s
        account.promised_s += cost_s

    def unpromise(self, entry: Entry, account: Account) -> None:
        """It begins, or has another standing."""
        account.promised_s -= entry.promised_s
        entry.promised_s = 0.0

    def begun(self, entry: Entry, account: Account) -> None:
        """The caller waits for it no more."""
        if account.waiting and account.waiting.pop(entry, self) is None:
            self.unpromise(entry, account)
            account.waiting_s -= entry.run_s
            entry.run_s = 0.0

    def begin(self, entry: Entry, account: Account, cost_s: float) -> None:
        """Work on the request begins, and is expected to take so many GPU seconds: they are charged for at once."""
        self.begun(entry, account)
        entry.charged_s = cost_s
        self.charge(account, cost_s)

    def settle(self, entry: Entry, account: Account, gpu_s: float) -> None:
        """GPU time was spent on the request: what was not charged ahead is now."""
        ahead_s = min(entry.charged_s, gpu_s)
        entry.charged_s -= ahead_s
        self.charge(account, gpu_s - ahead_s)

    def charge(self, account: Account, gpu_s: float) -> None:
        """GPU time was spent on a caller, or is about to be."""
        account.spent_s = max(account.spent_s, self.most_s - self._credit_s) + gpu_s / account.weight
        self.most_s = max(self.most_s, account.spent_s)

    def ended(self, entry: Entry, account: Account) -> None:
        """A request is over, however it ended."""
        self.begun(entry, account)
        account.spent_s -= entry.charged_s / account.weight
        entry.charged_s = 0.0
        account.open -= 1
        if not account.open:
            account.promised_s = account.waiting_s = 0.0
            account.beyond = False
            self._open_weight -= account.weight
            self._beyond.pop(account, None)
            self._idle[entry.request.caller] = account
        if self._idle and self.contended and not self._beyond:
            self._forget()

    def _forget(self) -> None:
        """Who is silent, and as far behind as anybody can be, is as good as a new caller."""
        caller, account = next(iter(self._idle.items()))
        if account.spent_s <= self.most_s - self._credit_s:
            del self._idle[caller], self.accounts[caller]
            self.contended = len(self.accounts) > 1

    def displaced_by(self, request: Request) -> Entry | None:
        """Whose place in a full queue a new request may take: the newest of the caller with most requests open for his
        weight, if these are more than the new one's caller would have. Linear in the callers."""
        own = self.accounts.get(request.caller)
        most, displaced = (1 if own is None else own.open + 1) / request.weight, None
        for account in self.accounts.values():
            if account.open / account.weight > most and account is not own and (newest := account.newest()):
                most, displaced = account.open / account.weight, newest
        return displaced
