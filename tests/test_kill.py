"""kill -9 at any moment costs at most the case in flight; a resume ends with the same records."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsa_bench import doubt
from dsa_bench.operator import UsageError
from dsa_bench.store import open_writer, read_run

KILLS = 20
WAYS = ("brief", "wrong", "brief", "exits", "brief", "brief")
CASES, REPLICATES = len(WAYS), 2

SCRIPT = """
import dataclasses, sys
from pathlib import Path
from dsa_bench import job, probe
from dsa_bench.operator import Machine
from dsa_bench.record import Case
from dsa_bench.sweep import Planned
from tests import fake_worker

path = Path(sys.argv[1])
machine = Machine(device="cpu", name="Test CPU")
facts = {"machine": {"device": "cpu", "name": "Test CPU"}, "ceilings": {}}
probe.probe = lambda device, with_ceilings: probe.Probe(machine=machine, header=facts)
if (path / "run.json").exists():
    ready = job.prepare_resume(path, timeout=None)
else:
    planned = tuple(
        Planned(case=Case(op=op, impl="triton", phase="decode", seq_len_kv=i + 1, seq_len_q=1))
        for i, op in enumerate(sys.argv[3].split(","))
    )
    settings = {"timeout": 20.0, "replicates": int(sys.argv[2]), "order_seed": 7}
    header = facts | {
        "verb": "run", "protocol": 1, "started": "2026-01-01T00:00:00+00:00",
        "options": {"device": "cpu", "effort": "quick"} | settings,
        "plan": [item.to_json() for item in planned],
    }
    ready = job.Job(
        verb="run", path=path, planned=planned, groups=job._groups("run", planned, settings),
        header=header, is_resumed=False, timeout=20.0,
        options={"device": "cpu", "effort": "quick"}, lost={},
    )
job.execute(ready, lambda progress: None, start=fake_worker.start_at)
"""


def begin(path: Path, *ways: str) -> subprocess.Popen[bytes]:
    arguments = (str(path), str(REPLICATES), ",".join(ways or WAYS))
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments])


def endings(path: Path) -> set[tuple[str, int, str]]:
    return {(r.case.key, r.replicate, r.status) for r in read_run(path).records}


def test_killed_run_ends_with_the_same_records(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    started = time.monotonic()
    assert begin(whole).wait(60) == 0
    duration = time.monotonic() - started
    expected = endings(whole)
    assert len(expected) == CASES * REPLICATES
    seed = random.SystemRandom().getrandbits(32)
    draw, kills, number = random.Random(seed), 0, 0
    while kills < KILLS:
        path = tmp_path / f"killed-{number}"
        number += 1
        while True:
            process = begin(path)
            if kills < KILLS:
                time.sleep(draw.uniform(0.0, duration))
            else:
                process.wait(60)
            killed = process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait(60)
            kills += killed
            if not killed:
                assert process.returncode == 0
                break
        assert endings(path) == expected, f"random seed {seed}"
        lines = (path / "records.jsonl").read_bytes().splitlines()
        assert len(lines) <= len(expected) + kills


def test_two_runs_cannot_write_one_folder(tmp_path: Path) -> None:
    path = tmp_path / "run"
    process = begin(path)
    try:
        deadline = time.monotonic() + 30
        while not (path / "records.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        with (
            pytest.raises(UsageError, match="is being written by another dsa-bench"),
            open_writer(path),
        ):
            pass
    finally:
        process.kill()
        process.wait(60)


def test_interrupted_process_keeps_everything_and_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    # seconds are left when the first case has ended
    process = begin(path, "brief", *["slow"] * 5)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if (path / "records.jsonl").exists() and (path / "records.jsonl").stat().st_size:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    before = endings(path)
    # between two cases there is none in flight
    assert sum(status == "interrupted" for *_, status in before) <= 1
    assert 0 < sum(status != "interrupted" for *_, status in before) < CASES * REPLICATES
    assert begin(path).wait(60) == 0
    after = endings(path)
    assert len(after) == CASES * REPLICATES and not any(s == "interrupted" for *_, s in after)
    assert {e for e in before if e[2] in ("ok", "wrong")} <= after


def test_flags_of_a_resumed_run_are_judged(tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert begin(path).wait(60) == 0
    records = read_run(path).records
    assert all(record.flags == doubt.judge(record, {}) for record in records)
