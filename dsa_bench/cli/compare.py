"""`dsa-bench compare`: two runs, a verdict for each case, exit code 4 on a regression."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsa_bench.cli.exits import Exit
from dsa_bench.cli.options import AsJson
from dsa_bench.operator import UsageError

if TYPE_CHECKING:
    from dsa_bench.reports.compare import Comparison


def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Run folder to compare with.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Run folder that is judged.")],
    threshold: Annotated[
        str,
        typer.Option("--threshold", metavar="SHARE", help="Changes up to this one don't matter."),
    ] = "2%",
    allow: Annotated[
        str | None,
        typer.Option("--allow", metavar="LIST", show_default=False,
                     help="Compare though these differ: machine,protocol"),
    ] = None,
    md: Annotated[Path | None, typer.Option("--md", metavar="FILE", help="Markdown.")] = None,
    as_json: AsJson = False,
) -> Exit:  # fmt: skip
    """Judge each case of a run: faster, slower or the same as before."""
    share, allowed = parse_threshold(threshold), _parse_allowed(allow)
    _refuse_same(base, new)
    from dsa_bench.reports import compare as judge
    from dsa_bench.reports import compare_tables
    from dsa_bench.show import case_label
    from dsa_bench.store import read_run

    found = judge.compare(read_run(base), read_run(new), threshold=share, allowed=allowed)
    if md is not None:
        md.write_text(compare_tables.markdown(found, case_label), encoding="utf-8")
    if as_json:
        for line in compare_tables.json_objects(found, case_label):
            print(json.dumps(line, allow_nan=False))
    else:
        _print(found)
    return Exit.REGRESSION if found.has_regression else Exit.OK


def parse_threshold(text: str) -> float:
    """`2%` and `0.02` -> 0.02; UsageError unless it is above 0 and below 1."""
    number = text.strip()
    try:
        share = float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UsageError(f"--threshold must be a share like 2% or 0.02, got '{text}'")
    return share


def _parse_allowed(text: str | None) -> tuple[str, ...]:
    from dsa_bench.reports.compare import ALLOWED
    from dsa_bench.sweep import unknown

    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    for name in names:
        if name not in ALLOWED:
            raise unknown("--allow", name, ALLOWED)
    return names


def _refuse_same(base: Path, new: Path) -> None:
    if base.resolve() == new.resolve():
        raise UsageError(f"{base} and {new} are one folder (give two runs: BASE, then NEW)")


def _print(found: "Comparison") -> None:
    """Caveats, both tables and the summary on stdout."""
    from dsa_bench.cli import terminal
    from dsa_bench.reports import compare_tables
    from dsa_bench.show import TextTable, case_label

    head, rows = compare_tables.rows(found, case_label)
    left_out = compare_tables.left_out_rows(found, case_label)
    for line in compare_tables.opening(found):
        print(line)
    print()
    tables = [
        TextTable(
            title="compare",
            head=head,
            rows=rows,
            notes=compare_tables.notes(found),
            right=compare_tables.NUMBERS,
            spare=("SM clock",),
        ),
        TextTable(title="not compared", head=("case", "why"), rows=left_out),
    ]
    terminal.draw(*(table for table in tables if table.rows))
    print(compare_tables.summary(found))
