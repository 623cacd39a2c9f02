"""Medians and intervals of samples that depend on each other; the shapes of their series."""

import math
import random
import time

import pytest

from dsa_bench import stats


def correlated(rng: random.Random, n: int, phi: float, sigma: float = 1.0) -> list[float]:
    """x_i = phi · x_(i - 1) + noise around 100, started in its stationary state."""
    x, out = rng.gauss(0, sigma) / math.sqrt(1 - phi**2), []
    for _ in range(n):
        x = phi * x + rng.gauss(0, sigma)
        out.append(100 + x)
    return out


def independent_interval(values: list[float]) -> tuple[float, float]:
    """Order statistics of the sign test, with n taken for the number of independent values."""
    ordered, n = sorted(values), len(values)
    tail, rank = 0.5**n, 0
    while tail <= 0.025:
        rank += 1
        tail += math.comb(n, rank) * 0.5**n
    return ordered[max(1, rank) - 1], ordered[-max(1, rank)]


def alternating(n: int) -> list[float]:
    """1 to n such that neighbours lie on either side of the median: never positively correlated."""
    low, high = range(1, n + 1), range(n, 0, -1)
    return [float(v) for pair in zip(low, high, strict=True) for v in pair][:n]


@pytest.mark.parametrize(
    ("values", "expected"), [((3.0,), 3.0), ((4.0, 1.0, 2.0), 2.0), ((4.0, 1.0, 2.0, 3.0), 2.5)]
)
def test_median_is_the_middle(values, expected):
    assert stats.median(values) == expected


@pytest.mark.parametrize(
    "function", [stats.median, stats.median_interval, stats.pooled, lambda v: stats.quantile(v, 0)]
)
def test_no_values_is_an_error(function):
    with pytest.raises(ValueError, match="needs at least one"):
        function(())


@pytest.mark.parametrize(
    # ranks of the sign test at 95 %, from the binomial distribution
    ("n", "rank"),
    [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (10, 2), (12, 3), (20, 6), (50, 18), (100, 40)],
)
def test_interval_takes_the_order_statistics_of_the_sign_test(n, rank):
    values = alternating(n)
    assert stats.effective_size(values) == n
    assert stats.median_interval(values) == (float(rank), float(n + 1 - rank))


def test_interval_of_thousands_of_samples_does_not_underflow():
    assert stats.median_interval(alternating(2000)) == (956.0, 1045.0)


def test_of_independent_values_the_interval_is_nearly_that_of_the_sign_test():
    rng = random.Random(2)
    for n, most in ((50, 1.25), (200, 1.15), (1000, 1.1)):
        widths = [0.0, 0.0]
        for _ in range(60):
            values = [rng.expovariate(1.0) for _ in range(n)]
            for i, interval in enumerate((independent_interval, stats.median_interval)):
                low, high = interval(values)
                widths[i] += high - low
        assert 1 <= widths[1] / widths[0] < most


@pytest.mark.parametrize(("phi", "n"), [(0.0, 30), (0.5, 100), (0.8, 300), (0.9, 500)])
def test_interval_covers_the_median_of_a_correlated_series_as_often_as_it_says(phi, n):
    rng = random.Random(n)
    hits, believed, rounds = 0, 0, 200
    for _ in range(rounds):
        values = correlated(rng, n, phi)
        low, high = stats.median_interval(values)
        hits += low <= 100 <= high
        low, high = independent_interval(values)
        believed += low <= 100 <= high
    assert hits >= 0.9 * rounds
    if phi >= 0.5:
        assert believed < 0.88 * rounds
    if phi >= 0.8:
        assert believed < 0.7 * rounds


def test_effective_size_is_that_of_the_signs():
    """Of a normal AR(1) the signs have rho(k) = 2 / pi · asin(phi^k)."""
    phi, n = 0.8, 20_000
    tau = 1 + 2 * sum(2 / math.pi * math.asin(phi**k) for k in range(1, 200))
    size = stats.effective_size(correlated(random.Random(4), n, phi))
    assert size == pytest.approx(n / tau, rel=0.15)


def test_a_step_between_blocks_widens_the_interval_and_noise_within_them_does_not():
    rng = random.Random(5)
    steady = [100 + rng.gauss(0, 1) for _ in range(400)]
    blocks = (100,) * 4
    stepped = [v + 3 * (i // 100 % 2) for i, v in enumerate(steady)]
    assert stats.effective_size(steady, blocks) > 300
    assert stats.effective_size(stepped, blocks) < 12
    low, high = stats.median_interval(stepped, blocks=blocks)
    assert low < 100.5 < 102.5 < high
    low, high = stats.median_interval(steady, blocks=blocks)
    assert high - low < 0.4


def test_products_do_not_reach_across_the_border_of_a_block():
    """Pairs alike, each pair a block: with their borders a lag of 1 is all there is."""
    rng = random.Random(6)
    values = [v for _ in range(500) for v in [rng.gauss(100, 1)] * 2]
    inside = stats.effective_size(values, (2,) * 500)
    assert inside == pytest.approx(500, rel=0.01)
    # the same pairs, cut apart: nothing is left to correlate
    assert stats.effective_size(values, (1,) * 1000) == 1000


def test_sizes_of_blocks_must_add_up():
    with pytest.raises(ValueError, match="blocks must add up to the 3 values, got 4"):
        stats.effective_size([1.0, 2.0, 3.0], (2, 2))


@pytest.mark.parametrize("n", range(1, 8))
def test_tiny_and_constant_series(n):
    assert stats.median_interval([2.0] * n) == (2.0, 2.0)
    assert stats.effective_size([2.0] * n) == n
    rising = [float(i) for i in range(n)]
    assert stats.median_interval(rising) == (0.0, n - 1.0)
    assert 1 <= stats.effective_size(rising) <= n
    assert not stats.two_modes(rising)


def test_ties_at_the_median_are_no_correlation():
    rng = random.Random(7)
    ticks = [rng.choice((1.0, 1.0, 1.0, 1.1, 1.1)) for _ in range(500)]
    assert stats.effective_size(ticks) > 350
    assert stats.median_interval(ticks) == (1.0, 1.0)


def test_a_huge_series_is_quick():
    series = correlated(random.Random(8), 2000, 0.9), [float(i) for i in range(2000)]
    for values in series:
        stats.median_interval(values)
        begin = time.process_time()
        for _ in range(5):
            stats.median_interval(values)
        # about 1 ms; 80 ms if each product were taken by itself
        assert (time.process_time() - begin) / 5 < 0.03


@pytest.mark.parametrize(
    # from tables of Student's distribution
    ("dof", "confidence", "expected"),
    [
        (1, 0.95, 12.7062),
        (2, 0.95, 4.3027),
        (3, 0.95, 3.1824),
        (4, 0.95, 2.7764),
        (9, 0.95, 2.2622),
        (30, 0.95, 2.0423),
        (1000, 0.95, 1.9623),
        (3, 0.99, 5.8409),
        (5, 0.90, 2.0150),
        (math.inf, 0.95, 1.9600),
    ],
)
def test_student_quantile(dof, confidence, expected):
    assert stats.student_quantile(dof, confidence) == pytest.approx(expected, abs=6e-5)


def test_student_quantile_between_whole_degrees_and_below_one():
    assert 3.1824 < stats.student_quantile(2.5) < 4.3027
    with pytest.raises(ValueError, match="at least 1"):
        stats.student_quantile(0.5)


def test_one_replicate_is_its_median_and_interval():
    values = alternating(100)
    found = stats.pooled([values])
    assert (found.middle, found.low, found.high) == (50.5, 40.0, 61.0)
    assert (found.replicates, found.dof) == (1, math.inf)
    assert found.log_se == pytest.approx(math.log(61 / 40) / 2 / 1.95996, rel=1e-5)


def test_error_of_few_samples_counts_what_their_range_covers():
    # of two independent values the range encloses the median half of the time: z = 0.6745
    assert stats.pooled([[1.0, 2.0]]).log_se == pytest.approx(math.log(2) / 2 / 0.67449, rel=1e-4)
    assert stats.pooled([[1.0]]).log_se == math.inf
    assert stats.pooled([[0.0, 1.0, 2.0]]).log_se == math.inf
    assert stats.pooled([[1.0] * 5]).log_se == 0


def test_of_processes_that_differ_the_process_is_the_unit():
    medians = (1.00, 1.02, 1.05)
    found = stats.pooled([[m] * 50 for m in medians])
    logs = [math.log(m) for m in medians]
    mean = sum(logs) / 3
    s = math.sqrt(sum((x - mean) ** 2 for x in logs) / 2)
    assert found.middle == pytest.approx(math.exp(mean))
    assert found.log_se == pytest.approx(s / math.sqrt(3))
    assert (found.dof, found.replicates) == (2, 3)
    assert math.log(found.high / found.middle) == pytest.approx(4.30265 * s / math.sqrt(3), 1e-5)
    assert math.log(found.middle / found.low) == pytest.approx(4.30265 * s / math.sqrt(3), 1e-5)


def test_processes_that_agree_by_luck_keep_the_error_within_them():
    values = alternating(100)
    one = stats.pooled([values])
    found = stats.pooled([values] * 4)
    assert found.log_se == pytest.approx(one.log_se / 2)
    assert found.dof == math.inf
    assert math.log(found.high / found.middle) == pytest.approx(1.95996 * one.log_se / 2, rel=1e-5)


def test_pooled_interval_covers_where_processes_have_levels_of_their_own():
    rng = random.Random(9)
    hits, rounds = 0, 300
    for _ in range(rounds):
        replicates = []
        for _ in range(3):
            level = 100 * math.exp(rng.gauss(0, 0.01))
            replicates.append([level * (1 + rng.gauss(0, 0.002)) for _ in range(30)])
        found = stats.pooled(replicates)
        hits += found.low <= 100 <= found.high
    assert 0.92 * rounds <= hits <= 0.98 * rounds


def test_pooled_uses_the_blocks_of_each_replicate():
    rng = random.Random(10)
    values = [100 + rng.gauss(0, 1) + 4 * (i // 50 % 2) for i in range(200)]
    apart = stats.pooled([values], blocks=[(50,) * 4])
    assert apart.relative_half_width > 0.02
    with pytest.raises(ValueError, match="shorter"):
        stats.pooled([values, values], blocks=[(200,)])


def test_a_median_of_zero_leaves_everything_open():
    found = stats.pooled([[0.0] * 3, [1.0, 2.0, 3.0]])
    assert (found.low, found.high, found.log_se) == (0.0, 3.0, math.inf)


def test_robust_spread_ignores_an_outlier():
    assert stats.robust_spread([9.0, 10.0, 11.0]) == pytest.approx(0.14826)
    assert stats.robust_spread([9.0, 9.0, 10.0, 11.0, 1e9]) == pytest.approx(0.14826)


def test_relative_half_width():
    assert stats.relative_half_width([9.0, 10.0, 11.0]) == pytest.approx(0.1)
    assert stats.relative_half_width([0.0, 0.0]) == math.inf


def test_quantile_goes_straight_between_two_values():
    values = [4.0, 1.0, 3.0, 2.0]
    assert [stats.quantile(values, q) for q in (0, 0.25, 0.5, 1)] == [1.0, 1.75, 2.5, 4.0]
    assert stats.quantile([7.0], 0.3) == 7.0


def test_trend_chance_is_that_of_kendalls_score():
    # 1 to 10 in order: S = 45, variance 10 · 9 · 25 / 18 = 125, z = 44 / sqrt(125)
    assert stats.trend_chance(range(10)) == pytest.approx(math.erfc(44 / math.sqrt(250)))
    assert stats.trend_chance(range(10, 0, -1)) == pytest.approx(math.erfc(44 / math.sqrt(250)))
    # ties: S = 4, variance (4 · 3 · 13 - 2 · 2 · 1 · 9) / 18
    tied = math.erfc(3 / math.sqrt(2 * (156 - 36) / 18))
    assert stats.trend_chance([1, 1, 2, 2]) == pytest.approx(tied)
    assert stats.trend_chance([1.0] * 9) == 1.0
    assert stats.trend_chance([1.0]) == 1.0


def noise(seed: int, n: int = 200, sigma: float = 0.005) -> list[float]:
    rng = random.Random(seed)
    return [1 + rng.gauss(0, sigma) for _ in range(n)]


def test_drifts_needs_an_amount_and_a_trend():
    clean = noise(11)
    assert not stats.drifts(clean)
    assert stats.drifts([v + 0.0002 * i for i, v in enumerate(clean)])
    assert stats.drifts([v - 0.0002 * i for i, v in enumerate(clean)])
    # sure, but half a percent
    assert not stats.drifts([v + 0.000035 * i for i, v in enumerate(clean)])
    # three percent between the thirds, but of five samples
    assert not stats.drifts([1.0, 1.0, 1.0, 1.03, 1.03])
    assert not stats.drifts([1.0, 2.0])


def test_two_modes_needs_a_gap_and_two_heaps():
    rng = random.Random(12)
    clean = noise(12)
    assert not stats.two_modes(clean)
    assert stats.two_modes([v + 0.05 * (rng.random() < 0.3) for v in clean])
    # a fourteenth is no second heap
    assert not stats.two_modes([v + 0.05 * (i % 14 == 0) for i, v in enumerate(clean)])
    # a gap, but below one percent
    assert not stats.two_modes([1 + 0.008 * (i % 2) for i in range(100)])
    assert stats.two_modes([1 + 0.012 * (i % 2) for i in range(100)])


def test_two_modes_are_found_beside_outliers_and_with_values_in_the_gap():
    rng = random.Random(13)
    values = [v + 0.05 * (rng.random() < 0.4) for v in noise(13)]
    assert stats.two_modes([*values, 50.0, 90.0, 1.020, 1.025, 1.030])


def test_one_heap_of_any_shape_has_no_two_modes():
    rng = random.Random(14)
    shapes = (
        lambda: rng.random() + 1,
        lambda: rng.expovariate(1.0) + 1,
        lambda: rng.lognormvariate(0, 0.3),
        lambda: rng.gauss(1, 0.02),
    )
    for shape in shapes:
        assert not any(stats.two_modes([shape() for _ in range(300)]) for _ in range(20))


def test_outlier_share():
    quartiles = [1.0, 1.1, 1.2, 1.3, 1.4] * 10
    # Q1 1.1, Q3 1.3: the limit is 1.9
    assert stats.outlier_share(quartiles) == 0
    assert stats.outlier_share([*quartiles, 1.89]) == 0
    assert stats.outlier_share([*quartiles, 1.91]) == pytest.approx(1 / 51)
    assert stats.outlier_share([*quartiles, 0.01]) == 0
    # a tick of the clock is none
    assert stats.outlier_share([1.0] * 80 + [1.001] * 20) == 0


def test_processes_differ_beyond_their_own_intervals():
    def each(middle: float, half_width: float) -> stats.Estimate:
        low, high = middle - half_width, middle + half_width
        return stats.Estimate(
            middle=middle, low=low, high=high, replicates=1, log_se=0.0, dof=math.inf
        )

    for other, half_width, expected in (
        (1.011, 0.001, True),
        (1.009, 0.001, False),
        (1.030, 0.014, True),
        (1.030, 0.016, False),
    ):
        found = [each(1.0, half_width), each(other, half_width)]
        assert stats.processes_differ(found) is expected
    assert not stats.processes_differ([each(1.0, 0.1)])


def test_processes_of_one_level_do_not_differ():
    single = [stats.pooled([noise(seed, sigma=0.02)]) for seed in range(15, 20)]
    assert not stats.processes_differ(single)
