"""Named reasons to doubt a time: the rules, their thresholds, and what to do about each.

The flags of a record are those that only its worker could see and those that follow from its raw
samples. `judge` works the second kind out anew, so that a reader need not believe the writer.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dsa_bench import cost, stats
from dsa_bench.record import Record, Telemetry, Timing

PROTOCOL = 1
"""Number of the way of measuring and judging. Times of two protocols are not compared."""

NOISY_SPREAD = 0.02
VERY_NOISY_SPREAD = 0.10
OUTLIER_SHARE = 0.05
SLOW_CLOCK = 0.95
"""Share of the case's highest SM clock below which its 5th percentile must not lie."""
LAUNCH_BOUND_SHARE = 0.05
SHORT_IN_OVERHEADS = 5.0
SHORT_SECONDS = 5e-6
FLOOR_SHARE = 0.95
HIDDEN_SECONDS = 150e-6
"""Asking an idle device takes the host 20 to 120 µs, the more the longer the call."""
HIDDEN_SHARE = 0.05
FRESH_SHARE = 2.0
FRESH_SECONDS = 20e-6
CPU_FRESH_SHARE = 4.0
"""New inputs are not in the caches of a CPU, the others are."""
CPU_FRESH_SECONDS = 1e-3
KERNELS_SHARE = 1.25
KERNELS_SECONDS = 20e-6
CPU_KERNELS_SHARE = 3.0
"""A profiler makes the many small operators of a CPU look far slower than they are."""
CPU_KERNELS_SECONDS = 1e-3
SLOWDOWN_BITS = 0x08 | 0x20 | 0x40 | 0x80
"""NVML's clocks-event reasons: hardware slowdown, thermal in software and hardware, power brake."""
CUT_SHORT = ("max_samples", "max_seconds")

SEVERITIES = ("noisy", "suspect", "invalid")
"""From mild to grave. A `noisy` time is shown with a mark; the others enter no result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """One reason for doubt."""

    name: str
    severity: str
    """`noisy`: less sure than it looks; `suspect`: perhaps not the time of the call; `invalid`:
    surely not.
    """
    rule: str
    hint: str


FLAGS = {
    flag.name: flag
    for flag in (
        Flag(
            name="noisy_samples",
            severity="noisy",
            rule=f"robust spread of the samples above {NOISY_SPREAD:.0%}",
            hint="stop what else runs on this machine, or use --effort precise",
        ),
        Flag(
            name="very_noisy",
            severity="suspect",
            rule=f"robust spread of the samples above {VERY_NOISY_SPREAD:.0%}",
            hint="find what disturbs the machine (dsa-bench doctor), then measure again",
        ),
        Flag(
            name="drift",
            severity="noisy",
            rule="the last third of the samples is over 1% off the first, with a trend",
            hint="the card warms up or slows down: use --mode sustained, or measure again",
        ),
        Flag(
            name="two_modes",
            severity="noisy",
            rule="the samples lie in two heaps with a gap between",
            hint="two clocks, or inputs of two speeds: look at the samples in the report",
        ),
        Flag(
            name="outliers",
            severity="noisy",
            rule=f"over {OUTLIER_SHARE:.0%} of the samples lie far above the others",
            hint="something interrupts the calls: stop what else runs on this machine",
        ),
        Flag(
            name="not_settled",
            severity="noisy",
            rule="sampling ended by time or count before the interval was narrow enough",
            hint="use --effort precise, or trust the interval rather than the median",
        ),
        Flag(
            name="clock",
            severity="noisy",
            rule="the SM clock fell over 5% below its highest, or heat or power brake slowed it",
            hint="compare in cycles, or lower the power limit and measure again",
        ),
        Flag(
            name="launch_bound",
            severity="suspect",
            rule=f"the GPU waited for the host in over {LAUNCH_BOUND_SHARE:.0%} of the samples",
            hint="the time is that of the launches: use --mode graph",
        ),
        Flag(
            name="no_graph",
            severity="noisy",
            rule="the call could not be captured in a CUDA graph, so its launches are in the time",
            hint="compare it only with times that hold launches too (--mode cold)",
        ),
        Flag(
            name="same_inputs",
            severity="noisy",
            rule="memory held no new inputs or no copy of the output: a kept result would not show",
            hint="take fewer sequences, or a GPU with more memory",
        ),
        Flag(
            name="too_short",
            severity="noisy",
            rule=f"shorter than {SHORT_IN_OVERHEADS:g} times the timer's own time, or than 5 µs "
            "on a GPU",
            hint="the timer is part of the time: use --mode sustained, or a larger case",
        ),
        Flag(
            name="neighbour",
            severity="suspect",
            rule="another process computed on the GPU meanwhile",
            hint="wait until the GPU is free (nvidia-smi), then measure again",
        ),
        Flag(
            name="unsteady_processes",
            severity="noisy",
            rule="fresh processes differ by over 1% and by more than their own intervals explain",
            hint="measure with more --replicates",
        ),
        Flag(
            name="below_floor",
            severity="invalid",
            rule=f"faster than {FLOOR_SHARE:.0%} of the time that its work needs at least here",
            hint="work was left out, or the ceilings are stale: dsa-bench doctor --measure",
        ),
        Flag(
            name="output_differs",
            severity="invalid",
            rule="the output of a timed call is not the one that was checked",
            hint="the implementation is wrong or keeps outputs: run dsa-bench check",
        ),
        Flag(
            name="hidden_work",
            severity="suspect",
            rule="the device was still busy after the end of the timed call",
            hint="the call works on a stream that the timer does not see: join it before returning",
        ),
        Flag(
            name="fresh_slower",
            severity="suspect",
            rule=f"on inputs it had never met the call took over {FRESH_SHARE:g} times as long",
            hint="it may hand out results that it has kept: look at what it does with its inputs",
        ),
        Flag(
            name="lost_worker",
            severity="noisy",
            rule="a process died over this case before it ended well in another",
            hint="read worker.log in the run folder",
        ),
        Flag(
            name="kernels_exceed_call",
            severity="suspect",
            rule="the profiler saw more kernel time than the call took",
            hint="the timer misses work, or kernels overlap: look at dsa-bench profile",
        ),
    )
}

Rule = Callable[[Record, Timing, float, Mapping[str, float]], bool]
"""(record, its timing, its median in seconds, ceilings) -> whether to doubt."""


def judge(record: Record, ceilings: Mapping[str, float]) -> tuple[str, ...]:
    """What the worker saw, then what the samples show in the order of FLAGS, each once.

    `ceilings` has the keys of `ceilings.measure_ceilings`, empty if they weren't measured. Judging
    a judged record gives the same flags.
    """
    shown = []
    if record.time and record.time.seconds:
        middle = stats.median(record.time.seconds)
        shown = [n for n in FLAGS if n in RULES and RULES[n](record, record.time, middle, ceilings)]
    return observed(record) + tuple(shown)


def observed(record: Record) -> tuple[str, ...]:
    """The flags that samples cannot show: the worker's, and names of a newer version."""
    seen = dict.fromkeys(record.flags)
    return tuple(name for name in seen if name not in RULES and name != "unsteady_processes")


def unsteady_processes(
    replicates: Sequence[Sequence[float]], blocks: Sequence[Sequence[int]] = ()
) -> bool:
    """Whether to flag a case so: the samples of each replicate, and the sizes of its visits."""
    cuts = blocks or [()] * len(replicates)
    pairs = zip(replicates, cuts, strict=True)
    return stats.processes_differ([stats.pooled([v], blocks=[b]) for v, b in pairs])


def severity(flags: Iterable[str]) -> str:
    """The gravest of the flags; empty if there are none. An unknown name counts as `noisy`."""
    found = [FLAGS[name].severity if name in FLAGS else "noisy" for name in flags]
    return max(found, key=SEVERITIES.index, default="")


def is_trusted(flags: Iterable[str]) -> bool:
    """Whether a time with these flags may be a best one, or enter a speed-up or a cost."""
    return severity(flags) in ("", "noisy")


def hint(name: str) -> str:
    """What to do about a flag."""
    return FLAGS[name].hint if name in FLAGS else "upgrade dsa-bench"


def rule(name: str) -> str:
    """When a flag is set."""
    return FLAGS[name].rule if name in FLAGS else "not known to this version"


def explain(flags: Iterable[str]) -> str:
    """A line a flag: `name: rule (hint)`."""
    return "\n".join(f"{name}: {rule(name)} ({hint(name)})" for name in flags)


def _noisy(record: Record, timing: Timing, middle: float, ceilings: Mapping[str, float]) -> bool:
    return NOISY_SPREAD < stats.robust_spread(timing.seconds) <= VERY_NOISY_SPREAD


def _clock(record: Record, timing: Timing, middle: float, ceilings: Mapping[str, float]) -> bool:
    read = timing.telemetry or Telemetry()
    clocks = read.sm_clock_mhz
    slow = bool(clocks) and stats.quantile(clocks, 0.05) < SLOW_CLOCK * max(clocks)
    return slow or bool(read.throttle_reasons & SLOWDOWN_BITS)


def _too_short(
    record: Record, timing: Timing, middle: float, ceilings: Mapping[str, float]
) -> bool:
    # the events stand around all the calls of a sample
    between_events = middle * timing.calls_per_sample
    least = SHORT_IN_OVERHEADS * timing.event_overhead_seconds
    if timing.mode != "cpu":
        least = max(least, SHORT_SECONDS)
    return between_events < least


def _below_floor(
    record: Record, timing: Timing, middle: float, ceilings: Mapping[str, float]
) -> bool:
    precision = record.case.precision
    # below the fp8 rate that nobody measured, a floor would not be one
    unmeasured = precision == "fp8" and precision + cost.FLOPS_SUFFIX not in ceilings
    if unmeasured or not {"flops", "bytes_read", "bytes_written"} <= set(record.cost):
        return False
    floor = cost.floor_seconds(record.cost, ceilings, precision, timing.mode)
    return floor is not None and middle < FLOOR_SHARE * floor


def _kernels_exceed_call(
    record: Record, timing: Timing, middle: float, ceilings: Mapping[str, float]
) -> bool:
    kernels = sum(stage.seconds for stage in record.stages)
    if timing.mode == "cpu":
        return kernels > CPU_KERNELS_SHARE * middle + CPU_KERNELS_SECONDS
    # back to back, a call overlaps with the next one
    if timing.mode == "sustained":
        return False
    return kernels > KERNELS_SHARE * middle + KERNELS_SECONDS


def _fresh_slower(
    record: Record, timing: Timing, middle: float, ceilings: Mapping[str, float]
) -> bool:
    # every visit has one such call: noise would have to hit all of them
    fresh = min(timing.fresh_seconds, default=0.0)
    if timing.mode == "cpu":
        return fresh > CPU_FRESH_SHARE * middle + CPU_FRESH_SECONDS
    return fresh > FRESH_SHARE * middle + FRESH_SECONDS


RULES: Mapping[str, Rule] = {
    "noisy_samples": _noisy,
    "very_noisy": lambda r, t, m, c: stats.robust_spread(t.seconds) > VERY_NOISY_SPREAD,
    "drift": lambda r, t, m, c: stats.drifts(t.seconds),
    "two_modes": lambda r, t, m, c: stats.two_modes(t.seconds),
    "outliers": lambda r, t, m, c: stats.outlier_share(t.seconds) > OUTLIER_SHARE,
    "not_settled": lambda r, t, m, c: t.stop in CUT_SHORT,
    "clock": _clock,
    "too_short": _too_short,
    "neighbour": lambda r, t, m, c: t.telemetry is not None and t.telemetry.neighbours > 0,
    "below_floor": _below_floor,
    "hidden_work": lambda r, t, m, c: t.hidden_seconds > max(HIDDEN_SECONDS, HIDDEN_SHARE * m),
    "fresh_slower": _fresh_slower,
    "lost_worker": lambda r, t, m, c: r.lost_workers > 0,
    "kernels_exceed_call": _kernels_exceed_call,
}
"""The flags that raw samples and the rest of a record show."""
