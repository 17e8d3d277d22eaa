"""The global queue: requests in order of arrival, also found by model, with the skips the O3 bound needs.

Every operation is O(1) amortised, but for a cancellation from within a model's own line. A request that leaves from the
middle stays behind as a *hole* until the requests before it are gone. The number of holes left by out-of-order
dispatches *is* the number of times the head was skipped: each such dispatch passed over every older request, hence over
the head. No counter per request is kept.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from enum import Enum, IntEnum
from typing import TYPE_CHECKING

import msgspec

from hotset.vocabulary import NORMAL_PRIORITY, Request

if TYPE_CHECKING:
    from hotset.scheduling.fairness import Account


class Place(Enum):
    """Where a request that has not ended is."""

    QUEUED = "queued"
    """In the global queue."""
    GATHERING = "gathering"
    """Held back for others of its model to join it (``gathering.py``)."""
    LOCAL = "local"
    """In a GPU's local queue (LALB, rule 2d; with overlap, also while its model is loaded for it)."""
    RETRY = "retry"
    """Waiting for another GPU after its process died."""
    ASSIGNED = "assigned"
    """On a GPU: loading or running."""


class Share(IntEnum):
    """How a request stands to its caller's share of the GPUs' time (``fairness.py``); the least goes first."""

    WITHIN = 0
    """Its caller is within his share, as everybody is where there is no crowd."""
    BEHIND = 1
    """Its caller asks for more than that, but has had less than others."""
    BEYOND = 2
    """And he has had no less."""


class Standing(msgspec.Struct, frozen=True, order=True):
    """Which requests go before which (``standing.py``); the least goes first."""

    rank: int = -NORMAL_PRIORITY
    """The negative priority."""
    share: Share = Share.WITHIN
    relaxed: bool = True
    """No deadline presses."""

    @property
    def priority(self) -> int:
        return -self.rank


class Entry(msgspec.Struct, gc=False, eq=False):
    """A request on its way through the scheduler."""

    request: Request
    model: str
    seq: int = 0
    """Order of arrival; ties in time break by it."""
    place: Place = Place.QUEUED
    attempts: int = 0
    """Loads and runs that it was lost with."""
    avoid_gpu: str = ""
    """The GPU whose process died with this request (a retry goes elsewhere if it can)."""
    cancelled: bool = False
    """Ended early while on a GPU: its client left or its deadline passed."""
    gpu_id: str = ""
    """The GPU it is on, or whose local queue it is in."""
    local_cost_s: float = 0.0
    """What it adds to that local queue's estimate."""
    loaded_on: str = ""
    """The GPU that loads, or has loaded, its model for it while it waits in that local queue (overlap)."""
    queue: GlobalQueue | None = None
    """The queue it is in, or was in last."""
    account: Account | None = None
    """What is spent on it goes on its caller's account."""
    share: Share = Share.WITHIN
    run_s: float = 0.0
    """GPU seconds that its caller waits for on its account."""
    promised_s: float = 0.0
    """GPU seconds that it was expected to take when it was found that its caller is behind, even with it."""
    charged_s: float = 0.0
    """GPU seconds that its caller's account was charged with ahead, and that were not spent on it yet."""
    since_s: float = 0.0
    """When it began to wait in the standing that it has: when it arrived, or when that improved."""
    expected: bool = False
    """It counts for the rate at which its model is asked for."""
    pressed: bool = False
    """Its deadline leaves little more time than it takes."""
    in_fifo: bool = False
    skipped_over: bool = False
    """It left the queue past older requests; its hole counts as one skip of each of them."""


def _by_seq(entry: Entry) -> int:
    return entry.seq


class GlobalQueue:
    """Requests that are bound to no GPU yet (late binding)."""

    def __init__(self, standing: Standing = Standing()) -> None:  # noqa: B008 -- frozen
        self.standing = standing
        """Of all requests in it."""
        self._fifo: deque[Entry] = deque()
        self.models: OrderedDict[str, deque[Entry]] = OrderedDict()
        """The models somebody waits for (read only), each with its line, oldest first; the newest lines last."""
        self.waiting = 0
        """How many requests wait (read only)."""
        self.skips_of_head = 0
        """How often the oldest waiting request was passed over by a younger one (read only)."""
        self.returns = 0
        """How often requests were given back: what a policy remembers of the lines is void then (read only)."""
        self._holes = 0

    def push(self, entry: Entry) -> None:
        entry.place = Place.QUEUED
        entry.queue = self
        entry.in_fifo = True
        self._fifo.append(entry)
        line = self.models.get(entry.model)
        if line is None:
            self.models[entry.model] = deque((entry,))
        else:
            line.append(entry)
        self.waiting += 1

    def give_back(self, entries: list[Entry]) -> None:
        """Take back requests that had left the queue, each to its place in order of arrival.

        Linear in the queue: it happens when a GPU is lost. Those that passed over a request while it was away count as
        skips of it too; one that comes back to its hole no longer counts as a skip of anyone.
        """
        if not entries:
            return
        self.returns += 1
        absent = [entry for entry in entries if not entry.in_fifo]
        for entry in entries:
            if entry.in_fifo:
                self._holes -= 1
            entry.in_fifo = True
            entry.skipped_over = False
            entry.place = Place.QUEUED
            line = [*self.models.get(entry.model, ()), entry]
            self.models[entry.model] = deque(sorted(line, key=_by_seq))
        self._fifo = deque(sorted([*self._fifo, *absent], key=_by_seq))
        self.skips_of_head = sum(entry.skipped_over for entry in self._fifo)
        self.waiting += len(entries)

    def take(self, entry: Entry, place: Place, *, skips: bool) -> None:
        """Remove a waiting request. ``skips``: it passed over older ones, and each of those counts it."""
        entry.place = place
        entry.skipped_over = skips
        self.waiting -= 1
        line = self.models[entry.model]
        if line[0] is entry:
            line.popleft()
        else:
            line.remove(entry)  # a cancelled request, or one that gets a further copy of its model
        if not line:
            del self.models[entry.model]
        if self._fifo[0] is entry:
            self._fifo.popleft()
            entry.in_fifo = False
            self._drop_leading_holes()
        else:
            if skips:
                self.skips_of_head += 1
            self._holes += 1
            useless = self._holes - self.skips_of_head
            if useless > 64 and useless > 4 * self.waiting:
                self._compact()

    def leave(self, entry: Entry) -> None:
        """Remove a waiting request that goes on waiting in another queue: it leaves no hole and skips nobody.

        Linear in the requests before it, of which there are few: it is its caller's oldest, or has waited long.
        """
        self.waiting -= 1
        line = self.models[entry.model]
        line.remove(entry)
        if not line:
            del self.models[entry.model]
        self._fifo.remove(entry)
        entry.in_fifo = False
        self._drop_leading_holes()

    def head(self) -> Entry | None:
        """The oldest waiting request."""
        return self._fifo[0] if self.waiting else None

    def first_of(self, model: str) -> Entry | None:
        """The oldest waiting request for this model."""
        line = self.models.get(model)
        return line[0] if line is not None else None

    def last(self) -> Entry | None:
        """The newest waiting request."""
        return next((entry for entry in reversed(self._fifo) if entry.place is Place.QUEUED), None)

    def waiting_for(self, model: str) -> int:
        """How many requests wait for this model."""
        line = self.models.get(model)
        return len(line) if line is not None else 0

    def set_back(self, models: list[str]) -> None:
        """Move these models' lines to the end of ``models``: whoever looks only at the first few has seen them."""
        for model in models:
            self.models.move_to_end(model)

    def in_order(self) -> Iterator[Entry]:
        """Every waiting request, oldest first."""
        return (entry for entry in self._fifo if entry.place is Place.QUEUED)

    def _drop_leading_holes(self) -> None:
        fifo, queued, holes, skips = self._fifo, Place.QUEUED, 0, 0
        while fifo and (entry := fifo[0]).place is not queued:
            holes += 1
            if entry.skipped_over:
                skips += 1
            entry.in_fifo = False
            fifo.popleft()
        self._holes -= holes
        self.skips_of_head -= skips

    def _compact(self) -> None:
        """Drop the holes that count for nothing (cancelled, or joined to another's run)."""
        kept: deque[Entry] = deque()
        for entry in self._fifo:
            if entry.place is Place.QUEUED or entry.skipped_over:
                kept.append(entry)
            else:
                entry.in_fifo = False
                self._holes -= 1
        self._fifo = kept
