"""Median, its interval and the spread."""

import math
import random

import pytest

from dsa_bench import stats


@pytest.mark.parametrize(
    ("values", "expected"), [((3.0,), 3.0), ((4.0, 1.0, 2.0), 2.0), ((4.0, 1.0, 2.0, 3.0), 2.5)]
)
def test_median_is_the_middle(values: tuple[float, ...], expected: float) -> None:
    assert stats.median(values) == expected


@pytest.mark.parametrize("function", [stats.median, stats.median_interval])
def test_no_values_is_an_error(function: object) -> None:
    with pytest.raises(ValueError, match="needs at least one value"):
        function(())  # type: ignore[operator]


@pytest.mark.parametrize(
    # ranks of the sign test at 95 %, from the binomial distribution
    ("n", "rank"),
    [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (10, 2), (12, 3), (20, 6), (50, 18), (100, 40)],
)
def test_median_interval_takes_the_order_statistics_of_the_sign_test(n: int, rank: int) -> None:
    values = [float(i) for i in range(1, n + 1)]
    random.Random(0).shuffle(values)
    assert stats.median_interval(values) == (float(rank), float(n + 1 - rank))


def test_median_interval_covers_the_true_median_as_often_as_it_says() -> None:
    rng = random.Random(1)
    hits = 0
    for _ in range(1000):
        low, high = stats.median_interval([rng.expovariate(1.0) for _ in range(20)])
        hits += low <= math.log(2) <= high
    assert 940 <= hits <= 980  # the exact coverage for 20 samples is 95.9 %


def test_median_interval_of_thousands_of_samples_does_not_underflow() -> None:
    low, high = stats.median_interval([float(i) for i in range(1, 2001)])
    assert (low, high) == (956.0, 1045.0)


def test_robust_spread_ignores_an_outlier() -> None:
    assert stats.robust_spread([9.0, 10.0, 11.0]) == pytest.approx(0.14826)
    assert stats.robust_spread([9.0, 9.0, 10.0, 11.0, 1e9]) == pytest.approx(0.14826)


def test_relative_half_width() -> None:
    assert stats.relative_half_width([9.0, 10.0, 11.0]) == pytest.approx(0.1)
    assert stats.relative_half_width([0.0, 0.0]) == math.inf
