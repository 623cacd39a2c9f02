"""Requests in, records out: every ending of a case, and the process itself."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsa_bench import gate, measure, registry, worker
from dsa_bench.measure import Effort
from dsa_bench.operator import Memory
from dsa_bench.record import Case, Record
from tests import fake_operator
from tests.fake_operator import case

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fake_operator.catalogue()
    monkeypatch.setattr(registry, "catalogue", lambda: found)
    monkeypatch.setitem(measure.EFFORTS, "quick", Effort(half_width=9.0, max_seconds=0.01))


def ask(wanted: Case, verb: str = "run", **options: Any) -> tuple[Record, bool, list[str]]:
    """Record, whether the process may go on, and the phases told."""
    told: list[str] = []
    request = {
        "verb": verb,
        "case": wanted.to_json(),
        "options": {"device": "cpu", "unknown_option": 1} | options,
    }
    record, usable = worker.answer(request, lambda event: told.append(str(event["phase"])))
    # it must survive the pipe
    return Record.from_json(json.loads(json.dumps(record.to_json()))), usable, told


def test_run_fills_the_whole_record() -> None:
    record, usable, phases = ask(case("best"))
    assert (record.status, record.reason, usable) == ("ok", "", True)
    assert phases == ["build", "gate", "measure", "memory", "trace"]
    assert record.case == case("best")
    assert record.time is not None and record.time.mode == "cpu"
    assert len(record.time.seconds) >= measure.MIN_SAMPLES_SLOW
    assert record.cost == {"flops": 3200.0, "bytes_read": 12800.0, "bytes_written": 12800.0}
    assert record.memory is not None and record.memory.input_bytes == 200 * 64
    assert record.memory.predicted_bytes == 2 * 200 * 64
    assert record.gate["rows"] == 200 and record.gate["rows_checked"] == gate.SAMPLED_ROWS
    assert [(s.name, s.impl, s.flops) for s in record.stages] == [("double", "best", 3200.0)]
    assert record.kernels[0].name == "aten::add" and record.kernels[0].calls == 1.0


def test_composition_has_a_time_for_each_stage() -> None:
    wanted = case({"double": "best", "shift": "reference"}, op="affine")
    record, _, _ = ask(wanted)
    assert record.status == "ok" and record.case.impl == wanted.impl
    assert [(s.name, s.impl) for s in record.stages] == [("double", "best"), ("shift", "reference")]
    assert all(s.seconds > 0 and s.flops == 3200.0 for s in record.stages)


def test_check_takes_no_time() -> None:
    record, _, phases = ask(case("best"), "check")
    assert record.status == "ok" and phases == ["build", "gate"]
    assert record.time is None and record.memory is None and record.stages == ()
    assert record.gate["checks"][0]["passed"]


def test_profile_leaves_a_trace_and_no_headline_time(tmp_path: Path) -> None:
    record, _, phases = ask(case("best"), "profile", trace_dir=str(tmp_path))
    assert record.status == "ok" and record.time is None
    assert phases == ["build", "gate", "memory", "trace"]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{record.case.key}.memory.csv", f"{record.case.key}.trace.json.gz"]


def test_parts_can_be_left_out() -> None:
    record, _, phases = ask(case("zeros"), gate=False, profile=False)
    assert record.status == "ok" and phases == ["build", "measure", "memory"]
    assert record.gate == {} and record.stages == ()


@pytest.mark.parametrize("impl", ["zeros", "nan", "off_by_one", "wrong_shape", "stale"])
def test_wrong_output_ends_the_case_without_a_time(impl: str) -> None:
    record, usable, phases = ask(case(impl))
    assert record.status == "wrong" and usable
    assert record.reason.startswith("out: ")
    assert record.time is None and record.stages == () and record.memory is None
    assert phases == ["build", "gate"]
    assert not record.gate["checks"][0]["passed"]


@pytest.mark.parametrize(
    ("wanted", "status", "reason", "usable"),
    [
        (case("broken"), "failed", "RuntimeError in phase build: boom", True),
        (case("lost"), "failed", "RuntimeError in phase build: CUDA error: an illegal", False),
        (case("greedy"), "oom", "out of memory in phase build: tried to allocate 20.00", True),
        (case("unable"), "skipped", "cannot do that", True),
        (case("gpu"), "skipped", "needs a CUDA GPU", True),
        (case("triton"), "skipped", "triton cannot be imported: No module named 'triton'", True),
        (case("best", seq_len_q=300), "skipped", "more queries than keys", True),
        (case("best", seq_len_kv=-1, seq_len_q=-2), "failed", "ValueError in phase build", True),
        (case("gluoon"), "failed", "unknown implementation 'gluoon' of double", True),
        (case(op="doubel"), "failed", "unknown operator 'doubel'", True),
    ],
)
def test_every_ending_is_a_record_with_a_reason(
    wanted: Case, status: str, reason: str, usable: bool
) -> None:
    record, still_usable, _ = ask(wanted)
    assert record.status == status and still_usable is usable
    assert record.reason.startswith(reason) and "\n" not in record.reason
    assert record.time is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"effort": "heroic"}, "unknown effort 'heroic'; known: quick, standard, precise"),
        ({"device": "tpu"}, "--device 'tpu' is unknown"),
    ],
)
def test_bad_options_are_told(options: dict[str, str], reason: str) -> None:
    record, _, _ = ask(case("best"), **options)
    assert record.status == "failed" and record.reason.startswith(reason)


def test_predicted_memory_ends_a_case_before_it_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(shape: Any, *, seed: int, device: str) -> Any:
        raise AssertionError("inputs were made")

    huge = fake_operator.make_operator(
        "double",
        lambda x: 2 * x,
        make_inputs=refuse,
        memory=lambda shape: Memory(input_bytes=2**60, output_bytes=0),
    )
    found = registry.collect({"double": type("M", (), {"OPERATOR": huge})})  # type: ignore[dict-item]
    monkeypatch.setattr(registry, "catalogue", lambda: found)
    record, usable, _ = ask(case("reference"))
    assert record.status == "oom" and usable
    assert record.reason.startswith("needs 1073741824.0 GiB, ")
    assert record.cost == {}


def test_a_second_input_set_that_does_not_fit_is_done_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    def one_only(shape: Any, *, seed: int, device: str) -> Any:
        if seed != 0:
            raise torch.OutOfMemoryError("full")
        return fake_operator.make_inputs(shape, seed=seed, device=device)

    operator = fake_operator.make_operator("double", lambda x: 2 * x, make_inputs=one_only)
    found = registry.collect({"double": type("M", (), {"OPERATOR": operator})})  # type: ignore[dict-item]
    monkeypatch.setattr(registry, "catalogue", lambda: found)
    assert ask(case("reference"))[0].status == "ok"


def test_serve_ends_after_a_lost_device() -> None:
    told: list[dict[str, Any]] = []
    requests = [
        json.dumps({"verb": "check", "case": case(impl).to_json(), "options": {"device": "cpu"}})
        for impl in ("best", "lost", "best")
    ]
    assert worker.serve(requests, lambda event: told.append(dict(event))) == 1
    records = [event["record"] for event in told if event["event"] == "record"]
    assert [record["status"] for record in records] == ["ok", "failed"]


def test_the_process_answers_on_its_descriptor_only() -> None:
    wanted = Case(
        op="topk",
        impl="reference",
        phase="prefill",
        seq_len_kv=64,
        seq_len_q=8,
        topk=16,
        preset="v3.2-cpu",
    )
    request = {"verb": "check", "case": wanted.to_json(), "options": {"device": "cpu"}}
    read_end, write_end = os.pipe()
    done = subprocess.run(
        [sys.executable, "-m", "dsa_bench.worker", "--reply-fd", str(write_end)],
        input=(json.dumps(request) + "\n") * 2,
        capture_output=True,
        text=True,
        cwd=ROOT,
        pass_fds=(write_end,),
        timeout=120,
    )
    os.close(write_end)
    with os.fdopen(read_end) as replies:
        events = [json.loads(line) for line in replies]
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert [e["event"] for e in events] == ["phase", "phase", "record"] * 2
    assert Record.from_json(events[2]["record"]).case == wanted
    assert [e["record"]["status"] for e in events if e["event"] == "record"] == ["ok", "ok"]
