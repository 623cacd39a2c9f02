"""Run folders of others: bounds of what is read, hostile values, names and files."""

import csv
import functools
import io
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsa_bench import store, untrusted
from dsa_bench.operator import UsageError
from dsa_bench.record import Record
from dsa_bench.reports import html, plots, tables
from dsa_bench.reports.digest import digest
from dsa_bench.reports.figures import figures
from dsa_bench.untrusted import Refused, parse, read_file
from tests.reports_runs import h100_run

DEEP = 10**6


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"[" * DEEP, "nests deeper than 32 levels"),
        (b'{"a":' * DEEP, "nests deeper than 32 levels"),
        (b"[" * 33 + b"]" * 33, "nests deeper than 32 levels"),
        (b'[NaN,"[[[["]', "holds NaN"),
        (b"[-Infinity]", "holds -Infinity"),
        (b"[1e999]", "1e999.*too large"),
        (b"[-1e999]", "too large"),
        (b"[" + b"9" * 5000 + b"]", "too large"),
        (b"\xff\xfe[\x00", "utf-8"),
        (b'{"a":', "Expecting value"),
        (b'"' + b'\\"' * DEEP, "Unterminated"),
    ],
)
def test_json_that_is_refused(data: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse(data)


def test_json_that_is_read() -> None:
    assert parse(b"[" * 32 + b"]" * 32) == json.loads("[" * 32 + "]" * 32)
    # brackets within a text, behind escaped quotes too, do not nest
    brackets = {"a": '\\"' + "[{" * 100, "b": ["\\", "[" * 50]}
    assert parse(json.dumps(brackets).encode()) == brackets
    assert parse(b'{"a": 1, "a": 2}') == {"a": 2}
    assert parse(b"[1.5, -7, 18446744073709551615]") == [1.5, -7, 2**64 - 1]


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_file(tmp_path / "file", 5) == b"12345"
    with pytest.raises(Refused, match="larger than 0 MiB"):
        read_file(tmp_path / "file", 4)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, what in [("link", "link"), ("zero", "link"), ("pipe", "regular"),
                       ("folder", "regular")]:  # fmt: skip
        with pytest.raises(Refused, match=what):
            read_file(tmp_path / name, 100)


# ---- run folders


def written(folder: Path, header: Any, records: list[Any]) -> Path:
    """A run folder with this JSON in it."""
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(header))
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "records.jsonl").write_text(lines)
    return folder


@functools.cache
def plain_text() -> str:
    """JSON of the header and all records of a run of the H100."""
    run = h100_run()
    records = [record.to_json() for record in run.records if record.case.seq_len_kv <= 16384]
    header = run.header | {"plan": [{"case": record["case"], "reason": ""} for record in records]}
    return json.dumps([header, records])


def plain_run(count: int | None = None) -> tuple[Any, list[Any]]:
    """The header and some records, of which each test may change its own."""
    header, records = json.loads(plain_text())
    return header, records[:count]


@pytest.mark.parametrize("name", ["run.json", "records.jsonl"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_run_of_no_plain_files_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    folder = written(tmp_path / "run", *plain_run(1))
    (folder / name).rename(tmp_path / "moved")
    if kind == "link":
        (folder / name).symlink_to(tmp_path / "moved")
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).mkdir()
    with pytest.raises(UsageError, match=f"{name} is (a link|no regular file)"):
        store.read_run(folder)


def test_what_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "run", *plain_run(3))
    size = (folder / "run.json").stat().st_size
    limits = [
        ("MAX_HEADER_BYTES", size - 1, r"run.json is larger than"),
        ("MAX_RECORDS_BYTES", 100, r"records.jsonl is larger than"),
        ("MAX_LINE_BYTES", 100, r"records.jsonl:1: .*line is longer than"),
        ("MAX_RECORDS", 2, r"records.jsonl has more than 2 lines"),
    ]
    for limit, value, sentence in limits:
        with monkeypatch.context() as patch:
            patch.setattr(store, limit, value)
            with pytest.raises(UsageError, match=sentence):
                store.read_run(folder)
    assert len(store.read_run(folder).records) == 3


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", *plain_run(1))
    mine = tmp_path / "mine"
    mine.write_text("precious, without a newline")
    for name in ("report.html", "worker.log", "figures/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(mine)
        with pytest.raises(UsageError, match=f"{name} is a link"), store.open_writer(folder):
            pass
        (folder / name).unlink()
    (folder / "records.jsonl").unlink()
    (folder / "records.jsonl").symlink_to(mine)
    with pytest.raises(UsageError, match="is a link"), store.open_writer(folder):
        pass
    assert mine.read_text() == "precious, without a newline"


BAD_FIELDS = [
    (("case", "seq_len_kv"), -1, "case.seq_len_kv must be a whole number"),
    (("case", "seq_len_kv"), 0, "case.seq_len_kv must be from 1"),
    (("case", "seq_len_q"), True, "case.seq_len_q must be a whole number"),
    (("case", "batch_size"), 2**31, "case.batch_size must be from 1"),
    (("case", "op"), "A" * 101, "case.op must have at most 100"),
    (("case", "impl"), {"topk": 3}, "must be a text, got 3"),
    (("case", "topk"), "512", "case.topk must be a whole number"),
    (("status",), "fine", "status must be one of .*upgrade"),
    (("time", "seconds"), [0.0], r"time.seconds\[0\] must be a number"),
    (("time", "seconds"), [1.0, None], r"time.seconds\[1\] must be a number"),
    (("time", "seconds"), [-1.0], "time.seconds"),
    (("time", "seconds"), {}, "time.seconds must be a list"),
    (("time", "seconds"), [1e-3] * 20_001, "at most 20000 items"),
    (("time", "blocks"), [3, 4], "blocks must add up to 24 samples, got 7"),
    (("time", "overtaken"), [24], "overtaken must be below 24"),
    (("time", "mode"), None, "time.mode must be a text"),
    (("flags",), ["x", 1], r"flags\[1\] must be a text"),
    (("log",), "line", "log must be a list"),
    (("reason",), "A" * 10_001, "reason must have at most 10000 characters, got 10001"),
    (("replicate",), 0.5, "replicate must be a whole number"),
    (("cost", "flops"), -1, "flops.*must be a number from 0"),
    (("memory", "peak_bytes"), 1.5, "memory.peak_bytes must be a whole number"),
    (("gate",), [], "gate must be an object"),
    (("gate", "checks"), {}, "gate.checks must be a list"),
    (("gate", "dense_error"), {"relative_l2": "0"}, "gate.dense_error.'relative_l2' must be"),
    (("gate", "dense_error"), {"\x1b\n" + "A" * 900: "0"}, r"gate.dense_error.'\\x1b\\nA+.* must"),
    (("gate", "rounding_error"), [0.1], r"gate.rounding_error must be .* got \[0.1\]"),
    (("gate", "rounding_error"), True, "gate.rounding_error must be a number"),
    (("gate", "rounding_error"), {"relative_l2": "0"}, "gate.rounding_error.'relative_l2' must be"),
    (("gate", "rounding_error"), {"x": {"y": 1}}, "gate.rounding_error.'x' must be a number"),
    (("stages", 0, "seconds"), -1, "seconds of stage"),
    (("stages", 0, "name"), [], r"stages\[0\].name must be a text"),
    (("kernels", 0), None, r"kernels\[0\] must be an object"),
]


def put(data: Any, place: tuple[Any, ...], value: Any) -> None:
    for step in place[:-1]:
        data = data[step]
    data[place[-1]] = value


@pytest.mark.parametrize(
    ("place", "value", "sentence"), BAD_FIELDS, ids=[f"{p}-{str(v)[:9]}" for p, v, _ in BAD_FIELDS]
)
def test_a_field_of_another_type_names_its_line(
    tmp_path: Path, place: tuple[Any, ...], value: Any, sentence: str
) -> None:
    header, records = plain_run(2)
    put(records[1], place, value)
    with pytest.raises(UsageError, match=f"records.jsonl:2: .*{sentence}") as caught:
        store.read_run(written(tmp_path / "run", header, records))
    assert len(str(caught.value)) < 500


BAD_HEADERS = [
    (("machine",), [], "machine must be an object"),
    (("machine", "name"), 3, "machine.name must be a text"),
    (("machine", "name"), "A" * 101, "machine.name must have at most 100"),
    (("options", "gpu_hour_usd"), "2", "options.gpu_hour_usd must be a number"),
    (("options", "gpu_hour_usd"), -1, "options.gpu_hour_usd must be a number"),
    (("options", "replicates"), 0, "options.replicates must be at least 1"),
    (("ceilings",), 7, "ceilings must be an object"),
    (("ceilings", "copy_bytes_per_second"), 1e-300, "ceilings.copy_bytes_per_second must be"),
    (("plan",), {}, "plan must be a list"),
    (("plan", 1, "case", "op"), None, "case.op must be a text"),
    (("plan", 0), "x", r"plan\[0\] must be an object"),
    (("argv",), [1], "argv"),
    (("protocol",), "new", "protocol must be a whole number"),
]


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    BAD_HEADERS,
    ids=[f"{p}-{str(v)[:9]}" for p, v, _ in BAD_HEADERS],
)
def test_a_bad_header_is_refused(
    tmp_path: Path, place: tuple[Any, ...], value: Any, sentence: str
) -> None:
    header, records = plain_run(2)
    put(header, place, value)
    with pytest.raises(UsageError, match=f"run.json: .*{sentence}"):
        store.read_run(written(tmp_path / "run", header, records))


def test_a_record_that_a_reader_would_refuse_is_cut_to_size(tmp_path: Path) -> None:
    header, records = plain_run(1)
    long = Record.from_json(records[0] | {"reason": "x" * 10_000})
    object.__setattr__(long, "reason", "x" * 50_000)
    store.create_run(tmp_path / "run", header)
    with store.open_writer(tmp_path / "run") as writer:
        writer.append(long)
    (found,) = store.read_run(tmp_path / "run").records
    assert len(found.reason) == 10_000 and found.reason.endswith("x…")


# ---- any value of a run replaced by a hostile one

VALUES = (
    *(None, -1, 0, 1, True, 2**31 - 1, 2**53, 1e29, 1e-11, 0.5, 1e300, "", "A" * 10**5, "A" * 99),
    *("../../etc/passwd", "/dev/zero", "=cmd()", "<script>alert(1)</script>", "\ud800", "\x00"),
    *("\u202egnp.exe", "nan", "-1e5", [], {}, [[]], {"": ""}, [1e-9], ["a"], {"relative_l2": 0}),
)


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value something stands."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    return [here] * bool(here) + [p for key, item in items for p in places(item, (*here, key))]


def at(data: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        data = data[step]
    return data


def kind(value: Any) -> str:
    """`number`, or the name of the type."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return "number" if is_number else type(value).__name__


def read_hostile(folder: Path, seed: int, changes: int) -> store.Run | None:
    """A run with some values exchanged; None where it was refused with a sentence."""
    rng = random.Random(seed)
    header, records = plain_run(24)
    for _ in range(changes):
        # a list of samples has many places, a name has one: the longer ones are rarer
        target = rng.choice([header, *records])
        found = [p for p in places(target) if not (isinstance(p[-1], int) and p[-1] > 1)]
        place = rng.choice(found)
        alike = [value for value in VALUES if kind(value) == kind(at(target, place))]
        # of another type it is nearly always refused
        put(target, place, rng.choice(alike if alike and rng.random() < 0.9 else VALUES))
    try:
        return store.read_run(written(folder, header, records))
    except UsageError as error:
        assert len(str(error)) < 1000 and "\n" not in str(error)
        return None


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 3))
def test_a_hostile_run_is_refused_or_reported(tmp_path: Path, seed: int, changes: int) -> None:
    run = read_hostile(tmp_path / "run", seed, changes)
    if run is None:
        return
    report = digest([run])
    tables.markdown(report).encode()
    tables.csv_text(report).encode()
    tables.json_lines(report)
    for figure in figures(report):
        assert (tmp_path / f"{figure.name}.png").resolve().parent == tmp_path.resolve()
        assert len(figure.name) < 200


def test_hostile_runs_are_not_all_refused(tmp_path: Path) -> None:
    # else the test above would look at no report
    runs = [read_hostile(tmp_path / "run", seed, 1) for seed in range(20)]
    assert 4 <= sum(run is not None for run in runs) <= 19


@pytest.mark.parametrize("seed", range(2))
def test_pages_and_pictures_of_a_hostile_run(tmp_path: Path, seed: int) -> None:
    runs = (read_hostile(tmp_path / "run", 1000 * seed + n, 1) for n in range(1000))
    run = next(run for run in runs if run is not None)
    html.write_html([run], tmp_path / "page.html")
    # a page is one file, and pictures lie in their folder alone
    drawn = figures(digest([run]))[:1]
    for figure in drawn:
        plots.write_figure(figure, tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "page.html"}


# ---- texts in tables

FORMULAS = ["=1+1", "+1", "-1+2", "@SUM(1)", "\t=1", "\r=1", "\n=1", " =1", "\u00a0=1", "\u200b=1"]


@pytest.mark.parametrize("text", FORMULAS, ids=[ascii(text) for text in FORMULAS])
def test_no_cell_of_a_csv_starts_a_formula(tmp_path: Path, text: str) -> None:
    header, records = plain_run(1)
    records[0]["reason"] = text
    records[0]["case"]["op"] = text
    run = store.read_run(written(tmp_path / "run", header, records))
    (row,) = csv.DictReader(io.StringIO(tables.csv_text(digest([run]))))
    for cell in (row["reason"], row["op"]):
        assert cell.startswith("'"), ascii(cell)
        assert cell.isprintable()


MARKUP = ["a|b", "`x`", "[a](http://x)", "![i](x)", "<b>", "**b**", "a\u2028b", "\u202eb", "&lt;"]


@pytest.mark.parametrize("text", MARKUP, ids=[ascii(text) for text in MARKUP])
def test_markdown_shows_texts_as_they_are(tmp_path: Path, text: str) -> None:
    header, records = plain_run(2)
    plain = tables.markdown(digest([store.read_run(written(tmp_path / "a", header, records))]))
    records[0]["reason"] = f"x{text}x"
    records[0]["status"] = "failed"
    run = store.read_run(written(tmp_path / "b", header, records))
    shown = tables.markdown(digest([run]))
    (line,) = [line for line in shown.splitlines() if "failed" in line and line.startswith("|")]
    head = next(line for line in shown.splitlines() if line.startswith("|"))
    bars = line.replace("\\\\", "").replace("\\|", "").count("|")
    assert bars == head.count("|")
    assert "<b>" not in line and not re.search(r"(?<!\\)\]\(", line) and "\u202e" not in shown
    assert "\u2028" not in shown and plain.count("\n") <= shown.count("\n")


def test_the_key_of_a_line_is_no_path(tmp_path: Path) -> None:
    header, records = plain_run(1)
    right = records[0]["key"]
    records[0]["key"] = "../../etc/passwd"
    run = store.read_run(written(tmp_path / "run", header, records))
    # traces are named by the key, which is worked out from the case
    assert [record.case.key for record in run.records] == [right]
    assert untrusted.shown("A" * 100) == "'" + "A" * 36 + "..."
