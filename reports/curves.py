"""Figures that compare lines over L: speed-up, cost, time, single operators."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from dsa_bench.contest import CONTEST_OF, LAYER, SPARSE, SPARSE_BESIDE
from dsa_bench.reports import crossover, frame, lines, naming, published, units
from dsa_bench.reports.chart import Axis, Figure, Mark
from dsa_bench.reports.digest import Digest
from dsa_bench.reports.series import LENGTH, line_series

MAX_CROSSINGS = 3
"""Crossings that one figure labels."""


def speedup(report: Digest) -> list[Figure]:
    """Time of the fastest dense opponent over time of sparse, with the crossing of 1."""
    rows = report.cases[report.cases["speedup"].notna()]
    return [
        Figure(
            name=f"speedup-{panel.slug}",
            title=f"Speed-up over {panel.opponent}, {panel.title}",
            question=f"From which length is {_subject(panel)} faster, and by how much?",
            answer=" ".join(_crossing_answer(line, report) for line in panel.lines)
            + _left_out(panel, report),
            x=LENGTH,
            y=Axis(title="times as fast as dense", text=units.format_ratio, base=2, log=True),
            series=tuple(line_series(line, "speedup", _speedup_note) for line in panel.lines),
            marks=(
                Mark(kind="level", y=1.0, label="as fast as dense"),
                *_crossing_marks(panel, report),
            ),
            is_lead=True,
        )
        for panel in lines.panels(rows)
    ]


def latency(report: Digest) -> list[Figure]:
    """Time of one call, sparse and every dense implementation."""
    cases = report.cases
    rows = cases[cases["seconds"].notna() & cases["op"].isin(CONTEST_OF)]
    return [
        Figure(
            name=f"latency-{panel.slug}",
            title=f"Time of one layer, {panel.title}",
            question="How long does one whole layer take, from hidden state to output?"
            if panel.contest == LAYER.name
            else "How long does the attention of one layer take?",
            answer=_last_values(panel, "seconds", units.format_seconds),
            x=LENGTH,
            y=Axis(title="time of one call", text=units.format_seconds, log=True),
            series=tuple(line_series(line, "seconds") for line in panel.lines),
            marks=tuple(_missing_marks(panel, cases)),
        )
        for panel in lines.panels(rows)
    ]


def cost(report: Digest) -> list[Figure]:
    """USD per million tokens; of decode the largest batch, of dense implementations the fastest."""
    cases = report.cases
    rows = cases[cases["usd_per_million_tokens"].notna() & cases["op"].isin(CONTEST_OF)]
    rows = lines.fastest_dense(lines.largest_batch(rows))
    made = []
    for panel in lines.panels(rows):
        price = float(panel.rows["gpu_hour_usd"].iloc[0])
        per_hour = frame.price_text(panel.rows.iloc[0])
        curves = published.series(panel, price) if published.is_comparable(panel) else ()
        beside = f" {published.caption(price)}" if curves else ""
        part = "attention layers" if panel.contest == LAYER.name else "attention"
        made.append(
            Figure(
                name=f"cost-{panel.slug}",
                title=f"Cost of a million tokens, {panel.title}",
                question=f"What is the cost of the {part} for a token at position L?",
                answer=_last_values(panel, "usd_per_million_tokens", units.format_usd)
                + f" {part.capitalize()} only, of the whole model, at {per_hour}.{beside}",
                x=Axis(title=LENGTH.title, text=units.format_length, base=2, log=False),
                y=Axis(
                    title=f"USD per million tokens, {part} only", text=units.format_usd, log=False
                ),
                series=(
                    *(line_series(line, "usd_per_million_tokens") for line in panel.lines),
                    *curves,
                ),
            )
        )
    return made


def operators(report: Digest) -> list[Figure]:
    """Time of operators that were measured on their own."""
    cases = report.cases
    rows = cases[cases["seconds"].notna() & ~cases["op"].isin(CONTEST_OF)]
    return [
        Figure(
            name=f"operators-{panel.slug}",
            title=f"Single operators, {panel.title}",
            question="How long does one operator take on its own?",
            answer=_last_values(panel, "seconds", units.format_seconds),
            x=LENGTH,
            y=Axis(title="time of one call", text=units.format_seconds, log=True),
            series=tuple(line_series(line, "seconds") for line in panel.lines),
        )
        for panel in lines.panels(rows)
    ]


def _subject(panel: lines.Panel) -> str:
    return "the sparse layer" if panel.contest == LAYER.name else "DSA"


def _speedup_note(row: dict[str, Any]) -> str:
    dense = f"{naming.impl_text(row['dense_impl'])}, {row['dense_precision']}"
    own, other = units.format_seconds(row["seconds"]), units.format_seconds(row["dense_seconds"])
    return f"{own} against {other} of {dense}"


def _crossover_of(line: lines.Line, report: Digest) -> Any:
    matches = [c for c in report.crossovers if lines.same_axes(c.axes, line.rows.iloc[0])]
    return matches[0]


def _crossing_marks(panel: lines.Panel, report: Digest) -> list[Mark]:
    """Where each line meets 1; of many lines only those that the headline speaks of.

    More than MAX_CROSSINGS labels lie on top of each other; the text below the figure has them all.
    """
    found = [(line, _crossover_of(line, report)) for line in panel.lines]
    found = [(line, each) for line, each in found if each.seq_len_kv is not None]
    if len(found) > MAX_CROSSINGS:
        chosen = [
            crossover.choose([each for _, each in found if each.axes["op"] in ops])
            for ops in (SPARSE - SPARSE_BESIDE, SPARSE_BESIDE)
        ]
        found = [(line, each) for line, each in found if any(each is one for one in chosen)]
    return [
        Mark(
            kind="crossing",
            x=each.seq_len_kv,
            y=1.0,
            label=units.format_length(each.seq_len_kv),
            role=line.role,
        )
        for line, each in found
    ]


def _left_out(panel: lines.Panel, report: Digest) -> str:
    """The suspect times without which a figure of speed-ups is drawn."""
    lost = dict.fromkeys(
        one for line in panel.lines for one in _crossover_of(line, report).left_out
    )
    return f" Left out as suspect: {', '.join(lost)}." if lost else ""


def _crossing_answer(line: lines.Line, report: Digest) -> str:
    found = _crossover_of(line, report)
    last = f"{units.format_ratio(found.last_speedup)} at {units.format_length(found.last_length)}"
    match found.outcome:
        case "crosses":
            start = units.format_length(found.seq_len_kv)
            spread = ""
            if found.interval:
                low, high = (units.format_length(end) for end in found.interval)
                spread = f" ({low} to {high})" if low != high else ""
            return f"{line.label}: faster from {start}{spread}, {last}."
        case "always":
            return f"{line.label}: faster at every L, {last}."
        case "one length":
            return f"{line.label}: {last}."
        case _:
            return f"{line.label}: not faster, {last}."


def _last_values(panel: lines.Panel, column: str, text: Callable[[float], str]) -> str:
    """At the longest L: the value of each line that reaches it."""
    longest = panel.rows["seq_len_kv"].max()
    values = []
    for line in panel.lines:
        at = line.rows[line.rows["seq_len_kv"] == longest]
        if not at.empty:
            values.append(f"{line.label} {text(at[column].iloc[0])}")
    return f"At {units.format_length(longest)}: {'; '.join(values)}."


def _missing_marks(panel: lines.Panel, cases: pd.DataFrame) -> list[Mark]:
    """A cross at each L where a case of this panel was wanted and gave no time."""
    lost = cases[cases["status"].isin(["wrong", "failed", "oom", "timeout"])]
    return [
        Mark(
            kind="lost",
            x=float(row["seq_len_kv"]),
            label=f"{lines.name_of(row)}: {row['status']}, {row['reason']}",
        )
        for row in frame.rows(lost)
        if lines.belongs(panel, row)
    ]
