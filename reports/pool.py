"""The records of one case, one a fresh process, as one result."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsa_bench import doubt, stats
from dsa_bench.record import KernelTime, Record, StageTime, Timing
from dsa_bench.stats import Estimate, median

WORST_FIRST = ("wrong", "failed", "timeout", "oom", "interrupted", "skipped", "ok")
UNSTEADY = "unsteady_processes"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pooled:
    """What all replicates of one case come to."""

    first: Record
    """The record that stands for the case: the first `ok` one, or the one that ended worst."""
    replicates: tuple[Record, ...]
    """In the order of their numbers; without those that were interrupted if others ended."""
    reason: str
    flags: tuple[str, ...] = ()
    """Of all replicates, each once, and what their differences add."""

    @property
    def status(self) -> str:
        """`ok` only if every replicate is."""
        return self.first.status

    @property
    def estimate(self) -> Estimate | None:
        """Of the time; None unless every replicate is `ok` and timed."""
        timings = self.timings
        if self.status != "ok" or len(timings) < len(self.replicates):
            return None
        return stats.pooled([t.seconds for t in timings], blocks=[t.blocks for t in timings])

    @property
    def timings(self) -> tuple[Timing, ...]:
        """The timing of each replicate that has samples."""
        return tuple(r.time for r in self.replicates if r.time and r.time.seconds)

    @property
    def stages(self) -> tuple[StageTime, ...]:
        """Stages with the median of their seconds over the replicates."""
        names = [stage.name for stage in self.first.stages]
        # a replicate in which the profiler saw other stages is left out
        alike = [r.stages for r in self.replicates if [s.name for s in r.stages] == names]
        return tuple(
            replace(stage, seconds=median([stages[i].seconds for stages in alike]))
            for i, stage in enumerate(self.first.stages)
        )

    @property
    def kernels(self) -> tuple[KernelTime, ...]:
        """Kernels of the first replicate: which kernels there are may differ between processes."""
        return self.first.kernels

    @property
    def joules_per_call(self) -> float | None:
        """Energy of one call of the whole card, over all replicates; None where none was read."""
        read = [t.telemetry for t in self.timings if t.telemetry]
        joules = [t.energy_joules for t in read if t.energy_joules is not None and t.energy_calls]
        calls = [t.energy_calls for t in read if t.energy_joules is not None]
        return sum(joules) / sum(calls) if joules else None


def pool(records: Sequence[Record]) -> tuple[Pooled, ...]:
    """One result a case, in the order of their first records.

    Of a replicate that ended twice the last ending counts.
    """
    last = {(record.case.key, record.replicate): record for record in records}
    by_case: dict[str, list[Record]] = {}
    for (key, _), record in last.items():
        by_case.setdefault(key, []).append(record)
    return tuple(_pooled(found) for found in by_case.values())


def _pooled(found: Sequence[Record]) -> Pooled:
    ended = [r for r in found if r.status != "interrupted"] or found
    replicates = tuple(sorted(ended, key=lambda r: r.replicate))
    first = min(replicates, key=_badness)
    timings = [r.time for r in replicates if r.time and r.time.seconds]
    flags = [flag for r in replicates for flag in r.flags]
    is_timed = first.status == "ok" and len(timings) > 1
    if is_timed and doubt.unsteady_processes(
        [t.seconds for t in timings], [t.blocks for t in timings]
    ):
        flags.append(UNSTEADY)
    return Pooled(
        first=first,
        replicates=replicates,
        reason=_reason(first, len(replicates)),
        flags=tuple(dict.fromkeys(flags)),
    )


def _badness(record: Record) -> int:
    # a status that a newer version writes is not known to be good
    return WORST_FIRST.index(record.status) if record.status in WORST_FIRST else 0


def _reason(first: Record, num_replicates: int) -> str:
    if first.status == "ok" or num_replicates == 1:
        return first.reason
    return f"replicate {first.replicate}: {first.reason or first.status}"
