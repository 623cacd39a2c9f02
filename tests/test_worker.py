"""Requests in, records out: every ending of a case, and the process itself."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa_bench import gate, measure, phases, registry, worker
from dsa_bench.measure import Effort
from dsa_bench.operator import Memory
from dsa_bench.record import Case, Record, Telemetry
from dsa_bench.telemetry import Monitor
from tests import fake_operator
from tests.fake_operator import case

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fake_operator.catalogue()
    monkeypatch.setattr(registry, "catalogue", lambda: found)
    monkeypatch.setitem(measure.EFFORTS, "quick", Effort(half_width=9.0, max_seconds=0.01))


def ask_all(
    cases: list[Case], verb: str = "run", **options: Any
) -> tuple[dict[int, Record], bool, list[tuple[int, str]]]:
    """Records by place, whether the process may go on, and (place, phase) as told."""
    told: list[tuple[int, str]] = []
    records: dict[int, Record] = {}

    def emit(event: Any) -> None:
        # it must survive the pipe
        event = json.loads(json.dumps(event))
        if event["event"] == "phase":
            told.append((event["case"], event["phase"]))
        elif event["event"] == "record":
            assert event["case"] not in records
            records[event["case"]] = Record.from_json(event["record"])

    request = {
        "verb": verb,
        "cases": [case.to_json() for case in cases],
        "options": {"device": "cpu", "unknown_option": 1} | options,
    }
    return records, worker.answer(request, emit), told


def ask(wanted: Case, verb: str = "run", **options: Any) -> tuple[Record, bool, list[str]]:
    """Record, whether the process may go on, and the phases told."""
    records, usable, told = ask_all([wanted], verb, **options)
    return records[0], usable, [phase for _, phase in told]


def test_run_fills_the_whole_record() -> None:
    record, usable, phases = ask(case("best"))
    assert (record.status, record.reason, usable) == ("ok", "", True)
    assert phases == ["build", "gate", *["measure", "recheck"] * 2, "memory", "trace"]
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
    assert record.status == "ok" and phases == ["build", "measure", "measure", "memory"]
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
        (case("best", seq_len_kv=13), "failed", "ValueError in phase build", True),
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


def test_the_gate_looks_at_the_rows_that_are_always_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row of 200 that is no part of the sample of 64."""
    sampled = gate.sample_rows(200, seed=0, device="cpu")
    assert sampled is not None
    missing = next(i for i in range(200) if i not in sampled.tolist())
    operator = fake_operator.make_operator(
        "double", lambda x: 2 * x, always_checked=lambda shape: (missing,)
    )
    found = registry.collect({"double": type("M", (), {"OPERATOR": operator})})  # type: ignore[dict-item]
    monkeypatch.setattr(registry, "catalogue", lambda: found)
    for verb in ("run", "check"):
        record, _, _ = ask(case("reference"), verb)
        assert record.status == "ok" and record.gate["rows_checked"] == gate.SAMPLED_ROWS + 1


def test_a_second_input_set_that_does_not_fit_is_done_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def one_only(shape: Any, *, seed: int, device: str) -> Any:
        if seed != 0:
            raise torch.OutOfMemoryError("full")
        return fake_operator.make_inputs(shape, seed=seed, device=device)

    operator = fake_operator.make_operator("double", lambda x: 2 * x, make_inputs=one_only)
    found = registry.collect({"double": type("M", (), {"OPERATOR": operator})})  # type: ignore[dict-item]
    monkeypatch.setattr(registry, "catalogue", lambda: found)
    assert ask(case("reference"))[0].status == "ok"


def test_competitors_are_timed_there_and_back() -> None:
    cases = [case("best"), case("good"), case({"double": "best", "shift": "best"}, op="affine")]
    records, usable, told = ask_all(cases, profile=False)
    assert usable
    measured = [place for place, phase in told if phase == "measure"]
    assert measured == [0, 1, 2, 2, 1, 0]
    keys = [each.key for each in cases]
    for place, record in records.items():
        assert record.status == "ok" and record.time is not None
        assert record.time.beside == tuple(key for key in keys if key != keys[place])
        assert len(record.time.blocks) == 2 and record.time.input_sets == 3


def test_faulty_competitor_leaves_the_others_alone() -> None:
    cases = [case("best"), case("broken"), case("zeros"), case("good")]
    records, usable, told = ask_all(cases, profile=False)
    assert usable
    assert [records[i].status for i in range(4)] == ["ok", "failed", "wrong", "ok"]
    assert records[0].time is not None and records[0].time.beside == (cases[3].key,)
    assert [place for place, phase in told if phase == "measure"] == [0, 3, 3, 0]


def test_case_that_does_not_fit_beside_the_others_comes_behind_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def narrow(self: worker.Job) -> None:
        if self.case.impl == "best" and len(held) > 0:
            raise torch.OutOfMemoryError("no room")
        held.append(self.case.impl)
        plain(self)

    def close(self: worker.Job) -> Record:
        held.remove(self.case.impl)
        return plain_close(self)

    held: list[Any] = []
    plain, plain_close = worker.Job.open, worker.Job.close
    monkeypatch.setattr(worker.Job, "open", narrow)
    monkeypatch.setattr(worker.Job, "close", close)
    records, _, told = ask_all([case("good"), case("best"), case("reference")], profile=False)
    assert [records[i].status for i in range(3)] == ["ok", "ok", "ok"]
    assert [place for place, phase in told if phase == "measure"] == [0, 0, 1, 2, 2, 1]
    assert records[0].time is not None and records[0].time.beside == ()


def test_phases_are_charged_to_their_own_case() -> None:
    cases = [case("best"), case("good")]
    records, _, _ = ask_all(cases)
    for record in records.values():
        assert set(record.phases) == {"build", "gate", "measure", "recheck", "memory", "trace"}
        assert all(seconds > 0 for seconds in record.phases.values())


def test_serve_ends_after_a_lost_device() -> None:
    told: list[dict[str, Any]] = []
    cases = [case(impl).to_json() for impl in ("best", "lost", "good")]
    request = {"verb": "check", "cases": cases, "options": {"device": "cpu"}}
    lines = [json.dumps(request)] * 2
    assert worker.serve(lines, lambda event: told.append(dict(event))) == 1
    # the case that was open and the one behind it are for another worker
    records = {event["case"]: event["record"] for event in told if event["event"] == "record"}
    assert {place: record["status"] for place, record in records.items()} == {1: "failed"}
    assert all(event["event"] != "done" for event in told)


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
    request = {"verb": "check", "cases": [wanted.to_json()], "options": {"device": "cpu"}}
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
    assert [e["event"] for e in events] == ["phase", "phase", "record", "done"] * 2
    assert Record.from_json(events[2]["record"]).case == wanted
    assert [e["record"]["status"] for e in events if e["event"] == "record"] == ["ok", "ok"]


def test_energy_counts_the_samples_and_no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Meter(Monitor):
        """100 joules at each look."""

        joules = 0.0

        def energy_joules(self) -> float:
            self.joules += 100.0
            return self.joules

        def take(self) -> Telemetry:
            return Telemetry(sm_clock_max_mhz=1000.0)

    def sampler(run: Any, sets: Any, **options: Any) -> measure.Sampler:
        made = plain(run, sets, **options)
        made.mode = "sustained"
        return made

    plain = measure.open_sampler
    monkeypatch.setattr(measure, "open_sampler", sampler)
    monkeypatch.setattr(measure, "SUSTAINED_SECONDS", 0.01)
    monkeypatch.setattr(measure, "SUSTAINED_WARMUP_SECONDS", 0.05)
    monkeypatch.setattr(phases, "open_monitor", lambda machine, before: Meter())
    record, _, _ = ask(case("best"), profile=False)
    assert record.time is not None and record.time.telemetry is not None
    telemetry = record.time.telemetry
    assert telemetry.energy_joules == 100.0 * measure.VISITS
    assert telemetry.energy_calls == len(record.time.seconds)
    assert record.time.warmup_calls > 0
