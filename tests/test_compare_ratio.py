"""The ratio of two estimates: intervals and p values by hand, discoveries among many."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from dsa_bench.reports import ratio
from dsa_bench.stats import Estimate


@pytest.mark.parametrize(
    ("t", "dof"),
    [(12.7062, 1), (2.7764, 4), (2.2281, 10), (2.0423, 30), (1.9799, 120), (1.95996, math.inf)],
)
def test_student_tails_are_those_of_the_tables(t: float, dof: float) -> None:
    assert ratio.student_tail(t, dof) == pytest.approx(0.025, abs=2e-6)
    assert ratio.student_tail(-t, dof) == pytest.approx(0.975, abs=2e-6)


@pytest.mark.parametrize("t", [-8.0, -1.0, 0.0, 0.3, 1.0, 2.5, 40.0])
def test_student_tails_have_closed_forms(t: float) -> None:
    assert ratio.student_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-9)
    two = 0.5 - t / (2 * math.sqrt(2 + t * t))
    assert ratio.student_tail(t, 2) == pytest.approx(two, rel=1e-9, abs=1e-12)
    # four degrees: P(T < t) = 1/2 + 3/8 · s · (1 - s² / 12 · ...), by its integral
    s = t / math.sqrt(4 + t * t)
    four = 0.5 - 0.75 * (s - s**3 / 3)
    assert ratio.student_tail(t, 4) == pytest.approx(four, rel=1e-6, abs=1e-12)


def test_tail_is_smooth_where_the_normal_one_takes_over() -> None:
    below = ratio.student_tail(3.0, ratio.NORMAL_DOF - 1)
    assert ratio.student_tail(3.0, ratio.NORMAL_DOF) == pytest.approx(below, rel=0.002)


def estimate(middle: float, log_se: float, dof: float = math.inf) -> Estimate:
    return Estimate(middle=middle, low=0.0, high=9.0, replicates=1, log_se=log_se, dof=dof)


def test_ratio_and_interval_by_hand() -> None:
    found = ratio.ratio(estimate(2.0, 0.003), estimate(2.1, 0.004))
    assert found.middle == pytest.approx(1.05)
    assert found.log_se == pytest.approx(0.005)
    assert found.low == pytest.approx(1.05 * math.exp(-1.959964 * 0.005), rel=1e-7)
    assert found.high == pytest.approx(1.05 * math.exp(1.959964 * 0.005), rel=1e-7)


def test_freedom_is_welchs() -> None:
    found = ratio.ratio(estimate(1.0, 0.003, 2), estimate(1.0, 0.004, 4))
    # 25² / (9² / 2 + 16² / 4) = 625 / 104.5
    assert found.dof == pytest.approx(625 / 104.5)
    one_side = ratio.ratio(estimate(1.0, 0.003, 2), estimate(1.0, 0.004))
    assert one_side.dof == pytest.approx(625 / 40.5)
    assert ratio.ratio(estimate(1.0, 0.0, 2), estimate(1.0, 0.004, 4)).dof == pytest.approx(4)


def test_an_unknown_error_tells_nothing() -> None:
    found = ratio.ratio(estimate(1.0, math.inf), estimate(9.0, 0.001))
    assert (found.low, found.high) == (0.0, math.inf)
    assert ratio.p_unchanged(found, 0.02) == 1.0
    assert ratio.p_changed(found, 0.02) == 1.0


def test_no_error_at_all_is_sure() -> None:
    found = ratio.ratio(estimate(1.0, 0.0), estimate(1.03, 0.0))
    assert found.low == found.high == found.middle
    assert (ratio.p_unchanged(found, 0.02), ratio.p_unchanged(found, 0.04)) == (0.0, 1.0)
    assert (ratio.p_changed(found, 0.02), ratio.p_changed(found, 0.04)) == (1.0, 0.0)


def test_p_values_by_hand() -> None:
    edge = math.log(1.02)
    se = 0.01
    found = ratio.Ratio(log=edge + 2 * se, log_half_width=0.0, log_se=se, dof=math.inf)
    far = math.erfc((2 * edge + 2 * se) / se / math.sqrt(2)) / 2
    assert ratio.p_unchanged(found, 0.02) == pytest.approx(0.0227501 + far, rel=1e-4)
    # the nearer edge is the one that counts
    near = replace(found, log=edge - 0.01, log_se=0.005)
    assert ratio.p_changed(near, 0.02) == pytest.approx(0.0227501, rel=1e-4)
    for each in (found, near):
        mirrored = replace(each, log=-each.log)
        for p in (ratio.p_unchanged, ratio.p_changed):
            assert p(mirrored, 0.02) == pytest.approx(p(each, 0.02))


@pytest.mark.parametrize(
    ("p_values", "marked"),
    [
        ((), ()),
        ((0.05,), (True,)),
        ((0.051,), (False,)),
        # limits are 0.0125, 0.025, 0.0375, 0.05: the third passes and takes the second along
        ((0.037, 0.9, 0.001, 0.030), (True, False, True, True)),
        ((0.03, 0.9, 0.9, 0.9), (False, False, False, False)),
        ((0.05, 0.05, 0.05, 0.05), (True, True, True, True)),
    ],
)
def test_discoveries_by_hand(p_values: Sequence[float], marked: Sequence[bool]) -> None:
    assert ratio.discoveries(p_values, 0.05) == tuple(marked)
