"""Tables as text: against golden files, and against texts that attack a reader's tool."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsa_bench import doubt
from dsa_bench.record import Record
from dsa_bench.reports import spent, tables, units
from dsa_bench.reports.digest import digest
from tests.reports_runs import (
    ENDED,
    HEADER,
    HOSTILE,
    FakeRun,
    doubtful_run,
    h100_run,
    hostile_run,
    ok,
)

GOLDEN = Path(__file__).parent / "golden"


def small_run() -> FakeRun:
    """Two lengths of the H100 run, its doubtful case, and what failed."""
    run = h100_run()
    kept = [
        record
        for record in run.records
        if record.case.seq_len_kv in (8192, 131072)
        and record.case.topk in (None, 2048)
        and record.case.batch_size in (1,)
    ]
    run.records = [*kept, *run.records[-5:]]
    return run


@pytest.mark.parametrize(
    ("name", "make"), [("report.md", tables.markdown), ("report.csv", tables.csv_text)]
)
def test_text_is_as_in_the_golden_file(name: str, make: object) -> None:
    assert callable(make)
    actual = make(digest([small_run()]))
    assert actual == (GOLDEN / name).read_text(encoding="utf-8")


def test_files_are_written(tmp_path: Path) -> None:
    tables.write_markdown([small_run()], tmp_path / "r.md")
    tables.write_csv([small_run()], tmp_path / "r.csv")
    assert (tmp_path / "r.md").read_bytes() == (GOLDEN / "report.md").read_bytes()
    assert (tmp_path / "r.csv").read_bytes() == (GOLDEN / "report.csv").read_bytes()


def test_csv_cells_do_not_start_a_formula() -> None:
    text = tables.csv_text(digest([hostile_run()]))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 2 * len(HOSTILE)
    impls = {row["impl"] for row in rows}
    assert "'@SUM(1+1)" in impls and "'-2+3" in impls
    for row in rows:
        assert not any(cell.lstrip().startswith(("=", "+", "-", "@")) for cell in row.values())


def test_csv_numbers_keep_their_sign() -> None:
    # quoting is for texts; a number may be negative
    assert tables._csv_cell(-1.5) == "-1.5"
    assert tables._csv_cell("-1.5") == "'-1.5"
    assert tables._csv_cell(" =1") == "' =1"


def test_markdown_holds_no_markup_of_a_record() -> None:
    text = tables.markdown(digest([hostile_run()]))
    assert "<script" not in text and "<img" not in text and "![" not in text
    assert "\\[link\\](http" in text
    bodies = [line for line in text.splitlines() if line.startswith("|")]
    bars = {line.replace("\\|", "").count("|") for line in bodies}
    assert len(bars) == 1


def test_terminal_texts_have_no_control_characters() -> None:
    found = tables.terminal_rows([hostile_run()])
    texts = [text for table in found for row in table.rows for text in row]
    assert any("alert(1)" in text for text in texts)
    assert all(text.isprintable() for text in texts)


def test_terminal_tables() -> None:
    prefill, decode = tables.terminal_rows([h100_run()])
    assert (prefill.title, decode.title) == ("prefill", "decode")
    titles = [column.title for column in decode.columns]
    assert "batch" in titles and "machine" not in titles and "heads" not in titles
    assert "batch" not in [column.title for column in prefill.columns]
    time = titles.index("time")
    marked = [row for row in decode.rows if tables.MARKS["noisy"] in row[time]]
    assert len(marked) == 2
    assert decode.notes == (
        "timed in mode cold (L2 flushed before each call)",
        "⚑ noisy: counts, with care",
        f"⚑ {doubt.explain(['noisy_samples'])}",
    )
    assert prefill.notes == decode.notes[:1] and "mode" not in titles
    oom = next(row for row in decode.rows if "oom" in row)
    assert oom[time] == units.MISSING
    assert "needs 86.1 GiB, 78.2 GiB are free" in oom


def test_doubt_is_marked_and_explained_once() -> None:
    (table,) = tables.terminal_rows([doubtful_run()])
    titles = [column.title for column in table.columns]
    assert "mode" in titles
    rows = [dict(zip(titles, row, strict=True)) for row in table.rows]
    cheat = next(row for row in rows if row["implementation"] == "cheat")
    assert cheat["time"] == "1.00 µs ✗"
    assert cheat["speed-up"] == cheat["$/M tokens"] == units.MISSING
    marked = {
        (row["L"], row["time"]) for row in rows if row["mode"] == "cold" and row["k"] == "2048"
    }
    assert {("16K", "2.00 ms ⚑"), ("32K", "2.00 ms ✗"), ("4K", "2.00 ms")} <= marked
    names = [note.split(":")[0] for note in table.notes]
    assert names == [
        *("timed in mode warm (L2 not flushed), cold (L2 flushed before each call), "
          "sustained (calls back to back)", "⚑ noisy", "✗ suspect or invalid"),
        *("✗ below_floor", "✗ launch_bound", "⚑ made_up_flag", "⚑ drift"),
    ]  # fmt: skip
    assert all(note.isprintable() for note in table.notes)


def test_a_case_without_a_time_shows_the_mode_it_was_asked_in() -> None:
    run = h100_run()
    failed = replace(run.records[-1].case, mode="warm")
    run.records.append(Record(case=failed, status="failed", reason="died"))
    prefill = tables.terminal_rows([run])[0]
    mode = [column.title for column in prefill.columns].index("mode")
    assert [row[mode] for row in prefill.rows if "died" in row] == ["warm"]
    assert prefill.notes == ("timed in mode cold (L2 flushed before each call)",)


def test_processes_and_energy_are_columns_where_they_tell() -> None:
    report = digest([doubtful_run()])
    names = [column.name for column in tables.COLUMNS]
    shown = {column.title for column in tables.phase_tables(report, names)[0].columns}
    assert {"processes", "energy/token"} <= shown
    plain = tables.phase_tables(digest([h100_run()]), names)[0]
    assert not {"processes", "energy/token", "mode"} & {column.title for column in plain.columns}


def test_the_fp8_error_is_a_column_where_it_was_taken() -> None:
    names = [column.name for column in tables.COLUMNS]
    (plain, *_) = tables.phase_tables(digest([h100_run()]), names)
    assert "fp8 error" not in [column.title for column in plain.columns]
    run = h100_run()
    case = replace(run.records[0].case, op="sparse_prefill_fp8", impl="gluon", precision="fp8")
    gate = {"rounding_error": {"relative_l2": 0.0412}}
    run.records.append(ok(case, 0.002, gate=gate))
    report = digest([run])
    prefill, decode = tables.phase_tables(report, names)
    titles = [column.title for column in prefill.columns]
    place = titles.index("fp8 error")
    assert titles[place - 1] == "error"
    errors = {row[titles.index("operator")]: row[place - 1 : place + 1] for row in prefill.rows}
    assert errors["sparse_prefill_fp8"] == (units.MISSING, "0.041")
    assert {row[place] for row in prefill.rows} == {units.MISSING, "0.041"}
    assert "fp8 error" not in [column.title for column in decode.columns]
    cells = [row["rounding_error"] for row in csv.DictReader(io.StringIO(tables.csv_text(report)))]
    assert cells[-1] == "0.0412" and set(cells[:-1]) == {""}
    last = json.loads(tables.json_lines(report).splitlines()[-1])
    assert last["rounding_error"] == 0.0412 and last["dense_error"] is None


def test_where_the_time_went_is_said() -> None:
    text = tables.markdown(digest([doubtful_run()]))
    # 59 processes with 60 s of measuring and 30 s of checks each, in 115 minutes
    assert "wall 6900 s: 51 % measuring, 26 % checks, 23 % outside of cases" in text
    assert "wall" not in tables.markdown(digest([h100_run()]))


@pytest.mark.parametrize(
    ("started", "ended", "said"),
    [
        ("2026-11-23T18:05:00+00:00", ENDED, "wall 6900 s: 100 % measuring"),
        # two devices at once: more work than wall time
        ("2026-11-23T18:05:00+00:00", ENDED - 6899, "wall 1 s: 100 % measuring"),
        ("yesterday", ENDED, "in cases 6900 s: 100 % measuring"),
        ("2026-11-23T18:05:00+00:00", 0.0, "in cases 6900 s: 100 % measuring"),
    ],
)
def test_wall_time_that_cannot_be_worked_out_is_not_made_up(
    started: str, ended: float, said: str
) -> None:
    records = [replace(h100_run().records[0], phases={"measure": 6900.0}, ended=ended)]
    run = FakeRun(path=Path("r"), header=HEADER | {"started": started}, records=records)
    assert spent.sentence(run) == said


def test_two_runs_name_their_machine() -> None:
    other = h100_run(2)
    other.header = other.header | {"machine": {"name": "NVIDIA H200"}}
    prefill = tables.terminal_rows([h100_run(), other])[0]
    assert prefill.columns[0].title == "machine"
    assert {row[0] for row in prefill.rows} == {"NVIDIA H100 80GB HBM3", "NVIDIA H200"}


def test_json_lines_are_json_without_nan() -> None:
    lines = tables.json_lines(digest([h100_run()])).splitlines()
    rows = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]
    assert len(rows) == len(h100_run().records)
    assert rows[0]["seq_len_kv"] == 4096 and rows[0]["status"] == "ok"
    assert rows[-1]["seconds"] is None and rows[-1]["status"] == "timeout"


@pytest.mark.parametrize(
    ("make", "value", "text"),
    [
        (units.format_length, 512, "512"),
        (units.format_length, 4096, "4K"),
        (units.format_length, 11500, "11.2K"),
        (units.format_length, 131072, "128K"),
        (units.format_length, 1048576, "1M"),
        (units.format_seconds, 22.34e-6, "22.3 µs"),
        (units.format_seconds, 0.00195, "1.95 ms"),
        (units.format_seconds, 0.9996e-3, "1.00 ms"),
        (units.format_seconds, 3.0, "3.00 s"),
        (units.format_bytes, 512 * 2**20, "512 MiB"),
        (units.format_flops, 631e12, "631 TFLOP/s"),
        (units.format_flops, 1124e12, "1124 TFLOP/s"),
        (units.format_bandwidth, 2.26e12, "2.26 TB/s"),
        (units.format_usd, 0.04412, "$0.0441"),
        (units.format_ratio, 9.999, "10.0×"),  # noqa: RUF001
        (units.format_share, 0.256, "26 %"),
        (units.format_seconds, None, units.MISSING),
        (units.format_seconds, float("nan"), units.MISSING),
    ],
)
def test_numbers_as_people_read_them(make: object, value: object, text: str) -> None:
    assert callable(make)
    assert make(value) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2.00 ms", "2 ms"),
        ("$0.500", "$0.5"),
        ("0.00 MFLOP/s", "0"),
        ("$0", "0"),
        ("0 B", "0"),
        ("0.50×", "0.5×"),  # noqa: RUF001
        ("128K", "128K"),
        ("100 ms", "100 ms"),
    ],
)
def test_ticks_have_no_empty_decimals(text: str, shown: str) -> None:
    assert units.tick(text) == shown
