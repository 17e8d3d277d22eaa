"""Latency statistics in bounded memory: exact count, mean and variance; percentiles within 0.1 %."""

from __future__ import annotations

import math

RELATIVE_ERROR = 0.001
_SCALE = 1.0 / math.log((1.0 + RELATIVE_ERROR) / (1.0 - RELATIVE_ERROR))
_SMALLEST_S = 1e-9


class LatencySketch:
    """Counts in logarithmic buckets, as in DDSketch (Masson, Rim, Lee, VLDB 2019), plus Welford's moments.

    Every percentile is within 0.1 % of the exact nearest-rank value. A span from a microsecond to a day takes at most
    12,600 buckets, however many values there are.
    """

    __slots__ = ("_buckets", "count", "largest", "mean", "sum_squares")

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.sum_squares = 0.0
        """Sum of squared distances from the mean."""
        self.largest = 0.0
        self._buckets: dict[int, int] = {}

    def add(self, value_s: float) -> None:
        self.count += 1
        delta = value_s - self.mean
        self.mean += delta / self.count
        self.sum_squares += delta * (value_s - self.mean)
        if value_s > self.largest:
            self.largest = value_s
        bucket = math.ceil(math.log(value_s) * _SCALE) if value_s > _SMALLEST_S else -1_000_000
        buckets = self._buckets
        buckets[bucket] = buckets.get(bucket, 0) + 1

    @property
    def variance(self) -> float:
        """Population variance, in seconds squared."""
        return self.sum_squares / self.count if self.count else 0.0

    def percentile(self, q: float) -> float:
        """The nearest-rank percentile for 0 < q <= 100; 0 when nothing was added."""
        rank = max(1, math.ceil(q / 100.0 * self.count))
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= rank:
                if bucket == -1_000_000:
                    return 0.0
                upper = math.exp(bucket / _SCALE)
                return min(upper * (1.0 - RELATIVE_ERROR), self.largest)
        return 0.0
