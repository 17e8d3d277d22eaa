"""Thrashing: GPUs spend more of their time on swapping models than on running them, while requests queue up.

The models in demand are then more than fit, and the load is more than the swaps leave time for. Order of arrival makes
it worse: each request finds its model gone. The guard says so, and says when it is over; the policy answers.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from hotset.scheduling.cluster import Cluster

WINDOW_LOADS = 5.0
"""GPU time that one judgement rests on, in typical loads of each GPU."""
MOST_SWAPPING = 0.5
"""Share of the GPUs' time that swaps may take."""
MOST_EPISODES = 32


class Episode(msgspec.Struct, gc=False):
    """A time of thrashing."""

    since_s: float
    swapping: float
    """Share of the GPUs' time that swaps took when it was worst, 0 to 1."""
    until_s: float | None = None
    """None: it goes on."""


class ThrashGuard:
    """Judges by what the GPUs did; constant time, and only where something is swapped."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.run_s = 0.0
        """Time spent on runs since the last judgement; the Scheduler adds to it."""
        self._swap_s = 0.0
        self.episodes: deque[Episode] = deque(maxlen=MOST_EPISODES)
        """The newest last (read only)."""

    def swapped(self, load_s: float, now_s: float) -> None:
        """A load begins for which another model leaves, and takes about so long."""
        self._swap_s += load_s
        cluster, busy_s = self._cluster, self._swap_s + self.run_s
        if not busy_s or busy_s < WINDOW_LOADS * cluster.profiles.typical_load_s() * len(cluster.gpus):
            return
        swapping, episode = self._swap_s / busy_s, self.episode(now_s)
        self._swap_s = self.run_s = 0.0
        if swapping > MOST_SWAPPING and self._is_crowded():
            if episode is None:
                self.episodes.append(Episode(now_s, swapping))
            else:
                episode.swapping = max(episode.swapping, swapping)

    def episode(self, now_s: float) -> Episode | None:
        """The one that goes on; it ends once no more requests wait than there are GPUs."""
        episode = self.episodes[-1] if self.episodes else None
        if episode is None or episode.until_s is not None:
            return None
        if not self._is_crowded():
            episode.until_s = now_s
            return None
        return episode

    def _is_crowded(self) -> bool:
        return self._cluster.queues.waiting > len(self._cluster.gpus)
