"""The latency sketch: exact moments, percentiles within 0.1 %, memory that does not grow with the values."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.simulation.sketch import RELATIVE_ERROR, LatencySketch

latencies = st.floats(1e-6, 1e5)


def sketch_of(values: list[float]) -> LatencySketch:
    sketch = LatencySketch()
    for value in values:
        sketch.add(value)
    return sketch


@given(values=st.lists(latencies, min_size=1, max_size=200), q=st.sampled_from((1, 50, 95, 99, 100)))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_percentiles_are_within_a_thousandth_of_the_nearest_rank(values: list[float], q: int):
    exact = sorted(values)[max(1, math.ceil(q / 100 * len(values))) - 1]
    assert sketch_of(values).percentile(q) == pytest.approx(exact, rel=RELATIVE_ERROR * 1.001)


@given(parts=st.lists(st.lists(latencies, max_size=30), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_count_mean_and_variance_are_exact_however_the_values_come(parts: list[list[float]]):
    sketch, values = LatencySketch(), [value for part in parts for value in part]
    for part in parts:
        for value in part:
            sketch.add(value)
        sketch.fold()
    assert sketch.count == len(values)
    if values:
        assert sketch.mean == pytest.approx(statistics.fmean(values))
        assert sketch.variance == pytest.approx(statistics.pvariance(values), rel=1e-6, abs=1e-9)


def test_nothing_added_nothing_known():
    sketch = LatencySketch()
    assert (sketch.count, sketch.mean, sketch.variance, sketch.percentile(99)) == (0, 0.0, 0.0, 0.0)


def test_a_latency_of_nothing_is_counted():
    sketch = sketch_of([0.0, 0.0, 1.0])
    assert sketch.percentile(50) == pytest.approx(0.0, abs=1e-8)
    assert sketch.percentile(100) == pytest.approx(1.0, rel=RELATIVE_ERROR * 1.001)


def test_folding_waits_for_enough_values():
    sketch = sketch_of([1.0] * 10)
    sketch.fold(at_least=11)
    assert len(sketch._pending) == 10
    sketch.fold(at_least=10)
    assert sketch._pending == []


def test_memory_grows_with_the_span_and_not_with_the_count():
    rng, sketch = random.Random(1), LatencySketch()
    for _ in range(60):
        for _ in range(1_000):
            sketch.add(rng.lognormvariate(0.0, 3.0))
        sketch.fold()
    assert sketch.count == 60_000
    assert len(sketch._buckets) < 12_600
    assert sketch._pending == []
