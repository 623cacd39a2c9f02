"""Who fails on hostile inputs: what a run's findings come to, by operator and implementation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsa_bench.record import Case
from dsa_bench.reports import units
from dsa_bench.reports.digest import Digest
from dsa_bench.reports.naming import impl_text
from dsa_bench.reports.sheet import Sheet

if TYPE_CHECKING:
    from dsa_bench.finding import Finding

TITLE = "Hostile inputs"
MEANING = (
    "Ties, NaN, empty and turned ranges, indices out of range, odd lengths: every output is held "
    "against the reference. refused: the implementation says that it cannot take this input."
)
VERDICTS = ("ok", "wrong", "raised", "refused")
MARK = "†"
"""Stands behind an implementation that fails."""
NUM_NAMES = 3
"""Inputs that a table names; the page has all of them."""
NUM_FAILING = 5
"""Implementations that a sentence names."""
REASON_LENGTH = 120
"""Characters of a reason in a table."""
DETAIL_LENGTH = 400
"""Characters of a reason behind a fold of the page."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What one implementation of one run did."""

    run: int
    op: str
    impl: str
    findings: "tuple[Finding, ...]"

    def count(self, verdict: str) -> int:
        return sum(finding.verdict == verdict for finding in self.findings)

    @property
    def failures(self) -> "tuple[Finding, ...]":
        return tuple(finding for finding in self.findings if finding.is_bad)

    @property
    def name(self) -> str:
        return units.clean(f"{self.op} {impl_text(self.impl)}")

    @property
    def share(self) -> str:
        return f"{len(self.failures)} of {len(self.findings)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Detail:
    """Every failed input of one implementation, behind a fold."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What a report says of one operator."""

    sheet: Sheet
    details: tuple[Detail, ...]


def standings(report: Digest) -> tuple[Standing, ...]:
    """Every implementation that was examined; of an operator those that fail most come first."""
    grouped: dict[tuple[str, int, str], list[Finding]] = {}
    for run, findings in enumerate(report.findings):
        for finding in findings:
            grouped.setdefault((finding.op, run, finding.impl), []).append(finding)
    found = [
        Standing(run=run, op=op, impl=impl, findings=tuple(findings))
        for (op, run, impl), findings in grouped.items()
    ]
    return tuple(sorted(found, key=lambda s: (s.op, s.run, -len(s.failures), s.impl)))


def flaws(report: Digest) -> dict[tuple[int, str], str]:
    """(run, key of a case) -> `fails 4 of 22 hostile inputs`; of a composition with the stage."""
    bad = {(s.run, s.op, s.impl): s for s in standings(report) if s.failures}
    found = {}
    for run, read in enumerate(report.runs):
        for record in read.records if bad else ():
            if text := _flaw(run, record.case, bad):
                found[run, record.case.key] = text
    return found


def _flaw(run: int, case: Case, bad: Mapping[tuple[int, str, str], Standing]) -> str:
    failing = [bad[run, *pair] for pair in _pairs(case) if (run, *pair) in bad]
    is_whole = isinstance(case.impl, str)
    named = [f"{'' if is_whole else f'{s.name} '}fails {s.share}" for s in failing]
    return f"{' and '.join(named)} hostile inputs" if named else ""


def _pairs(case: Case) -> tuple[tuple[str, str], ...]:
    """(operator, implementation) of a case; of a composition those of its stages."""
    return ((case.op, case.impl),) if isinstance(case.impl, str) else tuple(case.impl.items())


def sentences(report: Digest) -> list[str]:
    """For each run with findings who failed, and who was left out; with the run's name of many."""
    found = standings(report)
    lines = []
    for run, label in enumerate(report.labels):
        here = [standing for standing in found if standing.run == run]
        if here:
            place = f"{label}, " if len(report.runs) > 1 else ""
            lines.append(f"{place}{_sentence(here)}{_left_out(report, run, here)}.")
    return lines


def _sentence(found: list[Standing]) -> str:
    failing = [standing for standing in found if standing.failures]
    if not failing:
        return f"hostile inputs: {_none_fails(len(found))}"
    named = [f"{s.name} fails {s.share}" for s in failing[:NUM_FAILING]]
    if len(failing) > NUM_FAILING:
        named.append(f"{len(failing) - NUM_FAILING} more fail")
    rest = len(found) - len(failing)
    others = {0: "", 1: "; the other fails none"}.get(rest, f"; none of {rest} others fails")
    return f"hostile inputs: {', '.join(named)}{others}"


def _none_fails(count: int) -> str:
    return (
        f"none of {count} implementations fails"
        if count > 1
        else "the one implementation fails none"
    )


def _left_out(report: Digest, run: int, found: list[Standing]) -> str:
    """Implementations that were ok in a case of the run, and were not examined."""
    ended = [record.case for record in report.runs[run].records if record.status == "ok"]
    pairs = {pair for case in ended for pair in _pairs(case)}
    left = sorted(pairs - {(standing.op, standing.impl) for standing in found})
    names = ", ".join(units.clean(f"{op} {impl}") for op, impl in left[:NUM_FAILING])
    more = f" and {len(left) - NUM_FAILING} more" if len(left) > NUM_FAILING else ""
    return f"; not examined: {names}{more}" if left else ""


def parts(report: Digest) -> list[Part]:
    """One table an operator, and behind it all that failed; empty where no run has findings."""
    found = standings(report)
    return [
        _part(op, [standing for standing in found if standing.op == op], report)
        for op in dict.fromkeys(standing.op for standing in found)
    ]


def _part(op: str, found: list[Standing], report: Digest) -> Part:
    names = ("machine",) if len({s.run for s in found}) > 1 else ()
    sheet = Sheet(
        title=units.clean(op),
        head=(*names, "implementation", "inputs", *VERDICTS, "fails on", "first reason"),
        rows=tuple(_row(standing, report if names else None) for standing in found),
        notes=tuple(_short(found)),
        num_names=len(names) + 1,
        num_remarks=2,
    )
    details = tuple(_detail(standing) for standing in found if standing.failures)
    return Part(sheet=sheet, details=details)


def _row(standing: Standing, report: Digest | None) -> tuple[str, ...]:
    names = (report.labels[standing.run],) if report else ()
    mark = MARK if standing.failures else ""
    return (
        *names,
        f"{units.clean(impl_text(standing.impl))}{mark}",
        *(str(len(standing.findings)), *(str(standing.count(verdict)) for verdict in VERDICTS)),
        *_remarks(standing.failures),
    )


def _remarks(failures: "tuple[Finding, ...]") -> tuple[str, str]:
    """The first failed inputs, and why the first of them failed."""
    if not failures:
        return units.MISSING, units.MISSING
    named = "; ".join(units.clean(finding.name) for finding in failures[:NUM_NAMES])
    more = f"; and {len(failures) - NUM_NAMES} more" if len(failures) > NUM_NAMES else ""
    return f"{named}{more}", units.shorten(units.clean(failures[0].reason), REASON_LENGTH)


def _short(found: list[Standing]) -> list[str]:
    """Who met fewer inputs than the others did: a process that hangs is not asked again."""
    most = max(len(standing.findings) for standing in found)
    return [
        f"{units.clean(standing.impl)} met {len(standing.findings)} of {most} inputs: its process"
        " did not go on"
        for standing in found
        if len(standing.findings) < most
    ]


def _detail(standing: Standing) -> Detail:
    return Detail(
        title=f"{standing.name} fails {standing.share}",
        lines=tuple(
            units.shorten(units.clean(f"{f.name}: {f.verdict}: {f.reason}"), DETAIL_LENGTH)
            for f in standing.failures
        ),
    )
