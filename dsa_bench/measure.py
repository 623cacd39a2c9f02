"""How long a call takes: raw samples, never beside a profiler.

Modes:
    cold       each call by itself, L2 flushed before it, a bounded spin on the GPU so that the host
               has queued the call before the GPU reaches it
    warm       the same without the flush, always on one input set
    graph      cold, but a replay of a CUDA graph of the call: without launches, as it is served
    sustained  calls back to back for two seconds and more in each visit
    cpu        the host clock

A case is sampled in visits. Between its visits its competitors are sampled, in the order A B B A,
so that a drift of the machine meets all of them alike. In each visit one call, nobody knows which,
meets inputs that are new in place, and its output is kept for the gate.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from dsa_bench import timed_outputs
from dsa_bench.doubt import LAUNCH_BOUND_SHARE
from dsa_bench.meter import (
    NO_FLUSH,
    Call,
    Clock,
    CudaMeter,
    HostMeter,
    Meter,
    Sample,
    SustainedMeter,
    l2_flush,
)
from dsa_bench.operator import Machine, Run
from dsa_bench.record import AUTO_MODE, Timing
from dsa_bench.stats import median, relative_half_width
from dsa_bench.timed_outputs import Watch

WARMUP_CALLS = 3
WARMUP_SECONDS = 0.05
MIN_SAMPLES = 20
MIN_SAMPLES_SLOW = 5
MAX_SAMPLES = 2000
VISITS = 2
BATCH_SECONDS = 0.02
"""Length of one sample of `sustained`: long beside the events, short beside the visit."""
SUSTAINED_SECONDS = 2.0
SUSTAINED_WARMUP_SECONDS = 0.5


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


def default_mode(phase: str, machine: Machine) -> str:
    """Decode is served from CUDA graphs; prefill is long enough to hide its launches."""
    if machine.device == "cpu":
        return "cpu"
    return "graph" if phase == "decode" else "cold"


def unsuited(mode: str, device: str) -> str:
    """Why a mode cannot be had on a device; empty where it can."""
    if mode == AUTO_MODE or (mode == "cpu") == (device == "cpu"):
        return ""
    if mode == "cpu":
        return "mode cpu times on the host, this case runs on a GPU (use cold or graph)"
    return f"mode {mode} needs a CUDA GPU (leave --mode out)"


Spoil = Callable[[int], None]


def _nothing(set_index: int) -> None:
    """Plain calls leave nothing behind that a later one could hand out."""


@dataclass(slots=True)
class Sampler:
    """Takes the samples of one case, visit by visit."""

    calls: Sequence[Call]
    """One for each input set; in `sustained` one for all of them in turn."""
    num_sets: int
    meter: Meter
    effort: Effort
    mode: str
    flags: tuple[str, ...] = ()
    """What was seen while it was prepared: `no_graph`."""
    spoil: Spoil = _nothing
    """Makes what earlier calls on an input set left unusable."""
    clock: Clock = time.perf_counter
    watching: Callable[[], AbstractContextManager[object]] = nullcontext
    """Entered while samples are taken: reads clocks and power."""
    samples: list[Sample] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    elapsed: float = 0.0
    stop: str = ""
    warmup_calls: int = 0
    fresh: list[float] = field(default_factory=list)
    """Seconds of the watched calls."""

    def visit(self, number: int, watch: Watch | None = None) -> None:
        """Warm up, then sample in turn until this visit's share of the effort is spent."""
        share = (number + 1) / VISITS
        self._warm_up()
        self.stop = ""
        # new inputs would leave a gap in a train of calls: there one behind the train is watched
        inside = None if self.mode == "sustained" else watch
        before, begin = len(self.samples), self.clock()
        with self.watching():
            for index, call in _numbered(self.calls):
                self._sample(index, call, inside, is_last=bool(self.stop))
                spent = self.elapsed + self.clock() - begin
                self.stop = self._stop_reason(before, spent, share)
                if self.stop and not (inside is not None and inside.is_due):
                    break
        self.elapsed += self.clock() - begin
        self.blocks.append(len(self.samples) - before)
        if isinstance(self.meter, SustainedMeter):
            self.meter.pause()
        # a round ends with the last set
        if watch is not None and watch.chooses(self.num_sets - 1, is_last=True):
            watch.keep(self.calls[-1]())
            watch.end()

    def _sample(self, index: int, call: Call, watch: Watch | None, *, is_last: bool) -> None:
        begin = self.clock()
        if watch is None or not watch.chooses(index, is_last=is_last):
            self.samples.append(self.meter.sample(call))
            return
        self.samples.append(self.meter.sample(call, watch.keep))
        self.fresh.append(self.samples[-1].seconds)
        watch.end()
        # making inputs can take longer than all samples: it isn't their time
        self.elapsed -= self.clock() - begin

    def _warm_up(self) -> None:
        begin = self.clock()
        is_sustained = self.mode == "sustained"
        wanted = SUSTAINED_WARMUP_SECONDS if is_sustained else WARMUP_SECONDS
        for count, (_, call) in enumerate(_numbered(self.calls), start=1):
            self.meter.sample(call)
            self.warmup_calls += 1
            spent = self.clock() - begin
            if count >= WARMUP_CALLS and spent >= wanted:
                break
            # a call of seconds is warm after one
            if spent >= max(wanted, self.effort.max_seconds / 4):
                break

    def _stop_reason(self, before: int, spent: float, share: float) -> str:
        seconds = [sample.seconds for sample in self.samples]
        blocks = (*self.blocks, len(seconds) - before)
        if self.mode == "sustained":
            if spent < share * VISITS * SUSTAINED_SECONDS:
                return ""
            return _last_word(seconds, blocks, self.effort)
        return stop_reason(seconds, spent, self.effort, blocks=blocks, share=share)

    @property
    def expected_samples(self) -> int:
        """Of the next visit: as many as the last one took, or the fewest that there may be."""
        return self.blocks[-1] if self.blocks else MIN_SAMPLES // VISITS

    @property
    def calls_per_sample(self) -> int:
        return self.meter.calls_per_sample if isinstance(self.meter, SustainedMeter) else 1

    @property
    def timing(self) -> Timing:
        """All that was sampled so far."""
        return Timing(
            mode=self.mode,
            seconds=tuple(sample.seconds for sample in self.samples),
            stop=self.stop,
            blocks=tuple(self.blocks),
            overtaken=tuple(i for i, sample in enumerate(self.samples) if sample.overtaken),
            input_sets=self.num_sets,
            calls_per_sample=self.calls_per_sample,
            fresh_seconds=tuple(self.fresh),
            warmup_calls=self.warmup_calls,
            event_overhead_seconds=self.meter.event_overhead,
            spin_seconds=self.meter.spin_seconds,
            flush_bytes=self.meter.flush_bytes,
            hidden_seconds=median([sample.hidden_seconds for sample in self.samples]),
        )

    @property
    def all_flags(self) -> tuple[str, ...]:
        """Doubts that the samples alone do not show."""
        is_bound = is_launch_bound(self.samples, self.effort)
        return self.flags + (("launch_bound",) if is_bound else ())


def open_sampler(
    run: Run,
    input_sets: Sequence[Any],
    *,
    mode: str,
    effort: Effort,
    machine: Machine,
    watching: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Sampler:
    """Prepare a mode: capture graphs, make the flush, choose batches. Nothing is sampled yet."""
    if mode == "warm":
        # further sets would push the first one out of L2
        input_sets = input_sets[:1]
    calls: Sequence[Call] = _rotation(run, input_sets)
    flags: tuple[str, ...] = ()
    spoil: Spoil = _nothing
    asked = mode
    if mode in ("graph", "sustained"):
        calls, spoil, captured = _try_graphs(run, input_sets)
        if not captured:
            flags = ("no_graph",)
            mode = "cold" if mode == "graph" else mode
    meter: Meter
    if mode == "cpu":
        meter = HostMeter()
    elif asked == "sustained":
        meter, calls = _sustained(calls)
    else:
        meter = CudaMeter(NO_FLUSH if mode == "warm" else l2_flush(machine))
    return Sampler(
        calls=calls,
        num_sets=len(input_sets),
        meter=meter,
        effort=effort,
        mode=mode,
        flags=flags,
        spoil=spoil,
        watching=watching,
    )


def _rotation(run: Run, input_sets: Sequence[Any]) -> list[Call]:
    return [functools.partial(run, inputs) for inputs in input_sets]


def _try_graphs(run: Run, input_sets: Sequence[Any]) -> tuple[list[Call], Spoil, bool]:
    """Replays of graphs, what spoils their outputs, True; or plain calls and False."""
    try:
        # a capture that fails leaves its own stream as the current one
        with torch.cuda.stream(torch.cuda.current_stream()):
            graphs, outputs = _capture(run, input_sets)
    except torch.OutOfMemoryError:
        # a RuntimeError too, but one that ends the case as `oom`
        raise
    except RuntimeError:
        # a callee that waits for the GPU or allocates outside of torch cannot be captured
        torch.cuda.synchronize()
        return _rotation(run, input_sets), _nothing, False
    calls: list[Call] = [
        functools.partial(_replay, graph, out) for graph, out in zip(graphs, outputs, strict=True)
    ]
    return calls, lambda set_index: timed_outputs.spoil(outputs[set_index]), True


def _replay(graph: Any, outputs: Any) -> Any:
    graph.replay()
    return outputs


def _capture(run: Run, input_sets: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """One CUDA graph for each input set, captured after a call on a side stream warmed it up."""
    side = cast(Any, torch.cuda.Stream)()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for inputs in input_sets:
            run(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graphs: list[Any] = []
    outputs: list[Any] = []
    for inputs in input_sets:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(run(inputs))
        graphs.append(graph)
    torch.cuda.synchronize()
    return graphs, outputs


def _sustained(calls: Sequence[Call]) -> tuple[SustainedMeter, list[Call]]:
    """A meter whose batches take about BATCH_SECONDS, and one round over the input sets."""

    def one_round() -> Any:
        outputs = None
        for call in calls:
            outputs = call()
        return outputs

    probe = CudaMeter(NO_FLUSH)
    one_round()
    seconds = min(probe.sample(one_round).seconds for _ in range(3))
    rounds = max(1, math.ceil(BATCH_SECONDS / max(seconds, 1e-7)))
    meter = SustainedMeter(rounds=rounds, calls_per_round=len(calls), overhead=probe.event_overhead)
    return meter, [one_round]


def _numbered(calls: Sequence[Call]) -> Iterator[tuple[int, Call]]:
    while True:
        yield from enumerate(calls)


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


def stop_reason(
    seconds: Sequence[float],
    elapsed: float,
    effort: Effort,
    *,
    blocks: Sequence[int] = (),
    share: float = 1.0,
) -> str:
    """`settled`, `max_samples`, `max_seconds`; empty while sampling goes on.

    A visit that ends at `share` of the effort may take that share of samples and time, and settles
    at the width that so many fewer samples of the same spread would have.
    """
    n = len(seconds)
    # an interval of thousands of samples after each of them would take longer than they do
    judged = n < 50 or n % 25 == 0
    wanted = effort.half_width / math.sqrt(share)
    if n >= share * MIN_SAMPLES and judged and relative_half_width(seconds, blocks) <= wanted:
        return "settled"
    if n >= share * MAX_SAMPLES:
        return "max_samples"
    if n >= share * MIN_SAMPLES_SLOW and elapsed >= share * effort.max_seconds:
        return "max_seconds"
    return ""


def _last_word(seconds: Sequence[float], blocks: Sequence[int], effort: Effort) -> str:
    is_narrow = relative_half_width(seconds, blocks) <= effort.half_width
    return "settled" if is_narrow else "max_seconds"
