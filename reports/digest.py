"""Everything that a report shows, worked out once from the runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from dsa_bench import doubt
from dsa_bench.doubt import SEVERITIES
from dsa_bench.record import STATUSES
from dsa_bench.reports import crossover, frame, metrics, spent, switch

if TYPE_CHECKING:
    from dsa_bench.finding import Finding


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
    switches: tuple[crossover.Crossover, ...]
    """Where the sparse layer's MQA form meets its masked form."""
    headlines: tuple[str, ...]
    """A sentence or a few for each run."""
    time_spent: tuple[str, ...]
    """For each run where its wall time went; empty where that was not recorded."""
    findings: "tuple[tuple[Finding, ...], ...]"
    """For each run what its implementations did on hostile inputs."""

    @property
    def status_counts(self) -> dict[str, int]:
        """How many cases ended how, in the order of record.STATUSES, then any other."""
        counts = self.cases["status"].value_counts()
        names = [*STATUSES, *sorted(set(counts.index) - set(STATUSES))]
        return {name: int(counts[name]) for name in names if name in counts}

    @property
    def health(self) -> dict[str, int]:
        """How many cases are ok, noisy, suspect, invalid, or ended otherwise.

        `ok` counts the cases whose time carries no doubt, so that the numbers add up to all cases.
        """
        doubts = self.cases["doubt"].value_counts()
        found = {name: int(doubts[name]) for name in SEVERITIES if name in doubts}
        counts = self.status_counts
        if "ok" in counts:
            found = {"ok": counts.pop("ok") - sum(found.values())} | found
        return {name: count for name, count in (found | counts).items() if count}


def flags_of(cases: pd.DataFrame) -> dict[str, str]:
    """Each flag of these cases -> how much doubt it alone is, the worst first."""
    found = dict.fromkeys(flag for row in frame.rows(cases) for flag in frame.flags_of(row))
    judged = {flag: doubt.severity((flag,)) for flag in found}
    return dict(sorted(judged.items(), key=lambda item: -_rank(item[1])))


def _rank(severity: str) -> int:
    return SEVERITIES.index(severity) if severity in SEVERITIES else -1


def digest(runs: Sequence[frame.Run]) -> Digest:
    """Work out tables, crossovers and headlines of these runs."""
    table = metrics.cases(runs)
    found, forms = crossover.crossovers(table), switch.switches(table)
    labels = tuple(frame.run_labels(runs))
    return Digest(
        runs=tuple(runs),
        labels=labels,
        cases=table,
        stages=metrics.stages(runs, table),
        kernels=frame.kernels(runs),
        crossovers=found,
        switches=forms,
        headlines=tuple(
            f"{crossover.headline(table, found, label)} {switch.sentence(forms, label)}".strip()
            for label in labels
        ),
        time_spent=tuple(spent.sentence(run) for run in runs),
        # a run that was made up for a report need not know of them
        findings=tuple(tuple(run.findings) for run in runs),
    )
