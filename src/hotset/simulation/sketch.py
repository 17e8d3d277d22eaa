"""Latency statistics in bounded memory: exact count, mean and variance; percentiles within 0.1 %."""

from __future__ import annotations

import math

import numpy as np

RELATIVE_ERROR = 0.001
_SCALE = 1.0 / math.log((1.0 + RELATIVE_ERROR) / (1.0 - RELATIVE_ERROR))
_SMALLEST_S = 1e-9


class LatencySketch:
    """Counts in logarithmic buckets, as in DDSketch (Masson, Rim, Lee, VLDB 2019), plus exact moments.

    Every percentile is within 0.1 % of the exact nearest-rank value. A span from a microsecond to a day takes at most
    12,600 buckets, however many values there are. Values are folded in by the thousand.
    """

    __slots__ = ("_buckets", "_count", "_largest", "_mean", "_pending", "_sum_squares", "add")

    def __init__(self) -> None:
        self._pending: list[float] = []
        self.add = self._pending.append
        """Take one value, in seconds; ``fold`` must be called now and then."""
        self._count = 0
        self._mean = 0.0
        self._sum_squares = 0.0
        self._largest = 0.0
        self._buckets: dict[int, int] = {}

    def fold(self, *, at_least: int = 1) -> None:
        """Work pending values into the sketch if there are that many."""
        if len(self._pending) < at_least:
            return
        values = np.array(self._pending)
        self._pending.clear()
        mean = float(values.mean())
        delta, total = mean - self._mean, self._count + len(values)
        # Chan, Golub, LeVeque: moments of a union from the moments of its parts.
        self._sum_squares += float(((values - mean) ** 2).sum()) + delta * delta * self._count * len(values) / total
        self._mean += delta * len(values) / total
        self._count = total
        self._largest = max(self._largest, float(values.max()))
        logs = np.ceil(np.log(np.maximum(values, _SMALLEST_S)) * _SCALE).astype(np.int64)
        for bucket, count in zip(*np.unique(logs, return_counts=True), strict=True):
            self._buckets[int(bucket)] = self._buckets.get(int(bucket), 0) + int(count)

    def take_in(self, other: LatencySketch) -> None:
        """Add all values of another sketch."""
        self.fold()
        other.fold()
        if not other._count:
            return
        delta, total = other._mean - self._mean, self._count + other._count
        self._sum_squares += other._sum_squares + delta * delta * self._count * other._count / total
        self._mean += delta * other._count / total
        self._count = total
        self._largest = max(self._largest, other._largest)
        for bucket, count in other._buckets.items():
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count

    @property
    def count(self) -> int:
        self.fold()
        return self._count

    @property
    def mean(self) -> float:
        self.fold()
        return self._mean

    @property
    def variance(self) -> float:
        """Population variance, in seconds squared."""
        self.fold()
        return self._sum_squares / self._count if self._count else 0.0

    def percentile(self, q: float) -> float:
        """The nearest-rank percentile for 0 < q <= 100; 0 when nothing was added."""
        self.fold()
        rank = max(1, math.ceil(q / 100.0 * self._count))
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= rank:
                return min(math.exp(bucket / _SCALE) * (1.0 - RELATIVE_ERROR), self._largest)
        return 0.0
