"""Where the middle of some samples lies, how sure that is, and what their series looks like.

Nothing here takes samples of one process for independent. Calls that follow each other share a
clock, a temperature and a state of the caches, so n samples tell less than n independent ones
would: `effective_size` says as much as how many.
"""

import itertools
import math
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, stdev

MAD_TO_SIGMA = 1.4826
"""1 / (75th percentile of the normal distribution): makes the MAD an estimate of sigma."""
MATTERS = 0.01
"""Share of the median below which no pattern in the samples is worth a word."""
LAG_SHARE = 0.25
"""Longest lag of the autocorrelation, as a share of the samples: beyond it, few pairs are left."""
DRIFT_CHANCE = 0.01
GAP_IN_MADS = 3.0
MINOR_SHARE = 0.1
MINOR_SAMPLES = 5
OUTLIER_IQRS = 3.0
UNSTEADY_HALF_WIDTHS = 2.0
SURE_NORMAL = 1e6
"""Degrees of freedom from which Student's t is the normal distribution in nine digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """The median of a case, its interval, and what a comparison needs to know of it."""

    middle: float
    low: float
    high: float
    replicates: int
    log_se: float
    """Standard error of log(middle); infinite where the samples cannot tell, as of one sample."""
    dof: float
    """Degrees of freedom of `log_se`: infinite if it comes from within the processes."""

    @property
    def relative_half_width(self) -> float:
        """Half the width of the interval as a share of the middle."""
        return (self.high - self.low) / 2 / self.middle if self.middle else math.inf


def median(values: Sequence[float]) -> float:
    """Middle value; of an even number of values the mean of the two in the middle."""
    if not values:
        raise ValueError("median needs at least one value, got none")
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def median_interval(
    values: Sequence[float], confidence: float = 0.95, *, blocks: Sequence[int] = ()
) -> tuple[float, float]:
    """Interval of the true median from order statistics: no assumption on the distribution.

    Of n independent values the r-th smallest and r-th largest enclose the median with probability
    1 - 2 · P(Binomial(n, 1/2) < r); r is the largest that keeps this at or above `confidence`.
    Here n is the effective size, and the ranks are those at the same quantiles of all the values.
    Where the effective size is below six, 95 % cannot be had: the answer is then (min, max).
    `blocks`: how many of the values each visit gave.
    """
    if not values:
        raise ValueError("median_interval needs at least one value, got none")
    low, high, _ = _interval(values, confidence, blocks)
    return low, high


def _interval(
    values: Sequence[float], confidence: float, blocks: Sequence[int]
) -> tuple[float, float, float]:
    """Both ends, and the confidence that they have."""
    ordered, n = sorted(values), len(values)
    size = int(effective_size(values, blocks))
    rank = _interval_rank(size, confidence)
    place = max(1, (n + 1) * rank // (size + 1))
    reached = confidence if rank else 1 - 2.0 ** (1 - size)
    return ordered[place - 1], ordered[-place], reached


@cache
def _interval_rank(n: int, confidence: float) -> int:
    """Rank of the low end among n independent values; 0 if they are too few."""
    # in whole numbers, for 2**-n underflows in a long run
    allowed = 2**n * round((1.0 - confidence) * 1_000_000) // 2_000_000
    rank, chances, tail = 0, 1, 1
    while tail <= allowed:
        rank += 1
        chances = chances * (n - rank + 1) // rank
        tail += chances
    return rank


def effective_size(values: Sequence[float], blocks: Sequence[int] = ()) -> float:
    """How many independent values would pin the median down as well as these: n / tau.

    tau = max(1, 1 + 2 · sum of the autocorrelations of sign(value - median)): the error of a median
    grows with those of its signs, not of the values. Lags are summed in pairs up to the first pair
    that isn't positive (Geyer's initial positive sequence), at most a quarter of n. Products do not
    reach across the borders of `blocks`, for in between other cases ran; a level that differs
    between blocks shows as correlation within them.
    """
    n = len(values)
    if blocks and sum(blocks) != n:
        raise ValueError(f"blocks must add up to the {n} values, got {sum(blocks)}")
    products = _sign_products(values, blocks)
    variance = next(products)
    if not variance:
        return float(n)
    total = 0.0
    # both arguments are the same iterator: zip takes two lags at a time
    lags = itertools.chain((variance,), products)
    for even, odd in zip(lags, lags, strict=False):
        if even + odd <= 0:
            break
        total += even + odd
    return max(1.0, n / max(1.0, 2 * total / variance - 1))


def _sign_products(values: Sequence[float], blocks: Sequence[int]) -> Iterator[float]:
    """For lag 0, 1, …: the sum of s_i · s_(i + lag) over pairs of one block, s the centred signs.

    The signs are kept as bits of whole numbers, so that a lag costs a few operations on 2000 bits.
    """
    n, middle = len(values), median(values)
    above = _bits(value > middle for value in values)
    below = _bits(value < middle for value in values)
    mean = (above.bit_count() - below.bit_count()) / n
    borders = set(itertools.accumulate(blocks))
    joined = _bits(i + 1 not in borders for i in range(n - 1))
    pairs = 2**n - 1
    for lag in range(int(LAG_SHARE * n) + 2):
        plus, minus = above >> lag, below >> lag
        equal = (pairs & ((above & plus) | (below & minus))).bit_count()
        opposite = (pairs & ((above & minus) | (below & plus))).bit_count()
        first = (pairs & above).bit_count() - (pairs & below).bit_count()
        second = (pairs & plus).bit_count() - (pairs & minus).bit_count()
        yield equal - opposite - mean * (first + second) + mean**2 * pairs.bit_count()
        pairs &= joined >> lag


def _bits(flags: Iterable[bool]) -> int:
    return int("".join("1" if flag else "0" for flag in flags)[::-1] or "0", 2)


def pooled(
    replicates: Sequence[Sequence[float]],
    *,
    blocks: Sequence[Sequence[int]] = (),
    confidence: float = 0.95,
) -> Estimate:
    """The median of a case over its replicates; one replicate is the samples of a fresh process.

    Processes differ by where their memory lies, what was compiled and how warm the card was, and no
    number of samples within one shows that: the process is what is repeated, and R of them are R
    values. So the middle is exp(mean of the logarithms of their medians) and half of the width of
    its interval in logarithms is the larger of

        t(R - 1) · s / sqrt(R)              s: standard deviation of the R logarithms
        z · sqrt(sum of se_i squared) / R   se_i: from the interval within process i

    The second keeps a few medians that agree by luck from looking surer than their samples are. A
    single process has its own interval alone: how the next one would differ isn't known.
    """
    if not replicates:
        raise ValueError("pooled needs at least one replicate, got none")
    cuts = blocks or [()] * len(replicates)
    single = [_single(v, confidence, b) for v, b in zip(replicates, cuts, strict=True)]
    if len(single) == 1:
        return single[0]
    count = len(single)
    if any(each.middle <= 0 for each in single):
        return _unsure(single)
    logs = [math.log(each.middle) for each in single]
    between, within = stdev(logs) / math.sqrt(count), _joint_error(single)
    t, z = student_quantile(count - 1, confidence), student_quantile(math.inf, confidence)
    log_se, dof = (between, count - 1.0) if t * between >= z * within else (within, math.inf)
    half_width = max(t * between, z * within)
    middle = math.exp(sum(logs) / count)
    low, high = middle * math.exp(-half_width), middle * math.exp(half_width)
    return Estimate(middle=middle, low=low, high=high, replicates=count, log_se=log_se, dof=dof)


def _single(values: Sequence[float], confidence: float, blocks: Sequence[int]) -> Estimate:
    low, high, reached = _interval(values, confidence, blocks)
    log_se = math.inf
    if reached > 0 and low > 0:
        log_se = math.log(high / low) / 2 / student_quantile(math.inf, reached)
    return Estimate(
        middle=median(values), low=low, high=high, replicates=1, log_se=log_se, dof=math.inf
    )


def _unsure(single: Sequence[Estimate]) -> Estimate:
    """Of medians that have no logarithm: all that any of them allows."""
    return Estimate(
        middle=median([each.middle for each in single]),
        low=min(each.low for each in single),
        high=max(each.high for each in single),
        replicates=len(single),
        log_se=math.inf,
        dof=math.inf,
    )


def _joint_error(single: Sequence[Estimate]) -> float:
    """Error of the mean of the logarithms; a process whose own error isn't known adds none."""
    known = [each.log_se for each in single if math.isfinite(each.log_se)]
    return math.hypot(*known) / len(single)


@cache
def student_quantile(dof: float, confidence: float = 0.95) -> float:
    """The t that |T| exceeds with probability 1 - confidence; of infinite freedom the normal z."""
    if dof < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {dof}")
    if dof >= SURE_NORMAL:
        return NormalDist().inv_cdf((1 + confidence) / 2)
    # t = sqrt(dof) · tan(angle): P(|T| <= t) is an integral of cos(angle)^(dof - 1) from 0
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, dof) < confidence else (low, angle)
    return math.sqrt(dof) * math.tan(low)


def _within(angle: float, dof: float) -> float:
    """P(|T| <= sqrt(dof) · tan(angle)) by Simpson's rule."""
    steps = 200
    heights = [math.pow(math.cos(angle * i / steps), dof - 1) for i in range(steps + 1)]
    area = heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
    scale = math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)) * 2 / math.sqrt(math.pi)
    return scale * area * angle / steps / 3


def relative_half_width(values: Sequence[float], blocks: Sequence[int] = ()) -> float:
    """Half the width of `median_interval` as a share of the median; infinite where that is 0."""
    low, high = median_interval(values, blocks=blocks)
    middle = median(values)
    return (high - low) / 2 / middle if middle else math.inf


def robust_spread(values: Sequence[float]) -> float:
    """1.4826 · MAD / median: the coefficient of variation that outliers do not move."""
    middle = median(values)
    return MAD_TO_SIGMA * _deviation(values) / middle if middle else math.inf


def _deviation(values: Sequence[float]) -> float:
    """Median of the distances from the median: the MAD."""
    middle = median(values)
    return median([abs(value - middle) for value in values])


def quantile(values: Sequence[float], share: float) -> float:
    """Value below which this share lies, between two values by the straight line."""
    if not values:
        raise ValueError("quantile needs at least one value, got none")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    index = min(int(place), len(ordered) - 2)
    if index < 0:
        return ordered[0]
    return ordered[index] + (place - index) * (ordered[index + 1] - ordered[index])


def drifts(values: Sequence[float]) -> bool:
    """Whether the median of the last third is off that of the first, and the series has a trend.

    Off by more than MATTERS; the trend by Mann and Kendall's test, p < DRIFT_CHANCE.
    """
    third = len(values) // 3
    if not third:
        return False
    moved = abs(median(values[-third:]) - median(values[:third]))
    return moved > MATTERS * median(values) and trend_chance(values) < DRIFT_CHANCE


def trend_chance(values: Sequence[float]) -> float:
    """Mann and Kendall's test: P of so many rises less falls among all pairs if order is chance.

    By the normal approximation, with the correction for ties.
    """
    n, score = len(values), 0
    seen: list[float] = []
    for i, value in enumerate(values):
        score += bisect_left(seen, value) - (i - bisect_right(seen, value))
        insort(seen, value)
    ties = Counter(values).values()
    variance = (_kendall(n) - sum(_kendall(count) for count in ties)) / 18
    if variance <= 0:
        return 1.0
    return math.erfc(max(0, abs(score) - 1) / math.sqrt(2 * variance))


def _kendall(n: int) -> int:
    return n * (n - 1) * (2 * n + 5)


def two_modes(values: Sequence[float]) -> bool:
    """Whether the values lie in two heaps with a gap between, as of two clocks or two code paths.

    The split is the widest step between neighbours that leaves MINOR_SHARE on either side. The gap
    is from the 90th percentile of the lower heap to the 10th of the upper, so that a few values in
    it do not close it, and must exceed MATTERS · median and GAP_IN_MADS · MAD of the wider heap: a
    long tail is no heap.
    """
    ordered, n = sorted(values), len(values)
    least = max(MINOR_SAMPLES, math.ceil(MINOR_SHARE * n))
    if n < 2 * least:
        return False
    cut = max(range(least, n - least + 1), key=lambda i: ordered[i] - ordered[i - 1])
    heaps = ordered[:cut], ordered[cut:]
    gap = quantile(heaps[1], 0.1) - quantile(heaps[0], 0.9)
    within = max(_deviation(heap) for heap in heaps)
    return gap > max(GAP_IN_MADS * within, MATTERS * median(ordered))


def outlier_share(values: Sequence[float]) -> float:
    """Share of values above Q3 + max(3 · IQR, 1 % of the median); quick ones are no outliers.

    Without the percent, ticks of the clock would be outliers of a series that hardly varies.
    """
    first, third = quantile(values, 0.25), quantile(values, 0.75)
    limit = third + max(OUTLIER_IQRS * (third - first), MATTERS * median(values))
    return sum(value > limit for value in values) / len(values)


def processes_differ(single: Sequence[Estimate]) -> bool:
    """Whether replicates lie further apart than their own intervals explain; one estimate each.

    Range of the medians > MATTERS and > UNSTEADY_HALF_WIDTHS · root mean square of the half-widths,
    all as shares of the median.
    """
    if len(single) < 2:
        return False
    middles = [each.middle for each in single]
    spread = max(middles) - min(middles)
    half_width = math.sqrt(sum((each.high - each.low) ** 2 for each in single) / len(single)) / 2
    return spread > max(MATTERS * median(middles), UNSTEADY_HALF_WIDTHS * half_width)
