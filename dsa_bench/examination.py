"""Which implementations meet the hostile inputs: those of a selection, or those of a run.

They are examined one after the other, and the findings on each are kept before the next begins: who
stops this, or kills it, loses those on one implementation.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from dsa_bench import conformance, registry
from dsa_bench.finding import Finding
from dsa_bench.job import Job
from dsa_bench.record import Case
from dsa_bench.store import Run, save_findings

Pair = tuple[str, str]
"""(operator, implementation)."""


def selected(job: Job, *, everything: bool) -> tuple[Pair, ...]:
    """Implementations of the files in use, and with `everything` those of all planned cases."""
    brought = [(op, impl) for op, names in registry.brought_by_files().items() for impl in names]
    planned = [item.case for item in job.planned if isinstance(item.case.impl, str)]
    found = {*brought, *(pair for case in planned if everything for pair in _parts(case))}
    return _known(found)


def of_run(run: Run) -> tuple[Pair, ...]:
    """Every implementation that a case of the run was ok with, of a composition each stage's;
    without those that the run has findings on."""
    ended = {
        pair for record in run.records if record.status == "ok" for pair in _parts(record.case)
    }
    return _known(ended - {(finding.op, finding.impl) for finding in run.findings})


def _parts(case: Case) -> tuple[Pair, ...]:
    if isinstance(case.impl, str):
        return ((case.op, case.impl),)
    return tuple(case.impl.items())


def _known(pairs: set[Pair]) -> tuple[Pair, ...]:
    """Those that there are here: a run of others may name anything."""
    ops = registry.operators()
    return tuple(
        (op, impl)
        for op, impl in sorted(pairs)
        if op in ops and impl in registry.implementations(op)
    )


def examine(
    pairs: Sequence[Pair],
    device: str,
    *,
    folder: Path | None,
    tell: Callable[[Sequence[Finding]], None] = lambda found: None,
) -> tuple[list[Finding], bool]:
    """Findings on each pair, and whether nobody interrupted; a folder keeps them.

    `tell` is given those on one pair once they are kept.
    """
    all_found: list[Finding] = []
    try:
        for op, impl in pairs:
            found = conformance.examine({op: (impl,)}, device)
            if folder is not None:
                save_findings(folder, found)
            all_found += found
            if found:
                tell(found)
    except KeyboardInterrupt:
        return all_found, False
    return all_found, True
