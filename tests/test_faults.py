"""A case that crashes or hangs costs itself alone: real workers, real crashes."""

import sys
import time
from pathlib import Path

import pytest

from dsa_bench import runner, worker_process
from dsa_bench.record import Record
from dsa_bench.runner import Settings
from dsa_bench.schedule import Group
from dsa_bench.sweep import Planned
from dsa_bench.worker_process import Worker, start_worker
from tests.fake_operator import case

CRASHES = {
    "segfault": "worker died with signal SIGSEGV in phase build: reading address 0",
    "abort": "worker died with signal SIGABRT in phase build",
    "exit_early": "worker exited with code 0 in phase build",
    "leave": "worker exited with code 0 in phase build",
}
TIMEOUT = 8.0


def start(log: Path) -> Worker:
    return start_worker(log, command=(sys.executable, "-m", "tests.faulty_worker"))


def take(
    impls: list[str], log: Path, *, device: str = "cpu", timeout: float = 60.0
) -> list[Record]:
    saved: list[Record] = []

    def save(record: Record) -> Record:
        saved.append(record)
        return record

    items = tuple(Planned(case=case(impl, seed=place)) for place, impl in enumerate(impls))
    assert runner.run(
        [Group(replicate=0, items=items)],
        settings=Settings(
            verb="run", options={"device": device, "profile": False}, timeout=timeout, log=log
        ),
        save=save,
        start=start,
    )
    return saved


def endings(records: list[Record]) -> dict[str, str]:
    return {str(record.case.impl): record.status for record in records}


def test_crashes_cost_themselves_only(tmp_path: Path) -> None:
    records = take(["good", "segfault", "talk", "exit_early", "out_of_memory"], tmp_path / "log")
    assert endings(records) == {
        **{"good": "ok", "talk": "ok", "out_of_memory": "oom"},
        **{"segfault": "failed", "exit_early": "failed"},
    }
    by_impl = {str(record.case.impl): record for record in records}
    for impl in ("segfault", "exit_early"):
        assert by_impl[impl].reason.startswith(CRASHES[impl])
        assert by_impl[impl].reason.endswith("(set aside: it has cost 2 workers)")
    assert by_impl["segfault"].log[-1] == "reading address 0"
    assert '"done"' in (tmp_path / "log").read_text()


@pytest.mark.parametrize("impl", ["abort", "leave"])
def test_other_ways_to_end_a_process(impl: str, tmp_path: Path) -> None:
    records = take([impl, "good"], tmp_path / "log")
    assert endings(records) == {impl: "failed", "good": "ok"}
    assert records[-1].reason.startswith(CRASHES[impl])


def test_hangs_are_ended_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "GRACE_SECONDS", 0.3)
    records = take(["good", "deadlock", "loop"], tmp_path / "log", timeout=TIMEOUT)
    assert endings(records) == {"good": "ok", "deadlock": "timeout", "loop": "timeout"}
    assert f"no answer after {TIMEOUT:g} s, in phase build" in records[0].reason + records[1].reason


def test_starting_a_worker_again_is_quick(tmp_path: Path) -> None:
    """The bound is for an idle machine; the best of three forgives a busy one."""
    seconds = []
    for attempt in range(3):
        begin = time.monotonic()
        take(["out_of_memory"], tmp_path / f"log{attempt}")
        seconds.append(time.monotonic() - begin)
        if seconds[-1] < 4.0:
            break
    assert min(seconds) < 4.0


@pytest.mark.gpu
def test_gpu_faults_cost_themselves_only(tmp_path: Path) -> None:
    impls = ["good", "illegal_address", "talk", "out_of_memory"]
    records = take(impls, tmp_path / "log", device="cuda")
    assert endings(records) == {
        **{"good": "ok", "talk": "ok", "out_of_memory": "oom", "illegal_address": "failed"}
    }
    (lost,) = (record for record in records if record.case.impl == "illegal_address")
    assert "CUDA error" in lost.reason


@pytest.mark.gpu
def test_gpu_kernel_without_an_end_is_killed(tmp_path: Path) -> None:
    records = take(["endless_kernel", "good"], tmp_path / "log", device="cuda", timeout=20.0)
    assert endings(records) == {"endless_kernel": "timeout", "good": "ok"}
