"""What changed from one run to another: a verdict for each case that both have.

Ratios are NEW ÷ BASE of medians over all replicates, so above 1 is slower. `slower` and `faster`
say that the true ratio is farther from 1 than the threshold; of all cases so called, 5 % at most
are expected to be called wrongly (Benjamini and Hochberg). `same` says that it is nearer: its 90 %
interval lies within the threshold. `broken` was ok in BASE and is not right in NEW.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from dsa_bench import doubt
from dsa_bench.operator import UsageError
from dsa_bench.record import Case
from dsa_bench.reports import ratio
from dsa_bench.reports.pool import Pooled, pool
from dsa_bench.reports.ratio import Ratio
from dsa_bench.reports.units import clean, shorten
from dsa_bench.stats import median

if TYPE_CHECKING:
    from dsa_bench.reports.frame import Run

DEFAULT_THRESHOLD = 0.02
FALSE_DISCOVERY_RATE = 0.05
SAME_P = 0.05
VERDICTS = ("broken", "slower", "faster", "inconclusive", "same")
"""In the order in which they are shown."""
REGRESSIONS = frozenset({"broken", "slower"})
BROKEN_STATUSES = frozenset({"wrong", "failed", "timeout", "oom"})
ALLOWED = ("machine", "protocol")
"""Differences that make times no comparison, unless they are allowed by name."""
MACHINE_KEYS = ("device", "name", "num_sms")
"""`num_sms` tells a slice of a GPU from the whole."""
MAX_NAMED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One case in one run."""

    seconds: float
    replicates: int
    clock_mhz: float | None
    """Median of the SM clock while it was timed; None where nobody read it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A case with a verdict; `broken` ones have no ratio."""

    case: Case
    verdict: str
    note: str = ""
    base: Side | None = None
    new: Side | None = None
    ratio: Ratio | None = None
    cycle_ratio: float | None = None
    """NEW ÷ BASE of seconds · SM clock."""
    p_unchanged: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """A case without a verdict, and why."""

    case: Case
    kind: str
    """`only in BASE`, `only in NEW`, `status`, `suspect`, `mode`, `no time`."""
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two runs side by side."""

    base: Mapping[str, str]
    """`path`, `machine` and `started`."""
    new: Mapping[str, str]
    threshold: float
    caveats: tuple[str, ...]
    """Differences between the runs that were allowed, or that may explain a ratio."""
    rows: tuple[Row, ...]
    """Regressions first, the largest change of each verdict before the smaller ones."""
    left_out: tuple[LeftOut, ...]

    @property
    def geometric_mean(self) -> float | None:
        """Of the ratios of all rows that have one."""
        logs = [row.ratio.log for row in self.rows if row.ratio]
        return ratio.exp(math.fsum(logs) / len(logs)) if logs else None

    @property
    def counts(self) -> dict[str, int]:
        """Verdict -> number of cases."""
        found = Counter(row.verdict for row in self.rows)
        return {verdict: found[verdict] for verdict in VERDICTS}

    @property
    def has_regression(self) -> bool:
        return any(row.verdict in REGRESSIONS for row in self.rows)


def compare(
    base: "Run",
    new: "Run",
    *,
    threshold: float = DEFAULT_THRESHOLD,
    allowed: Collection[str] = (),
) -> Comparison:
    """UsageError where the two are no comparison: another machine, protocol, or no case in common.

    `allowed` names those of ALLOWED that are compared all the same; a caveat then says so.
    """
    for run in (base, new):
        if not run.records:
            raise UsageError(f"{run.path} has no records (run a sweep, or finish it with --resume)")
    lifted = _refuse(base, new, allowed)
    olds = {each.first.case.key: each for each in pool(base.records)}
    news = {each.first.case.key: each for each in pool(new.records)}
    common = [key for key in olds if key in news]
    if not common:
        raise UsageError(_nothing_in_common(olds.values(), news.values()))
    judged = [_judge(olds[key], news[key]) for key in common]
    rows = _with_verdicts([each for each in judged if isinstance(each, Row)], threshold)
    return Comparison(
        base=_description(base),
        new=_description(new),
        threshold=threshold,
        caveats=(*lifted, *_warnings(base.header, new.header)),
        rows=tuple(sorted(rows, key=_place)),
        left_out=(
            *(each for each in judged if isinstance(each, LeftOut)),
            *_missing(olds, news, "only in BASE"),
            *_missing(news, olds, "only in NEW"),
        ),
    )


def _refuse(base: "Run", new: "Run", allowed: Collection[str]) -> tuple[str, ...]:
    """Sentences on differences that are allowed; UsageError with those that are not."""
    found: dict[str, str] = {}
    machines = [_machine(run.header) for run in (base, new)]
    if machines[0] != machines[1]:
        found["machine"] = f"the machines differ: {_pair(*machines)}"
    protocols = [clean(str(run.header.get("protocol", 0))) for run in (base, new)]
    if protocols[0] != protocols[1]:
        found["protocol"] = f"the timing protocols differ: {_pair(*protocols)}"
    refused = [name for name in found if name not in allowed]
    if refused:
        why = " and ".join(found[name] for name in refused)
        names = ",".join([*(name for name in found if name in allowed), *refused])
        raise UsageError(f"{why} (run the same sweep again, or add --allow {names})")
    return tuple(f"allowed, though {sentence}" for sentence in found.values())


def _machine(header: Mapping[str, Any]) -> str:
    facts = [_part(header, "machine").get(key) for key in MACHINE_KEYS]
    device, name, num_sms = (None if fact is None else clean(str(fact)) for fact in facts)
    sms = f", {num_sms} SMs" if num_sms and device == "cuda" else ""
    return f"{name or 'unknown'} ({device or 'unknown'}{sms})"


def _warnings(base: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, ...]:
    """Differences that may explain a ratio."""
    watched = (
        ("driver", "machine", "driver"),
        ("CUDA version", "versions", "cuda"),
        ("torch version", "versions", "torch"),
        ("triton version", "versions", "triton"),
        ("power limit in W", "machine", "power_limit_w"),
        ("--effort", "options", "effort"),
    )
    found = []
    for title, part, key in watched:
        values = [clean(str(_part(header, part).get(key, "unknown"))) for header in (base, new)]
        if values[0] != values[1]:
            found.append(f"{title} differs: {_pair(*values)}")
    return tuple(found)


def _part(header: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = header.get(name)
    return found if isinstance(found, Mapping) else {}


def _pair(base: str, new: str) -> str:
    return f"{shorten(base)} in BASE, {shorten(new)} in NEW"


def _description(run: "Run") -> dict[str, str]:
    started = clean(str(run.header.get("started") or "unknown"))
    return {"path": str(run.path), "machine": _machine(run.header), "started": started}


def _nothing_in_common(base: Collection[Pooled], new: Collection[Pooled]) -> str:
    """The axes on which the two share no value."""
    apart = []
    for name in (field.name for field in fields(Case)):
        old, late = (_values(side, name) for side in (base, new))
        if not set(old) & set(late):
            apart.append(f"{name} is {_some(old)} in BASE and {_some(late)} in NEW")
    why = "; ".join(apart) or "their axes cross at no point"
    return f"no case is in both runs: {why} (run the same selection twice)"


def _values(side: Collection[Pooled], name: str) -> list[str]:
    """All values of one axis, each once."""
    name = "impl_label" if name == "impl" else name
    texts = [clean(str(getattr(each.first.case, name))) for each in side]
    return list(dict.fromkeys(texts))


def _some(values: Sequence[str]) -> str:
    rest = ["…"] if len(values) > MAX_NAMED else []
    return ", ".join([*(shorten(value) for value in values[:MAX_NAMED]), *rest])


def _missing(have: Mapping[str, Pooled], lack: Mapping[str, Pooled], kind: str) -> list[LeftOut]:
    return [
        LeftOut(case=each.first.case, kind=kind, reason=f"{kind} ({each.status})")
        for key, each in have.items()
        if key not in lack
    ]


def _judge(base: Pooled, new: Pooled) -> Row | LeftOut:
    """A row with its ratio but without its verdict, for which the other cases count too."""
    case = base.first.case
    if base.status == "ok" and new.status in BROKEN_STATUSES:
        reason = f": {new.reason}" if new.reason else ""
        return Row(case=case, verdict="broken", note=clean(f"ok → {new.status}{reason}"))
    if (base.status, new.status) != ("ok", "ok"):
        return LeftOut(case=case, kind="status", reason=clean(f"{base.status} → {new.status}"))
    suspect = [
        f"{name} is suspect: {', '.join(side.flags)}"
        for name, side in (("BASE", base), ("NEW", new))
        if not doubt.is_trusted(side.flags)
    ]
    if suspect:
        return LeftOut(case=case, kind="suspect", reason=clean("; ".join(suspect)))
    modes = [" and ".join(sorted({t.mode for t in side.timings})) for side in (base, new)]
    if modes[0] != modes[1]:
        reason = clean(f"timed {modes[0]} → {modes[1]}")
        return LeftOut(case=case, kind="mode", reason=reason)
    return _timed_row(base, new)


def _timed_row(base: Pooled, new: Pooled) -> Row | LeftOut:
    case = base.first.case
    before, after = base.estimate, new.estimate
    if before is None or after is None or min(before.middle, after.middle) <= 0:
        return LeftOut(case=case, kind="no time", reason="no time above 0 on both sides")
    found = ratio.ratio(before, after)
    old, late = (
        Side(seconds=estimate.middle, replicates=len(side.replicates), clock_mhz=_clock_mhz(side))
        for side, estimate in ((base, before), (new, after))
    )
    clocks = (old.clock_mhz or 0.0, late.clock_mhz or 0.0)
    return Row(
        case=case,
        verdict="",
        base=old,
        new=late,
        ratio=found,
        cycle_ratio=found.middle * clocks[1] / clocks[0] if all(clocks) else None,
    )


def _clock_mhz(pooled: Pooled) -> float | None:
    """Median over the processes of the median SM clock of each."""
    read = [t.telemetry.sm_clock_mhz for t in pooled.timings if t.telemetry]
    clocks = [median(series) for series in read if series]
    return median(clocks) if clocks else None


def _with_verdicts(rows: Sequence[Row], threshold: float) -> list[Row]:
    """Verdicts of all rows that have a ratio, taken together."""
    timed = [(row, row.ratio) for row in rows if row.ratio]
    p_values = [ratio.p_unchanged(found, threshold) for _, found in timed]
    marked = ratio.discoveries(p_values, FALSE_DISCOVERY_RATE)
    judged = [
        replace(
            row,
            verdict=_verdict(found, is_change, threshold),
            p_unchanged=p,
            note=_cycle_note(found, row.cycle_ratio, threshold),
        )
        for (row, found), is_change, p in zip(timed, marked, p_values, strict=True)
    ]
    return [row for row in rows if not row.ratio] + judged


def _verdict(found: Ratio, is_change: bool, threshold: float) -> str:
    if is_change:
        return "slower" if found.log > 0 else "faster"
    return "same" if ratio.p_changed(found, threshold) <= SAME_P else "inconclusive"


def _cycle_note(found: Ratio, cycle_ratio: float | None, threshold: float) -> str:
    """Says where a ratio disappears in cycles, so that it is perhaps that of the clocks."""
    edge = math.log1p(threshold)
    if not cycle_ratio or abs(found.log) <= edge or abs(math.log(cycle_ratio)) > edge:
        return ""
    return f"in cycles {cycle_ratio:.3f}: the SM clocks differ as much"


def _place(row: Row) -> tuple[int, float]:
    distance = abs(row.ratio.log) if row.ratio else math.inf
    return VERDICTS.index(row.verdict), -distance
