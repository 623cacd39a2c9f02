"""Reports of batches whose sequences differ in length: named wherever they are not all equal."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest

from dsa_bench.record import Case, Record
from dsa_bench.reports import html, leaderboard, tables
from dsa_bench.reports.digest import Digest, digest
from dsa_bench.reports.figures import figures
from tests.reports_runs import HEADER, FakeRun, ok

DSA = Case(
    op="dsa", impl="gluon", phase="decode", seq_len_kv=8192, seq_len_q=1, topk=2048, batch_size=32
)
DENSE = replace(DSA, op="dense_attention", impl="flash_mla", topk=None)
TIMES = {"equal": (1.0, 4.0), "spread": (0.5, 2.7), "one-long": (0.5, 0.4)}
"""ms of DSA and of the fastest dense attention at 8K; twice as much at 16K. The largest speed-up is
not that of equal lengths."""


def records(*kinds: str) -> list[Record]:
    made = []
    for kind in kinds:
        sparse, dense = TIMES[kind]
        for length, factor in ((8192, 1e-3), (16384, 2e-3)):
            of = {"seq_len_kv": length, "lengths": kind}
            made += [
                ok(replace(DSA, **of), sparse * factor),
                ok(replace(DENSE, **of), dense * factor),
                ok(replace(DENSE, impl="triton", **of), 3 * dense * factor),
            ]
    return made


def run(*kinds: str, more: tuple[Record, ...] = ()) -> FakeRun:
    return FakeRun(path=Path("r"), header=HEADER, records=[*records(*kinds), *more])


def report(*kinds: str) -> Digest:
    return digest([run(*kinds)])


@pytest.mark.parametrize(
    ("kinds", "is_shown"),
    [(("equal",), False), (("one-long",), True), (("equal", "spread", "one-long"), True)],
)
def test_tables_have_the_column_where_not_all_are_equal(
    kinds: tuple[str, ...], is_shown: bool
) -> None:
    for names in (tables.TERMINAL_COLUMNS, [column.name for column in tables.COLUMNS]):
        (table,) = tables.phase_tables(report(*kinds), names)
        titles = [column.title for column in table.columns]
        assert ("lengths" in titles) == is_shown
        if is_shown:
            place = titles.index("lengths")
            assert {row[place] for row in table.rows} == set(kinds)
    board = leaderboard.sheets(report(*kinds))[0]
    assert ("lengths" in board.head) == is_shown


def test_rows_of_the_same_lengths_stand_together() -> None:
    (table,) = tables.phase_tables(report("one-long", "equal"), ["seq_len_kv", "lengths", "op"])
    kinds = ["equal"] * 3 + ["one-long"] * 3
    assert [row[1] for row in table.rows] == kinds * 2


def test_csv_always_says_them() -> None:
    rows = list(csv.DictReader(io.StringIO(tables.csv_text(report("equal", "spread")))))
    assert [row["lengths"] for row in rows] == ["equal"] * 6 + ["spread"] * 6


def test_each_has_a_ranking_of_its_own() -> None:
    (board,) = leaderboard.sheets(report("equal", "spread"))
    place = board.head.index("lengths")
    assert [row[place] for row in board.rows] == ["equal", "equal", "spread", "spread"]
    found = leaderboard.rankings(report("equal", "spread").cases)
    assert all([p.impl for p in ranking.places] == ["flash_mla", "triton"] for ranking in found)


def test_the_headline_is_of_equal_lengths_where_there_are_such() -> None:
    (said,) = report("one-long", "spread", "equal").headlines
    assert "in decode at batch 32 DSA (k=2048, bf16) beats dense attention (flash_mla" in said
    assert "is 4.00× as fast at 16K" in said  # noqa: RUF001
    assert "spread" not in said
    assert (
        "With one-long lengths in decode at batch 32 it does not beat dense attention"
        " (flash_mla, bf16) up to L = 16K, where it runs at 0.800× the speed of dense."  # noqa: RUF001
    ) in said
    (said,) = report("one-long").headlines
    assert "DSA (k=2048, bf16, one-long lengths) does not beat dense attention" in said


@pytest.mark.parametrize(("kinds", "named"), [(("equal",), False), (("one-long",), True)])
def test_titles_name_them_where_they_are_not_equal(kinds: tuple[str, ...], named: bool) -> None:
    made = figures(report(*kinds))
    titles = [figure.title for figure in made if figure.name.startswith("latency")]
    assert len(titles) == 1 and ("one-long lengths" in titles[0]) == named
    assert "batch 32" in titles[0]


def test_figures_do_not_mix_them_in_one_line() -> None:
    made = [f for f in figures(report("equal", "spread", "one-long")) if "speedup" in f.name]
    series = {s.label: [p.y for p in s.points] for figure in made for s in figure.series}
    assert len(series) == 3
    for kind, (sparse, dense) in TIMES.items():
        (own,) = [ys for label, ys in series.items() if kind in label]
        assert own == pytest.approx([dense / sparse] * 2)


def test_a_case_without_a_time_says_them_on_the_page() -> None:
    failed = Record(case=replace(DSA, lengths="one-long", batch_size=1), status="skipped")
    equal = Record(case=replace(DSA, batch_size=1), status="failed")
    rows = html._lost(digest([run("equal", more=(failed, equal))]))
    assert [row["where"] for row in rows] == ["dsa gluon bf16 one-long lengths", "dsa gluon bf16"]
