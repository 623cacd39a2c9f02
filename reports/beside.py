"""Sparse against the dense operators that are shown beside the opponent: those in fp8."""

from collections.abc import Mapping, Sequence

import pandas as pd

from dsa_bench.contest import Contest
from dsa_bench.reports import frame, naming
from dsa_bench.reports.metrics import SHAPE
from dsa_bench.reports.units import format_length, format_ratio


def sentences(
    contest: Contest, rows: pd.DataFrame, lines: Sequence[Mapping[str, object]]
) -> list[str]:
    """One sentence, or none where no two times stand beside each other.

    `lines` are the values of frame.AXES of the sparse cases that the headline speaks of.
    """
    timed = rows[rows["seconds"].notna() & frame.trusted(rows)]
    dense = timed[timed["op"].isin(contest.beside)].sort_values("seconds", kind="stable")
    dense = dense.drop_duplicates(list(SHAPE))[[*SHAPE, "impl", "seconds"]]
    parts = [part for axes in lines if (part := _part(timed, dense, axes))]
    if not parts:
        return []
    return [f"Against {naming.BESIDE[contest.name]}, which is less exact: {'; '.join(parts)}."]


def _part(timed: pd.DataFrame, dense: pd.DataFrame, axes: Mapping[str, object]) -> str:
    """`DSA in fp8 is 1.40x as fast in prefill at 128K (flash_attn_3)`: at the longest L of both."""
    is_line = pd.Series(True, index=timed.index)
    for name in frame.AXES:
        value = axes[name]
        is_line &= timed[name].isna() if value is None or value != value else timed[name] == value
    pairs = timed[is_line].merge(dense, on=list(SHAPE), suffixes=("", "_beside"))
    if pairs.empty:
        return ""
    last = pairs.sort_values("seq_len_kv").iloc[-1]
    speedup = format_ratio(float(last["seconds_beside"] / last["seconds"]))
    length = format_length(int(last["seq_len_kv"]))
    name = naming.impl_text(str(last["impl_beside"]))
    sparse = f"{naming.sparse_text(last['op'])} in {last['precision']}"
    return f"{sparse} is {speedup} as fast in {last['phase']} at {length} ({name})"
