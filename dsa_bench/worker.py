"""One process that answers cases with records: `python -m dsa_bench.worker --reply-fd N`.

Requests are JSON lines on stdin, {"verb", "case", "options"}; verbs are `run` (gate, time, memory,
trace), `check` (gate alone) and `profile` (gate, memory, trace). Answers are JSON lines on the
descriptor: {"event": "phase", "phase"} as work goes on, and at last {"event": "record", "record"}.
stdout and stderr are free for whatever kernels print.

Every exception becomes a record. After a CUDA error nothing in this process can be trusted: it
answers and ends.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from dsa_bench import gate, measure, registry, trace
from dsa_bench.machine import detect, free_bytes
from dsa_bench.operator import Machine, Memory, Operator, Unsupported, UsageError
from dsa_bench.record import Case, MemoryUse, Record, StageTime, Timing
from dsa_bench.stats import median

Emit = Callable[[Mapping[str, Any]], None]

CUDA_ERROR = re.compile(r"CUDA error|Triton Error \[CUDA\]|CUDA driver error")
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory", re.IGNORECASE)
MAX_INPUT_SETS = 3
INPUT_SETS_SHARE = 0.25
"""Share of the free memory that further input sets may take."""
NO_BREAKDOWN = trace.Breakdown(stages=(), kernels=())
SLOW_SECONDS = 0.1
MAX_REASON = 400


class EndCase(Exception):
    """The case has ended before its last phase, with this status and reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a request may set beside the case."""

    device: str = "auto"
    effort: str = "quick"
    gate: bool = True
    profile: bool = True
    """A pass under the profiler after the timing, for stages and kernels."""
    trace_dir: str | None = None
    """Where `profile` leaves <key>.trace.json.gz and <key>.memory.csv."""
    workspace_bytes: int | None = None
    """Replaces the default of operators that have such a limit."""

    def __post_init__(self) -> None:
        if self.effort not in measure.EFFORTS:
            known = ", ".join(measure.EFFORTS)
            raise UsageError(f"unknown effort {self.effort!r}; known: {known}")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Options":
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in data.items() if k in known})


@dataclass(slots=True)
class Job:
    """A case on its way through the phases, with what is known of it so far."""

    case: Case
    verb: str
    options: Options
    machine: Machine
    resolved: registry.Resolved
    emit: Emit
    predicted: Memory
    cost: dict[str, float]
    input_sets: list[Any] = field(default_factory=list)
    gate: Mapping[str, Any] = field(default_factory=dict)
    time: Timing | None = None
    memory: MemoryUse | None = None
    breakdown: trace.Breakdown = NO_BREAKDOWN
    flags: tuple[str, ...] = ()

    def enter(self, phase: str) -> None:
        self.emit({"event": "phase", "phase": phase})


def answer(request: Mapping[str, Any], emit: Emit) -> tuple[Record, bool]:
    """The record of one request, and whether this process can go on."""
    case = Case.from_json(request["case"])
    entered: list[tuple[str, float]] = []

    def tell(event: Mapping[str, Any]) -> None:
        entered.append((str(event["phase"]), time.monotonic()))
        emit(event)

    # dropped on every way out: the traceback of an exception would keep the tensors of the case
    job: list[Job] = []
    try:
        with torch.no_grad():
            record = _take(request, case, tell, job)
        fatal = False
    except Exception as error:
        traceback.print_exc()
        status, reason, fatal = classify(error, entered[-1][0] if entered else "build")
        record = Record(case=case, status=status, reason=reason)
        if job:
            record = dataclasses.replace(record, gate=job[0].gate, cost=job[0].cost)
    job.clear()
    record = dataclasses.replace(record, phases=_durations(entered, time.monotonic()))
    return record, not fatal and release_memory()


def _durations(entered: Sequence[tuple[str, float]], now: float) -> dict[str, float]:
    """Seconds from each phase's beginning to the next one's."""
    ends = [begin for _, begin in entered[1:]] + [now]
    return {name: end - begin for (name, begin), end in zip(entered, ends, strict=True)}


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
    sticky = _is_cuda_error(error, text)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or OUT_OF_MEMORY.search(text):
        return "oom", f"out of memory in phase {phase}: {first_line}", sticky
    return "failed", f"{type(error).__name__} in phase {phase}: {first_line}", sticky


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


def _take(request: Mapping[str, Any], case: Case, emit: Emit, holder: list[Job]) -> Record:
    emit({"event": "phase", "phase": "build"})
    verb = str(request["verb"])
    if verb not in ("run", "check", "profile"):
        raise UsageError(f"unknown verb {verb!r}; known: run, check, profile")
    options = Options.from_json(request.get("options", {}))
    job = _plan(case, verb, options, emit)
    holder.append(job)
    _make_inputs(job)
    if options.gate or verb == "check":
        _gate(job)
    if verb == "run":
        _measure(job)
    if verb != "check":
        _memory(job)
    if verb == "profile" or (verb == "run" and options.profile):
        _trace(job)
    return Record(
        case=case,
        status="ok",
        time=job.time,
        stages=job.breakdown.stages,
        kernels=job.breakdown.kernels,
        cost=job.cost,
        memory=job.memory,
        gate=job.gate,
        flags=job.flags,
    )


def _plan(case: Case, verb: str, options: Options, emit: Emit) -> Job:
    """Everything that can end a case before a byte is allocated."""
    machine = detect(options.device)
    resolved = registry.resolve(case, machine, workspace_bytes=options.workspace_bytes)
    if resolved.reason is not None:
        raise EndCase("skipped", resolved.reason)
    predicted = resolved.operator.memory(resolved.shape)
    lacking = measure.shortage(predicted, free_bytes(machine))
    if lacking:
        raise EndCase("oom", lacking)
    return Job(
        case=case,
        verb=verb,
        options=options,
        machine=machine,
        resolved=resolved,
        emit=emit,
        predicted=predicted,
        cost=_cost_figures(resolved.operator, resolved.shape),
    )


def _make_inputs(job: Job) -> None:
    """Up to three input sets if they take little memory; then the first call, which compiles.

    The first call runs on the last set, so that what the gate sees for the first set cannot be left
    over from it.
    """
    make, shape = job.resolved.operator.make_inputs, job.resolved.shape
    spare = (free_bytes(job.machine) - job.predicted.total_bytes) * INPUT_SETS_SHARE
    wanted = MAX_INPUT_SETS if job.verb == "run" else 2
    more = min(wanted - 1, int(max(0.0, spare) // max(1, job.predicted.input_bytes)))
    for offset in range(1 + more):
        try:
            inputs = make(shape, seed=job.case.seed + offset, device=job.machine.device)
        except torch.OutOfMemoryError:
            # making inputs may need more than they hold; one set is enough to go on
            if not job.input_sets:
                raise
            break
        job.input_sets.append(inputs)
    job.resolved.run(job.input_sets[-1])
    _synchronize(job.machine)


def _gate(job: Job) -> None:
    job.enter("gate")
    operator, machine = job.resolved.operator, job.machine
    gate.poison_memory(job.predicted, machine.device, free_bytes(machine))
    outputs = job.resolved.run(job.input_sets[0])
    _synchronize(machine)
    verdict = gate.check_outputs(
        operator,
        job.input_sets[0],
        outputs,
        num_rows=operator.num_rows(job.resolved.shape),
        seed=job.case.seed,
        device=machine.device,
    )
    job.gate = verdict.gate
    del outputs
    if machine.device == "cuda":
        # the reference took far more than the case will: its pool must not look like the case's
        torch.cuda.empty_cache()
    if not verdict.passed:
        raise EndCase("wrong", verdict.reason)


def _measure(job: Job) -> None:
    job.enter("measure")
    taken = measure.measure(
        job.resolved.run,
        job.input_sets,
        mode=measure.default_mode(job.case.phase, job.machine),
        effort=measure.EFFORTS[job.options.effort],
        machine=job.machine,
    )
    job.time, job.flags = taken.timing, taken.flags


def _memory(job: Job) -> None:
    job.enter("memory")
    del job.input_sets[1:]
    job.memory = measure.measure_memory(
        job.resolved.run, job.input_sets[0], predicted=job.predicted, machine=job.machine
    )


def _trace(job: Job) -> None:
    job.enter("trace")
    machine, folder = job.machine, job.options.trace_dir
    is_slow = job.time is not None and median(job.time.seconds) > SLOW_SECONDS
    job.breakdown = trace.trace_case(
        job.resolved.run,
        job.input_sets[0],
        stages=_blank_stages(job.resolved),
        device=machine.device,
        calls=1 if is_slow else 3,
        before=measure.l2_flush(machine) if machine.device == "cuda" else None,
        keep=Path(folder) / job.case.key if folder is not None else None,
    )


def _blank_stages(resolved: registry.Resolved) -> list[StageTime]:
    """Name, implementation and cost of each stage; the seconds come from the trace."""
    stages = []
    for name, part in resolved.parts.items():
        operator, shape = registry.operator(name), resolved.stage_shapes[name]
        cost = _cost_figures(operator, shape)
        stages.append(StageTime(name=name, impl=part.name, seconds=0.0, **cost))
    return stages


def _cost_figures(operator: Operator, shape: Any) -> dict[str, float]:
    return {k: float(v) for k, v in dataclasses.asdict(operator.cost(shape)).items()}


def _synchronize(machine: Machine) -> None:
    if machine.device == "cuda":
        torch.cuda.synchronize()


def serve(requests: Iterable[str], emit: Emit) -> int:
    """Answer requests until there are none; the exit code."""
    for line in requests:
        record, usable = answer(json.loads(line), emit)
        emit({"event": "record", "record": record.to_json()})
        if not usable:
            return 1
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
