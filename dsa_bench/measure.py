"""How long a call takes and how much memory it holds: raw samples, never beside a profiler.

Modes: `cold` times each call by CUDA events, with L2 flushed before it and a bounded spin on the
GPU, so that the host has queued the call before the GPU reaches it. `graph` does the same with a
CUDA graph of one call, which leaves out the launches as a serving engine does. `cpu` reads the host
clock.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from dsa_bench import trace
from dsa_bench.operator import Machine, Memory, Run
from dsa_bench.record import MemoryUse, Timing
from dsa_bench.stats import median, relative_half_width

Call = Callable[[], object]
Clock = Callable[[], float]

WARMUP_CALLS = 3
WARMUP_SECONDS = 0.05
MIN_SAMPLES = 20
MIN_SAMPLES_SLOW = 5
MAX_SAMPLES = 2000
LAUNCH_BOUND_SHARE = 0.05
HARMLESS_WAIT = 0.01
"""Share of a sample by which a wait for the host cannot spoil it."""
FLUSH_L2_SIZES = 2
SPIN_FACTOR = 2.0
SPIN_MARGIN_SECONDS = 200e-6
SPIN_LIMIT_SECONDS = 20e-3
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """When sampling ends: the 95 % interval of the median is narrow enough, or time is up."""

    half_width: float
    """Half of the interval's width as a share of the median."""
    max_seconds: float


EFFORTS = {
    "quick": Effort(half_width=0.03, max_seconds=1.0),
    "standard": Effort(half_width=0.01, max_seconds=3.0),
    "precise": Effort(half_width=0.0025, max_seconds=20.0),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One timed call. `overtaken`: the GPU may have waited for the host for some time."""

    seconds: float
    overtaken: bool = False


class Meter(Protocol):
    """Times one call."""

    def sample(self, call: Call) -> Sample: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Samples, and named reasons to doubt them: `launch_bound`, `no_graph`."""

    timing: Timing
    flags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMeter:
    """Host clock around a call that is done when it returns."""

    clock: Clock = time.perf_counter

    def sample(self, call: Call) -> Sample:
        begin = self.clock()
        call()
        return Sample(seconds=self.clock() - begin)


class CudaMeter:
    """CUDA events around a call, after a flush of L2 and a spin that lets the host get ahead.

    `cuda` is torch.cuda, or a fake of it. The spin is bounded, so a call that waits for the GPU
    cannot hang.
    """

    def __init__(
        self, flush: Call, *, cuda: Any = torch.cuda, clock: Clock = time.perf_counter
    ) -> None:
        self._flush, self._cuda, self._clock = flush, cuda, clock
        self._queueing_seconds = math.inf
        self._spin_factor = SPIN_FACTOR
        self._cycles_per_second = self._measure_spin()

    def _measure_spin(self) -> float:
        cycles = 1_000_000
        self._cuda._sleep(cycles)
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._cuda._sleep(cycles)
        end.record()
        self._cuda.synchronize()
        return cycles / (float(start.elapsed_time(end)) / 1000)

    def sample(self, call: Call) -> Sample:
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self._flush()
        spin = self._spin_factor * self._queueing_seconds + SPIN_MARGIN_SECONDS
        self._cuda._sleep(int(min(spin, SPIN_LIMIT_SECONDS) * self._cycles_per_second))
        queued = self._clock()
        start.record()
        call()
        end.record()
        overtaken = bool(start.query())
        queueing = self._clock() - queued
        # the least of all calls: the first ones compile, and some wait for the operating system
        self._queueing_seconds = min(self._queueing_seconds, queueing)
        if overtaken:
            self._spin_factor = 2 * SPIN_FACTOR
        self._cuda.synchronize()
        seconds = float(start.elapsed_time(end)) / 1000
        # the GPU can have waited no longer than the host took
        matters = queueing > HARMLESS_WAIT * seconds
        return Sample(seconds=seconds, overtaken=overtaken and matters)


def default_mode(phase: str, machine: Machine) -> str:
    """Decode is served from CUDA graphs; prefill is long enough to hide its launches."""
    if machine.device == "cpu":
        return "cpu"
    return "graph" if phase == "decode" else "cold"


def measure(
    run: Run, input_sets: Sequence[Any], *, mode: str, effort: Effort, machine: Machine
) -> Measurement:
    """Time `run` on the input sets in turn: no call can hand out the result of the one before."""
    if mode == "cpu":
        return sample_until(_rotation(run, input_sets), HostMeter(), effort, mode=mode)
    flags: tuple[str, ...] = ()
    calls = _rotation(run, input_sets)
    if mode == "graph":
        try:
            # a capture that fails leaves its own stream as the current one
            with torch.cuda.stream(torch.cuda.current_stream()):
                calls = _graph_rotation(run, input_sets)
        except torch.OutOfMemoryError:
            # a RuntimeError too, but one that ends the case as `oom`
            raise
        except RuntimeError:
            # a callee that waits for the GPU or allocates outside of torch cannot be captured
            mode, flags = "cold", ("no_graph",)
            torch.cuda.synchronize()
    meter = CudaMeter(l2_flush(machine))
    measured = sample_until(calls, meter, effort, mode=mode)
    return dataclasses.replace(measured, flags=flags + measured.flags)


def _rotation(run: Run, input_sets: Sequence[Any]) -> list[Call]:
    return [functools.partial(run, inputs) for inputs in input_sets]


def _graph_rotation(run: Run, input_sets: Sequence[Any]) -> list[Call]:
    """One CUDA graph for each input set, captured after a call on a side stream warmed it up."""
    side = cast(Any, torch.cuda.Stream)()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for inputs in input_sets:
            run(inputs)
    torch.cuda.current_stream().wait_stream(side)
    calls: list[Call] = []
    for inputs in input_sets:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(inputs)
        calls.append(graph.replay)
    torch.cuda.synchronize()
    return calls


def l2_flush(machine: Machine) -> Call:
    """Writes, then reads twice the size of L2: neither inputs nor dirty lines are left in it."""
    words = FLUSH_L2_SIZES * max(machine.l2_bytes, 2**20) // 4
    buffer = torch.zeros(words, dtype=torch.int32, device=machine.device)
    out = torch.zeros((), dtype=torch.int64, device=machine.device)

    def flush() -> None:
        buffer.zero_()
        torch.sum(buffer, dim=0, out=out)

    return flush


def sample_until(
    calls: Sequence[Call],
    meter: Meter,
    effort: Effort,
    *,
    mode: str,
    clock: Clock = time.perf_counter,
) -> Measurement:
    """Warm up, then sample the calls in turn until the median has settled or time is up."""
    begin = clock()
    for count, call in enumerate(_cycle(calls), start=1):
        meter.sample(call)
        spent = clock() - begin
        warm = count >= WARMUP_CALLS and spent >= WARMUP_SECONDS
        if warm or spent >= effort.max_seconds / 4:
            break
    begin = clock()
    samples: list[Sample] = []
    stop = ""
    for call in _cycle(calls):
        samples.append(meter.sample(call))
        stop = stop_reason([s.seconds for s in samples], clock() - begin, effort)
        if stop:
            break
    timing = Timing(mode=mode, seconds=tuple(s.seconds for s in samples), stop=stop)
    flags = ("launch_bound",) if is_launch_bound(samples, effort) else ()
    return Measurement(timing=timing, flags=flags)


def is_launch_bound(samples: Sequence[Sample], effort: Effort) -> bool:
    """Whether waits for the host show: the median moves when the overtaken samples are left out.

    A host that hesitates now and then overtakes no median; one that is slower than the GPU leaves
    no sample untouched.
    """
    untouched = [s.seconds for s in samples if not s.overtaken]
    if len(samples) - len(untouched) <= LAUNCH_BOUND_SHARE * len(samples):
        return False
    if len(untouched) < MIN_SAMPLES_SLOW:
        return True
    return abs(median([s.seconds for s in samples]) / median(untouched) - 1) > effort.half_width


def _cycle(calls: Sequence[Call]) -> Iterator[Call]:
    while True:
        yield from calls


def stop_reason(seconds: Sequence[float], elapsed: float, effort: Effort) -> str:
    """`settled`, `max_samples`, `max_seconds`; empty while sampling goes on."""
    n = len(seconds)
    # sorting thousands of samples after each of them would take longer than they do
    judged = n < 50 or n % 25 == 0
    if n >= MIN_SAMPLES and judged and relative_half_width(seconds) <= effort.half_width:
        return "settled"
    if n >= MAX_SAMPLES:
        return "max_samples"
    if n >= MIN_SAMPLES_SLOW and elapsed >= effort.max_seconds:
        return "max_seconds"
    return ""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors of a dataclass, NamedTuple, mapping or sequence, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def held_bytes(value: Any) -> int:
    """Bytes of the storages under a value's tensors; a shared storage counts once."""
    storages = (tensor.untyped_storage() for tensor in tensors_in(value))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure_memory(run: Run, inputs: Any, *, predicted: Memory, machine: Machine) -> MemoryUse:
    """One call with torch's allocator watched: its peak on CUDA, the profiler's events on a CPU.

    Memory that a library takes without torch's allocator isn't seen.
    """
    if machine.device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        outputs = run(inputs)
        torch.cuda.synchronize()
        grown = torch.cuda.max_memory_allocated() - before
    else:
        outputs, grown = trace.peak_growth(run, inputs)
    input_bytes, output_bytes = held_bytes(inputs), held_bytes(outputs)
    return MemoryUse(
        peak_bytes=input_bytes + grown,
        input_bytes=input_bytes,
        output_bytes=output_bytes,
        workspace_bytes=max(0, grown - output_bytes),
        predicted_bytes=predicted.total_bytes,
    )


def shortage(predicted: Memory, free: int) -> str:
    """Sentence on why a case cannot fit into what is free; empty where it can."""
    if predicted.total_bytes <= free:
        return ""
    parts = ", ".join(
        f"{name} {size / GIB:.1f}"
        for name, size in (
            ("inputs", predicted.input_bytes),
            ("outputs", predicted.output_bytes),
            ("workspace", predicted.workspace_bytes),
        )
    )
    return f"needs {predicted.total_bytes / GIB:.1f} GiB, {free / GIB:.1f} GiB free ({parts})"
