"""Where the wall time of a run went."""

from collections import defaultdict
from datetime import datetime

from dsa_bench.reports.frame import Run
from dsa_bench.reports.units import clean, format_share

PHASE_WORDS = {
    "build": "building",
    "gate": "checks",
    "measure": "measuring",
    "recheck": "checks",
    "memory": "memory",
    "trace": "profiling",
}
"""How a phase of a case is called in a sentence."""


def seconds_by_work(run: Run) -> dict[str, float]:
    """Host seconds of all records of a run by kind of work, the largest first."""
    total: dict[str, float] = defaultdict(float)
    for record in run.records:
        for phase, seconds in record.phases.items():
            total[PHASE_WORDS.get(phase, clean(phase))] += float(seconds)
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def wall_seconds(run: Run) -> float | None:
    """From the start of the run to the end of its last record; None where that is not known."""
    ended = max((record.ended for record in run.records), default=0.0)
    try:
        started = datetime.fromisoformat(str(run.header.get("started"))).timestamp()
    except ValueError:
        return None
    return ended - started if ended > started else None


def sentence(run: Run) -> str:
    """`wall 127 s: 61 % measuring, 22 % checks, 17 % outside of cases`; empty where not recorded.

    What runs at the same time on several devices can come to more than the wall time; then the
    shares are of the sum.
    """
    work = seconds_by_work(run)
    inside, wall = sum(work.values()), wall_seconds(run)
    if not inside:
        return ""
    whole = wall if wall is not None and wall >= inside else inside
    shares = [f"{format_share(s / whole)} {name}" for name, s in work.items() if s > 0.005 * whole]
    if whole > inside:
        shares.append(f"{format_share((whole - inside) / whole)} outside of cases")
    label = f"wall {wall:.0f} s" if wall is not None else f"in cases {inside:.0f} s"
    return f"{label}: {', '.join(shares)}"
