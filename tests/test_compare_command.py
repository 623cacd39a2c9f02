"""`dsa-bench compare`: what is printed, exit codes, sentences."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dsa_bench import cli
from dsa_bench.record import Case, Record
from dsa_bench.reports import compare_tables
from dsa_bench.show import case_label
from dsa_bench.store import create_run, open_writer
from tests.compare_runs import H200, case, compared, five, timed
from tests.reports_runs import HEADER, HOSTILE

Folder = Callable[..., None]
Output = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """Writes a run folder into the empty folder in which the test stands."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, records: Sequence[Record], **header: Any) -> None:
        create_run(Path(name), {**HEADER, **header})
        with open_writer(Path(name)) as writer:
            for record in records:
                writer.append(record)

    return write


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
