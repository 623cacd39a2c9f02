"""A run folder: append, torn lines, resume, and the sentences for folders that cannot be read."""

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from dsa_bench import store
from dsa_bench.operator import UsageError
from dsa_bench.record import Case, KernelTime, MemoryUse, Record, StageTime, Timing
from dsa_bench.store import create_run, open_writer, read_run

HEADER = {"started": "2026-01-01T00:00:00+00:00", "argv": ["run"]}


def record(seq_len_kv: int, status: str = "ok", reason: str = "") -> Record:
    case = Case(op="topk", impl="triton", phase="decode", seq_len_kv=seq_len_kv, seq_len_q=1)
    return Record(case=case, status=status, reason=reason)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    create_run(path, HEADER)
    return path


def test_records_are_read_as_they_were_written(folder: Path) -> None:
    written = [record(1), record(2, "failed", "no")]
    with open_writer(folder) as writer:
        for each in written:
            writer.append(each)
    run = read_run(folder)
    assert list(run.records) == written
    assert run.header == HEADER | {"schema": "dsa-bench/run@1"}
    assert not run.torn


def test_each_record_is_on_disk_before_the_next(folder: Path) -> None:
    with open_writer(folder) as writer:
        for count in (1, 2, 3):
            writer.append(record(count))
            assert len(read_run(folder).records) == count


def test_numbers_that_json_lacks_become_null(folder: Path) -> None:
    with open_writer(folder) as writer:
        gate = {"checks": [{"figures": {"max_abs": math.nan, "cos": math.inf, "outside": 1.0}}]}
        writer.append(Record(case=record(1).case, status="wrong", gate=gate))
    (found,) = read_run(folder).records
    assert found.gate["checks"][0]["figures"] == {"max_abs": None, "cos": None, "outside": 1.0}


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_torn_last_line_is_left_out_and_cut_off_before_writing(folder: Path, cut: int) -> None:
    with open_writer(folder) as writer:
        writer.append(record(1))
        writer.append(record(2))
    file = folder / "records.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    run = read_run(folder)
    assert run.torn
    assert run.records == (record(1),)
    with open_writer(folder) as writer:
        writer.append(record(3))
    run = read_run(folder)
    assert run.records == (record(1), record(3))
    assert not run.torn


def test_newest_record_of_a_case_wins_in_the_place_of_the_first(folder: Path) -> None:
    with open_writer(folder) as writer:
        for each in (record(1, "failed"), record(2), record(1)):
            writer.append(each)
    assert read_run(folder).records == (record(1), record(2))


def test_ended_cases_are_those_a_resume_leaves_alone(folder: Path) -> None:
    statuses = ("ok", "wrong", "skipped", "failed", "oom", "timeout", "interrupted")
    with open_writer(folder) as writer:
        for number, status in enumerate(statuses):
            writer.append(record(number + 1, status))
    expected = {(record(number + 1).case.key, 0) for number in range(3)}
    assert read_run(folder).ended == expected


def test_each_replicate_of_a_case_ends_for_itself(folder: Path) -> None:
    written = [replace(record(1, status), replicate=n) for n, status in
               [(0, "ok"), (1, "failed"), (2, "ok"), (1, "timeout")]]  # fmt: skip
    with open_writer(folder) as writer:
        for each in written:
            writer.append(each)
    run = read_run(folder)
    assert run.records == (written[0], written[3], written[2])
    key = record(1).case.key
    assert run.ended == {(key, 0), (key, 2)}


def test_a_case_that_cost_two_workers_is_set_aside(folder: Path) -> None:
    key = record(1).case.key
    with open_writer(folder) as writer:
        for lost in (1, 2):
            writer.append(replace(record(1, "failed"), replicate=3, lost_workers=lost))
            run = read_run(folder)
            assert run.lost_workers(key, 3) == lost
            assert run.ended == ({(key, 3)} if lost == 2 else frozenset())
    assert run.lost_workers(key, 0) == run.lost_workers("other", 3) == 0


def test_a_line_ends_in_the_checksum_of_what_is_before_it(folder: Path) -> None:
    with open_writer(folder) as writer:
        writer.append(replace(record(1), reason='größer \u2028 "x"'))
    line = (folder / "records.jsonl").read_bytes().removesuffix(b"\n")
    body, checksum = line[: -len(b',"crc32":"01234567"}')] + b"}", line[-10:-2]
    assert line == body[:-1] + b',"crc32":"' + checksum + b'"}'
    assert int(checksum, 16) == zlib.crc32(body)
    assert json.loads(body) == replace(record(1), reason='größer \u2028 "x"').to_json()
    # what was read and is written again has one checksum, the right one
    (found,) = read_run(folder).records
    assert "crc32" not in found.extra and store.line_of(json.loads(line)) == line


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (b'"status":"ok"', b'"status":"no"', "the line was changed or damaged"),
        (b"triton", b"gluon", "the line was changed or damaged"),
        (b'"seed":0', b'"seed":0 ', "the line was changed or damaged"),
        (b'"crc32":"', b'"crc32":"f', "crc32 must be the last field"),
        (b'"crc32":', b'"crc32": ', "crc32 must be the last field"),
    ],
)
def test_a_changed_line_is_refused(folder: Path, old: bytes, new: bytes, sentence: str) -> None:
    with open_writer(folder) as writer:
        writer.append(record(1))
        writer.append(record(2))
    file = folder / "records.jsonl"
    first, second = file.read_bytes().splitlines()
    file.write_bytes(first + b"\n" + second.replace(old, new, 1) + b"\n")
    assert old in second
    with pytest.raises(UsageError, match=f"records.jsonl:2: isn't a record: .*{sentence}"):
        read_run(folder)
    lines, torn = store.read_lines(folder)
    assert [line.record for line in lines] == [record(1), None] and not torn
    assert sentence in lines[1].fault and lines[0].fault == ""


def test_lines_of_older_versions_have_no_checksum(folder: Path) -> None:
    (folder / "records.jsonl").write_text(json.dumps(record(1).to_json()) + "\n")
    assert read_run(folder).records == (record(1),)


def test_create_refuses_a_folder_that_holds_anything(folder: Path, tmp_path: Path) -> None:
    before = (folder / "run.json").read_bytes()
    with pytest.raises(UsageError, match=r"isn't empty .* --resume"):
        create_run(folder, {"argv": []})
    assert (folder / "run.json").read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="isn't empty"):
        create_run(tmp_path / "file", HEADER)
    (tmp_path / "empty").mkdir()
    create_run(tmp_path / "empty", HEADER)
    assert read_run(tmp_path / "empty").records == ()


def test_two_writers_cannot_share_a_folder(folder: Path) -> None:
    with (
        open_writer(folder),
        pytest.raises(UsageError, match="is being written by another dsa-bench"),
        open_writer(folder),
    ):
        pass
    with open_writer(folder) as writer:
        writer.append(record(1))
    assert read_run(folder).records == (record(1),)


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone doesn't exist \(give the folder"):
        read_run(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"is empty \(give the folder"):
        read_run(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match=r"has no run.json \(give the folder"):
        read_run(tmp_path)
    with pytest.raises(UsageError, match=r"notes.txt has no run.json"):
        read_run(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.json isn't JSON"),
        ('{"schema": "dsa-be', "run.json isn't JSON"),
        ("[]", "run.json must hold a JSON object"),
        ("{}", "run.json: schema must be dsa-bench/run@1, got None"),
        (
            '{"schema": "dsa-bench/run@2"}',
            "run.json: written by schema dsa-bench/run@2, .*upgrade",
        ),
    ],
)
def test_bad_headers(folder: Path, text: str, message: str) -> None:
    (folder / "run.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_run(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "records.jsonl:2: isn't a record: .*delete this line"),
        ("[]", "records.jsonl:2: isn't a record"),
        ('{"schema": "dsa-bench/record@1"}', "records.jsonl:2: isn't a record: case is missing"),
        ('{"schema": "dsa-bench/record@9"}', "records.jsonl:2: written by schema .*upgrade"),
        ('{"schema": "dsa-bench/record@²"}', r"2: schema must be dsa-bench/record@1, got .*\\xb2"),
        # quoted in short, whatever its length
        (f'{{"schema": "{"A" * 10**5}"}}', r"schema must be dsa-bench/record@1, got 'A{36}\.\.\. "),
        (f'{{"schema": "dsa-bench/record@{"9" * 5000}"}}', r"2: schema must be .*@9+\.\.\. \(is"),
    ],
)
def test_bad_lines_name_file_and_line(folder: Path, line: str, message: str) -> None:
    good = json.dumps(record(1).to_json())
    (folder / "records.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UsageError, match=message):
        read_run(folder)


def test_fields_of_a_newer_version_are_read_over() -> None:
    written = Record(
        case=record(1).case,
        status="ok",
        time=Timing(mode="cold", seconds=(1.0, 2.0), stop="settled"),
        stages=(
            StageTime(
                name="topk",
                impl="triton",
                seconds=1.0,
                flops=2.0,
                bytes_read=3.0,
                bytes_written=4.0,
            ),
        ),
        kernels=(KernelTime(name="k", stage="topk", calls=1.0, seconds=1.0),),
        memory=MemoryUse(
            peak_bytes=9, input_bytes=1, output_bytes=2, workspace_bytes=6, predicted_bytes=9
        ),
    )
    data = json.loads(json.dumps(written.to_json()))
    for part in (data["case"], data["time"], data["memory"], *data["stages"], *data["kernels"]):
        part["joules"] = 5
    assert Record.from_json(data) == written
    top = Record.from_json(data | {"joules": 5})
    assert top.extra == {"joules": 5} and top.to_json()["joules"] == 5


def test_a_header_that_was_being_written_is_no_run(tmp_path: Path) -> None:
    """A run that was killed in its first milliseconds can be begun again in the same place."""
    (tmp_path / ".run.json").write_text('{"sche')
    store.expect_free(tmp_path)
    store.create_run(tmp_path, {"verb": "run"})
    assert read_run(tmp_path).header["verb"] == "run"
    assert not (tmp_path / ".run.json").exists()
