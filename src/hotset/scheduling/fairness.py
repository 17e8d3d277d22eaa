"""Fair shares: who has had less of the GPUs' time than is due to him, and so goes first.

Start-time fair queueing, turned into a question with two answers. Every caller has an account of the GPU seconds spent
on him, the loads that he caused included, divided by his weight. While a caller, with what he was promised already, has
had less than the one who has had *most*, by more than a slack, his next request is *owed* to him, and no request that
is not owed is considered before it. What the owed ones leave is everybody's. Who asks, and when: ``standing.py``.

So a caller who is alone is never held back, a flood is served with what the others leave, or with as much as any of
them gets where they leave less, and all others meet the policy as if they were one. What is remembered is bounded:
nobody is ever more than ``CREDIT`` behind, so neither a long silence nor an old flood counts for long.

After Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996: virtual time is clocked by the service itself, and
work is charged for when it begins. The two answers are those of a network that marks what exceeds the agreed rate.
Different from both: the order of those with the same answer is the policy's business, as locality is worth more than
the exact order.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from itertools import islice

import msgspec

from hotset.scheduling.queue import Entry, Place
from hotset.vocabulary import Request

CREDIT = 1.5
"""In units of the cluster: a load and a run, as they usually are, on every GPU. Who comes back from silence is owed no
more than that."""
SLACK = 0.1
"""In units of the caller's part of the cluster: that much does not matter, as locality needs some play."""
MOST_LOOKED_AT = 16
"""Callers with requests beyond their share that are looked at when time was spent; where there are more, in turn."""
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

    __slots__ = ("backlog", "open", "promised_s", "spent_s", "usage", "weight")

    def __init__(self, spent_s: float, usage: Usage) -> None:
        self.weight = 1.0
        self.spent_s = spent_s
        """GPU seconds over weight."""
        self.promised_s = 0.0
        """Expected GPU seconds of the requests that were found to be owed and have not ended."""
        self.open = 0
        """Requests that have not ended."""
        self.backlog: deque[Entry] = deque()
        """Requests that were not owed when last looked at, oldest first; some may have left the queue since."""
        self.usage = usage

    def oldest(self) -> Entry | None:
        """The oldest waiting request that is not owed."""
        while self.backlog and not _is_held(self.backlog[0]):
            self.backlog.popleft()
        return self.backlog[0] if self.backlog else None

    def newest(self) -> Entry | None:
        """The newest waiting request that is not owed."""
        while self.backlog and not _is_held(self.backlog[-1]):
            self.backlog.pop()
        return self.backlog[-1] if self.backlog else None


def _is_held(entry: Entry) -> bool:
    return entry.place is Place.QUEUED and not entry.owed


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
        self._backlogged: OrderedDict[Account, None] = OrderedDict()

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

    def owes(self, account: Account) -> bool:
        """Whether the caller's next request is owed to him."""
        return (
            account.spent_s + account.promised_s / account.weight
            < self.most_s - SLACK * self._unit_s() / self._open_weight
        )

    def part(self, account: Account) -> float:
        """The caller's share, 0 to 1, among all who have requests open."""
        return account.weight / max(self._open_weight, account.weight)

    def promise(self, entry: Entry, account: Account, cost_s: float) -> None:
        """The request, expected to take so many GPU seconds, is owed from now on."""
        entry.owed, entry.promised_s = True, cost_s
        account.promised_s += cost_s

    def begin(self, entry: Entry, account: Account, cost_s: float) -> None:
        """Work on the request begins, and is expected to take so many GPU seconds: they are charged for at once."""
        account.promised_s -= entry.promised_s
        entry.promised_s, entry.charged_s = 0.0, cost_s
        self.charge(account, cost_s)

    def settle(self, entry: Entry, account: Account, gpu_s: float) -> None:
        """GPU time was spent on the request: what was not charged ahead is now."""
        ahead_s = min(entry.charged_s, gpu_s)
        entry.charged_s -= ahead_s
        self.charge(account, gpu_s - ahead_s)

    def hold(self, entry: Entry, account: Account) -> None:
        """The request is not owed yet."""
        account.backlog.append(entry)
        self._backlogged[account] = None

    def clear(self) -> None:
        """Hold nothing."""
        for account in self._backlogged:
            account.backlog.clear()
        self._backlogged.clear()

    def charge(self, account: Account, gpu_s: float) -> None:
        """GPU time was spent on a caller, or is about to be."""
        account.spent_s = max(account.spent_s, self.most_s - self._credit_s) + gpu_s / account.weight
        self.most_s = max(self.most_s, account.spent_s)

    def ended(self, entry: Entry, account: Account) -> None:
        """A request is over, however it ended."""
        account.promised_s -= entry.promised_s
        account.spent_s -= entry.charged_s / account.weight
        entry.promised_s = entry.charged_s = 0.0
        account.open -= 1
        if not account.open:
            account.promised_s = 0.0
            account.backlog.clear()
            self._open_weight -= account.weight
            self._backlogged.pop(account, None)
            self._idle[entry.request.caller] = account
        if self._idle and self.contended:
            self._forget()

    def _forget(self) -> None:
        """Who is silent, and as far behind as anybody can be, is as good as a new caller."""
        caller, account = next(iter(self._idle.items()))
        if account.spent_s <= self.most_s - self._credit_s:
            del self._idle[caller], self.accounts[caller]
            self.contended = len(self.accounts) > 1

    def held(self) -> Iterator[tuple[Account, Entry]]:
        """The oldest request that is not owed of each caller who has one; of the next few, where they are many.

        If its reader promises it, the caller's next one follows.
        """
        for account in list(islice(self._backlogged, MOST_LOOKED_AT)):
            self._backlogged.move_to_end(account)
            while (entry := account.oldest()) is not None:
                yield account, entry
                if not entry.owed:
                    break
            else:
                del self._backlogged[account]

    def displaced_by(self, request: Request) -> Entry | None:
        """Whose place in a full queue a new request may take: the newest of the caller with most requests open for his
        weight, if these are more than the new one's caller would have. Linear in the callers."""
        own = self.accounts.get(request.caller)
        most, displaced = (1 if own is None else own.open + 1) / request.weight, None
        for account in self._backlogged:
            if account.open / account.weight > most and account is not own and (newest := account.newest()):
                most, displaced = account.open / account.weight, newest
        return displaced
