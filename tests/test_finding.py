"""Findings on hostile inputs: kept in a run folder, checked when read, whole after a kill."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dsa_bench import conformance, examination, registry, store
from dsa_bench.finding import Finding
from dsa_bench.operator import UsageError
from dsa_bench.record import Case, Record
from tests.test_plan import offer
from tests.test_sweep import operator

KILLS, INPUTS = 10, 20
IMPLS = ("a", "b", "c", "d")
CASE = Case(op="topk", impl="a", phase="decode", seq_len_kv=8, seq_len_q=1)


def finding(impl: str = "a", name: str = "x", verdict: str = "ok", reason: str = "") -> Finding:
    return Finding(op="topk", impl=impl, name=name, verdict=verdict, reason=reason)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    store.create_run(path, {"machine": {"name": "Test CPU", "device": "cpu"}, "options": {}})
    with store.open_writer(path) as writer:
        writer.append(Record(case=CASE, status="ok"))
    return path


def test_findings_are_read_as_they_were_written(folder: Path) -> None:
    assert store.read_run(folder).findings == ()
    written = (finding(), finding(name="y", verdict="wrong", reason='a "b"\n\\u2028'))
    store.save_findings(folder, written)
    run = store.read_run(folder)
    assert run.findings == written and [f.is_bad for f in run.findings] == [False, True]
    assert len(run.records) == 1
    assert {path.name for path in folder.iterdir()} == {
        "run.json", "records.jsonl", "findings.jsonl"
    }  # fmt: skip
    first = json.loads((folder / "findings.jsonl").read_bytes().splitlines()[0])
    assert first["schema"] == "dsa-bench/finding@1" and list(first)[-1] == "crc32"


def test_an_implementation_that_is_examined_again_has_its_newest_findings_alone(
    folder: Path,
) -> None:
    store.save_findings(folder, (finding(), finding(name="y"), finding("b")))
    store.save_findings(folder, (finding(name="x", verdict="wrong"),))
    assert store.read_findings(folder) == (finding("b"), finding(name="x", verdict="wrong"))


def test_a_file_that_could_not_be_finished_is_as_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_findings(folder, (finding(),))

    def stop(descriptor: int) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stop)
        with pytest.raises(OSError, match="disk full"):
            store.save_findings(folder, (finding("b"),))
    assert store.read_findings(folder) == (finding(),)
    store.save_findings(folder, (finding("b"),))
    assert store.read_findings(folder) == (finding(), finding("b"))


def test_a_long_reason_is_cut_to_what_a_reader_takes(folder: Path) -> None:
    store.save_findings(folder, (finding(reason="x" * 50_000),))
    (found,) = store.read_findings(folder)
    assert len(found.reason) == 10_000


def line(**fields: Any) -> bytes:
    return store.line_of(finding().to_json() | fields)


LINE = line()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"nonsense\n", "findings.jsonl:1: isn't a finding: Expecting value"),
        (LINE + b"\n" + LINE[:-9] + b"\n", "findings.jsonl:2: isn't a finding"),
        (LINE + b"\n" + LINE[:-9], "findings.jsonl breaks off in its last line"),
        (LINE.replace(b'"ok"', b'"wrong"') + b"\n", "the line was changed or damaged"),
        (re.sub(rb',"crc32":"\w+"', b"", LINE) + b"\n", "crc32 must be the last field"),
        (store.line_of({"verdict": "ok"}) + b"\n", "findings.jsonl:1: schema must be"),
        (line(schema="dsa-bench/finding@2") + b"\n", r":1: written by schema .*\(upgrade"),
        (line(verdict="fine") + b"\n", "verdict must be ok, wrong, raised, refused, got 'fine'"),
        (line(verdict=3) + b"\n", "verdict must be a text, got 3"),
        (line(op="A" * 101) + b"\n", "op must have at most 100 characters"),
        (line(name="A" * 201) + b"\n", "name must have at most 200 characters"),
        (line(impl=None) + b"\n", "impl must be a text, got None"),
        (b"[" * 99 + b"\n", "nests deeper"),
    ],
)
def test_a_broken_line_is_refused_with_a_sentence(folder: Path, data: bytes, sentence: str) -> None:
    (folder / "findings.jsonl").write_bytes(data)
    with pytest.raises(UsageError, match=sentence) as caught:
        store.read_run(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    # it is not written over either
    with pytest.raises(UsageError):
        store.save_findings(folder, (finding(),))
    assert (folder / "findings.jsonl").read_bytes() == data


def test_later_fields_are_read_over(folder: Path) -> None:
    (folder / "findings.jsonl").write_bytes(line(seconds=3.5) + b"\n")
    assert store.read_findings(folder) == (finding(),)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_findings_of_no_plain_file_are_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    place = folder / "findings.jsonl"
    if kind == "link":
        (tmp_path / "mine").write_text("precious")
        place.symlink_to(tmp_path / "mine")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    with pytest.raises(UsageError, match=r"findings.jsonl is (a link|no regular file)"):
        store.read_run(folder)
    with pytest.raises(UsageError):
        store.save_findings(folder, (finding(),))


def test_bounds_of_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save_findings(folder, (finding(), finding(name="y")))
    for limit, value, sentence in (
        ("MAX_FINDINGS_BYTES", 100, "findings.jsonl is larger than"),
        ("MAX_FINDINGS", 1, "findings.jsonl has more than 1 lines"),
        ("MAX_LINE_BYTES", 100, "longer than"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(store, limit, value)
            with pytest.raises(UsageError, match=sentence):
                store.read_findings(folder)


# ---- who is examined


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators topk and indexer, each with the implementations reference and a to d."""
    offered = offer(reference=-1000, **dict.fromkeys(IMPLS, 1))
    catalogue = registry.Catalogue(
        operators={op: operator(op, "topk") for op in ("topk", "indexer")},
        implementations={op: offered for op in ("topk", "indexer")},
    )
    monkeypatch.setattr(registry, "catalogue", lambda: catalogue)


def record(impl: str | Mapping[str, str], status: str = "ok", op: str = "topk") -> Record:
    case = Case(op=op, impl=impl, phase="decode", seq_len_kv=8, seq_len_q=1)
    return Record(case=case, status=status)


def test_what_was_ok_in_a_run_is_examined_once(known: None) -> None:
    records = (
        *(record("b"), record("a"), record("a"), record("c", "wrong"), record("d")),
        record({"indexer": "b", "topk": "reference", "stage": "b"}, op="dsa"),
        *(record("unknown"), record("a", op="gone")),
    )  # fmt: skip
    run = store.Run(path=Path("r"), header={}, records=records, findings=(finding("d"),))
    assert examination.of_run(run) == (
        ("indexer", "b"), ("topk", "a"), ("topk", "b"), ("topk", "reference")
    )  # fmt: skip


def examining(stop_at: str = "") -> Callable[[Mapping[str, Sequence[str]], str], list[Finding]]:
    def examine(wanted: Mapping[str, Sequence[str]], device: str) -> list[Finding]:
        ((_, (impl,)),) = wanted.items()
        if impl == stop_at:
            raise KeyboardInterrupt
        return [finding(impl, f"{n}") for n in range(2)]

    return examine


def test_an_interrupt_keeps_what_was_found(
    folder: Path, known: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conformance, "examine", examining(stop_at="c"))
    told: list[str] = []
    found, finished = examination.examine(
        [("topk", impl) for impl in IMPLS], "cpu", folder=folder,
        tell=lambda found: told.append(found[0].impl),
    )  # fmt: skip
    assert not finished and told == ["a", "b"]
    run = store.read_run(folder)
    assert run.findings == tuple(found) and {f.impl for f in found} == {"a", "b"}
    assert len(run.records) == 1


SCRIPT = """
import sys, time
from pathlib import Path
from dsa_bench import conformance, examination
from dsa_bench.finding import Finding
def examine(wanted, device):
    (op, (impl,)), = wanted.items()
    time.sleep(0.02)
    return [Finding(op=op, impl=impl, name=str(n), verdict="ok") for n in range(int(sys.argv[2]))]
conformance.examine = examine
examination.save_findings(Path(sys.argv[1]), ())
print("begun", flush=True)
pairs = [("topk", impl) for impl in sys.argv[3].split(",")] * 100
examination.examine(pairs, "cpu", folder=Path(sys.argv[1]))
"""


def test_a_killed_examination_leaves_a_readable_folder(folder: Path) -> None:
    seed = random.SystemRandom().getrandbits(32)
    draw = random.Random(seed)
    for _ in range(KILLS):
        words = (str(folder), str(INPUTS), ",".join(IMPLS))
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, *words], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        time.sleep(draw.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        run = store.read_run(folder)
        assert len(run.records) == 1
        counts = [sum(f.impl == impl for f in run.findings) for impl in IMPLS]
        assert set(counts) <= {0, INPUTS}, f"random seed {seed}"
    assert INPUTS in counts
