"""Hostile inputs in a report: tables and sentences from made-up findings, marks, escaped names."""

from pathlib import Path
from typing import Any

import pytest

from dsa_bench.finding import Finding
from dsa_bench.record import Case, Record
from dsa_bench.reports import hostile, html, leaderboard, tables
from dsa_bench.reports.digest import Digest, digest
from dsa_bench.store import Run
from tests.reports_runs import HEADER, HOSTILE, h100_run, ok
from tests.test_reports_html import Page


def finding(
    impl: str, name: str, verdict: str = "ok", reason: str = "", op: str = "topk"
) -> Finding:
    return Finding(op=op, impl=impl, name=name, verdict=verdict, reason=reason)


def case(impl: Any, op: str = "topk", length: int = 8192) -> Case:
    return Case(op=op, impl=impl, phase="prefill", seq_len_kv=length, seq_len_q=4096, topk=2048)


def made(*findings: Finding, records: tuple[Record, ...] = (), name: str = "r") -> Run:
    return Run(path=Path(name), header=HEADER, records=records, findings=findings)


FOUND = (
    finding("steady", "prefill ties"), finding("steady", "prefill special", "refused", "no NaN"),
    finding("hasty", "prefill ties", "wrong", "wrong_values 3, limit 0"),
    finding("hasty", "prefill special", "raised", "IndexError: 7"),
)  # fmt: skip
RECORDS = (ok(case("hasty"), 1e-3), ok(case("steady"), 2e-3))


def report(*findings: Finding, records: tuple[Record, ...] = RECORDS) -> Digest:
    return digest([made(*findings, records=records)])


def test_a_table_counts_verdicts_and_names_what_failed_first() -> None:
    (part,) = hostile.parts(report(*FOUND))
    assert part.sheet.title == "topk"
    assert part.sheet.head == (
        *("implementation", "inputs", "ok", "wrong", "raised", "refused"),
        *("fails on", "first reason"),
    )
    assert part.sheet.rows == (
        (
            *("hasty†", "2", "0", "1", "1", "0"),
            *("prefill ties; prefill special", "wrong_values 3, limit 0"),
        ),
        ("steady", "2", "1", "0", "0", "1", "–", "–"),  # noqa: RUF001
    )
    assert list(part.sheet.numbers) == [1, 2, 3, 4, 5]
    (detail,) = part.details
    assert detail.title == "topk hasty fails 2 of 2"
    assert detail.lines[1] == "prefill special: raised: IndexError: 7"


def test_long_lists_are_short_in_tables_and_whole_behind_the_fold() -> None:
    many = [finding("hasty", f"input {i}", "wrong", "x" * 5000) for i in range(9)]
    (part,) = hostile.parts(report(*many))
    *_, named, reason = part.sheet.rows[0]
    assert named == "input 0; input 1; input 2; and 6 more" and len(reason) == 120
    assert [line.split(":")[0] for line in part.details[0].lines] == [f.name for f in many]
    assert all(len(line) == 400 for line in part.details[0].lines)


def test_operators_have_tables_of_their_own_and_a_short_list_is_explained() -> None:
    other = finding("triton", "odd", op="indexer")
    indexer, topk = hostile.parts(report(*FOUND[:3], other))
    assert (indexer.sheet.title, topk.sheet.title) == ("indexer", "topk")
    assert indexer.sheet.notes == ()
    assert topk.sheet.notes == ("hasty met 1 of 2 inputs: its process did not go on",)


def test_several_runs_are_told_apart() -> None:
    runs = [made(*FOUND, records=RECORDS, name=name) for name in ("a", "b")]
    found = digest(runs)
    (part,) = hostile.parts(found)
    assert part.sheet.head[0] == "machine"
    assert [row[0] for row in part.sheet.rows] == [found.labels[i] for i in (0, 0, 1, 1)]
    assert [line.split(", hostile")[0] for line in hostile.sentences(found)] == list(found.labels)


@pytest.mark.parametrize(
    ("findings", "sentence"),
    [
        (FOUND, "topk hasty fails 2 of 2; the other fails none."),
        (FOUND[:2], "the one implementation fails none; not examined: topk hasty."),
        ((FOUND[0], finding("hasty", "a")), "none of 2 implementations fails."),
    ],
)
def test_one_sentence_says_who_failed(findings: tuple[Finding, ...], sentence: str) -> None:
    assert hostile.sentences(report(*findings)) == [f"hostile inputs: {sentence}"]


def test_a_sentence_stays_short() -> None:
    many = [finding(f"i{n}", "a", "wrong") for n in range(9)]
    (line,) = hostile.sentences(report(*many))
    assert "topk i4 fails 1 of 1, 4 more fail; not examined: topk hasty, topk steady." in line


def test_the_winner_bears_a_mark_if_it_fails() -> None:
    (sheet,) = leaderboard.sheets(report(*FOUND))
    assert sheet.rows[0][2].startswith("hasty† 1.00 ms")
    assert sheet.rows[0][3].startswith("steady 2")
    assert sheet.notes[0].startswith("hasty† leads")
    assert sheet.notes[-1] == "† hasty: fails 2 of 2 hostile inputs"
    (clean,) = leaderboard.sheets(report())
    assert "†" not in "".join((*clean.rows[0], *clean.notes))


def test_a_composition_is_marked_for_its_stages() -> None:
    mixed = {"indexer": "triton", "topk": "hasty", "sparse_prefill": "gluon"}
    fine = mixed | {"topk": "steady"}
    records = (ok(case(mixed, "dsa"), 1e-3), ok(case(fine, "dsa"), 2e-3))
    (sheet,) = leaderboard.sheets(report(*FOUND, records=records))
    assert sheet.notes[-1] == "† triton+hasty+gluon: topk hasty fails 2 of 2 hostile inputs"
    assert sheet.rows[0][2].startswith("triton+hasty+gluon† ")
    assert sheet.rows[0][3].startswith("triton+steady+gluon 2")


def test_markdown_has_the_section_only_where_there_are_findings() -> None:
    text = tables.markdown(report(*FOUND))
    assert "## Hostile inputs\n" in text and "### topk\n" in text
    assert "| hasty† | 2 | 0 | 1 | 1 | 0 | prefill ties; prefill special |" in text
    assert "hostile inputs: topk hasty fails 2 of 2" in text.split("## prefill")[0]
    assert "ostile" not in tables.markdown(report())
    assert "ostile" not in tables.markdown(digest([h100_run()]))


def test_the_page_has_the_section_with_all_failures_folded() -> None:
    page = Page(html.page(report(*FOUND)))
    text = " ".join(page.text.split())
    assert "topk hasty fails 2 of 2" in text and "prefill special: raised: IndexError: 7" in text
    assert ("section", {"id": "hostile"}) in page.elements
    without = Page(html.page(report()))
    assert ("section", {"id": "hostile"}) not in without.elements
    assert ("a", {"href": "#hostile"}) not in without.elements


def test_no_text_of_a_finding_becomes_markup() -> None:
    found = [
        Finding(op=text[:90], impl=text[:90], name=text, verdict="wrong", reason=text)
        for text in (*HOSTILE, "\ud800")
    ]
    drawn = digest([made(*found, records=(ok(case(HOSTILE[0]), 1e-3), *RECORDS))])
    text = html.page(drawn)
    page = Page(text)
    plain = Page(html.page(report(*FOUND)))
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements}
    assert len(page.scripts) == len(plain.scripts)
    assert HOSTILE[0] in page.text and "<img src=x onerror=alert(3)>" in page.text
    text.encode()
    markdown = tables.markdown(drawn)
    assert "<script>" not in markdown and "\x1b" not in markdown
    section = markdown.split("## Hostile inputs", 1)[1]
    # a bar or a line break in a name would add a column or a row
    rows = [line for line in section.splitlines() if line.startswith("| ") and "†" in line]
    assert len(rows) == len(found)
    assert {line.replace("\\|", "").count("|") for line in rows} == {9}
