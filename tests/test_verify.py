"""`verify`: a good run agrees with itself; each of many edits is found and named."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsa_bench import doubt, store
from dsa_bench.cli import call
from dsa_bench.cli.verify import read
from dsa_bench.record import Record
from dsa_bench.reports import metrics, tables
from dsa_bench.reports.verify import Check, verify
from tests.reports_runs import h100_run

ROOT = Path(__file__).parent.parent
CHECKS = [{"name": "out", "passed": True, "figures": {"cos": 1e-6}, "limits": {"cos": 1e-5}}]


def judged(record: Record, replicate: int, header: dict[str, Any]) -> Record:
    """A record as the protocol of today would have left it, in this replicate."""
    gate = dict(record.gate) | ({"checks": CHECKS} if record.status == "ok" else {})
    made = replace(record, gate=gate, flags=(), replicate=replicate)
    if made.time:
        seconds = tuple(s * (1 + replicate / 1e4) for s in made.time.seconds)
        stop = "max_samples" if record.case.topk == 512 else "settled"
        time = replace(made.time, seconds=seconds, blocks=(12, 12), stop=stop)
        made = replace(made, time=time)
    return replace(made, flags=doubt.judge(made, metrics.ceilings(header)))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two replicates with its reports."""
    made = h100_run()
    records = [r for r in made.records if r.case.seq_len_kv in (8192, 65536)]
    header = made.header | {
        "protocol": doubt.PROTOCOL,
        "verb": "run",
        "plan": [{"case": r.case.to_json(), "reason": ""} for r in records],
        "options": made.header["options"] | {"replicates": 2},
    }
    folder = tmp_path_factory.mktemp("runs") / "good"
    store.create_run(folder, header)
    with store.open_writer(folder) as writer:
        for replicate in (0, 1):
            for record in records:
                writer.append(judged(record, replicate, header))
    run = store.read_run(folder)
    tables.write_csv([run], folder / "report.csv")
    tables.write_markdown([run], folder / "report.md")
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    for name in ("run.json", "records.jsonl", "report.csv", "report.md"):
        (tmp_path / name).write_bytes((good / name).read_bytes())
    return tmp_path


def findings(folder: Path) -> dict[str, tuple[str, ...]]:
    """Of each check that found something what it found."""
    return {check.name: check.findings for check in verify(read(folder)) if check.findings}


def test_a_good_run_agrees_with_itself(good: Path) -> None:
    checks = verify(read(good))
    assert {check.verdict for check in checks} == {"agrees"}, [c.findings for c in checks]
    count = {check.name: check.count for check in checks}
    assert count["lines"] == count["plan"] == 2 * count["report.md"] > 20
    assert count["figures"] > 300 and count["report.csv"] > 600 and count["flags"] > 20


def rewrite(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change the records and give them checksums that fit, as a careful forger would."""
    file = folder / "records.jsonl"
    records = [json.loads(line) for line in file.read_bytes().splitlines()]
    change(records)
    file.write_bytes(b"".join(store.line_of(record) + b"\n" for record in records))


def first(records: list[dict[str, Any]], op: str = "dsa") -> dict[str, Any]:
    """The first timed record of this operator."""
    return next(r for r in records if r["case"]["op"] == op and r["status"] == "ok")


def halve_times(records: list[dict[str, Any]]) -> None:
    time = first(records)["time"]
    time["seconds"] = [seconds / 2 for seconds in time["seconds"]]


def unflag(records: list[dict[str, Any]]) -> None:
    next(r for r in records if r["flags"])["flags"] = []


def make_drift(records: list[dict[str, Any]]) -> None:
    time = first(records)["time"]
    time["seconds"] = [s * (1 + i / 100) for i, s in enumerate(time["seconds"])]


def change_key(records: list[dict[str, Any]]) -> None:
    records[3]["key"] = "0123456789abcdef"


def pass_the_wrong(records: list[dict[str, Any]]) -> None:
    next(r for r in records if r["status"] == "wrong")["status"] = "ok"


def exceed(records: list[dict[str, Any]]) -> None:
    first(records)["gate"]["checks"][0]["figures"]["cos"] = 2e-5


def lose_figure(records: list[dict[str, Any]]) -> None:
    first(records)["gate"]["checks"][0]["figures"]["cos"] = None


def fail_check(records: list[dict[str, Any]]) -> None:
    first(records)["gate"]["checks"][0]["passed"] = False


def drop_gate(records: list[dict[str, Any]]) -> None:
    first(records)["gate"]["checks"] = []


def change_case(records: list[dict[str, Any]]) -> None:
    first(records)["case"]["seed"] = 7


def third_replicate(records: list[dict[str, Any]]) -> None:
    records.append(first(records) | {"replicate": 2})


def drop_record(records: list[dict[str, Any]]) -> None:
    records.remove(first(records))


def double_work(records: list[dict[str, Any]]) -> None:
    first(records)["cost"]["flops"] *= 2


def slow_stage(records: list[dict[str, Any]]) -> None:
    first(records)["stages"][0]["seconds"] *= 1.1


def grow_memory(records: list[dict[str, Any]]) -> None:
    first(records)["memory"]["peak_bytes"] += 2**30


def lose_block(records: list[dict[str, Any]]) -> None:
    first(records)["time"]["blocks"] = [12, 11]


def interrupt(records: list[dict[str, Any]]) -> None:
    records[-1]["status"] = "interrupted"


FORGERIES = [
    (halve_times, "report.csv", "shows seconds '.*' of .*, its records give"),
    (unflag, "flags", "its samples show .*, its flags do not"),
    (make_drift, "flags", "its samples show drift, its flags do not"),
    (change_key, "lines", r"records.jsonl:4: its key is '0123456789abcdef', its case has"),
    (pass_the_wrong, "verdicts", "is ok and has no time"),
    (exceed, "verdicts", "cos of its check 'out' is 2e-05, limit 1e-05"),
    (lose_figure, "verdicts", "cos of its check 'out' is None"),
    (fail_check, "verdicts", "its check 'out' did not pass"),
    (drop_gate, "verdicts", "no check of its output is recorded"),
    (change_case, "plan", "was planned, and has no record"),
    (change_case, "plan", "has a record, and was not planned"),
    (third_replicate, "plan", "only 2 replicates were planned"),
    (drop_record, "plan", "was planned, and has no record"),
    (double_work, "sums", "the flops of its stages are"),
    (slow_stage, "sums", "took .* its kernels"),
    (grow_memory, "sums", "bytes at its peak"),
    (lose_block, "lines", "time.blocks must add up to 24 samples, got 23"),
    (interrupt, "plan", "was interrupted .*--resume"),
]


@pytest.mark.parametrize(
    ("forge", "check", "sentence"), FORGERIES, ids=[forge.__name__ for forge, _, _ in FORGERIES]
)
def test_a_forgery_with_right_checksums_is_found(
    folder: Path, forge: Callable[[list[dict[str, Any]]], object], check: str, sentence: str
) -> None:
    rewrite(folder, lambda records: None)
    assert not findings(folder)
    rewrite(folder, forge)
    found = findings(folder).get(check, ())
    assert any(re.search(sentence, text) for text in found), findings(folder)


def edit(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))


def test_an_edit_without_the_checksum_is_found(folder: Path) -> None:
    edit(folder, "records.jsonl", '"warmup_calls":0', '"warmup_calls":9')
    (found,) = findings(folder)["lines"]
    assert "records.jsonl:1: its crc32 is" in found and "was changed or damaged" in found


def test_a_line_without_its_checksum_is_found(folder: Path) -> None:
    lines = (folder / "records.jsonl").read_text().splitlines()
    lines[1] = json.dumps({k: v for k, v in json.loads(lines[1]).items() if k != "crc32"})
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    assert findings(folder) == {"lines": ("records.jsonl:2: has no crc32, it was rewritten",)}


def test_a_torn_line_is_found(folder: Path) -> None:
    file = folder / "records.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    found = findings(folder)
    assert "the last line is cut off" in found["lines"][0]
    assert "has no record" in found["plan"][0]


def csv_cell(folder: Path, column: str, change: Callable[[str], str]) -> None:
    """Change one cell of the first row of report.csv that has a value there."""
    file = folder / "report.csv"
    head, *rows = file.read_text().splitlines()
    index = head.split(",").index(column)
    for n, row in enumerate(rows):
        cells = row.split(",")
        if '"' not in row and cells[index]:
            cells[index] = change(cells[index])
            rows[n] = ",".join(cells)
            break
    file.write_text("\n".join([head, *rows]) + "\n")


@pytest.mark.parametrize(
    "column",
    ["seconds", "seconds_high", "usd_per_million_tokens", "speedup", "flops_per_second",
     "floor_share", "tokens", "peak_bytes"],
)  # fmt: skip
def test_a_number_changed_in_the_csv_is_found(folder: Path, column: str) -> None:
    csv_cell(folder, column, lambda text: repr(float(text) * (1 + 1e-5)))
    found = findings(folder)
    assert list(found) == ["report.csv"]
    assert f"report.csv shows {column} " in found["report.csv"][0] and len(found["report.csv"]) == 1


def test_rows_of_the_reports_are_counted(folder: Path) -> None:
    for name in ("report.csv", "report.md"):
        lines = (folder / name).read_text().splitlines(keepends=True)
        gone = next(i for i, line in enumerate(lines) if "flash_attn_3" in line and "ok" in line)
        (folder / name).write_text("".join(lines[:gone] + lines[gone + 1 :]))
    found = findings(folder)
    assert "report.csv lacks the case" in found["report.csv"][0]
    count = len({record.case.key for record in store.read_run(folder).records})
    assert f"report.md has {count - 1} rows, the records {count} cases" in found["report.md"][0]
    (folder / "report.csv").write_text("a,b\n1,2\n")
    assert findings(folder)["report.csv"] == ("report.csv has no column key",)


def test_a_fault_of_the_tables_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # were the tables wrong, the records of good runs would not agree with them
    wrong = tuple(
        replace(m, compute=lambda t: 1.01 * t["dense_seconds"] / t["seconds"])
        if m.name == "speedup"
        else m
        for m in metrics.METRICS
    )
    monkeypatch.setattr(metrics, "METRICS", wrong)
    found = findings(folder)
    assert "the tables show speedup" in found["figures"][0]


def test_the_command_says_it_with_its_exit_code(
    good: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["verify", str(good)]) == 0
    assert "report.csv" in capsys.readouterr().out
    rewrite(folder, drop_record)
    assert call(["verify", str(good), str(folder)]) == 3
    assert "was planned, and has no record" in capsys.readouterr().out
    assert call(["verify", "--json", str(folder)]) == 3
    said = json.loads(capsys.readouterr().out)
    assert said["agrees"] is False and said["run"] == str(folder)
    assert {c["verdict"] for c in said["checks"]} >= {"agrees", "differs"}
    assert call(["verify", str(folder / "gone")]) == 2


@pytest.mark.parametrize("name", ["v3.2", "kernels-decode", "kernels-prefill"])
def test_committed_runs_agree(name: str) -> None:
    checks: tuple[Check, ...] = verify(read(ROOT / "docs" / "results" / "h100" / name))
    assert not [check.findings for check in checks if check.findings]
    assert sum(check.count for check in checks) >= 500
