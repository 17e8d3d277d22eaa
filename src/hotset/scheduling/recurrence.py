"""What recurs: which models are about to be called, by what arrivals alone have told (``prefetch.py`` acts on it).

Two habits are learned. *Succession*: a call of one model is followed, within seconds, by one of another that had been
quiet (B reads what A wrote). *Rhythm*: a model is called at regular intervals, however long they are (every ten
minutes, every night at three). Both look at *episodes*: calls of a model that are less than ``EPISODE_S`` apart are
one, as a model in use needs no guessing.

A model that a guess was made for is not guessed again until somebody calls it; one whose guesses came to nothing is
passed over ever longer. Time and memory are constant for each call and model.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush

import msgspec

from hotset.scheduling.cluster import Cluster

EPISODE_S = 30.0
"""A model that was quiet for so long begins a new episode."""
SUCCESSION_S = 15.0
"""An episode that begins so soon after another model's may follow from it; a guess is tried for so long."""
MOST_RECENT = 16
"""Episodes that a new one may follow from, the newest."""
MOST_SUCCESSORS = 8
"""Counted for each model; the rarest gives way."""
LEAST_EPISODES = 5
"""Of a model, before a succession is believed."""
LEAST_INTERVALS = 3
"""Of a model, before a rhythm is believed."""
DOUBT = 2.0
"""Episodes without a successor that every model is taken to have had: few observations say little."""
LEAST_LIKELY = 0.6
"""A guess is made from this share of episodes with that successor on."""
MOST_COUNTED = 64
"""Counts are halved there, so that habits may change."""
MOST_IRREGULAR = 0.1
"""Mean deviation of a model's intervals, as a share of their mean, up to which they are a rhythm."""
NEWEST_WEIGHT = 0.25
"""Of an interval, in mean and deviation."""
RHYTHM_LIKELY = 0.75
"""What a rhythm's next beat is taken to be worth."""
EARLY_LOADS = 1.5
EARLY_DEVIATIONS = 2.0
"""How long before the expected beat a load is due."""
MOST_PASSED_OVER = 64
MOST_EXPECTED = 32
"""Models at a time; the longest expected give way."""


class Expected(msgspec.Struct, frozen=True, gc=False):
    """A model that is about to be called."""

    likely: float
    """About how probable that is."""
    until_s: float
    """Later it is no longer expected."""


class _Habits:
    """What is known of one model."""

    __slots__ = (
        "began_s",
        "deviation_s",
        "due_s",
        "episodes",
        "failures",
        "guessed",
        "intervals",
        "last_s",
        "mean_s",
        "passed_over",
        "successors",
    )

    def __init__(self) -> None:
        self.last_s = 0.0
        self.began_s = 0.0
        """The newest episode."""
        self.episodes = 0.0
        self.successors: dict[str, float] = {}
        """Model -> episodes that one of its own followed."""
        self.intervals = 0
        self.mean_s = 0.0
        self.deviation_s = 0.0
        self.due_s = 0.0
        """When a guess is due by its rhythm."""
        self.guessed = False
        """A guess was made, and nobody has called it since."""
        self.failures = 0
        """Guesses in a row that came to nothing."""
        self.passed_over = 0
        """Times that it will not be guessed, whatever suggests it."""


class Recurrence:
    """Learns habits and tells whom they make expect."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._habits: dict[str, _Habits] = {}
        self._recent: deque[tuple[str, float]] = deque(maxlen=MOST_RECENT)
        """Episodes: model and beginning, oldest first."""
        self._agenda: list[tuple[float, str]] = []
        """A heap of guesses due by rhythm; those that were overtaken by a call are passed over."""
        self.expected: dict[str, Expected] = {}
        """Models that no GPU holds, longest expected first (read only)."""

    @property
    def wakeup_s(self) -> float | None:
        """When the next guess is due by rhythm."""
        return self._agenda[0][0] if self._agenda else None

    def arrived(self, name: str, now_s: float) -> None:
        """Somebody calls the model."""
        habits = self._habits.get(name)
        if habits is None:
            habits = self._habits[name] = _Habits()
        elif now_s - habits.last_s < EPISODE_S:
            habits.last_s = now_s
            return
        self._episode_begins(name, habits, now_s)

    def advance(self, now_s: float) -> None:
        """Time passes: beats are expected, and what did not come no longer is."""
        agenda = self._agenda
        while agenda and agenda[0][0] <= now_s:
            due_s, name = heappop(agenda)
            habits = self._habits.get(name)
            if habits is not None and habits.due_s == due_s:
                self._expect(name, RHYTHM_LIKELY, now_s)
        for name, each in list(self.expected.items()):
            if now_s >= each.until_s or self._cluster.cache.copies(name) or not self._cluster.is_deployed(name):
                del self.expected[name]

    def guessed(self, name: str) -> None:
        """The model is being loaded because it is expected."""
        del self.expected[name]
        self._habits[name].guessed = True

    def forget(self, name: str) -> None:
        """The model is gone for good."""
        self._habits.pop(name, None)
        self.expected.pop(name, None)

    def _episode_begins(self, name: str, habits: _Habits, now_s: float) -> None:
        self.expected.pop(name, None)
        if habits.guessed:
            habits.guessed = False
            habits.failures = 0 if self._cluster.cache.copies(name) else habits.failures + 1
            habits.passed_over = min(2**habits.failures, MOST_PASSED_OVER) if habits.failures else 0
        self._learn_rhythm(name, habits, now_s)
        self._learn_succession(name, now_s)
        if habits.episodes >= MOST_COUNTED:
            habits.episodes /= 2
            habits.successors = {model: count / 2 for model, count in habits.successors.items()}
        if habits.episodes >= LEAST_EPISODES:
            for model, count in habits.successors.items():
                likely = count / (habits.episodes + DOUBT)
                if likely >= LEAST_LIKELY:
                    self._expect(model, likely, now_s)
        habits.episodes += 1.0
        habits.last_s = habits.began_s = now_s
        self._recent.append((name, now_s))

    def _learn_succession(self, name: str, now_s: float) -> None:
        seen = {name}
        for model, began_s in reversed(self._recent):
            if now_s - began_s > SUCCESSION_S:
                return
            before = self._habits.get(model)
            if before is not None and model not in seen:
                seen.add(model)
                successors = before.successors
                if name not in successors and len(successors) >= MOST_SUCCESSORS:
                    del successors[min(successors, key=successors.__getitem__)]
                successors[name] = successors.get(name, 0.0) + 1.0

    def _learn_rhythm(self, name: str, habits: _Habits, now_s: float) -> None:
        if not habits.episodes:
            return
        interval_s = now_s - habits.began_s
        habits.intervals += 1
        if habits.intervals == 1:
            habits.mean_s = interval_s
            return
        weight = max(NEWEST_WEIGHT, 1.0 / habits.intervals)
        habits.deviation_s += weight * (abs(interval_s - habits.mean_s) - habits.deviation_s)
        habits.mean_s += weight * (interval_s - habits.mean_s)
        gpu = next(iter(self._cluster.gpus.values()), None)
        if gpu is None or habits.intervals < LEAST_INTERVALS:
            return
        if habits.deviation_s <= MOST_IRREGULAR * habits.mean_s:
            early_s = EARLY_DEVIATIONS * habits.deviation_s + EARLY_LOADS * self._cluster.load_s(name, gpu)
            habits.due_s = now_s + habits.mean_s - early_s
            heappush(self._agenda, (habits.due_s, name))

    def _expect(self, name: str, likely: float, now_s: float) -> None:
        habits = self._habits.get(name)
        if habits is None or habits.guessed or self._cluster.cache.copies(name):
            return
        if habits.passed_over:
            habits.passed_over -= 1
            return
        if len(self.expected) >= MOST_EXPECTED:
            del self.expected[next(iter(self.expected))]
        self.expected[name] = Expected(likely, now_s + SUCCESSION_S)
