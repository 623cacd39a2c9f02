"""`dsa-bench verify`: do run folders agree with themselves? Exit code 3 where one does not."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsa_bench.cli.exits import Exit
from dsa_bench.cli.options import AsJson
from dsa_bench.operator import UsageError

if TYPE_CHECKING:
    from dsa_bench.reports.verify import Check, Contents

MAX_SENTENCES = 50
"""Findings that are printed; --json has all of them."""


def verify(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    as_json: AsJson = False,
) -> Exit:
    """Recompute all figures from raw samples; find damage and edits."""
    from dsa_bench.reports import verify as judge

    is_fine = True
    for path in runs:
        checks = judge.verify(read(path))
        agrees = not any(check.findings for check in checks)
        is_fine = is_fine and agrees
        if as_json:
            print(json.dumps({"run": str(path), "agrees": agrees, "checks": _plain(checks)}))
        else:
            _print(path, checks)
    return Exit.OK if is_fine else Exit.FAILED


def read(path: Path) -> "Contents":
    """All of a run folder that is looked at; UsageError where it can't be read as a whole."""
    from dsa_bench import store
    from dsa_bench.reports.verify import Contents

    header = store.read_header(path)
    lines, torn = store.read_lines(path)
    count, fault = _findings(path)
    return Contents(
        path=path,
        header=header,
        lines=lines,
        torn=torn,
        csv_text=_text(path / "report.csv"),
        markdown=_text(path / "report.md"),
        num_findings=count,
        findings_fault=fault,
    )


def _findings(path: Path) -> tuple[int | None, str]:
    """(findings on hostile inputs, what is wrong with their file); None where there is no file."""
    from dsa_bench import store

    if not os.path.lexists(path / store.FINDINGS):
        return None, ""
    try:
        return len(store.read_findings(path)), ""
    except UsageError as error:
        return 0, str(error)


def _text(file: Path) -> str | None:
    """Text of a report in the folder; None if there is none."""
    from dsa_bench.untrusted import MAX_REPORT_BYTES, Refused, read_file

    if not os.path.lexists(file):
        return None
    try:
        return read_file(file, MAX_REPORT_BYTES).decode("utf-8", errors="replace")
    except Refused as error:
        raise UsageError(f"{file} {error}") from None


def _plain(checks: "Sequence[Check]") -> list[dict[str, Any]]:
    return [
        {
            "name": check.name,
            "count": check.count,
            "verdict": check.verdict,
            "findings": list(check.findings),
            "notes": list(check.notes),
        }
        for check in checks
    ]


def _print(path: Path, checks: "Sequence[Check]") -> None:
    from dsa_bench.cli import terminal
    from dsa_bench.reports.units import clean
    from dsa_bench.show import TextTable

    findings = [clean(text) for check in checks for text in check.findings]
    notes = [clean(f"{check.name}: {text}") for check in checks for text in check.notes]
    if len(findings) > MAX_SENTENCES:
        rest = f"… and {len(findings) - MAX_SENTENCES} more (--json has all)"
        findings = [*findings[:MAX_SENTENCES], rest]
    terminal.draw(
        TextTable(
            title=clean(str(path)),
            head=("check", "looked at", "verdict"),
            rows=tuple((c.name, str(c.count), c.verdict) for c in checks),
            notes=(*notes, *findings),
            right=frozenset({"looked at"}),
        )
    )
