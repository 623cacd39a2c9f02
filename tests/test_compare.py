"""Two runs side by side: verdicts over many cases, refusals, caveats."""

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from dsa_bench.operator import UsageError
from dsa_bench.record import Case, Record
from dsa_bench.reports import compare_tables
from dsa_bench.reports.compare import Comparison, compare
from dsa_bench.show import case_label
from tests.compare_runs import H200, case, compared, five, run, timed, verdicts
from tests.reports_runs import HEADER

SUSPECT = "launch_bound"


def test_ratio_of_replicates_by_hand() -> None:
    """se = sqrt(2 · u² · 2.5 / 5) = u, 8 degrees of freedom, t = 2.3060."""
    unit = 0.004
    (row,) = compared(five(case(), 1e-3, unit), five(case(), 1.1e-3, unit)).rows
    assert row.ratio is not None and row.base is not None and row.new is not None
    assert (row.base.seconds, row.new.seconds) == pytest.approx((1e-3, 1.1e-3))
    assert (row.base.replicates, row.new.replicates) == (5, 5)
    assert row.ratio.middle == pytest.approx(1.1)
    assert row.ratio.log_se == pytest.approx(unit)
    assert row.ratio.dof == pytest.approx(8)
    assert row.ratio.high == pytest.approx(1.1 * math.exp(2.306004 * unit), rel=1e-6)
    assert row.verdict == "slower"


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.1, "slower"), (1 / 1.1, "faster"), (1.0, "same"), (1.019, "inconclusive")],
)
def test_verdict_follows_the_ratio(factor: float, verdict: str) -> None:
    found = compared(five(case(), 1e-3, 0.002), five(case(), factor * 1e-3, 0.002))
    assert verdicts(found) == {0: verdict}
    assert found.has_regression == (verdict == "slower")


# 90 % interval of 8 degrees of freedom: 1.859548 · se
@pytest.mark.parametrize(("share", "verdict"), [(0.999, "same"), (1.001, "inconclusive")])
def test_same_ends_where_its_90_percent_interval_leaves_the_threshold(
    share: float, verdict: str
) -> None:
    unit = share * math.log(1.02) / 1.859548
    found = compared(five(case(), 1e-3, unit), five(case(), 1e-3, unit))
    assert verdicts(found) == {0: verdict}


def test_threshold_decides() -> None:
    base, new = five(case(), 1e-3, 0.002), five(case(), 1.05e-3, 0.002)
    found = {t: verdicts(compared(base, new, threshold=t))[0] for t in (0.02, 0.05, 0.1)}
    assert found == {0.02: "slower", 0.05: "inconclusive", 0.1: "same"}


def test_many_cases_ask_more_of_each() -> None:
    """t of 8 degrees at p = 0.02 is 2.449: enough alone, not as one of forty."""
    unit = 0.003
    borderline = 1.02 * math.exp(2.449 * unit)

    def both(count: int, last: float) -> Comparison:
        base = [r for n in range(count) for r in five(case(n), 1e-3, unit)]
        factors = [1.0] * (count - 1) + [last]
        new = [r for n, f in enumerate(factors) for r in five(case(n), f * 1e-3, unit)]
        return compared(base, new)

    assert verdicts(both(1, borderline)) == {0: "slower"}
    assert both(40, borderline).counts == {
        "broken": 0, "slower": 0, "faster": 0, "inconclusive": 1, "same": 39
    }  # fmt: skip
    assert verdicts(both(40, 1.10))[39] == "slower"
    assert both(40, 1.10).counts["same"] == 39


def test_geometric_mean_is_of_all_ratios() -> None:
    base = [timed(case(n), 1e-3) for n in range(3)]
    new = [timed(case(0), 2e-3), timed(case(1), 0.5e-3), timed(case(2), 8e-3)]
    assert compared(base, new).geometric_mean == pytest.approx(2.0)


def test_regressions_come_first_and_the_largest_before_the_smaller() -> None:
    factors = (1.0, 0.5, 1.2, 3.0, 0.9)
    base = [timed(case(n), 1e-3) for n in range(6)]
    new = [timed(case(n), f * 1e-3) for n, f in enumerate(factors)]
    new.append(Record(case=case(5), status="wrong", reason="out differs"))
    found = compared(base, new)
    assert list(verdicts(found).items()) == [
        (5, "broken"), (3, "slower"), (2, "slower"), (1, "faster"), (4, "faster"), (0, "same")
    ]  # fmt: skip


@pytest.mark.parametrize("status", ["wrong", "failed", "timeout", "oom"])
def test_a_case_that_no_longer_works_is_broken(status: str) -> None:
    ended = Record(case=case(1), status=status, reason="it fell")
    found = compared([timed(case(n), 1e-3) for n in range(2)], [timed(case(0), 1e-3), ended])
    assert verdicts(found) == {1: "broken", 0: "same"}
    assert found.rows[0].note == f"ok → {status}: it fell"
    assert found.has_regression


def test_one_wrong_process_breaks_a_case() -> None:
    new = [timed(case(), 1e-3), Record(case=case(), status="wrong", replicate=1)]
    assert verdicts(compared([timed(case(), 1e-3)], new)) == {0: "broken"}


@pytest.mark.parametrize(
    ("old", "late", "reason"),
    [
        ("failed", "ok", "failed → ok"),
        ("failed", "failed", "failed → failed"),
        ("ok", "skipped", "ok → skipped"),
        ("ok", "interrupted", "ok → interrupted"),
    ],
)
def test_a_case_without_two_times_is_listed(old: str, late: str, reason: str) -> None:
    def record(status: str) -> Record:
        return timed(case(), 1e-3) if status == "ok" else Record(case=case(), status=status)

    found = compared([record(old)], [record(late)])
    assert (found.rows, found.has_regression) == ((), False)
    assert [(each.kind, each.reason) for each in found.left_out] == [("status", reason)]


def test_suspect_times_get_no_verdict() -> None:
    base = [timed(case(0), 1e-3), timed(case(1), 1e-3, flags=(SUSPECT,))]
    new = [timed(case(0), 9e-3, flags=(SUSPECT,)), timed(case(1), 1e-3, flags=(SUSPECT,))]
    found = compared(base, new)
    assert found.rows == ()
    assert [(each.kind, each.reason) for each in found.left_out] == [
        ("suspect", f"NEW is suspect: {SUSPECT}"),
        ("suspect", f"BASE is suspect: {SUSPECT}; NEW is suspect: {SUSPECT}"),
    ]
    assert found.geometric_mean is None


def test_times_of_two_modes_are_no_pair() -> None:
    found = compared([timed(case(), 1e-3, mode="cold")], [timed(case(), 1e-3)])
    assert [each.reason for each in found.left_out] == ["timed cold → graph"]


def test_a_time_of_zero_has_no_ratio() -> None:
    found = compared([timed(case(), 0.0)], [timed(case(), 1e-3)])
    assert [each.kind for each in found.left_out] == ["no time"]


def test_missing_cases_are_named_and_counted() -> None:
    found = compared([timed(case(n), 1e-3) for n in (0, 1)], [timed(case(n), 1e-3) for n in (1, 2)])
    assert [(each.case, each.reason) for each in found.left_out] == [
        (case(0), "only in BASE (ok)"), (case(2), "only in NEW (ok)")
    ]  # fmt: skip
    assert compare_tables.summary(found) == "1 case: 1 same; not compared: 2"


def test_a_ratio_of_the_clocks_is_called_so() -> None:
    base = [timed(case(n), 1e-3, clock_mhz=1800.0) for n in range(3)]
    new = [
        timed(case(0), 1.2e-3, clock_mhz=1500.0),
        timed(case(1), 1.2e-3, clock_mhz=1800.0),
        timed(case(2), 1e-3, clock_mhz=1800.0),
    ]
    found = {row.case: row for row in compared(base, new).rows}
    assert found[case(0)].verdict == "slower"
    assert found[case(0)].note == "in cycles 1.000: the SM clocks differ as much"
    assert found[case(1)].cycle_ratio == pytest.approx(1.2)
    assert (found[case(1)].note, found[case(2)].note) == ("", "")
    head, rows = compare_tables.rows(compared(base, new), case_label)
    assert "1800 → 1500 MHz" in rows[0] and "SM clock" in head


def noisy(of: Case, rng: random.Random, num_processes: int) -> list[Record]:
    """Processes that differ by 0.3 %, with samples that spread by 1 %."""
    out = []
    for replicate in range(num_processes):
        middle = 1e-3 * math.exp(rng.gauss(0, 0.003))
        samples = [middle * math.exp(rng.gauss(0, 0.01)) for _ in range(40)]
        out.append(timed(of, samples, replicate))
    return out


@pytest.mark.parametrize("num_processes", [1, 3])
def test_runs_of_the_same_thing_are_the_same(num_processes: int) -> None:
    rng = random.Random(num_processes)
    counts = dict.fromkeys(("slower", "faster", "same", "inconclusive", "broken"), 0)
    for _ in range(5):
        sides = [
            [r for n in range(40) for r in noisy(case(n), rng, num_processes)] for _ in range(2)
        ]
        for verdict, count in compared(*sides).counts.items():
            counts[verdict] += count
    assert sum(counts.values()) == 200
    assert counts["slower"] + counts["faster"] <= 10
    assert counts["same"] >= 190, counts


def test_a_slower_case_is_found_among_equal_ones() -> None:
    rng = random.Random(5)
    base = [r for n in range(40) for r in noisy(case(n), rng, 3)]
    new = [r for n in range(40) for r in noisy(case(n), rng, 3)]
    assert new[0].time is not None
    for i in range(3):
        time = new[i].time
        assert time is not None
        slow = replace(time, seconds=tuple(1.08 * s for s in time.seconds))
        new[i] = replace(new[i], time=slow)
    assert verdicts(compared(base, new))[0] == "slower"


SLICE = HEADER["machine"] | {"num_sms": 66}


@pytest.mark.parametrize(
    ("change", "name", "sentence"),
    [
        (
            {"machine": H200},
            "machine",
            "the machines differ: NVIDIA H100 80GB HBM3 (cuda, 132 SMs) in BASE,"
            " NVIDIA H200 (cuda, 132 SMs) in NEW",
        ),
        ({"machine": SLICE}, "machine", "(cuda, 66 SMs) in NEW"),
        ({"protocol": 3}, "protocol", "the timing protocols differ: 0 in BASE, 3 in NEW"),
    ],
)
def test_other_machines_and_protocols_are_refused_unless_allowed(
    change: Mapping[str, Any], name: str, sentence: str
) -> None:
    base, new = run("a", [timed(case(), 1e-3)]), run("b", [timed(case(), 1e-3)], **change)
    with pytest.raises(UsageError) as raised:
        compare(base, new)
    assert sentence in str(raised.value)
    assert str(raised.value).endswith(f"(run the same sweep again, or add --allow {name})")
    found = compare(base, new, allowed=(name,))
    assert found.caveats[0].startswith("allowed, though the ")
    assert sentence in found.caveats[0]
    assert compare(base, base, allowed=(name,)).caveats == ()


def test_allowing_one_difference_leaves_the_other() -> None:
    base = run("a", [timed(case(), 1e-3)])
    new = run("b", [timed(case(), 1e-3)], machine=H200, protocol=1)
    with pytest.raises(UsageError, match=r"protocols differ.*--allow machine,protocol\)"):
        compare(base, new, allowed=("machine",))
    assert len(compare(base, new, allowed=("protocol", "machine")).caveats) == 2


@pytest.mark.parametrize(
    ("change", "caveat"),
    [
        (
            {"machine": HEADER["machine"] | {"driver": "590.1"}},
            "driver differs: 580.65.06 in BASE, 590.1 in NEW",
        ),
        (
            {"versions": HEADER["versions"] | {"cuda": "13.1"}},
            "CUDA version differs: unknown in BASE, 13.1 in NEW",
        ),
        ({"options": {"effort": "quick"}}, "--effort differs: standard in BASE, quick in NEW"),
    ],
)
def test_smaller_differences_are_caveats(change: Mapping[str, Any], caveat: str) -> None:
    found = compare(run("a", [timed(case(), 1e-3)]), run("b", [timed(case(), 1e-3)], **change))
    assert found.caveats == (caveat,)


def test_runs_without_a_case_in_common_are_told_what_differs() -> None:
    base = [timed(case(n, seed=0), 1e-3) for n in range(5)]
    new = [timed(case(n, seed=1, preset="v3.2-cpu"), 1e-3) for n in range(5)]
    with pytest.raises(UsageError) as raised:
        compared(base, new)
    assert str(raised.value) == (
        "no case is in both runs: preset is v3.2 in BASE and v3.2-cpu in NEW; seed is 0 in BASE"
        " and 1 in NEW (run the same selection twice)"
    )
    with pytest.raises(UsageError, match=r"seq_len_kv is 4096, 8192, 12288, … in BASE and 81920"):
        compared([timed(case(n), 1e-3) for n in range(5)], [timed(case(19), 1e-3)])
    crossed = ([timed(case(0, seed=0), 1e-3), timed(case(1, seed=1), 1e-3)],
               [timed(case(0, seed=1), 1e-3), timed(case(1, seed=0), 1e-3)])  # fmt: skip
    with pytest.raises(UsageError, match="their axes cross at no point"):
        compared(*crossed)


def test_an_empty_run_is_refused() -> None:
    with pytest.raises(UsageError, match=r"new has no records \("):
        compared([timed(case(), 1e-3)], [])


def test_a_header_of_nonsense_is_no_traceback() -> None:
    found = compare(
        run("a", [timed(case(), 1e-3)], machine="x", versions=[1], options=None),
        run("b", [timed(case(), 1e-3)], machine=None, versions=3, options="o"),
    )
    assert found.caveats == ()
