"""Where the middle of some samples lies, how sure that is, and how far they spread."""

import math
from collections.abc import Sequence
from functools import cache

MAD_TO_SIGMA = 1.4826
"""1 / (75th percentile of the normal distribution): makes the MAD an estimate of sigma."""


def median(values: Sequence[float]) -> float:
    """Middle value; of an even number of values the mean of the two in the middle."""
    if not values:
        raise ValueError("median needs at least one value, got none")
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the true median from order statistics: no assumption on the distribution.

    The r-th smallest and r-th largest value enclose the median with probability 1 - 2 ·
    P(Binomial(n, 1/2) < r); r is the largest that keeps this at or above `confidence`. Fewer than
    six values cannot give 95 %: the answer is then (min, max).
    """
    if not values:
        raise ValueError("median_interval needs at least one value, got none")
    ordered = sorted(values)
    rank = _interval_rank(len(ordered), confidence)
    return ordered[rank - 1], ordered[-rank]


@cache
def _interval_rank(n: int, confidence: float) -> int:
    # in whole numbers, for 2**-n underflows in a long run
    allowed = 2**n * round((1.0 - confidence) * 1_000_000) // 2_000_000
    rank, tail = 0, 1
    while tail <= allowed:
        rank += 1
        tail += math.comb(n, rank)
    return max(1, rank)


def relative_half_width(values: Sequence[float]) -> float:
    """Half the width of `median_interval` as a share of the median; infinite where that is 0."""
    low, high = median_interval(values)
    middle = median(values)
    return (high - low) / 2 / middle if middle else math.inf


def robust_spread(values: Sequence[float]) -> float:
    """1.4826 · MAD / median: the coefficient of variation that outliers do not move."""
    middle = median(values)
    deviation = median([abs(value - middle) for value in values])
    return MAD_TO_SIGMA * deviation / middle if middle else math.inf
