"""Means over seeds and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hotset.errors import ConfigurationError


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, summed exactly so that it does not depend on the order."""
    return math.fsum(values) / len(values)


def confidence_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean of independent values; None for fewer than two, of which nothing is known.

    The values are one figure of one run per seed, so the interval says what another set of seeds would give, not what
    another workload would.
    """
    count = len(values)
    if count < 2:
        return None
    try:
        from scipy.special import stdtrit  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigurationError("confidence intervals need scipy: pip install 'hotset[sim]'") from None
    centre = mean(values)
    half = float(stdtrit(count - 1, 0.5 + level / 2)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return centre - half, centre + half
