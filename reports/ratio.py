"""The ratio of two times: its interval, and how surely it is a change, or none."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dsa_bench.stats import Estimate, student_quantile

CONFIDENCE = 0.95
FRACTION_TERMS = 200
# from here on the tails are the normal ones to 0.5 % at P = 1e-5
NORMAL_DOF = 20_000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """NEW ÷ BASE of two times, as natural logarithm; above 0 is slower."""

    log: float
    log_half_width: float
    """Half of the interval at 95 %."""
    log_se: float
    """Standard error."""
    dof: float
    """Degrees of freedom of that error; infinite where it doesn't come from replicates."""

    @property
    def middle(self) -> float:
        return exp(self.log)

    @property
    def low(self) -> float:
        return exp(self.log - self.log_half_width)

    @property
    def high(self) -> float:
        return exp(self.log + self.log_half_width)


def ratio(base: Estimate, new: Estimate) -> Ratio:
    """se² = se_base² + se_new² of the logarithms, with Welch's and Satterthwaite's freedom."""
    log_se = math.hypot(base.log_se, new.log_se)
    dof = _welch_dof(base, new)
    is_known = math.isfinite(log_se)
    return Ratio(
        log=math.log(new.middle) - math.log(base.middle),
        log_half_width=student_quantile(dof, CONFIDENCE) * log_se if is_known else math.inf,
        log_se=log_se,
        dof=dof,
    )


def p_unchanged(found: Ratio, threshold: float) -> float:
    """P of so far a ratio, either way, if the true one differs by a factor 1 + threshold at most.

    Both tails at the edge of what counts as unchanged, log(1 + threshold) = e:
    P(T >= (|d| - e) / se) + P(T >= (|d| + e) / se), which is the most that any true ratio between
    the edges gives.
    """
    edge, distance = math.log1p(threshold), abs(found.log)
    return min(1.0, _tail(distance - edge, found) + _tail(distance + edge, found))


def p_changed(found: Ratio, threshold: float) -> float:
    """P of so near a ratio if the true one lies outside of the edges: two one-sided tests.

    At or below 0.05 the interval at 90 % lies inside of the edges.
    """
    edge = math.log1p(threshold)
    return max(_tail(edge - found.log, found), _tail(edge + found.log, found))


def discoveries(p_values: Sequence[float], rate: float) -> tuple[bool, ...]:
    """Benjamini and Hochberg: of those marked, the expected share of false ones is `rate` at most.

    Marked are the k smallest, k the largest for which the k-th smallest is at most rate · k / n.
    """
    n = len(p_values)
    ranked = sorted(p_values)
    passed = [p for k, p in enumerate(ranked, start=1) if p <= rate * k / n]
    limit = passed[-1] if passed else -1.0
    return tuple(p <= limit for p in p_values)


def student_tail(t: float, dof: float) -> float:
    """P(T >= t) for Student's distribution; of infinite freedom the normal one."""
    if dof >= NORMAL_DOF:
        return 0.5 * math.erfc(t / math.sqrt(2.0))
    if t < 0:
        return 1.0 - student_tail(-t, dof)
    x = dof / (dof + t * t)
    a, b = dof / 2, 0.5
    # the fraction converges fast on one side of the middle of the distribution
    if x <= (a + 1) / (a + b + 2):
        return 0.5 * _beta_share(x, a, b)
    return 0.5 - 0.5 * _beta_share(1 - x, b, a)


def _welch_dof(base: Estimate, new: Estimate) -> float:
    """(se_a² + se_b²)² / (se_a⁴ / dof_a + se_b⁴ / dof_b)."""
    parts = [(each.log_se**2, each.dof) for each in (base, new)]
    below = sum(square**2 / dof for square, dof in parts)
    if not 0 < below < math.inf:
        return math.inf
    return float(sum(square for square, _ in parts) ** 2 / below)


def _tail(distance: float, found: Ratio) -> float:
    """P that chance moves the logarithm by this distance."""
    if not math.isfinite(found.log_se):
        return 1.0
    if found.log_se == 0:
        return 0.0 if distance > 0 else 1.0
    return student_tail(distance / found.log_se, found.dof)


def _beta_share(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b) by its continued fraction, from the end."""
    if x <= 0:
        return 0.0
    fraction = 1.0
    for m in range(FRACTION_TERMS, 0, -1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        fraction = 1.0 + even / (1.0 + odd / fraction)
    fraction = 1.0 - (a + b) * x / (a + 1) / fraction
    log_factor = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_factor += a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_factor) / (a * fraction)


def exp(value: float) -> float:
    """e to the power of value, infinite where a float has no room for it."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
