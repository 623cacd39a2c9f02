"""Does a run folder agree with itself? Lines, plan, verdicts, sums, flags, figures and reports.

Whoever gets a run folder can ask this without a GPU. It finds what was damaged, cut or edited in
one place; it is no proof against someone who rewrites all of it.
"""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsa_bench import doubt
from dsa_bench.record import CHECKSUM, MAX_KERNELS, Case, Record
from dsa_bench.reports import frame, metrics, recompute, tables
from dsa_bench.reports.digest import Digest, digest
from dsa_bench.store import Line, Run
from dsa_bench.untrusted import parse, shown

TOLERANCE = 1e-6
"""Relative; a CSV keeps nine figures."""
SUM_TOLERANCE = 1e-3
# what older versions worked out in another way
SINCE_PROTOCOL = frozenset(
    {"seconds_low", "seconds_high", "floor_seconds", "floor_share", "flags", "doubt"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What a run folder holds, as it was read."""

    path: Path
    header: Mapping[str, Any]
    lines: Sequence[Line]
    torn: bool = False
    csv_text: str | None = None
    """Of report.csv; None: there is none."""
    markdown: str | None = None
    """Of report.md."""
    num_findings: int | None = None
    """Lines of findings.jsonl; None: there is none."""
    findings_fault: str = ""
    """Why findings.jsonl can't be read."""

    @property
    def protocol(self) -> int:
        """Of the measurement; 0: from before it had a number."""
        return int(self.header.get("protocol", 0))

    @property
    def records(self) -> tuple[Record, ...]:
        """The newest record of each case and replicate among the lines that can be read."""
        read = [line.record for line in self.lines if line.record is not None]
        return tuple({(r.case.key, r.replicate): r for r in read}.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One question to the folder."""

    name: str
    count: int
    """How many things were looked at."""
    findings: tuple[str, ...] = ()
    """What does not agree, a sentence each."""
    notes: tuple[str, ...] = field(default=())
    """What was not checked, and why."""

    @property
    def verdict(self) -> str:
        """`agrees`, `differs`, or `nothing to check`."""
        if self.findings:
            return "differs"
        return "agrees" if self.count else "nothing to check"


def verify(contents: Contents) -> tuple[Check, ...]:
    """Every check of one folder."""
    records = contents.records
    expected = recompute.figures(records, contents.header)
    report = digest([Run(path=contents.path, header=contents.header, records=records)])
    return (
        _lines(contents),
        _plan(contents),
        Check(name="verdicts", count=len(records), findings=_all(_verdict, records, contents)),
        Check(name="sums", count=len(records), findings=_all(_sums, records, contents)),
        _flags(contents),
        _figures(report, records, expected),
        _csv(contents, report, expected),
        _markdown(contents, expected),
        *_findings(contents),
    )


def _all(check: Any, records: Sequence[Record], contents: Contents) -> tuple[str, ...]:
    return tuple(f"{_name(r)}: {text}" for r in records for text in check(r, contents))


def _name(record: Record) -> str:
    case = record.case
    k = f" k={case.topk}" if case.topk else ""
    again = f" replicate {record.replicate}" if record.replicate else ""
    return f"{case.op} {case.impl_label} {case.phase} L={case.seq_len_kv}{k} ({case.key}){again}"


def _lines(contents: Contents) -> Check:
    """Each line can be read, is as it was written, and bears the key of its case."""
    findings, unsealed = [], []
    for line in contents.lines:
        place = f"records.jsonl:{line.number}"
        if line.record is None:
            findings.append(f"{place}: {line.fault}")
            continue
        data = parse(line.data)
        key = line.record.case.key
        if data.get("key") != key:
            findings.append(f"{place}: its key is {shown(data.get('key'))}, its case has {key}")
        if CHECKSUM not in data:
            unsealed.append(line.number)
    notes = []
    if unsealed and contents.protocol:
        findings += [f"records.jsonl:{n}: has no {CHECKSUM}, it was rewritten" for n in unsealed]
    elif unsealed:
        notes.append(f"{len(unsealed)} lines of an older version have no {CHECKSUM}")
    if contents.torn:
        findings.append("records.jsonl: the last line is cut off (dsa-bench run --resume)")
    return Check(name="lines", count=len(contents.lines), findings=tuple(findings),
                 notes=tuple(notes))  # fmt: skip


def _plan(contents: Contents) -> Check:
    """Every planned case has an ending in each replicate, and nothing else has one."""
    plan = contents.header.get("plan")
    if plan is None:
        return Check(name="plan", count=0, notes=("run.json has no plan",))
    replicates = int((contents.header.get("options") or {}).get("replicates", 1))
    endings = {(r.case.key, r.replicate): r for r in contents.records}
    findings, planned = [], set()
    for item in plan:
        case = Case.from_json(item["case"])
        planned.add(case.key)
        for n in range(replicates):
            record = endings.get((case.key, n))
            first = endings.get((case.key, 0))
            # what is skipped is skipped once for all replicates
            if record is None and not (first and first.status == "skipped"):
                missing = Record(case=case, status="interrupted", replicate=n)
                findings.append(f"{_name(missing)}: was planned, and has no record")
            elif record is not None and record.status == "interrupted":
                findings.append(f"{_name(record)}: was interrupted (dsa-bench run --resume)")
    for (key, n), record in endings.items():
        if key not in planned:
            findings.append(f"{_name(record)}: has a record, and was not planned")
        elif n >= replicates:
            findings.append(f"{_name(record)}: only {replicates} replicates were planned")
    return Check(name="plan", count=len(plan) * replicates, findings=tuple(findings))


def _verdict(record: Record, contents: Contents) -> Iterator[str]:
    """`ok` means that all checks passed, and that there is a time where one was asked for."""
    if record.status != "ok":
        return
    is_timed = record.time is not None and bool(record.time.seconds)
    if contents.header.get("verb", "run") == "run" and not is_timed:
        yield "is ok and has no time"
    checks = record.gate.get("checks", [])
    if not checks and contents.protocol:
        yield "is ok, and no check of its output is recorded"
    for check in checks:
        name = shown(check.get("name"))
        if check.get("passed") is not True:
            yield f"is ok, and its check {name} did not pass"
        limits = check.get("limits", {})
        for figure, value in check.get("figures", {}).items():
            limit = limits.get(figure)
            if limit is not None and not (value is not None and value <= limit):
                yield f"is ok, and {figure} of its check {name} is {value}, limit {limit}"


def _sums(record: Record, contents: Contents) -> Iterator[str]:
    """Parts add up: stages to the cost, kernels to their stage, memory to its peak."""
    for name in ("flops", "bytes_read", "bytes_written"):
        total = sum(getattr(stage, name) for stage in record.stages)
        if record.stages and name in record.cost and not _near(total, record.cost[name]):
            yield f"the {name} of its stages are {total:g}, of its call {record.cost[name]:g}"
    for stage in record.stages:
        kernels = [k.seconds for k in record.kernels if k.stage == stage.name]
        # a record keeps the longest kernels alone: of many there may be a rest
        has_rest = len(record.kernels) >= MAX_KERNELS and sum(kernels) < stage.seconds
        if kernels and not has_rest and not _near(sum(kernels), stage.seconds, SUM_TOLERANCE):
            took = f"took {stage.seconds:g} s, its kernels {sum(kernels):g} s"
            yield f"stage {shown(stage.name)} {took}"
    memory = record.memory
    if memory:
        parts = memory.input_bytes + memory.output_bytes + memory.workspace_bytes
        # a workspace below zero is kept as zero
        is_cut = memory.workspace_bytes == 0 and parts > memory.peak_bytes
        if not _near(parts, memory.peak_bytes) and not is_cut:
            yield f"its memory is {memory.peak_bytes} bytes at its peak, its parts are {parts}"


def _near(a: float, b: float, tolerance: float = TOLERANCE) -> bool:
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-12)


def _flags(contents: Contents) -> Check:
    """The flags are those that the samples show."""
    if not contents.protocol:
        return Check(name="flags", count=0, notes=("flags of older versions had other rules",))
    if contents.protocol > doubt.PROTOCOL:
        return Check(name="flags", count=0, notes=("judged by a newer version: upgrade",))
    ceilings = metrics.ceilings(contents.header)
    findings = []
    timed = [r for r in contents.records if r.status == "ok"]
    for record in timed:
        shows = doubt.judge(record, ceilings)
        for flag in shows:
            if flag not in record.flags:
                findings.append(f"{_name(record)}: its samples show {flag}, its flags do not")
        for flag in record.flags:
            if flag not in shows:
                findings.append(f"{_name(record)}: is flagged {flag}, its samples do not show it")
    return Check(name="flags", count=len(timed), findings=tuple(findings))


def _figures(
    report: Digest, records: Sequence[Record], expected: Mapping[str, recompute.Row]
) -> Check:
    """The tables of this version show what the samples give."""
    findings, count = [], 0
    by_case: dict[str, list[Record]] = {}
    for record in records:
        by_case.setdefault(record.case.key, []).append(record)
    for row in frame.rows(report.cases):
        key, wanted = str(row["key"]), expected[str(row["key"])]
        name = _name(by_case[key][0])
        for column in recompute.FIGURES:
            count += 1
            if not _same(_plain(row[column]), wanted[column]):
                findings.append(
                    f"{name}: the tables show {column} {row[column]}, its samples give"
                    f" {wanted[column]}"
                )
        if wanted["seconds"] is not None:
            count += 1
            findings += [f"{name}: {text}" for text in _interval(row, by_case[key])]
    return Check(name="figures", count=count, findings=tuple(findings))


def _interval(row: Mapping[str, Any], found: Sequence[Record]) -> Iterator[str]:
    """Any interval holds the median; one process's ends are samples; R processes' spread is in."""
    low, middle, high = row["seconds_low"], row["seconds"], row["seconds_high"]
    slack = 1 + 1e-9
    if not low <= middle * slack or not middle <= high * slack:
        yield f"its interval {low:g} to {high:g} s does not hold its median {middle:g} s"
    used = recompute.counted(found)
    if len(used) == 1 and used[0].time:
        if not {low, high} <= set(used[0].time.seconds):
            yield f"its interval {low:g} to {high:g} s does not end at samples"
        return
    logs = [math.log(value) for value in recompute.medians(used)]
    mean = sum(logs) / len(logs)
    error = math.sqrt(sum((v - mean) ** 2 for v in logs) / (len(logs) - 1) / len(logs))
    # no quantile of Student's distribution for 95 % is below the normal one
    if math.log(high / low) / 2 < 1.9599 * error / slack:
        yield f"its interval {low:g} to {high:g} s is narrower than its replicates differ"


def _plain(value: Any) -> float | None:
    return None if value is None or value != value else float(value)


def _same(a: float | None, b: float | None) -> bool:
    return a is None and b is None if a is None or b is None else _near(a, b)


def _csv(contents: Contents, report: Digest, expected: Mapping[str, recompute.Row]) -> Check:
    """Each cell of report.csv is what the samples give, or what a table of today shows."""
    if contents.csv_text is None:
        return Check(name="report.csv", count=0)
    try:
        rows = list(csv.DictReader(io.StringIO(contents.csv_text)))
    except csv.Error as error:
        return Check(name="report.csv", count=0, findings=(f"report.csv can't be read: {error}",))
    if not rows or "key" not in rows[0]:
        return Check(name="report.csv", count=0, findings=("report.csv has no column key",))
    today = {row["key"]: row for row in csv.DictReader(io.StringIO(tables.csv_text(report)))}
    findings = list(_csv_keys([row["key"] for row in rows], set(today)))
    columns = sorted(set(rows[0]) & set(tables.CSV_COLUMNS))
    if not contents.protocol:
        columns = [name for name in columns if name not in SINCE_PROTOCOL]
    known = [row for row in rows if row["key"] in today]
    for row in known:
        key = row["key"]
        for column in columns:
            wanted = _cell(column, expected[key], today[key])
            if not _same_cell(row[column] or "", wanted):
                findings.append(
                    f"report.csv shows {column} {shown(row[column])} of {key}, its records give"
                    f" {shown(wanted)}"
                )
    notes = [] if contents.protocol else ["intervals, floors and flags had other rules then"]
    count = len(known) * len(columns)
    return Check(name="report.csv", count=count, findings=tuple(findings), notes=tuple(notes))


def _csv_keys(found: Sequence[Any], wanted: set[str]) -> Iterator[str]:
    """Each case has one row."""
    seen = Counter(found)
    yield from (f"report.csv lacks the case {key}" for key in sorted(wanted - set(seen)))
    for key, count in seen.items():
        if key not in wanted:
            yield f"report.csv has a row of {shown(key)}, the records do not"
        elif count > 1:
            yield f"report.csv has {count} rows of {key}"


def _cell(column: str, wanted: recompute.Row, today: Mapping[str, str]) -> str:
    if column not in recompute.FIGURES:
        return today[column]
    return "" if wanted[column] is None else repr(float(wanted[column]))


def _same_cell(found: str, wanted: str) -> bool:
    try:
        return _near(float(found), float(wanted))
    except ValueError:
        return found == wanted


def _markdown(contents: Contents, expected: Mapping[str, recompute.Row]) -> Check:
    """report.md has a row for each case."""
    if contents.markdown is None:
        return Check(name="report.md", count=0)
    drawn = re.findall(r"(?:^\|.*\n)+", contents.markdown + "\n", re.MULTILINE)
    # of each table the head and the rule under it are no cases; other tables have no status
    count = sum(table.count("\n") - 2 for table in drawn if "| status |" in table.split("\n")[0])
    findings: tuple[str, ...] = ()
    if count != len(expected):
        findings = (
            f"report.md has {count} rows, the records {len(expected)} cases"
            " (write it anew with dsa-bench report --md)",
        )
    return Check(name="report.md", count=count, findings=findings)


def _findings(contents: Contents) -> Iterator[Check]:
    """Each line on a hostile input is as it was written; no question where there are none."""
    if contents.num_findings is not None:
        faults = (contents.findings_fault,) if contents.findings_fault else ()
        yield Check(name="findings.jsonl", count=contents.num_findings, findings=faults)
