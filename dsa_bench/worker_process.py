"""A worker process as its parent sees it: start, ask, listen, stop.

It reads requests as JSON lines on its stdin and answers as JSON lines on a private descriptor, so
that nothing a kernel prints can be taken for an answer. It has a process group of its own, which is
killed with all that it started.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKER = (sys.executable, "-m", "dsa_bench.worker")
# how long a worker may take to end by itself after SIGTERM, before SIGKILL
GRACE_SECONDS = 2.0
LOG_TAIL_BYTES = 4096
LOG_LINES = 12
MAX_LOG_LINE = 200
IDLE = "idle"


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

    def ask(self, request: Mapping[str, Any]) -> None:
        """Send one request; its answers follow."""
        self.log_start = self.log.stat().st_size
        stdin = self.process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the end of its answers tells how it died
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next event; WorkerDied, or WorkerTimeout after so many seconds, if none comes."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            with selectors.DefaultSelector() as selector:
                selector.register(self.replies, selectors.EVENT_READ)
                ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise WorkerTimeout(f"in phase {self.phase}")
            data = os.read(self.replies, 1 << 16)
            if not data:
                died = WorkerGone if self.phase == IDLE else WorkerDied
                raise died(self._obituary())
            self.buffer += data
        line, _, rest = bytes(self.buffer).partition(b"\n")
        self.buffer = bytearray(rest)
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise WorkerDied(f"worker answered {line[:80]!r} in phase {self.phase}, not an object")
        if event.get("event") == "done":
            self.phase = IDLE
        self.phase = str(event.get("phase", self.phase))
        return event

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
        last = self.last_lines[-1:]
        return ": ".join((f"worker {how} in phase {self.phase}", *last))

    @property
    def last_lines(self) -> tuple[str, ...]:
        """The end of what it wrote since the last request."""
        return last_lines(self.log, self.log_start)

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


def last_lines(log: Path, start: int = 0) -> tuple[str, ...]:
    """The last lines behind byte `start` that aren't blank, without control characters."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    texts = ("".join(c for c in line if c.isprintable()).strip()[:MAX_LOG_LINE] for line in lines)
    return tuple([text for text in texts if text][-LOG_LINES:])
