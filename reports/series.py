"""Rows of cases as the points, lines and bars of a figure."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from dsa_bench.reports import frame, lines, units
from dsa_bench.reports.chart import Axis, Point, Series

LENGTH = Axis(title="sequence length L (tokens)", text=units.format_length, base=2)
TEXTS: dict[str, Callable[[float], str]] = {
    "seconds": units.format_seconds,
    "speedup": units.format_ratio,
    "usd_per_million_tokens": units.format_usd,
    "dense_error": units.format_error,
    "mass_kept": units.format_spread,
    "recall": units.format_spread,
}
"""How a value of a column reads."""
UNTIMED = (
    *("dense_error", "rounding_error", "mass_kept", "recall"),
    *("peak_bytes", "input_bytes", "output_bytes", "workspace_bytes"),
)
"""Columns that a doubt about the time does not touch."""


def points_of(
    rows: pd.DataFrame,
    column: str,
    text: Callable[[float], str],
    note: Callable[[dict[str, Any]], str] | None = None,
) -> tuple[Point, ...]:
    """Points over L; only times have an interval, and only what comes from times is in doubt."""
    return tuple(
        _point(row, column, text(row[column]), note(row) if note else "")
        for row in frame.rows(rows.sort_values("seq_len_kv"))
        if pd.notna(row[column])
    )


def _point(row: dict[str, Any], column: str, text: str, note: str) -> Point:
    has_interval = column == "seconds" and "seconds_low" in row
    flags = list(frame.flags_of(row)) if "flags" in row else []
    doubts = [row.get("doubt")]
    if column == "speedup":
        flags += [f"dense: {flag}" for flag in frame.flags_of({"flags": row["dense_flags"]})]
        doubts.append(row["dense_doubt"])
    is_time = column not in UNTIMED
    return Point(
        x=float(row["seq_len_kv"]),
        y=float(row[column]),
        text=text,
        low=float(row["seconds_low"]) if has_interval else None,
        high=float(row["seconds_high"]) if has_interval else None,
        note=note,
        flags=", ".join(flags) if is_time else "",
        doubt=_worst(doubts) if is_time else "",
    )


def _worst(doubts: list[Any]) -> str:
    return next((d for d in ("invalid", "suspect", "noisy") if d in doubts), "")


def line_series(
    line: lines.Line, column: str, note: Callable[[dict[str, Any]], str] | None = None
) -> Series:
    points = points_of(line.rows, column, TEXTS[column], note)
    return Series(label=line.label, role=line.role, style=line.style, points=points)


def bar_series(
    label: str, role: str, rows: pd.DataFrame, column: str, text: Callable[[float], str]
) -> Series:
    return Series(label=units.shorten(label), role=role, points=points_of(rows, column, text))


def overlay(label: str, rows: pd.DataFrame, column: str, text: Callable[[float], str]) -> Series:
    return Series(label=label, role="ink", shape="points", points=points_of(rows, column, text))
