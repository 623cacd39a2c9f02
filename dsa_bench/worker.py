"""One process that answers requests with records: `python -m dsa_bench.worker --reply-fd N`.

Requests are JSON lines on stdin, {"verb", "cases", "options"}; verbs are `run` (gate, time, memory,
trace), `check` (gate alone) and `profile` (gate, memory, trace). The cases of one request compete:
they are held ready together and timed in turn, A B B A, as far as memory allows. Answers are JSON
lines on the descriptor: {"event": "phase", "case": index, "phase"} as work goes on, {"event":
"record", "case": index, "record"} for each case that has ended, at last {"event": "done"}. stdout
and stderr are free for whatever kernels print.

Every exception becomes a record. After a CUDA error nothing in this process can be trusted: it
ends, and another takes the cases that are still open.
"""

import argparse
import dataclasses
import gc
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch

from dsa_bench import library, nvml
from dsa_bench.measure import VISITS
from dsa_bench.operator import Unsupported, UsageError
from dsa_bench.phases import VERBS, EndCase, Job, Options
from dsa_bench.record import Case, Record

Emit = Callable[[Mapping[str, Any]], None]

CUDA_ERROR = re.compile(r"CUDA error|Triton Error \[CUDA\]|CUDA driver error")
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory", re.IGNORECASE)
MAX_REASON = 400


class DeviceLost(Exception):
    """This process cannot go on."""


@dataclass(slots=True)
class Answer:
    """One request on its way."""

    cases: tuple[Case, ...]
    verb: str
    options: Mapping[str, Any]
    emit: Emit
    before: frozenset[int]
    open_jobs: dict[int, Job] = field(default_factory=dict)
    """By place in the request."""
    phases: dict[int, dict[str, float]] = field(default_factory=dict)
    """Seconds that each case spent in each phase."""
    current: tuple[int, str, float] | None = None
    """Case and phase that run, and since when."""

    def take(self) -> None:
        """Open cases as long as they fit beside each other, time them together, and so on."""
        for index in range(len(self.cases)):
            if not self._open(index, is_last_word=not self.open_jobs):
                # it may fit once the others are gone
                self._finish()
                self._open(index, is_last_word=True)
        self._finish()
        self._leave()

    def _open(self, index: int, *, is_last_word: bool) -> bool:
        """False if the case didn't fit and others are in its way: it has not ended then."""
        try:
            job = Job(
                case=self.cases[index],
                verb=self.verb,
                options=Options.from_json(self.options),
                enter=lambda phase: self._enter(index, phase),
                before=self.before,
            )
            self.open_jobs[index] = job
            if self.verb not in VERBS:
                raise UsageError(f"unknown verb {self.verb!r}; known: {', '.join(VERBS)}")
            job.open()
        except Exception as error:
            status, _, is_lost = classify(error, self._phase)
            if status == "oom" and not is_lost and not is_last_word:
                self.open_jobs.pop(index, None)
                return False
            self._fail(index, error)
        return True

    def _finish(self) -> None:
        """Time the open cases in turn, there and back, and end each."""
        if self.verb == "run":
            keys = [job.case.key for job in self.open_jobs.values()]
            for job in self.open_jobs.values():
                job.beside = tuple(key for key in keys if key != job.case.key)
            for number in range(VISITS):
                order = list(self.open_jobs)
                for index in order if number % 2 == 0 else reversed(order):
                    self._try(index, partial(Job.visit, number=number))
        for index in list(self.open_jobs):
            self._try(index, partial(self._close, index))
        self._release()

    def _close(self, index: int, job: Job) -> None:
        record = job.close()
        del self.open_jobs[index]
        self._end(index, record)

    def _try(self, index: int, step: Callable[[Job], None]) -> None:
        try:
            step(self.open_jobs[index])
        except Exception as error:
            self._fail(index, error)

    def _fail(self, index: int, error: Exception) -> None:
        """End a case by what it raised; DeviceLost if that took the process with it."""
        if not isinstance(error, EndCase | Unsupported | UsageError):
            traceback.print_exception(error)
        status, reason, is_lost = classify(error, self._phase)
        # the traceback would keep the tensors of the case
        error.__traceback__ = None
        job = self.open_jobs.pop(index, None)
        flags = error.flags if isinstance(error, EndCase) else ()
        if job is None:
            self._end(index, Record(case=self.cases[index], status=status, reason=reason))
        else:
            self._end(index, job.record(status, reason, flags))
        del job
        if is_lost or not release_memory():
            raise DeviceLost

    def _release(self) -> None:
        if not release_memory():
            raise DeviceLost

    def _end(self, index: int, record: Record) -> None:
        self._leave()
        record = dataclasses.replace(record, phases=self.phases.get(index, {}))
        self.emit({"event": "record", "case": index, "record": record.to_json()})

    @property
    def _phase(self) -> str:
        return self.current[1] if self.current else "build"

    def _enter(self, index: int, phase: str) -> None:
        self._leave()
        self.current = index, phase, time.monotonic()
        self.emit({"event": "phase", "case": index, "phase": phase})

    def _leave(self) -> None:
        """Charge the phase that has ended to its case."""
        if self.current is not None:
            index, phase, begin = self.current
            spent = self.phases.setdefault(index, {})
            spent[phase] = spent.get(phase, 0.0) + time.monotonic() - begin
            self.current = None


def answer(request: Mapping[str, Any], emit: Emit, before: frozenset[int] = frozenset()) -> bool:
    """Answer one request; whether this process can go on."""
    asked = Answer(
        cases=tuple(Case.from_json(case) for case in request["cases"]),
        verb=str(request["verb"]),
        options=request.get("options", {}),
        emit=emit,
        before=before,
    )
    try:
        with torch.no_grad():
            asked.take()
    except DeviceLost:
        return False
    emit({"event": "done"})
    return True


def classify(error: Exception, phase: str) -> tuple[str, str, bool]:
    """(status, one-line reason, whether the process is lost) for what a case raised."""
    if isinstance(error, EndCase):
        return error.status, error.reason, False
    if isinstance(error, Unsupported):
        return "skipped", str(error), False
    if isinstance(error, UsageError):
        return "failed", str(error), False
    text = str(error).strip()
    first_line = (text.splitlines() or [""])[0][:MAX_REASON]
    is_lost = _is_cuda_error(error, text)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or OUT_OF_MEMORY.search(text):
        return "oom", f"out of memory in phase {phase}: {first_line}", is_lost
    return "failed", f"{type(error).__name__} in phase {phase}: {first_line}", is_lost


def _is_cuda_error(error: Exception, text: str) -> bool:
    # OutOfMemoryError is torch's own word on a full pool: the device is well
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or bool(CUDA_ERROR.search(text))


def release_memory() -> bool:
    """Give everything back to the device; False where even that fails."""
    gc.collect()
    if not cast(Any, torch.cuda).is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        traceback.print_exc()
        return False
    return True


def serve(requests: Iterable[str], emit: Emit) -> int:
    """Answer requests until there are none; the exit code."""
    before = nvml.processes_before()
    library.load_here()
    for number, line in enumerate(requests):
        if not answer(json.loads(line), emit, before):
            return 1
        if number == 0:
            # all modules are loaded: looking through them again takes 0.1 s for each case
            gc.freeze()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="dsa_bench.worker", description=__doc__)
    parser.add_argument("--reply-fd", type=int, required=True, help="descriptor for the answers")
    # else torch 2.13's profiler writes a line to stderr whenever it starts or stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with os.fdopen(parser.parse_args().reply_fd, "w", buffering=1) as replies:

        def emit(event: Mapping[str, Any]) -> None:
            replies.write(json.dumps(event) + "\n")
            replies.flush()

        # inherited by what the case starts, the descriptor would hide this process's end
        os.set_inheritable(replies.fileno(), False)
        return serve(sys.stdin, emit)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # a lost CUDA context may hang or abort in its own destructors
    os._exit(code)
