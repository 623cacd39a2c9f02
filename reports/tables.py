"""Cases as rows of text: for the terminal, Markdown, CSV and JSON lines."""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dsa_bench import doubt
from dsa_bench.contest import LAYER
from dsa_bench.record import AUTO_MODE
from dsa_bench.reports import budget, estimate_view, frame, hostile, leaderboard, naming, units
from dsa_bench.reports.digest import Digest, digest, flags_of
from dsa_bench.reports.lines import PHASE_RANKS
from dsa_bench.reports.sheet import Sheet

MARKS = {"noisy": "⚑", "suspect": "✗", "invalid": "✗"}
"""Stands behind a time that is in doubt."""
MARK_MEANINGS = {
    "⚑": "noisy: counts, with care",
    "✗": "suspect or invalid: no part of speed-up, cost or headline",
}
MODE_MEANINGS = {
    "cold": "L2 flushed before each call",
    "warm": "L2 not flushed",
    "graph": "replay of a CUDA graph, L2 flushed",
    "sustained": "calls back to back",
    "cpu": "host clock",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column of a table for people."""

    name: str
    title: str
    text: Callable[[Any], str]
    """Value of a cell -> its text."""
    is_number: bool = True
    optional: bool = False
    """Left out of a table in which no row has a value, or all rows have the same."""
    help: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table of text, ready to be drawn."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def _plain(value: Any) -> str:
    return units.MISSING if units.is_missing(value) or value == "" else units.clean(str(value))


def _impl(value: Any) -> str:
    return _plain(value if units.is_missing(value) else naming.impl_text(str(value)))


COLUMNS = (
    Column(name="run_label", title="machine", text=_plain, is_number=False, optional=True),
    Column(name="phase", title="phase", text=_plain, is_number=False),
    Column(name="preset", title="preset", text=_plain, is_number=False, optional=True),
    Column(name="op", title="operator", text=_plain, is_number=False),
    Column(name="impl", title="implementation", text=_impl, is_number=False),
    Column(name="precision", title="precision", text=_plain, is_number=False),
    Column(name="seq_len_kv", title="L", text=units.format_length, help="1K = 1024 tokens"),
    Column(name="topk", title="k", text=units.format_number, help="tokens selected"),
    Column(name="batch_size", title="batch", text=units.format_number, optional=True),
    Column(name="lengths", title="lengths", text=_plain, is_number=False, optional=True,
           help="of the sequences of a batch; L is the longest"),
    Column(name="seq_len_q", title="queries", text=units.format_number, optional=True),
    Column(name="num_heads", title="heads", text=units.format_number, optional=True),
    Column(name="tensor_parallel", title="tp", text=units.format_number, optional=True,
           help="ranks that share the heads; the time is that of one"),
    Column(name="inputs", title="inputs", text=_plain, is_number=False, optional=True),
    Column(name="weights", title="weights", text=_plain, is_number=False, optional=True),
    Column(name="seed", title="seed", text=units.format_number, optional=True),
    Column(name="mode", title="mode", text=_plain, is_number=False, optional=True,
           help="how it was timed"),
    Column(name="status", title="status", text=_plain, is_number=False),
    Column(name="seconds", title="time", text=units.format_seconds, help="median of one call"),
    Column(name="spread", title="±", text=units.format_spread, help="half the 95 % interval"),
    Column(name="replicates", title="processes", text=units.format_number, optional=True,
           help="fresh processes that timed it"),
    Column(name="speedup", title="speed-up", text=units.format_ratio, help="over fastest dense"),
    Column(name="usd_per_million_tokens", title="$/M tokens", text=units.format_usd,
           help="attention, or attention layers, only"),
    Column(name="joules_per_token", title="energy/token", text=units.format_joules, optional=True,
           help="of the whole card, one layer"),
    Column(name="flops_per_second", title="FLOP rate", text=units.format_flops),
    Column(name="bytes_per_second", title="traffic", text=units.format_bandwidth),
    Column(name="floor_share", title="of floor", text=units.format_share, optional=True,
           help="least possible time ÷ time"),
    Column(name="peak_bytes", title="peak memory", text=units.format_bytes),
    Column(name="dense_error", title="error", text=units.format_error, optional=True,
           help="relative L2 distance from dense attention"),
    Column(name="rounding_error", title="fp8 error", text=units.format_error, optional=True,
           help="relative L2 distance from the same attention over bf16 tensors"),
    Column(name="mass_kept", title="mass kept", text=units.format_spread, optional=True,
           help="share of the dense attention on the selected tokens"),
    Column(name="recall", title="recall", text=units.format_spread, optional=True,
           help="share of the exact top-k that was selected"),
    Column(name="reason", title="reason", text=_plain, is_number=False, optional=True),
)  # fmt: skip

TERMINAL_COLUMNS = (
    *("run_label", "preset", "op", "impl", "precision", "seq_len_kv", "topk", "batch_size"),
    *("lengths", "num_heads", "tensor_parallel", "inputs", "mode", "status", "seconds", "spread"),
    "speedup",
    *("usd_per_million_tokens", "joules_per_token", "flops_per_second", "bytes_per_second"),
    *("peak_bytes", "reason"),
)

CSV_COLUMNS = (
    *("run_label", "started", "op", "impl", "phase", "seq_len_kv", "seq_len_q", "topk"),
    *("precision", "batch_size", "lengths", "num_heads", "tensor_parallel", "inputs", "weights"),
    *("preset", "seed", "asked_mode", "status", "reason"),
    *(
        "flags",
        "doubt",
        "mode",
        "replicates",
        "samples",
        "seconds",
        "seconds_low",
        "seconds_high",
        "tokens",
        "seconds_per_token",
    ),
    *(
        "gpu_hour_usd",
        "usd_per_million_tokens",
        "joules_per_token",
        "speedup",
        "dense_impl",
        "dense_precision",
    ),
    *("flops", "bytes_read", "bytes_written", "flops_per_second", "bytes_per_second"),
    *("floor_seconds", "floor_share", "peak_bytes", "input_bytes", "output_bytes"),
    *("workspace_bytes", "predicted_bytes", "dense_error", "rounding_error", "mass_kept"),
    *("recall", "key", "reproduce"),
)


TELLING_IF_VARIED = (
    *("run_label", "preset", "batch_size", "seq_len_q", "num_heads", "seed", "mode", "replicates"),
    *("tensor_parallel", "inputs"),
)
"""Optional columns that say nothing where all rows have the same value."""


def terminal_rows(runs: Sequence[frame.Run]) -> tuple[Table, ...]:
    """One table for each phase; texts are free of control characters."""
    return phase_tables(digest(runs), TERMINAL_COLUMNS)


def phase_tables(report: Digest, names: Sequence[str]) -> tuple[Table, ...]:
    """One table for each phase with these columns, without the optional ones that say nothing.

    Layers have tables of their own.
    """
    cases = sorted_cases(with_spread(report.cases))
    is_layer = cases["contest"] == LAYER.name
    groups = cases.groupby(["phase", is_layer.map({False: "", True: ", layer"})], sort=False)
    return tuple(_table("".join(map(str, key)), rows, names) for key, rows in groups)


def with_spread(cases: pd.DataFrame) -> pd.DataFrame:
    """The cases with the column `spread`: half the interval of the median as a share of it.

    A case without a time shows the mode that it was asked in.
    """
    half = (cases["seconds_high"] - cases["seconds_low"]) / 2
    asked = cases["asked_mode"].mask(cases["asked_mode"] == AUTO_MODE)
    return cases.assign(
        spread=pd.to_numeric(half) / cases["seconds"],
        mode=cases["mode"].where(cases["mode"].notna(), asked),
    )


def sorted_cases(cases: pd.DataFrame) -> pd.DataFrame:
    """By phase, L, batch and lengths, layers last; dense before sparse, then fast before slow."""
    ranked = cases.assign(
        phase_rank=cases["phase"].map(PHASE_RANKS).fillna(len(PHASE_RANKS)),
        is_layer=cases["contest"] == LAYER.name,
    )
    place = ["run", "phase_rank", "is_layer", "seq_len_kv", "batch_size", "lengths"]
    order = [*place, "op", "topk", "seconds"]
    return cases.loc[ranked.sort_values(order, kind="stable").index]


def visible_columns(rows: pd.DataFrame, names: Sequence[str]) -> tuple[Column, ...]:
    """The columns of these names; an optional one only where it tells something."""
    by_name = {column.name: column for column in COLUMNS}
    return tuple(
        by_name[name] for name in names if not by_name[name].optional or _tells(name, rows[name])
    )


def _tells(name: str, values: pd.Series) -> bool:
    if name in naming.UNSAID:
        return bool((values != naming.UNSAID[name]).any())
    present = values[values.notna() & (values != "")]
    return present.nunique() > (1 if name in TELLING_IF_VARIED else 0)


def cell_text(column: Column, row: dict[str, Any]) -> str:
    """The text of one cell; a time in doubt bears a mark."""
    value = row[column.name]
    text = units.MISSING if units.is_missing(value) else column.text(value)
    mark = MARKS.get(row["doubt"], "") if column.name == "seconds" else ""
    return f"{text} {mark}" if mark else text


def _table(phase: str, rows: pd.DataFrame, names: Sequence[str]) -> Table:
    columns = visible_columns(rows, names)
    records = frame.rows(rows)
    return Table(
        title=units.clean(phase),
        columns=columns,
        rows=tuple(tuple(cell_text(c, row) for c in columns) for row in records),
        notes=(*_mode_notes(rows), *doubt_notes(rows)),
    )


def _mode_notes(rows: pd.DataFrame) -> list[str]:
    """How the times of a table were taken: no time stands without its mode."""
    modes = [str(mode) for mode in rows["mode"][rows["seconds"].notna()].unique()]
    named = [f"{m} ({MODE_MEANINGS[m]})" if m in MODE_MEANINGS else m for m in modes]
    return [f"timed in mode {', '.join(named)}"] if named else []


def doubt_notes(rows: pd.DataFrame) -> list[str]:
    """What each mark means, then each flag that occurs: its meaning and what to do, once."""
    timed = rows[rows["seconds"].notna()]
    marks = dict.fromkeys(MARKS[name] for name in timed["doubt"] if name in MARKS)
    notes = [f"{mark} {MARK_MEANINGS[mark]}" for mark in sorted(marks)]
    for flag, severity in flags_of(timed).items():
        notes.append(f"{MARKS.get(severity, '')} {flag_text(flag)}".strip())
    return notes


def flag_text(flag: str) -> str:
    """`drift: the rule that it broke (what to do)`."""
    return units.clean(doubt.explain((flag,)))


def markdown(report: Digest) -> str:
    """Headlines, one table a phase, and what the columns mean."""
    parts = ["# dsa-bench report"]
    parts += [f"**{escape_markdown(line)}**" for line in report.headlines]
    parts += [escape_markdown(line) for line in (*time_spent(report), *hostile.sentences(report))]
    names = [column.name for column in COLUMNS if column.name != "phase"]
    for table in phase_tables(report, names):
        parts.append(f"## {escape_markdown(table.title)}")
        parts.append(_markdown_table(table))
        # one paragraph, a line each
        parts += ["  \n".join(escape_markdown(note) for note in table.notes)] * bool(table.notes)
    for sheet in sheets(report):
        parts += _markdown_section("##", sheet)
    found = hostile.parts(report)
    parts += [f"## {hostile.TITLE}", hostile.MEANING] * bool(found)
    for part in found:
        parts += _markdown_section("###", part.sheet)
    parts.append(
        "L: 1K = 1024 tokens. time: median of one call of one layer. ±: half the 95 % interval of "
        "the median. "
        "speed-up: over the fastest dense attention of the same shape and mode in the same run. "
        "$/M tokens: USD per GPU-hour ÷ 3600 · seconds per token · layers · 10⁶, attention only."
    )
    if (report.cases["contest"] == LAYER.name).any():
        parts.append(
            "A layer goes from hidden state to output, and so does its cost. tp: the time is that "
            "of one of so many ranks, the cost that of all of them, without communication."
        )
    return "\n\n".join(parts) + "\n"


def write_markdown(runs: Sequence[frame.Run], path: Path) -> None:
    """Write the report as Markdown."""
    path.write_text(markdown(digest(runs)), encoding="utf-8")


def time_spent(report: Digest) -> list[str]:
    """Where the wall time of each run went, with the run's name where there are several."""
    many = len(report.runs) > 1
    return [
        f"{label}, {line}" if many else line
        for label, line in zip(report.labels, report.time_spent, strict=True)
        if line
    ]


def _markdown_table(table: Table) -> str:
    head = [column.title for column in table.columns]
    rule = ["---:" if column.is_number else "---" for column in table.columns]
    body = [[escape_markdown(text) for text in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *body])


def sheets(report: Digest) -> list[Sheet]:
    """The small tables of a report: who is fastest, budgets of layers, the whole model's cost."""
    return [
        *leaderboard.sheets(report),
        *budget.sheets(report),
        *estimate_view.sheets(report),
    ]


def _markdown_section(rank: str, sheet: Sheet) -> list[str]:
    # notes are one paragraph, a line each
    notes = ["  \n".join(escape_markdown(note) for note in sheet.notes)] * bool(sheet.notes)
    return [f"{rank} {escape_markdown(sheet.title)}", _markdown_sheet(sheet), *notes]


def _markdown_sheet(sheet: Sheet) -> str:
    rule = ["---:" if place in sheet.numbers else "---" for place in range(len(sheet.head))]
    body = [[escape_markdown(text) for text in row] for row in (sheet.head, *sheet.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [body[0], rule, *body[1:]])


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is: no markup, links, HTML or table bars of its own."""
    text = units.clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*|\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def csv_text(report: Digest) -> str:
    """All cases with raw numbers in SI units; a ' quotes texts that a spreadsheet would run."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in frame.rows(report.cases):
        writer.writerow([_csv_cell(row[name]) for name in CSV_COLUMNS])
    return out.getvalue()


def write_csv(runs: Sequence[frame.Run], path: Path) -> None:
    """Write all cases as CSV."""
    path.write_text(csv_text(digest(runs)), encoding="utf-8")


def _csv_cell(value: Any) -> str:
    if units.is_missing(value):
        return ""
    if isinstance(value, str):
        text = units.clean(value)
        return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.9g}"


def json_lines(report: Digest) -> str:
    """All cases, one JSON object a line; what is missing is null."""
    lines = []
    for row in frame.rows(report.cases):
        plain = {name: _json_value(row[name]) for name in CSV_COLUMNS}
        lines.append(json.dumps(plain, ensure_ascii=False))
    return "".join(f"{line}\n" for line in lines)


def _json_value(value: Any) -> Any:
    if units.is_missing(value):
        return None
    if isinstance(value, str):
        return value
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() else number
