"""Sentences on what is shown beside sparse and dense, in other numbers and less exact: fp8."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from dsa_bench.contest import Contest
from dsa_bench.reports import frame, naming
from dsa_bench.reports.metrics import SHAPE
from dsa_bench.reports.units import format_length, format_ratio, format_spread


def sentences(
    contest: Contest, rows: pd.DataFrame, lines: Sequence[Mapping[str, object]]
) -> list[str]:
    """One sentence, or none where no two times stand beside each other.

    `lines` are the values of frame.AXES of the sparse cases that the headline speaks of.
    """
    parts = []
    for axes in lines:
        if (found := _fastest_dense(contest, rows, axes)) is not None:
            sparse = f"{naming.sparse_text(axes['op'])} in {axes['precision']}"
            place = f"in {axes['phase']} at {found.length} ({found.impl})"
            parts.append(f"{sparse} is {found.speedup} as fast {place}")
    if not parts:
        return []
    dense = naming.DENSE_BESIDE[contest.name]
    return [f"Against {dense}, which is less exact: {'; '.join(parts)}."]


def against(contest: Contest, rows: pd.DataFrame, axes: Mapping[str, object]) -> str:
    """`; 1.40x as fast as dense attention in FP8 at 128K (flash_attn_3)`, or an empty text."""
    found = _fastest_dense(contest, rows, axes)
    if found is None:
        return ""
    dense = naming.DENSE_BESIDE[contest.name]
    return f"; {found.speedup} as fast as {dense} at {found.length} ({found.impl})"


def rounding_text(rows: pd.DataFrame, axes: Mapping[str, object]) -> str:
    """` (up to 0.9 % from bf16 on random inputs)`: at any L of a line; empty where nobody knows."""
    errors = _of_line(rows, axes)["rounding_error"].dropna()
    if errors.empty:
        return ""
    up_to = "up to " if len(errors) > 1 else ""
    error = format_spread(float(errors.max()))
    return f" ({up_to}{error} from bf16 on {naming.axis_text('inputs', axes['inputs'])})"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Match:
    """A sparse line and the fastest dense one beside it, at the longest L that both have."""

    speedup: str
    length: str
    impl: str


def _fastest_dense(
    contest: Contest, rows: pd.DataFrame, axes: Mapping[str, object]
) -> _Match | None:
    timed = rows[rows["seconds"].notna() & frame.trusted(rows)]
    dense = timed[timed["op"].isin(contest.dense_beside)].sort_values("seconds", kind="stable")
    dense = dense.drop_duplicates(list(SHAPE))[[*SHAPE, "impl", "seconds"]]
    pairs = _of_line(timed, axes).merge(dense, on=list(SHAPE), suffixes=("", "_beside"))
    if pairs.empty:
        return None
    last = pairs.sort_values("seq_len_kv").iloc[-1]
    return _Match(
        speedup=format_ratio(float(last["seconds_beside"] / last["seconds"])),
        length=format_length(int(last["seq_len_kv"])),
        impl=naming.impl_text(str(last["impl_beside"])),
    )


def _of_line(rows: pd.DataFrame, axes: Mapping[str, object]) -> pd.DataFrame:
    """The rows of one line over L."""
    is_line = pd.Series(True, index=rows.index)
    for name in frame.AXES:
        value = axes[name]
        is_line &= rows[name].isna() if value is None or value != value else rows[name] == value
    return rows[is_line]
