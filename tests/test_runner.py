"""Every planned case ends in exactly one record, whatever happens to the worker."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsa_bench import runner, worker_process
from dsa_bench.record import Case, Record
from dsa_bench.runner import Progress, Settings
from dsa_bench.schedule import Group
from dsa_bench.sweep import Planned
from dsa_bench.worker_process import last_lines
from tests import fake_worker


def planned(*ways: str, preset: str = "v3.2") -> list[Planned]:
    return [
        Planned(case=Case(op=way, impl="triton", phase="decode", seq_len_kv=i + 1, seq_len_q=1,
                          preset=preset))
        for i, way in enumerate(ways)
    ]  # fmt: skip


class Take:
    """Runs cases with the fake worker and keeps what is saved and told."""

    def __init__(self, folder: Path) -> None:
        self.saved: list[Record] = []
        self.told: list[Progress] = []
        self.log = folder / "worker.log"
        self.hook: Callable[[Progress], None] = lambda progress: None

    def __call__(
        self,
        items: list[Planned],
        timeout: float = 20.0,
        groups: list[Group] | None = None,
        lost: dict[tuple[str, int], int] | None = None,
    ) -> bool:
        """Each case by itself, unless there are groups."""

        def tell(progress: Progress) -> None:
            self.told.append(progress)
            self.hook(progress)

        def save(record: Record) -> Record:
            kept = replace(record, reproduce=f"again {record.case.op}")
            self.saved.append(kept)
            return kept

        return runner.run(
            groups or [Group(replicate=0, items=(item,)) for item in items],
            settings=Settings(
                verb="run", options={"effort": "quick"}, timeout=timeout, log=self.log
            ),
            save=save,
            tell=tell,
            start=fake_worker.start_at,
            lost=lost,
        )

    def together(self, *ways: str, **options: Any) -> list[tuple[str, str]]:
        """Take one group; how its cases ended, in the order in which they did."""
        items = tuple(planned(*ways, preset=options.pop("preset", "v3.2")))
        self([], groups=[Group(replicate=0, items=items)], **options)
        return [(record.case.op, record.status) for record in self.saved]

    def pids(self) -> list[int]:
        return [json.loads(r.reason)[0] for r in self.saved if r.reason.startswith("[")]

    @property
    def endings(self) -> list[tuple[str, str, str]]:
        return [(record.case.op, record.status, record.reason) for record in self.saved]


@pytest.fixture(autouse=True)
def heed_interrupts() -> Iterator[None]:
    """A shell starts what runs in the background with SIGINT ignored, and Python keeps that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Take:
    monkeypatch.setattr(worker_process, "GRACE_SECONDS", 0.3)
    return Take(tmp_path)


def is_alive(pid: int) -> bool:
    """A zombie is dead: nobody but init may reap an orphan."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def dies(pid: int) -> bool:
    """A signal takes a moment to be acted on."""
    deadline = time.monotonic() + 5
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_alive(pid)


def test_one_worker_takes_many_cases_and_is_told_the_options(take: Take) -> None:
    assert take(planned("a", "b", "wrong", "c"))
    assert [record.status for record in take.saved] == ["ok", "ok", "wrong", "ok"]
    pids = {json.loads(record.reason)[0] for record in take.saved}
    assert len(pids) == 1
    assert json.loads(take.saved[0].reason)[1:] == ["run", {"effort": "quick"}]
    assert dies(pids.pop())


def test_planned_reason_ends_as_skipped_without_a_worker(take: Take) -> None:
    (item,) = planned("a")
    assert take([Planned(case=item.case, reason="topk 9 is more than the 1 keys there are")])
    assert take.endings == [("a", "skipped", "topk 9 is more than the 1 keys there are")]
    assert not take.log.exists()


def test_records_carry_the_command_that_repeats_them(take: Take) -> None:
    take(planned("a", "exits"))
    assert [record.reproduce for record in take.saved] == ["again a", "again exits"]


def test_progress_tells_phases_then_the_record(take: Take) -> None:
    take(planned("a"))
    assert [progress.phase for progress in take.told] == ["start", "build", "gate", ""]
    assert [progress.ended for progress in take.told] == [0, 0, 0, 1]
    assert take.told[-1].record == take.saved[0]


@pytest.mark.parametrize(
    ("way", "status", "reason"),
    [
        ("segfault", "failed",
         "worker died with signal SIGSEGV in phase gate: about to touch[31m a bad page"),
        ("exits", "failed", "worker exited with code 7 in phase gate"),
        ("garbage", "failed", "worker answered b'not json' in phase gate, not an object"),
        ("newer", "failed", "worker answered with a broken record: written by schema"),
        ("lost_device", "oom", "out of memory"),
    ],
)  # fmt: skip
def test_lost_worker_costs_its_own_case_alone(
    take: Take, way: str, status: str, reason: str
) -> None:
    assert take(planned("a", way, "b"))
    assert [record.status for record in take.saved] == ["ok", status, "ok"]
    assert take.saved[1].reason.startswith(reason)
    assert take.saved[1].lost_workers == (0 if status == "oom" else 2)
    before, after = (json.loads(take.saved[i].reason)[0] for i in (0, 2))
    assert before != after


def test_obituary_quotes_the_log_of_its_own_case_only(take: Take) -> None:
    take(planned("segfault", "a", "silent_segfault"))
    assert "a bad page" in take.saved[0].reason
    assert take.saved[0].log[-1] == "about to touch[31m a bad page"
    # what a worker says when it starts may or may not fall behind the first request
    assert take.saved[2].reason.startswith("worker died with signal SIGSEGV in phase gate")
    assert set(take.saved[2].log) <= {"worker is up"}


def test_failed_case_gets_the_next_one_a_fresh_worker(take: Take) -> None:
    take(planned("failed", "a", "oom", "b"))
    pids = [json.loads(record.reason)[0] for record in take.saved]
    assert pids[0] != pids[1]
    assert pids[1] == pids[2] == pids[3]


def test_timeout_kills_the_worker_and_what_it_started(take: Take, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    begin = time.monotonic()
    assert take(planned("hangs", "a", preset=str(pid_file)), timeout=0.5)
    assert time.monotonic() - begin < 10
    assert take.endings[0] == ("hangs", "timeout", "no answer after 0.5 s, in phase gate")
    assert take.saved[1].status == "ok"
    assert dies(int(pid_file.read_text()))


def test_interrupt_ends_the_case_in_flight_and_keeps_the_rest(take: Take, tmp_path: Path) -> None:
    def interrupt_in_gate(progress: Progress) -> None:
        if progress.case.op == "hangs" and progress.phase == "gate":
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()

    take.hook = interrupt_in_gate
    items = planned("a", "hangs", "b", preset=str(tmp_path / "pid"))
    assert not take(items)
    assert [record.status for record in take.saved] == ["ok", "interrupted"]


def test_second_interrupt_kills_at_once(
    take: Take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "GRACE_SECONDS", 5.0)
    pid_file = tmp_path / "pid"

    def interrupt_twice(progress: Progress) -> None:
        if progress.phase == "gate":
            while not (pid_file.exists() and pid_file.read_text()):
                time.sleep(0.01)
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            raise KeyboardInterrupt

    take.hook = interrupt_twice
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        take(planned("hangs", preset=str(pid_file)))
    assert time.monotonic() - begin < 4
    assert [record.status for record in take.saved] == ["interrupted"]
    assert dies(int(pid_file.read_text()))


def test_interrupt_behind_the_saving_does_not_save_twice(take: Take) -> None:
    def interrupt_at_record(progress: Progress) -> None:
        if progress.record is not None:
            raise KeyboardInterrupt

    take.hook = interrupt_at_record
    assert not take(planned("a", "b"))
    assert [record.status for record in take.saved] == ["ok"]


def test_case_that_lost_its_worker_once_is_tried_again_alone(take: Take, tmp_path: Path) -> None:
    endings = take.together("a", "segfault_once", "b", preset=str(tmp_path / "met"))
    assert endings == [("a", "ok"), ("b", "ok"), ("segfault_once", "ok")]
    assert [record.lost_workers for record in take.saved] == [0, 0, 1]
    assert len(set(take.pids())) == 2


def test_group_goes_on_behind_a_case_that_kills_every_worker(take: Take) -> None:
    assert take.together("a", "segfault", "b", "exits", "c") == [
        *(("a", "ok"), ("b", "ok"), ("c", "ok")),
        *(("segfault", "failed"), ("exits", "failed")),
    ]
    assert take.saved[3].reason.endswith("a bad page (set aside: it has cost 2 workers)")


def test_early_exit_without_an_error_is_a_failure(take: Take) -> None:
    assert take.together("exits_well", "a") == [("a", "ok"), ("exits_well", "failed")]
    assert "exited with code 0 in phase gate" in take.saved[1].reason


def test_words_on_stdout_are_no_answers(take: Take) -> None:
    assert take.together("prints", "a") == [("prints", "ok"), ("a", "ok")]


def test_worker_that_forgets_a_case_is_told_on(take: Take) -> None:
    assert take.together("a", "forgets", "b") == [
        *(("a", "ok"), ("b", "ok"), ("forgets", "failed"))
    ]
    assert take.saved[2].reason == "the worker gave no record"


def test_hang_in_a_group_costs_itself_only_and_is_not_tried_again(
    take: Take, tmp_path: Path
) -> None:
    begin = time.monotonic()
    endings = take.together("a", "hangs", "b", preset=str(tmp_path / "pid"), timeout=0.5)
    assert time.monotonic() - begin < 10
    assert endings == [("a", "ok"), ("hangs", "timeout"), ("b", "ok")]
    assert take.saved[1].lost_workers == 1


def test_each_case_of_a_group_has_the_timeout_for_itself(take: Take) -> None:
    assert take.together("slow", "slow", "slow", timeout=0.6) == [("slow", "ok")] * 3


def test_second_loss_in_a_resumed_run_sets_the_case_aside(take: Take, tmp_path: Path) -> None:
    (item,) = planned("hangs", preset=str(tmp_path / "pid"))
    take([item], timeout=0.4, lost={(item.case.key, 0): 1})
    assert take.saved[0].reason.endswith("(set aside: it has cost 2 workers)")
    assert take.saved[0].lost_workers == 2


def test_each_replicate_begins_in_a_fresh_process(take: Take) -> None:
    items = tuple(planned("a", "b"))
    take([], groups=[Group(replicate=r, items=items) for r in range(3)])
    assert [record.replicate for record in take.saved] == [0, 0, 1, 1, 2, 2]
    pids = take.pids()
    assert pids[0] == pids[1] and pids[2] == pids[3] and len(set(pids)) == 3


def test_ending_carries_its_time(take: Take) -> None:
    before = time.time()
    take(planned("a"))
    assert before <= take.saved[0].ended <= time.time()


def test_last_lines_are_few_short_clean_and_behind_the_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 10_000 + b"\nfirst\n\x1b[1msecond\xff\x07\n  \n\n")
    assert last_lines(log)[1:] == ("first", "[1msecond\ufffd")
    assert len(last_lines(log)[0]) == worker_process.MAX_LOG_LINE
    assert last_lines(log, log.stat().st_size - 3) == ()
    log.write_text("\n".join(str(i) for i in range(100)))
    assert last_lines(log) == tuple(str(i) for i in range(88, 100))
