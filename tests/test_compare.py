"""Two runs side by side: ratios by hand, verdicts over many cases, refusals, what is printed."""

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsa_bench import cli
from dsa_bench.operator import UsageError
from dsa_bench.record import Case, Record, Telemetry, Timing
from dsa_bench.reports import compare_tables, ratio
from dsa_bench.reports.compare import Comparison, compare
from dsa_bench.show import case_label
from dsa_bench.stats import Estimate
from dsa_bench.store import create_run, open_writer
from tests.reports_runs import HEADER, HOSTILE, FakeRun

SUSPECT = "launch_bound"
FIVE = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""Logarithms of five processes in units of u: standard error u · sqrt(2.5 / 5), 4 degrees."""


def case(number: int = 0, **fields: Any) -> Case:
    length = 4096 * (1 + number)
    given = {"op": "topk", "impl": "triton", "phase": "decode", "seq_len_kv": length}
    return Case(**(given | {"seq_len_q": 1} | fields))


def timed(of: Case, seconds: float | Sequence[float], replicate: int = 0, **fields: Any) -> Record:
    """An `ok` record; of one number nine equal samples."""
    samples = (seconds,) * 9 if isinstance(seconds, float) else tuple(seconds)
    clock = fields.pop("clock_mhz", None)
    read = None if clock is None else Telemetry(seconds=(0.0,), sm_clock_mhz=(clock,))
    mode = fields.pop("mode", "graph")
    time = Timing(mode=mode, seconds=samples, stop="settled", telemetry=read)
    return Record(case=of, status="ok", time=time, replicate=replicate, **fields)


def five(of: Case, seconds: float, unit: float, **fields: Any) -> list[Record]:
    """Five processes round this time: geometric mean and median are `seconds`."""
    return [timed(of, seconds * math.exp(x * unit), i, **fields) for i, x in enumerate(FIVE)]


def run(name: str, records: Sequence[Record], **header: Any) -> FakeRun:
    return FakeRun(path=Path(name), header={**HEADER, **header}, records=list(records))


def compared(base: Sequence[Record], new: Sequence[Record], **options: Any) -> Comparison:
    return compare(run("base", base), run("new", new), **options)


def verdicts(found: Comparison) -> dict[int, str]:
    """Number of the case -> verdict."""
    return {row.case.seq_len_kv // 4096 - 1: row.verdict for row in found.rows}


# -- the ratio


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


# -- verdicts


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


# -- A/A: nothing changed


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


# -- refusals and caveats

H200 = HEADER["machine"] | {"name": "NVIDIA H200"}
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


# -- what is printed


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes a run folder into the empty folder in which the test stands."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, records: Sequence[Record], **header: Any) -> None:
        create_run(Path(name), {**HEADER, **header})
        with open_writer(Path(name)) as writer:
            for record in records:
                writer.append(record)

    return write


Folder = Callable[..., None]
Output = pytest.CaptureFixture[str]


def forty(*changed: float) -> list[Record]:
    factors = [*changed, *[1.0] * (40 - len(changed))]
    return [timed(case(n), factor * 1e-3) for n, factor in enumerate(factors)]


@pytest.mark.parametrize(
    ("changed", "code", "summary"),
    [
        ((), 0, "40 cases: 40 same"),
        ((0.5,), 0, "40 cases: 39 same, 1 faster"),
        ((0.5, 1.5), 4, "40 cases: 38 same, 1 faster, 1 slower"),
    ],
)
def test_exit_code_and_summary(
    folder: Folder, capsys: Output, changed: Sequence[float], code: int, summary: str
) -> None:
    folder("old", forty())
    folder("late", forty(*changed))
    assert cli.call(["compare", "old", "late"]) == code
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == summary
    assert out.splitlines()[0].startswith("BASE old: NVIDIA H100 80GB HBM3 (cuda, 132 SMs), 2026")
    assert out.count("decode topk L=") == 40
    assert "geometric mean of all ratios: " in out
    assert (err, "\x1b" in out) == ("", False)
    if code:
        row = next(line for line in out.splitlines() if "slower  " in line)
        assert row.split()[-6:] == ["1.50", "ms", "1.500", "1.500", "to", "1.500"]


def test_a_broken_case_is_exit_4(folder: Folder, capsys: Output) -> None:
    folder("old", forty())
    folder("late", [*forty()[:39], Record(case=case(39), status="oom", reason="80 GiB")])
    assert cli.call(["compare", "old", "late"]) == 4
    out = capsys.readouterr().out
    assert "ok → oom: 80 GiB" in out
    assert out.splitlines()[-1] == "40 cases: 39 same, 1 broken"


def test_what_was_allowed_stands_at_the_top(folder: Folder, capsys: Output) -> None:
    folder("old", forty())
    folder("late", forty(), machine=H200, protocol=1)
    assert cli.call(["compare", "old", "late", "--allow", "machine, protocol"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("allowed, though the machines differ")
    assert lines[3].startswith("allowed, though the timing protocols differ")


def test_cases_that_cannot_be_compared_are_shown(folder: Folder, capsys: Output) -> None:
    folder("old", forty())
    folder("late", forty()[1:])
    assert cli.call(["compare", "old", "late"]) == 0
    out = capsys.readouterr().out
    assert "only in BASE (ok)" in out
    assert out.splitlines()[-1] == "39 cases: 39 same; not compared: 1"


def test_json_lines_are_cases_and_a_summary(folder: Folder, capsys: Output) -> None:
    folder("old", forty())
    folder("late", [*forty(1.5)[:39], Record(case=case(39), status="failed", reason="x")][:-1])
    assert cli.call(["compare", "old", "late", "--json", "--threshold", "0.05"]) == 4
    *lines, end = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 40
    assert lines[0]["verdict"] == "slower"
    assert lines[0]["key"] == case(0).key
    assert Case.from_json(lines[0]["case"]) == case(0)
    assert lines[0]["ratio"] == pytest.approx(1.5)
    assert (lines[0]["base_seconds"], lines[0]["new_seconds"]) == pytest.approx((1e-3, 1.5e-3))
    assert lines[0]["dof"] is None
    assert (lines[-1]["verdict"], lines[-1]["not_compared"]) == (None, "only in BASE")
    summary = end["summary"]
    assert summary["counts"] == {
        "broken": 0, "slower": 1, "faster": 0, "inconclusive": 0, "same": 38
    }  # fmt: skip
    assert (summary["threshold"], summary["not_compared"]) == (0.05, 1)
    assert summary["geometric_mean"] == pytest.approx(1.5 ** (1 / 39))
    assert summary["has_regression"] is True


def test_markdown_is_a_table_that_hostile_names_cannot_leave(
    folder: Folder, capsys: Output
) -> None:
    cases = [case(n, impl=text, precision=text) for n, text in enumerate(HOSTILE)]
    folder("old", [timed(each, 1e-3) for each in cases], machine={"name": HOSTILE[0]})
    failed = [Record(case=each, status="failed", reason=HOSTILE[1]) for each in cases[:4]]
    folder("late", [*failed, *(timed(each, 2e-3) for each in cases[4:])],
           machine={"name": HOSTILE[0]})  # fmt: skip
    assert cli.call(["compare", "old", "late", "--md", "out.md"]) == 4
    assert "\x1b" not in capsys.readouterr().out
    text = Path("out.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(HOSTILE)
    bars = {len(line.replace("\\|", "").split("|")) for line in table}
    assert bars == {table[0].count("|") + 1}
    assert "<" not in text and "\x1b" not in text and "\u202e" not in text
    assert "](http" not in text.replace("\\]", "")
    assert text.startswith(f"**{len(HOSTILE)} cases: 12 slower, 4 broken**")


def test_cases_of_one_name_are_told_apart() -> None:
    cases = [case(0), case(0, num_heads=64), case(0, mode="warm"), case(1)]
    names = compare_tables.labels(cases, case_label)
    assert len(set(names)) == 4
    assert names[1].endswith("num_heads=64")
    assert names[3] == case_label(case(1))


def test_hints_say_what_would_help() -> None:
    found = compared(five(case(), 1e-3, 0.1), five(case(), 1e-3, 0.1))
    text = " ".join(compare_tables.notes(found))
    assert "--replicates" in text and "--effort precise" in text
    assert "one process on a side" not in text
    single = compare_tables.notes(compared([timed(case(), 1e-3)], [timed(case(), 1e-3)]))
    assert "one process on a side" in " ".join(single)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("old",), "Missing argument 'NEW'"),
        (("old", "gone"), "gone doesn't exist (give the folder"),
        (("old", "./old"), "old and old are one folder (give two runs: BASE, then NEW)"),
        (("old", "empty"), "empty has no records (run a sweep"),
        (("old", "other"), "no case is in both runs: op is topk in BASE and indexer in NEW"),
        (("old", "h200"), "the machines differ: NVIDIA H100"),
        (("old", "late", "--threshold", "2"), "--threshold must be a share like 2% or 0.02, got"),
        (("old", "late", "--threshold", "nan"), "--threshold must be a share like 2% or 0.02, got"),
        (("old", "late", "--threshold", "two"), "--threshold must be a share like 2% or 0.02, got"),
        (("old", "late", "--allow", "machin"), "--allow 'machin' is unknown; did you mean"),
    ],
)
def test_wrong_usage_is_one_sentence(
    folder: Folder, capsys: Output, words: Sequence[str], sentence: str
) -> None:
    folder("old", forty())
    folder("late", forty())
    folder("empty", [])
    folder("other", [timed(case(0, op="indexer"), 1e-3)])
    folder("h200", forty(), machine=H200)
    assert cli.call(["compare", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"dsa-bench: {sentence}"), err
    assert err.count("\n") == 1


@pytest.mark.parametrize("text", ["2%", "2 %", "0.02", " 2.0% "])
def test_threshold_is_a_share(folder: Folder, capsys: Output, text: str) -> None:
    folder("old", forty())
    folder("late", forty(1.021, 1.019))
    assert cli.call(["compare", "old", "late", "--threshold", text]) == 4
    assert capsys.readouterr().out.splitlines()[-1] == "40 cases: 39 same, 1 slower"
