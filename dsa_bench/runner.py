"""Takes the planned cases of a run through worker processes, and saves each ending at once.

A worker is one process that computes cases in sequence. It reads requests as JSON lines on its
stdin and answers as JSON lines on a private descriptor, so that nothing a kernel prints can be
taken for an answer. Its process group is killed when a case takes too long; when it dies the case
in flight is charged, and a fresh one goes on.
Nothing here knows torch, prints, or needs a GPU.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsa_bench.record import Case, Record
from dsa_bench.sweep import Planned

WORKER = (sys.executable, "-m", "dsa_bench.worker")
# how long a worker may take to end by itself after SIGTERM, before SIGKILL
GRACE_SECONDS = 2.0
LOG_TAIL_BYTES = 4096


class WorkerDied(Exception):
    """The worker ended without an answer; the text says how."""


class WorkerGone(WorkerDied):
    """It ended before it took up this request, so another case is to blame, or none."""


class WorkerTimeout(Exception):
    """The worker did not answer in time; the text says in which phase it was."""


@dataclass(slots=True)
class Worker:
    """One running worker process."""

    process: subprocess.Popen[bytes]
    replies: int
    """Descriptor on which the answers come."""
    log: Path
    """Where its stdout and stderr go."""
    phase: str = "start"
    """What it said last that it was doing; `idle` between two cases."""
    buffer: bytearray = field(default_factory=bytearray)
    log_start: int = 0
    """Where the log of the case in flight begins."""

    def ask(
        self, request: Mapping[str, Any], *, timeout: float, on_phase: Callable[[str], None]
    ) -> dict[str, Any]:
        """Send one request and wait for its record; WorkerDied or WorkerTimeout if none comes."""
        deadline = time.monotonic() + timeout
        self.log_start = self.log.stat().st_size
        stdin = self.process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the end of its answers tells how it died
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        while True:
            answer = self._answer(deadline, timeout)
            if answer.get("event") == "record":
                self.phase = "idle"
                return dict(answer["record"])
            self.phase = str(answer.get("phase", self.phase))
            on_phase(self.phase)

    def _answer(self, deadline: float, timeout: float) -> dict[str, Any]:
        """The next JSON line from the worker."""
        while b"\n" not in self.buffer:
            with selectors.DefaultSelector() as selector:
                selector.register(self.replies, selectors.EVENT_READ)
                ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise WorkerTimeout(f"no answer after {timeout:g} s, in phase {self.phase}")
            data = os.read(self.replies, 1 << 16)
            if not data:
                died = WorkerGone if self.phase == "idle" else WorkerDied
                raise died(self._obituary())
            self.buffer += data
        line, _, rest = bytes(self.buffer).partition(b"\n")
        self.buffer = bytearray(rest)
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise WorkerDied(f"worker answered {line[:80]!r} in phase {self.phase}, not an object")
        return answer

    def _obituary(self) -> str:
        """How the process ended, in which phase, and the last line that it wrote."""
        try:
            code = self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return f"worker closed its answers in phase {self.phase} without ending"
        if code < 0:
            how = f"died with signal {signal.Signals(-code).name}"
        else:
            how = f"exited with code {code}"
        last = last_line(self.log, self.log_start)
        return f"worker {how} in phase {self.phase}" + (f": {last}" if last else "")

    def stop(self) -> None:
        """End the process and all that it started: end of its input, then SIGTERM, then SIGKILL."""
        try:
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS)
        finally:
            self._signal(signal.SIGKILL)
            # a process stuck in the driver outlives even this; the run goes on without it
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS)
            os.close(self.replies)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def start_worker(log: Path, command: Sequence[str] = WORKER) -> Worker:
    """Start a worker in a process group of its own; its output is appended to `log`."""
    replies, write_end = os.pipe()
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*command, "--reply-fd", str(write_end)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(write_end,),
                start_new_session=True,
            )
    except BaseException:
        os.close(replies)
        raise
    finally:
        os.close(write_end)
    return Worker(process=process, replies=replies, log=log)


def last_line(log: Path, start: int = 0) -> str:
    """The last line behind byte `start` that isn't blank, without control characters."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    texts = ("".join(c for c in line if c.isprintable()).strip() for line in reversed(lines))
    return next((text for text in texts if text), "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What is told while a run goes on."""

    index: int
    """Place of the case among the planned ones, from 0."""
    case: Case
    phase: str = ""
    """What the worker does; empty once the case has ended."""
    record: Record | None = None
    """The ending; None while the case is in flight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How the cases of one run are taken."""

    verb: str
    """`run`, `check` or `profile`."""
    options: Mapping[str, Any]
    """What the worker is told with each case."""
    timeout: float
    """Seconds that one case may take, all phases together."""
    log: Path


def run(
    planned: Iterable[Planned],
    *,
    settings: Settings,
    save: Callable[[Record], None],
    reproduce: Callable[[Case], str],
    tell: Callable[[Progress], None] = lambda progress: None,
    start: Callable[[Path], Worker] = start_worker,
) -> bool:
    """Take every case to its ending and save it; False if a person interrupted.

    At the first Ctrl-C the case in flight ends as `interrupted` and the worker is stopped; a second
    one while it stops kills it at once and is passed on.
    """
    session = _Session(settings=settings, start=start)
    try:
        for index, item in enumerate(planned):
            record = session.end_of(index, item, tell)
            record = replace(record, reproduce=reproduce(item.case))
            save(record)
            tell(Progress(index=index, case=item.case, record=record))
            if record.status == "interrupted":
                return False
    except KeyboardInterrupt:
        return False
    finally:
        session.stop()
    return True


@dataclass(slots=True)
class _Session:
    """The worker of the moment, if there is one."""

    settings: Settings
    start: Callable[[Path], Worker]
    worker: Worker | None = None

    def end_of(self, index: int, item: Planned, tell: Callable[[Progress], None]) -> Record:
        """The record of one case, whatever happens to the worker."""
        case = item.case
        if item.reason:
            return Record(case=case, status="skipped", reason=item.reason)

        def on_phase(phase: str) -> None:
            tell(Progress(index=index, case=case, phase=phase))

        try:
            on_phase("start")
            record = self._ask(case, on_phase)
        except WorkerTimeout as error:
            record = Record(case=case, status="timeout", reason=str(error))
        except WorkerDied as error:
            record = Record(case=case, status="failed", reason=str(error))
        except KeyboardInterrupt:
            return Record(case=case, status="interrupted", reason="stopped by a person")
        if record.status in ("failed", "timeout"):
            # after a device fault every later call in that process fails too
            self.stop()
        return record

    def _ask(self, case: Case, on_phase: Callable[[str], None]) -> Record:
        request = {
            "verb": self.settings.verb,
            "case": case.to_json(),
            "options": dict(self.settings.options),
        }
        try:
            answer = self._answer(request, on_phase)
        except WorkerGone:
            # it ended itself after an earlier case, such as one that lost the device
            self.stop()
            answer = self._answer(request, on_phase)
        try:
            return replace(Record.from_json(answer), case=case)
        except (ValueError, KeyError, TypeError) as error:
            raise WorkerDied(f"worker answered with a broken record: {error}") from None

    def _answer(
        self, request: Mapping[str, Any], on_phase: Callable[[str], None]
    ) -> dict[str, Any]:
        if self.worker is None:
            self.worker = self.start(self.settings.log)
        return self.worker.ask(request, timeout=self.settings.timeout, on_phase=on_phase)

    def stop(self) -> None:
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.stop()
