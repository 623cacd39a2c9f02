"""Times one call: CUDA events behind a flush and a spin, or the host clock.

The timers are looked up when this module is loaded, before any implementation is: one that patches
`time.perf_counter` or `torch.cuda.Event` later changes nothing here. That is a cheap defence and no
security boundary.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dsa_bench.operator import Machine
from dsa_bench.stats import median

Call = Callable[[], Any]
Keep = Callable[[Any], None]
Clock = Callable[[], float]

FLUSH_L2_SIZES = 2
SPIN_FACTOR = 2.0
SPIN_MARGIN_SECONDS = 200e-6
SPIN_LIMIT_SECONDS = 20e-3
HARMLESS_WAIT = 0.01
"""Share of a sample by which a wait for the host cannot spoil it."""
OVERHEAD_PAIRS = 100

_elapsed_time: Any = torch.cuda.Event.elapsed_time


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One timed call, or the mean of several that ran back to back."""

    seconds: float
    overtaken: bool = False
    """The GPU may have waited for the host for some time."""
    hidden_seconds: float = 0.0
    """How long the device was still at work when the end of the call had passed."""


class Meter(Protocol):
    """Times one call; `keep` is given what it returned before the device is waited for."""

    @property
    def flush_bytes(self) -> int: ...
    @property
    def event_overhead(self) -> float: ...
    @property
    def spin_seconds(self) -> float: ...
    def sample(self, call: Call, keep: Keep | None = None) -> Sample: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMeter:
    """Host clock around a call that is done when it returns."""

    clock: Clock = time.perf_counter
    flush_bytes: int = 0
    event_overhead: float = 0.0
    spin_seconds: float = 0.0

    def sample(self, call: Call, keep: Keep | None = None) -> Sample:
        begin = self.clock()
        outputs = call()
        seconds = self.clock() - begin
        if keep is not None:
            keep(outputs)
        return Sample(seconds=seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Flush:
    """Empties L2; `num_bytes` are written and then read."""

    run: Callable[[], object]
    num_bytes: int


NO_FLUSH = Flush(run=lambda: None, num_bytes=0)


def l2_flush(machine: Machine) -> Flush:
    """Writes, then reads twice the size of L2: neither inputs nor dirty lines are left in it."""
    words = FLUSH_L2_SIZES * max(machine.l2_bytes, 2**20) // 4
    buffer = torch.zeros(words, dtype=torch.int32, device=machine.device)
    out = torch.zeros((), dtype=torch.int64, device=machine.device)

    def flush() -> None:
        buffer.zero_()
        torch.sum(buffer, dim=0, out=out)

    return Flush(run=flush, num_bytes=4 * words)


class CudaMeter:
    """CUDA events around a call, after a flush of L2 and a spin that lets the host get ahead.

    `cuda` is torch.cuda, or a fake of it. The spin is bounded, so a call that waits for the GPU
    cannot hang. It grows with the time that the host needs to queue the call, and whether it was
    long enough is asked for each sample: when all is queued, the start event must not have passed.
    """

    def __init__(
        self, flush: Flush, *, cuda: Any = torch.cuda, clock: Clock = time.perf_counter
    ) -> None:
        self._flush, self._cuda, self._clock = flush, cuda, clock
        self._elapsed = _elapsed_time if cuda is torch.cuda else None
        self._queueing_seconds = math.inf
        self._spin_factor = SPIN_FACTOR
        self._cycles_per_second = self._measure_spin()
        self.flush_bytes = flush.num_bytes
        self.spin_seconds = 0.0
        self.event_overhead = self._measure_overhead()

    def _seconds(self, start: Any, end: Any) -> float:
        elapsed = start.elapsed_time(end) if self._elapsed is None else self._elapsed(start, end)
        return float(elapsed) / 1000

    def _events(self) -> tuple[Any, Any]:
        return self._cuda.Event(enable_timing=True), self._cuda.Event(enable_timing=True)

    def _measure_spin(self) -> float:
        cycles = 1_000_000
        self._cuda._sleep(cycles)
        start, end = self._events()
        start.record()
        self._cuda._sleep(cycles)
        end.record()
        self._cuda.synchronize()
        return cycles / self._seconds(start, end)

    def _measure_overhead(self) -> float:
        """What two events with nothing between them show."""
        self._cuda._sleep(int(SPIN_LIMIT_SECONDS / 4 * self._cycles_per_second))
        pairs = [self._events() for _ in range(OVERHEAD_PAIRS)]
        for start, end in pairs:
            start.record()
            end.record()
        self._cuda.synchronize()
        return median([self._seconds(start, end) for start, end in pairs])

    def sample(self, call: Call, keep: Keep | None = None) -> Sample:
        start, end = self._events()
        self._flush.run()
        spin = self._spin_factor * self._queueing_seconds + SPIN_MARGIN_SECONDS
        self.spin_seconds = min(spin, SPIN_LIMIT_SECONDS)
        self._cuda._sleep(int(self.spin_seconds * self._cycles_per_second))
        queued = self._clock()
        start.record()
        outputs = call()
        end.record()
        overtaken = bool(start.query())
        queueing = self._clock() - queued
        # the least of all calls: the first ones compile, and some wait for the operating system
        self._queueing_seconds = min(self._queueing_seconds, queueing)
        if overtaken:
            self._spin_factor = 2 * SPIN_FACTOR
        if keep is not None:
            # queued behind the call, so it sees what a user of this stream would see
            keep(outputs)
        del outputs
        end.synchronize()
        ended = self._clock()
        self._cuda.synchronize()
        hidden = 0.0 if keep is not None else self._clock() - ended
        seconds = self._seconds(start, end)
        # the GPU can have waited no longer than the host took
        matters = queueing > HARMLESS_WAIT * seconds
        return Sample(
            seconds=seconds, overtaken=overtaken and matters, hidden_seconds=max(0.0, hidden)
        )


class SustainedMeter:
    """Rounds of calls back to back, with the next batch of rounds always queued.

    A call of `sample` is one round: `calls_per_round` calls, one on each input set. Nothing is
    flushed and nobody waits, so that power and clock come to rest where a service would hold them.
    A sample is the mean time of the calls of one batch.
    """

    flush_bytes = 0
    spin_seconds = 0.0

    def __init__(
        self, *, rounds: int, calls_per_round: int, overhead: float = 0.0, cuda: Any = torch.cuda
    ) -> None:
        self._cuda, self._rounds = cuda, rounds
        self._elapsed = _elapsed_time if cuda is torch.cuda else None
        self._marks: list[Any] = []
        self.calls_per_sample = rounds * calls_per_round
        self.event_overhead = overhead

    def sample(self, call: Call, keep: Keep | None = None) -> Sample:
        if not self._marks:
            self._mark()
            self._batch(call)
        outputs = self._batch(call)
        # two batches were queued ahead: had the GPU begun this one too, it would have run dry
        is_dry = bool(self._marks[-2].query())
        if keep is not None:
            keep(outputs)
        begin, end, *_ = self._marks
        end.synchronize()
        del self._marks[0]
        elapsed = begin.elapsed_time(end) if self._elapsed is None else self._elapsed(begin, end)
        return Sample(seconds=float(elapsed) / 1000 / self.calls_per_sample, overtaken=is_dry)

    def _mark(self) -> None:
        mark = self._cuda.Event(enable_timing=True)
        mark.record()
        self._marks.append(mark)

    def _batch(self, call: Call) -> Any:
        outputs = None
        for _ in range(self._rounds):
            outputs = call()
        self._mark()
        return outputs

    def pause(self) -> None:
        """Others will run: what follows does not join on to what is queued."""
        self._cuda.synchronize()
        self._marks.clear()
