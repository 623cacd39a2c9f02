"""Draws on the terminal through rich: tables on stdout, progress on stderr."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from dsa_bench.job import Job
from dsa_bench.record import Record
from dsa_bench.runner import Progress
from dsa_bench.show import TextTable, case_label, ending, fit, plan
from dsa_bench.store import Run
from dsa_bench.sweep import Planned

# rich falls back to 80 columns where there is no terminal, and would cut the tables
PIPE_WIDTH = 250
# columns of a report that a narrow terminal does without, in this order
SPARE = ("traffic", "FLOP rate", "peak memory", "status", "±", "$/M tokens", "mode", "precision")


def print_report(runs: Sequence[Run]) -> None:
    """The tables of some runs and their headline sentences."""
    from dsa_bench.reports import hostile, leaderboard
    from dsa_bench.reports.digest import digest
    from dsa_bench.reports.tables import TERMINAL_COLUMNS, phase_tables, time_spent

    found = digest(runs)
    for table in phase_tables(found, TERMINAL_COLUMNS):
        numbers = frozenset(column.title for column in table.columns if column.is_number)
        head = tuple(column.title for column in table.columns)
        draw(
            TextTable(
                title=table.title,
                head=head,
                rows=table.rows,
                notes=table.notes,
                right=numbers,
                spare=SPARE,
            )
        )
    for sheet in leaderboard.sheets(found):
        places = frozenset(sheet.head[sheet.num_names :])
        draw(
            TextTable(
                title=sheet.title,
                head=sheet.head,
                rows=sheet.rows,
                notes=sheet.notes,
                spare=tuple(sorted(places, reverse=True)),
            )
        )
    for sentence in (*found.headlines, *time_spent(found), *hostile.sentences(found)):
        print(sentence)


def print_plan(ready: Job, as_json: bool) -> None:
    """The cases that a run would take."""
    if as_json:
        for item in ready.planned:
            print(json.dumps(item.to_json()))
    else:
        draw(plan(ready.planned))


def print_tables(found: Mapping[str, Any], tables: Sequence[TextTable], as_json: bool) -> None:
    """Tables, or what they were made of as one line of JSON."""
    if as_json:
        print(json.dumps(found))
        return
    draw(*tables)


def draw(*tables: TextTable) -> None:
    """Draw tables on stdout."""
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    for table in tables:
        _draw(console, fit(table, console.width))


def _draw(console: Console, table: TextTable) -> None:
    # texts come from outside too, so none is read as markup
    console.print(Text(table.title, style="bold"))
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name in table.head:
        is_number = name in table.right
        drawn.add_column(name, justify="right" if is_number else "left", no_wrap=is_number)
    for row in table.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    console.print(drawn)
    for note in table.notes:
        console.print(Text(note))
    console.print()


@contextlib.contextmanager
def progress(
    planned: Sequence[Planned], *, num_endings: int, is_live: bool
) -> Iterator[Callable[[Progress], None]]:
    """Shows on stderr how a run goes on: a bar under the endings, or plain lines."""
    total = num_endings
    width = max((len(case_label(item.case)) for item in planned), default=0)

    def line(progress: Progress, record: Record) -> str:
        place = f"[{progress.ended:>{len(str(total))}}/{total}]"
        return f"{place} {case_label(progress.case):<{width}}  {ending(record)}"

    if not (is_live and sys.stderr.isatty()):

        def plain(progress: Progress) -> None:
            if progress.record is not None:
                print(line(progress, progress.record), file=sys.stderr, flush=True)

        yield plain
        return

    console = Console(stderr=True, highlight=False)
    columns = (
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)

        def live(progress: Progress) -> None:
            if progress.record is None:
                bar.update(task, description=f"{progress.phase}: {case_label(progress.case)}")
            else:
                console.print(Text(line(progress, progress.record)))
                bar.update(task, completed=progress.ended)

        yield live
