"""Everything that a report shows, worked out once from the runs."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from dsa_bench.record import STATUSES
from dsa_bench.reports import crossover, frame, metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Digest:
    """The tables of some runs with their derived columns, and what they come to."""

    runs: tuple[frame.Run, ...]
    labels: tuple[str, ...]
    """A name for each run that tells it from the others."""
    cases: pd.DataFrame
    stages: pd.DataFrame
    kernels: pd.DataFrame
    crossovers: tuple[crossover.Crossover, ...]
    headlines: tuple[str, ...]
    """One sentence for each run."""

    @property
    def status_counts(self) -> dict[str, int]:
        """How many cases ended how, in the order of record.STATUSES, then any other."""
        counts = self.cases["status"].value_counts()
        names = [*STATUSES, *sorted(set(counts.index) - set(STATUSES))]
        return {name: int(counts[name]) for name in names if name in counts}

    @property
    def num_flagged(self) -> int:
        """Cases with a time that carries a reason for doubt."""
        return int(((self.cases["flags"] != "") & (self.cases["status"] == "ok")).sum())


def digest(runs: Sequence[frame.Run]) -> Digest:
    """Work out tables, crossovers and headlines of these runs."""
    table = metrics.cases(runs)
    found = crossover.crossovers(table)
    labels = tuple(frame.run_labels(runs))
    return Digest(
        runs=tuple(runs),
        labels=labels,
        cases=table,
        stages=metrics.stages(runs, table),
        kernels=frame.kernels(runs),
        crossovers=found,
        headlines=tuple(crossover.headline(table, found, label) for label in labels),
    )
