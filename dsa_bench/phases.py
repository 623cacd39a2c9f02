"""The phases of one case inside a worker: build, gate, measure, recheck, memory, trace."""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsa_bench import gate, input_sets, measure, memory_use, registry, trace
from dsa_bench.machine import detect, free_bytes
from dsa_bench.meter import l2_flush
from dsa_bench.operator import Machine, Memory, Operator, UsageError
from dsa_bench.record import AUTO_MODE, Case, MemoryUse, Record, StageTime, Timing
from dsa_bench.stats import median
from dsa_bench.telemetry import Monitor, open_monitor
from dsa_bench.timed_outputs import Watch

VERBS = ("run", "check", "profile")
NO_BREAKDOWN = trace.Breakdown(stages=(), kernels=())
SLOW_SECONDS = 0.1


class EndCase(Exception):
    """The case has ended before its last phase, with this status and reason."""

    def __init__(self, status: str, reason: str, *flags: str) -> None:
        super().__init__(reason)
        self.status, self.reason, self.flags = status, reason, flags


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a request may set beside its cases."""

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
    enter: Callable[[str], None]
    """Told the name of each phase as it begins."""
    before: frozenset[int] = frozenset()
    """Processes that computed on the GPU before this one did."""
    beside: tuple[str, ...] = ()
    """Keys of the cases that are timed in turn with this one."""
    machine: Machine = field(init=False)
    resolved: registry.Resolved = field(init=False)
    predicted: Memory = field(init=False)
    cost: Mapping[str, float] = field(default_factory=dict)
    input_sets: list[Any] = field(default_factory=list)
    verdict: Mapping[str, Any] = field(default_factory=dict)
    """What the gate found."""
    monitor: Monitor = field(default_factory=Monitor)
    sampler: measure.Sampler | None = None
    energy: tuple[float, int] | None = None
    """Joules, and the calls that took them."""
    fresh: Any = None
    """Inputs that nobody can know, which a watched call has met."""
    same_inputs: tuple[str, ...] = ()
    """The flag of a case for which no new inputs could be made."""
    time: Timing | None = None
    memory: MemoryUse | None = None
    breakdown: trace.Breakdown = NO_BREAKDOWN
    flags: tuple[str, ...] = ()

    def open(self) -> None:
        """Everything up to the stopwatch; EndCase where the case ends before it."""
        self.enter("build")
        self._plan()
        self._make_inputs()
        if self.options.gate or self.verb == "check":
            self._gate()

    def _plan(self) -> None:
        """Everything that can end a case before a byte is allocated."""
        self.machine = detect(self.options.device)
        self.resolved = registry.resolve(
            self.case, self.machine, workspace_bytes=self.options.workspace_bytes
        )
        reason = self.resolved.reason or measure.unsuited(self.mode, self._device)
        if reason:
            raise EndCase("skipped", reason)
        self.predicted = self.resolved.operator.memory(self.resolved.shape)
        lacking = memory_use.shortage(self.predicted, free_bytes(self.machine))
        if lacking:
            raise EndCase("oom", lacking)
        self.cost = _cost_figures(self.resolved.operator, self.resolved.shape)

    @property
    def mode(self) -> str:
        """The mode that was asked for, `auto` resolved."""
        if self.case.mode != AUTO_MODE:
            return self.case.mode
        return measure.default_mode(self.case.phase, self.machine)

    def _make_inputs(self) -> None:
        """Up to three input sets if they take little memory; then the first call, which compiles.

        The first call runs on the last set, so that what the gate sees for the first set cannot be
        left over from it.
        """
        self.input_sets = input_sets.make_sets(
            lambda offset: self._make(self.case.seed + offset),
            wanted=input_sets.MAX_SETS if self.verb == "run" else 2,
            input_bytes=self.predicted.input_bytes,
            spare_bytes=free_bytes(self.machine) - self.predicted.total_bytes,
        )
        self.resolved.run(self.input_sets[-1])
        self._synchronize()

    def _make(self, seed: int) -> Any:
        make, shape = self.resolved.operator.make_inputs, self.resolved.shape
        return make(shape, seed=seed, device=self._device)

    def _gate(self) -> None:
        self.enter("gate")
        self._poison()
        outputs = self.resolved.run(self.input_sets[0])
        self._synchronize()
        verdict = self._check(self.input_sets[0], outputs, seed=self.case.seed)
        self.verdict = verdict.gate
        del outputs
        if self._device == "cuda":
            # the reference took far more than the case will: its pool must not look like the case's
            torch.cuda.empty_cache()
        if not verdict.passed:
            raise EndCase("wrong", verdict.reason)

    def _poison(self) -> None:
        gate.poison_memory(self.predicted, self._device, free_bytes(self.machine))

    def _check(self, inputs: Any, outputs: Any, **options: Any) -> gate.Verdict:
        operator = self.resolved.operator
        return gate.check_outputs(
            operator,
            inputs,
            outputs,
            num_rows=operator.num_rows(self.resolved.shape),
            always=operator.always_checked(self.resolved.shape),
            device=self._device,
            **options,
        )

    def visit(self, number: int) -> None:
        """Sample for one visit, and look at the output of one of its calls."""
        self.enter("measure")
        if self.sampler is None:
            self.monitor = open_monitor(self.machine, self.before)
            self.sampler = measure.open_sampler(
                self.resolved.run,
                self.input_sets,
                mode=self.mode,
                effort=measure.EFFORTS[self.options.effort],
                machine=self.machine,
                watching=self._watching,
            )
        watch = None
        if self.options.gate:
            watch = Watch(self.sampler.expected_samples, self._renew, self._restore)
        self.sampler.visit(number, watch)
        if watch is None or watch.set_index is None:
            return
        if watch.outputs is None:
            self.same_inputs = ("same_inputs",)
        else:
            self._recheck(watch.outputs, watch.set_index)
        self.fresh = None

    def _renew(self, set_index: int) -> None:
        """Leave nothing that the next call could hand out without computing it."""
        assert self.sampler is not None
        try:
            self.fresh = self._make(random.SystemRandom().getrandbits(62))
            input_sets.refill(self.input_sets[set_index], self.fresh)
        except torch.OutOfMemoryError:
            # the old contents must do
            self.fresh, self.same_inputs = None, ("same_inputs",)
        self.sampler.spoil(set_index)
        self._poison()

    def _restore(self, set_index: int) -> None:
        """Give a set its own contents back."""
        if self.fresh is None:
            return
        try:
            own = self._make(self.case.seed + set_index)
            input_sets.refill(self.input_sets[set_index], own)
        except torch.OutOfMemoryError:
            # the set keeps what it has, and is what the output is held against
            self.fresh = None

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Around the samples of a visit, without its warm-up: telemetry, and the energy of calls.

        As many batches are queued ahead at the beginning as at the end.
        """
        sampler = self.sampler
        assert sampler is not None
        before, count = self.monitor.energy_joules(), len(sampler.samples)
        with self.monitor.watching():
            yield
        after, calls_per_sample = self.monitor.energy_joules(), sampler.calls_per_sample
        if sampler.mode == "sustained" and before is not None and after is not None:
            joules, calls = self.energy or (0.0, 0)
            calls += (len(sampler.samples) - count) * calls_per_sample
            self.energy = joules + after - before, calls

    def close(self) -> Record:
        """What comes behind the stopwatch, and the record."""
        if self.sampler is not None:
            self._close_timing()
        if self.verb != "check":
            self._memory()
        if self.verb == "profile" or (self.verb == "run" and self.options.profile):
            self._trace()
        return self.record("ok")

    def _close_timing(self) -> None:
        assert self.sampler is not None
        telemetry = self.monitor.take()
        if telemetry is not None and self.energy is not None:
            joules, calls = self.energy
            telemetry = dataclasses.replace(telemetry, energy_joules=joules, energy_calls=calls)
        self.time = dataclasses.replace(
            self.sampler.timing, beside=self.beside, telemetry=telemetry
        )
        self.flags = self.sampler.all_flags + self.same_inputs
        # graphs hold memory of their own
        self.sampler = None

    def _recheck(self, outputs: Any, set_index: int) -> None:
        """Look at the output of a timed call, on rows that nobody could foresee."""
        self.enter("recheck")
        verdict = self._check(
            self.input_sets[set_index] if self.fresh is None else self.fresh,
            outputs,
            seed=random.SystemRandom().getrandbits(62),
            limit=gate.RECHECKED_ROWS,
            figures=False,
        )
        count = self.verdict.get("timed_calls_checked", 0) + 1
        self.verdict = {**self.verdict, "timed_calls_checked": count}
        if not verdict.passed:
            self.verdict = {**self.verdict, "timed_checks": verdict.gate["checks"]}
            reason = f"in a timed call {verdict.reason}, though the checked call was right"
            raise EndCase("wrong", reason, "output_differs")
        if self._device == "cuda":
            # the reference took far more than the case does
            torch.cuda.empty_cache()

    def _memory(self) -> None:
        self.enter("memory")
        del self.input_sets[1:]
        self.memory = memory_use.measure_memory(
            self.resolved.run, self.input_sets[0], predicted=self.predicted, machine=self.machine
        )

    def _trace(self) -> None:
        self.enter("trace")
        folder, is_cuda = self.options.trace_dir, self._device == "cuda"
        is_slow = self.time is not None and median(self.time.seconds) > SLOW_SECONDS
        self.breakdown = trace.trace_case(
            self.resolved.run,
            self.input_sets[0],
            stages=_blank_stages(self.resolved),
            device=self._device,
            calls=1 if is_slow else 3,
            before=l2_flush(self.machine).run if is_cuda else None,
            keep=Path(folder) / self.case.key if folder is not None else None,
        )

    def record(self, status: str, reason: str = "", flags: tuple[str, ...] = ()) -> Record:
        """What is known; a case that did not end well keeps no time."""
        is_ok = status == "ok"
        return Record(
            case=self.case,
            status=status,
            reason=reason,
            time=self.time if is_ok else None,
            stages=self.breakdown.stages if is_ok else (),
            kernels=self.breakdown.kernels if is_ok else (),
            cost=self.cost,
            memory=self.memory if is_ok else None,
            gate=self.verdict,
            flags=self.flags + flags if is_ok else flags,
        )

    @property
    def _device(self) -> str:
        return self.machine.device

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def _blank_stages(resolved: registry.Resolved) -> list[StageTime]:
    """Name, implementation and cost of each stage with a call; the seconds come from the trace."""
    stages = []
    for name, part in resolved.parts.items():
        operator, calls = registry.operator(name), resolved.stage_shapes[name]
        if calls:
            cost = _cost_figures(operator, *calls)
            stages.append(StageTime(name=name, impl=part.name, seconds=0.0, **cost))
    return stages


def _cost_figures(operator: Operator, *shapes: Any) -> dict[str, float]:
    """Of one call of each shape, together."""
    costs = [dataclasses.asdict(operator.cost(shape)) for shape in shapes]
    return {name: float(sum(cost[name] for cost in costs)) for name in costs[0]}
