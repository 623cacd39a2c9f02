"""Every cheat is caught, and the honest implementation beside them is not."""

import json
import time
from typing import Any

import pytest
import torch

from dsa_bench import doubt, measure, registry, worker
from dsa_bench.measure import Effort
from dsa_bench.record import Record
from tests import cheats, fake_operator
from tests.cheats import CHEATS, GPU_CHEATS
from tests.fake_operator import case

ROWS = 2000


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cheats.catalogue()
    monkeypatch.setattr(registry, "catalogue", lambda: found)
    # put back what a cheat patches
    monkeypatch.setattr(time, "perf_counter", time.perf_counter)
    monkeypatch.setattr(torch.cuda.Event, "elapsed_time", torch.cuda.Event.elapsed_time)
    monkeypatch.setitem(measure.EFFORTS, "quick", Effort(half_width=9.0, max_seconds=0.3))


def take(impl: str, device: str = "cpu", *, gate: bool = True, **axes: Any) -> Record:
    """The record of a case as the run would keep it."""
    told: list[Any] = []
    request = {
        "verb": "run",
        "cases": [case(impl, **({"seq_len_kv": ROWS} | axes)).to_json()],
        "options": {"device": device, "gate": gate},
    }
    assert worker.answer(request, told.append)
    (record,) = [event["record"] for event in told if event["event"] == "record"]
    return Record.from_json(json.loads(json.dumps(record)))


def test_honest_work_is_trusted() -> None:
    record = take("honest")
    assert record.status == "ok" and record.gate["timed_calls_checked"] == measure.VISITS
    assert not {"output_differs", "fresh_slower", "hidden_work"} & set(doubt.judge(record, {}))


def expect_caught(record: Record, impl: str) -> None:
    caught = GPU_CHEATS[impl]
    assert record.status == caught.status, record.reason
    flags = doubt.judge(record, {})
    if caught.flag:
        assert caught.flag in flags and not doubt.is_trusted(flags)
    if record.status == "wrong":
        assert record.time is None and record.stages == ()


@pytest.mark.parametrize("impl", CHEATS)
def test_cheat_is_caught(impl: str) -> None:
    expect_caught(take(impl), impl)


def test_patched_clock_does_not_make_it_faster() -> None:
    honest, patched = take("honest"), take("patched_clock")
    assert time.perf_counter.__name__ == "patched"
    assert honest.time is not None and patched.time is not None
    assert min(patched.time.seconds) > min(honest.time.seconds) / 5


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("impl", GPU_CHEATS)
def test_gpu_cheat_is_caught(impl: str, phase: str) -> None:
    record = take(impl, "cuda", phase=phase)
    # which of the two looks at the output first is a matter of time
    if impl == "later_in_a_thread":
        assert record.status == "wrong"
    else:
        expect_caught(record, impl)


@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_gpu_honest_work_is_trusted(phase: str) -> None:
    record = take("honest", "cuda", phase=phase)
    assert record.status == "ok" and record.gate["timed_calls_checked"] == measure.VISITS
    # other doubts may come from other tests on the same GPU
    assert not {"output_differs", "fresh_slower"} & set(doubt.judge(record, {}))


@pytest.mark.gpu
def test_gpu_work_on_another_stream_shows_behind_the_end() -> None:
    record = take("other_stream", "cuda", gate=False)
    assert record.status == "ok" and "hidden_work" in doubt.judge(record, {})


@pytest.mark.gpu
def test_gpu_patched_events_do_not_make_it_faster() -> None:
    honest, patched = take("honest", "cuda"), take("patched_events", "cuda")
    assert honest.time is not None and patched.time is not None
    assert min(patched.time.seconds) > min(honest.time.seconds) / 2


def test_inputs_are_their_own_again_behind_a_watched_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    plain = worker.Job.visit

    def visit(self: worker.Job, number: int) -> None:
        plain(self, number)
        seen.append([inputs.x.sum().item() for inputs in self.input_sets])

    monkeypatch.setattr(worker.Job, "visit", visit)
    assert take("honest").status == "ok"
    shape = fake_operator.FakeShape(num_rows=ROWS)
    expected = [
        fake_operator.make_inputs(shape, seed=seed, device="cpu").x.sum().item()
        for seed in range(3)
    ]
    assert seen == [expected, expected]
