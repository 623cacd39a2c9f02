"""`run` and `check` with hostile inputs: what is examined, kept, resumed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from dsa_bench import conformance
from dsa_bench.finding import Finding
from dsa_bench.store import read_run
from tests.fake_command import ONE, Call, fake_command


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Call:
    return fake_command(monkeypatch, tmp_path, capfd)


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Pairs that met two hostile inputs, and fail the second; `layer` is interrupted at first."""
    pairs: list[tuple[str, str]] = []

    def examine(wanted: Mapping[str, Sequence[str]], device: str) -> list[Finding]:
        ((op, (impl,)),) = wanted.items()
        pairs.append((op, impl))
        if op == "layer" and pairs.count((op, impl)) == 1:
            raise KeyboardInterrupt
        names = {"ties": "ok", "NaN": "wrong"}
        return [Finding(op=op, impl=impl, name=n, verdict=v) for n, v in names.items()]

    monkeypatch.setattr(conformance, "examine", examine)
    return pairs


def test_run_examines_what_was_ok_and_fails_with_it(
    call: Call, tmp_path: Path, examined: list[tuple[str, str]]
) -> None:
    words = ("run", "--op", "fine,wrong", *ONE[2:], "--hostile", "-o", "r")
    code, out, err = call(*words)
    assert code == 3 and examined == [("fine", "triton")]
    assert err.splitlines()[-1] == "hostile inputs: fine triton fails 1 of 2"
    assert out.splitlines() == ["the report", "r/report.html"]
    run = read_run(tmp_path / "r")
    assert [(f.impl, f.verdict) for f in run.findings] == [("triton", "ok"), ("triton", "wrong")]
    assert run.header["options"]["hostile"] is True
    # nothing is examined twice
    call("run", "--resume", "r")
    assert examined == [("fine", "triton")]


def test_run_alone_examines_nothing(
    call: Call, tmp_path: Path, examined: list[tuple[str, str]]
) -> None:
    assert call("run", *ONE, "-o", "r")[0] == 0
    assert not examined and not (tmp_path / "r" / "findings.jsonl").exists()
    assert "hostile" not in read_run(tmp_path / "r").header["options"]
    # a run that has ended can be examined later
    code, out, _ = call("run", "--resume", "r", "--hostile", "--json")
    assert code == 3 and examined == [("fine", "triton")]
    assert [f["name"] for f in json.loads(out)["hostile"]] == ["ties", "NaN"]


def test_interrupted_examination_keeps_the_run_and_is_resumed(
    call: Call, tmp_path: Path, examined: list[tuple[str, str]]
) -> None:
    axes = (*ONE[2:6], "--hostile")
    code, out, err = call("run", "--op", "fine,layer", *axes, "-o", "r")
    assert code == 130 and "the report" in out
    assert "stopped; go on with dsa-bench run --resume r --hostile" in err
    run = read_run(tmp_path / "r")
    assert {record.status for record in run.records} == {"ok"}
    assert {f.op for f in run.findings} == {"fine"}
    assert call("run", "--resume", "r")[0] == 3
    assert {f.op for f in read_run(tmp_path / "r").findings} == {"fine", "layer"}
    assert examined == [("fine", "triton"), ("layer", "triton"), ("layer", "triton")]


CHECK = ("check", "--op", "fine", "--phase", "decode", "-L", "1k", "-k", "64", "--seq-len-q", "1")


def test_check_keeps_findings_in_a_folder_of_their_own(
    call: Call, tmp_path: Path, examined: list[tuple[str, str]]
) -> None:
    code, out, _ = call(*CHECK, "--hostile", "-o", "c")
    assert code == 3 and "hostile inputs" in out and examined == [("fine", "triton")]
    run = read_run(tmp_path / "c")
    assert (run.header["verb"], len(run.records), len(run.findings)) == ("check", 1, 2)
    assert call("report", "c")[0] == 0


def test_check_adds_findings_to_a_run(
    call: Call, tmp_path: Path, examined: list[tuple[str, str]]
) -> None:
    assert call("run", *ONE, "-o", "r")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").glob("r*.json*")}
    code, _, err = call(*CHECK, "-o", "r")
    assert code == 2 and "r is a run: only findings can join it (pass --hostile)" in err
    assert call(*CHECK, "--hostile", "-o", "r")[0] == 3
    after = {path.name: path.read_bytes() for path in (tmp_path / "r").glob("r*.json*")}
    assert after == before and len(before) == 2
    assert len(read_run(tmp_path / "r").findings) == 2
    header = json.loads(before["run.json"])
    header["machine"]["name"] = "Other CPU"
    (tmp_path / "r" / "run.json").write_text(json.dumps(header))
    code, _, err = call(*CHECK, "--hostile", "-o", "r")
    assert code == 2 and "r was measured on Other CPU, this machine has Test CPU" in err
    assert len(examined) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    assert "exists and isn't empty" in call(*CHECK, "--hostile", "-o", "other")[2]


def test_a_broken_finding_ends_a_report_and_is_found_by_verify(call: Call, tmp_path: Path) -> None:
    assert call("run", *ONE, "-o", "r")[0] == 0
    (tmp_path / "r" / "findings.jsonl").write_text("{}\n")
    code, _, err = call("report", "r")
    assert code == 2 and err.startswith("dsa-bench: r/findings.jsonl:1: isn't a finding:")
    assert "then dsa-bench check --hostile -o r)" in err
    code, out, _ = call("verify", "r", "--json")
    (check,) = [c for c in json.loads(out)["checks"] if c["name"] == "findings.jsonl"]
    assert code == 3 and "isn't a finding" in check["findings"][0]
