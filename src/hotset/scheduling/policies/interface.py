"""What a policy is: a function from the cluster's state to the next placement."""

from __future__ import annotations

from enum import Enum
from typing import Protocol

import msgspec

from hotset.scheduling.cluster import Cluster, GpuState
from hotset.scheduling.queue import Entry


class Rule(Enum):
    """Why a request was placed where it was (PAPER: LALB's rules; shown by ``hotset explain``)."""

    NEXT_IDLE = "next idle GPU, whatever it holds"
    HIT_HERE = "the GPU idle longest holds the model"
    HIT_ELSEWHERE = "another idle GPU holds the model"
    NOWHERE = "no GPU holds the model"
    WAIT_FOR_HOLDER = "waiting for the busy holder is shorter than a load"
    LOAD_IS_SHORTER = "a load is shorter than waiting for the busy holder"
    HOLDER_AWAITED = "the busy holder is left to an older request that fits nowhere else"
    NO_MORE_COPIES = "as many GPUs hold the model as may; this one is done first"
    OUT_OF_ORDER_HIT = "the GPU holds the model of a younger request"
    CHEAPEST_ROOM = "no GPU holds the model; room costs least here"
    EXTRA_COPY = "its holders cannot drain its line as soon as another copy can help"
    SHORTER_LOAD = "requests queue up, and with a load this model's take far less GPU time than the hits at hand"
    MOST_ENDED = "more is asked for than can be answered in time; this ends most waiting per second of GPU time"
    LONGER_RUN = "GPUs swap models more than they run them: this one stays with its model for a while"
    OLDEST_FIRST = "it was passed over as often, or has waited as long, as is allowed"
    AHEAD = "every GPU is taken; the model is loaded ahead where it can run soonest"
    FAIR_HIT = "the least served function whose model is on an idle GPU"
    FAIR_MISS = "the least served function; its model has to be loaded"
    DRAWN_HOLDER = "the less loaded of two holders drawn by lot"
    DRAWN = "the less loaded of two GPUs drawn by lot"
    SOONEST_DUE = "of the requests whose model is on an idle GPU, the one that must start soonest"
    MOST_UNMET = "its model's demand most exceeds what the GPUs that hold it can serve"
    LEAST_START = "it is expected to start here first"
    LOCAL_QUEUE = "head of the GPU's local queue"
    JOINED = "joined a run of its model that was about to begin"
    RETRY = "second try after its process died"


class PolicySettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that some policies read."""

    o3_limit: int = 25
    """LALB+O3: most times a request may be passed over by younger ones."""
    max_skips: int = 10_000
    """hotset: the same. One much below a load's worth of requests turns an out-of-order queue back into thrash."""
    max_wait_s: float = 60.0
    """hotset: a request that has waited so long is passed over no more; while GPUs thrash, by none for longer than four
    loads' time (``thrash.py``). The same caution: several loads at least."""

    overrun_s: float = 10.0
    """mqfq_sticky: how much more service than the least served function one may have had before it must wait."""


class Placement(msgspec.Struct, frozen=True, gc=False):
    """One decision: this request on that GPU, now or (``local``) after what the GPU already has."""

    entry: Entry
    gpu: GpuState
    rule: Rule
    local: bool = False
    skips: bool = False
    """It passes over every older waiting request."""
    waited_s: float = 0.0
    """Estimated wait for the earliest busy holder, where the rule compared one."""


class Policy(Protocol):
    """A scheduling policy. It keeps no state about the cluster; ``Cluster`` has it all.

    One that bounds how often a request may be passed over by younger ones, on GPUs that could have taken it, says so in
    an attribute ``most_skips``; the tests hold it to that.
    """

    name: str

    def next_placement(self, cluster: Cluster, now_s: float) -> Placement | None:
        """The next placement, or None when nothing more can be placed now.

        Called again after each placement was carried out, until it answers None.
        """
        ...
