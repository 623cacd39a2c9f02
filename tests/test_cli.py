"""The command line: exit codes, sentences, what goes to stdout and stderr."""

import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dsa_bench import job, sweep
from dsa_bench.record import Case, Record
from dsa_bench.runner import Progress
from dsa_bench.store import Run, create_run, open_writer, read_run
from tests.fake_command import ONE, Call, fake_command


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Call:
    return fake_command(monkeypatch, tmp_path, capfd)


def test_run_saves_records_and_ends_with_report_and_path(call: Call, tmp_path: Path) -> None:
    code, out, err = call("run", *ONE, "-o", "r")
    assert code == 0
    assert out.splitlines() == ["the report", "r/report.html"]
    assert err == "[1/1] decode fine L=4k q=1 k=512 bf16 batch=1 (triton)  ok 1.00 ms\n"
    run = read_run(tmp_path / "r")
    assert [record.status for record in run.records] == ["ok"]
    assert run.header["argv"] == ["run", *ONE, "-o", "r"]
    assert run.header["options"]["gpu_hour_usd"] == 2.0
    assert run.header["ceilings"] == {"copy_bytes_per_second": 1e9}
    assert run.header["sweep"]["phases"]["decode"]["topk"] == [512]


def test_run_json_prints_the_records_alone(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("run", *ONE, "-o", "r", "--json")
    assert code == 0
    (line,) = out.splitlines()
    assert Record.from_json(json.loads(line)) == read_run(tmp_path / "r").records[0]


@pytest.mark.parametrize(
    ("words", "end"),
    [((), "--device cpu"), (("--effort", "standard"), "--effort standard --device cpu")],
)
def test_a_record_is_reproduced_with_its_effort(
    call: Call, tmp_path: Path, words: Sequence[str], end: str
) -> None:
    assert call("run", *ONE, *words, "-o", "r")[0] == 0
    (record,) = read_run(tmp_path / "r").records
    assert record.reproduce.endswith(end)
    assert ("--effort" in record.reproduce) == bool(words)


def test_run_names_its_folder_after_time_and_machine(call: Call, tmp_path: Path) -> None:
    assert call("run", *ONE)[0] == 0
    (folder,) = (tmp_path / "results").iterdir()
    assert re.fullmatch(r"\d{8}T\d{6}Z-test-cpu", folder.name)


@pytest.mark.parametrize(("op", "code"), [("fine", 0), ("fine,wrong", 3), ("exits", 3)])
def test_run_exit_code_tells_whether_a_case_failed(call: Call, op: str, code: int) -> None:
    assert call("run", "--op", op, "--phase", "decode", "-L", "4k", "-o", "r")[0] == code


def test_skipped_case_is_no_failure_and_needs_no_worker(call: Call, tmp_path: Path) -> None:
    axes = ("--phase", "decode", "-L", "512", "-k", "1k")
    code, _, err = call("run", "--op", "fine", *axes, "-o", "r")
    assert code == 0
    assert "skipped: topk 1024 is more than the 512 keys there are" in err
    assert not (tmp_path / "r" / "worker.log").exists()


def test_plan_shows_the_cases_and_writes_nothing(call: Call, tmp_path: Path) -> None:
    words = ("run", "--op", "fine", "--phase", "decode", "-L", "512,1k", "-k", "1k", "--plan")
    code, out, err = call(*words)
    assert (code, err) == (0, "")
    assert "to run: 1, skipped: 1" in out
    assert "topk 1024 is more than the 512 keys there are" in out
    assert "\x1b" not in out
    assert list(tmp_path.iterdir()) == []
    lines = [json.loads(line) for line in call(*words, "--json")[1].splitlines()]
    assert [line["case"]["seq_len_kv"] for line in lines] == [512, 1024]


def test_resume_takes_what_has_not_ended(call: Call, tmp_path: Path) -> None:
    words = ("run", "--op", "fine,wrong,exits,failed", *ONE[2:], "-o", "r")
    assert call(*words)[0] == 3
    file = tmp_path / "r" / "records.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    header = (tmp_path / "r" / "run.json").read_bytes()
    # the first case ended, the second line is torn, the third case failed
    file.write_bytes(lines[0] + lines[1][:-30])
    assert read_run(tmp_path / "r").torn
    code, _, err = call("run", "--resume", "r")
    assert code == 3
    assert [line.split()[2] for line in err.splitlines()] == ["wrong", "exits", "failed"]
    run = read_run(tmp_path / "r")
    assert [(r.case.op, r.status) for r in run.records] == [
        ("fine", "ok"), ("wrong", "wrong"), ("exits", "failed"), ("failed", "failed")
    ]  # fmt: skip
    assert (tmp_path / "r" / "run.json").read_bytes() == header
    # one that cost two workers is set aside
    assert [line.split()[2] for line in call("run", "--resume", "r")[2].splitlines()] == ["failed"]


def test_interrupted_run_says_how_to_go_on(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inner = job.execute

    def execute(ready: job.Job, tell: Callable[[Progress], None]) -> tuple[Run, bool]:
        def interrupting(progress: Progress) -> None:
            if progress.ended == 1 and progress.phase == "gate":
                raise KeyboardInterrupt
            tell(progress)

        return inner(ready, interrupting)

    monkeypatch.setattr(job, "execute", execute)
    axes = ("--phase", "decode", "-L", "4k:16k:x2", "-k", "64")
    code, _, err = call("run", "--op", "fine", *axes, "-o", "r")
    assert code == 130
    assert "dsa-bench: stopped; go on with dsa-bench run --resume r" in err
    statuses = [record.status for record in read_run(tmp_path / "r").records]
    assert statuses == ["ok", "interrupted"]
    monkeypatch.setattr(job, "execute", inner)
    assert call("run", "--resume", "r")[0] == 0
    assert [r.status for r in read_run(tmp_path / "r").records] == ["ok", "ok", "ok"]


def test_failed_report_keeps_the_results(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(job, "write_all_reports", lambda run: {"html": "KeyError: 'x'"})
    code, _, err = call("run", *ONE, "-o", "r")
    assert code == 0
    assert "the html report failed: KeyError: 'x' (the records in r are safe)" in err
    assert len(read_run(tmp_path / "r").records) == 1


def test_check_keeps_nothing(call: Call, tmp_path: Path) -> None:
    axes = ("--phase", "decode", "-L", "1k", "-k", "64", "--seq-len-q", "1")
    code, out, _ = call("check", "--op", "fine,wrong", *axes)
    assert code == 3
    assert "1 ok, 1 wrong" in out
    assert list(tmp_path.iterdir()) == []


def test_check_takes_every_implementation_by_default(call: Call) -> None:
    _, out, _ = call("check", "--op", "fine", "--json")
    records = [Record.from_json(json.loads(line)) for line in out.splitlines()]
    assert {record.case.impl for record in records} == {"triton"}
    assert {json.loads(record.reason)[1] for record in records} == {"check"}


def test_profile_asks_for_traces_of_a_few_cases(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("profile", *ONE, "-o", "p")
    assert code == 0
    (record,) = read_run(tmp_path / "p").records
    _, verb, options = json.loads(record.reason)
    assert (verb, options["trace_dir"]) == ("profile", str(tmp_path / "p" / "traces"))
    assert "kernels" in out
    code, _, err = call("profile", "--op", "fine", "-L", "1k:9k:+1k")
    assert code == 2
    assert "profile takes at most 8 cases, this selection has" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("run", "--op", "fien"), "unknown operator 'fien'; did you mean 'fine'?"),
        (("run", "--op", "fine", "-L", "4k:8k"), "-L must be sizes like 4k,8k or a range"),
        (("run", "--op", "fine", "--impl", "trition"), "implementation 'trition' is unknown; did"),
        (("run", "--inputs", "nedle"), "--inputs 'nedle' is unknown; did you mean 'needle'?"),
        (("run", "--lengths", "onelong"), "--lengths 'onelong' is unknown; did you mean 'one-long"),
        (("check", "--lengths", "4k"), "--lengths '4k' is unknown; known: equal, spread, one-long"),
        (("run", "--inputs", "x.safetensors"), "--inputs: there is no file x.safetensors (give"),
        (("check", "--weights", "x.safetensors:1"), "--weights: there is no file x.safetensors"),
        (("profile", "--tp", "two"), "--tp must be sizes like 4k,8k or a range"),
        (("run", "--preset", "v3"), "--preset 'v3' is unknown; did you mean 'v3.2'?"),
        (("run", "--phase", "decoed"), "--phase 'decoed' is unknown; did you mean 'decode'?"),
        (("run", "smok"), "sweep 'smok' is unknown; did you mean 'smoke'?"),
        (("run", "--device", "cuda"), "torch sees no CUDA device (pass --device cpu)"),
        (("run", "--device", "tpu"), "--device 'tpu' is unknown; did you mean 'cpu'?"),
        (("run", "--effort", "quik"), "--effort 'quik' is unknown; did you mean 'quick'?"),
        (("run", "--bogus"), "No such option: --bogus"),
        (("run", "--timeout", "0"), "Invalid value for '--timeout'"),
        (("run", "--resume", "gone"), "gone doesn't exist (give the folder"),
        (("run", "--resume", "gone", "-L", "4k"), "--resume takes its cases from the folder"),
        (("run", "--resume", "gone", "--effort", "quick"), "--resume takes --effort from the"),
        (("run", "--resume", "gone", "--device", "cpu"), "--resume takes --device from the"),
        (
            ("run", "--resume", "gone", "--gpu-hour-usd", "3"),
            "--resume takes --gpu-hour-usd from the folder (leave --gpu-hour-usd out)",
        ),
        (("report", "gone"), "gone doesn't exist (give the folder"),
        (("report",), "Missing argument 'RUN...'"),
        (("rnu",), "No such command 'rnu'"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_2(
    call: Call, tmp_path: Path, words: Sequence[str], sentence: str
) -> None:
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert err.startswith(f"dsa-bench: {sentence}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_run_overwrites_nothing(call: Call, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.tex").write_text("x")
    code, _, err = call("run", *ONE, "-o", "r")
    assert code == 2
    assert "r exists and isn't empty" in err
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["thesis.tex"]


def test_folder_that_cannot_be_made_is_one_sentence(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    code, _, err = call("run", *ONE, "-o", "file/r")
    assert (code, err) == (2, "dsa-bench: file/r: Not a directory\n")


def saved_run(path: Path, *records: Record) -> None:
    create_run(path, {"machine": {"name": "Test CPU", "device": "cpu"}, "options": {}})
    with open_writer(path) as writer:
        for record in records:
            writer.append(record)


def test_report_refuses_torn_and_empty_runs(call: Call, tmp_path: Path) -> None:
    case = Case(op="fine", impl="triton", phase="decode", seq_len_kv=1, seq_len_q=1)
    saved_run(tmp_path / "torn", Record(case=case, status="ok"), Record(case=case, status="ok"))
    file = tmp_path / "torn" / "records.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    saved_run(tmp_path / "none")
    before = file.read_bytes()
    code, _, err = call("report", "torn", "--html", "page.html")
    assert code == 2
    assert "breaks off in its last line, after case 1 (finish it with" in err
    assert file.read_bytes() == before
    code, _, err = call("report", "none", "--html", "page.html")
    assert code == 2
    assert "none has no records yet (finish it with dsa-bench run --resume none)" in err
    assert not (tmp_path / "page.html").exists()


def test_resume_refuses_another_machine(call: Call, tmp_path: Path) -> None:
    assert call("run", *ONE, "-o", "r")[0] == 0
    header = json.loads((tmp_path / "r" / "run.json").read_text())
    header["machine"]["name"] = "Other CPU"
    (tmp_path / "r" / "run.json").write_text(json.dumps(header))
    code, _, err = call("run", "--resume", "r")
    assert code == 2
    assert "r was measured on Other CPU, this machine has Test CPU" in err


def test_environment_variables_stand_for_options(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DSA_BENCH_GPU_HOUR_USD", "3.5")
    assert call("run", *ONE, "-o", "r")[0] == 0
    assert read_run(tmp_path / "r").header["options"]["gpu_hour_usd"] == 3.5
    # a variable that stays set is no wish to change the run
    assert call("run", "--resume", "r")[0] == 0


def test_reproduce_is_read_as_the_same_case(call: Call) -> None:
    case = Case(
        op="fine", impl="triton", phase="decode", seq_len_kv=5000, seq_len_q=2, topk=2048,
        preset="v3.2-cpu", num_heads=16, seed=3,
    )  # fmt: skip
    _, *words = shlex.split(sweep.reproduce(case, device="cpu"))
    _, out, _ = call(*words, "--plan", "--json")
    (line,) = [json.loads(text) for text in out.splitlines()]
    assert Case.from_json(line["case"]) == dataclasses.replace(case)


def test_ranks_inputs_and_weights_reach_the_plan(call: Call, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").touch()
    axes = ("--tp", "1,8", "--inputs", "local", "--weights", "w.safetensors:3")
    words = ("run", "--op", "layer", *ONE[2:], *axes, "--plan")
    lines = [json.loads(text) for text in call(*words, "--json")[1].splitlines()]
    cases = [Case.from_json(line["case"]) for line in lines]
    assert [(c.tensor_parallel, c.inputs, c.weights) for c in cases] == [
        (1, "local", "w.safetensors:3"),
        (8, "local", "w.safetensors:3"),
    ]
    assert "tp=8 inputs=local" in call(*words)[1]
    assert "others" not in call("run", *ONE, "--plan")[1]
    # a case that is reproduced is that case
    for case in cases:
        _, *again = shlex.split(sweep.reproduce(case, device="cpu"))
        (line,) = call(*again, "--plan", "--json")[1].splitlines()
        assert Case.from_json(json.loads(line)["case"]) == case


def test_lengths_reach_the_plan_of_decode(call: Call) -> None:
    words = ("run", "--op", "batch", "-L", "4k", "--batch", "2,8", "--lengths", "equal,spread")
    for verb in ("run", "profile", "check"):
        assert "--lengths LIST" in call(verb, "--help")[1]
    lines = call(*words, "--plan", "--json")[1].splitlines()
    cases = [Case.from_json(json.loads(text)["case"]) for text in lines]
    assert [(c.phase, c.batch_size, c.lengths) for c in cases] == [
        ("prefill", 1, "equal"),
        ("decode", 2, "equal"),
        ("decode", 2, "spread"),
        ("decode", 8, "equal"),
        ("decode", 8, "spread"),
    ]
    assert call(*words, "--plan")[1].count("lengths=spread") == 2
    for case in cases:
        _, *again = shlex.split(sweep.reproduce(case, device="cpu"))
        assert ("--lengths" in again) == (case.lengths != "equal")
        (line,) = call(*again, "--plan", "--json")[1].splitlines()
        assert Case.from_json(json.loads(line)["case"]) == case
