"""From which length DSA is faster than dense attention, and the sentence that says so."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import pandas as pd

from dsa_bench.record import AUTO_MODE
from dsa_bench.reports import frame
from dsa_bench.reports.units import format_length, format_ratio

HEADLINE_TOPK = 2048
"""Tokens that DeepSeek-V3.2 selects: the k of the headline where it was measured."""

MAX_NAMED = 4
"""Suspect times that a headline names; the others are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossover:
    """Where one line of DSA cases over L meets the fastest dense attention."""

    axes: dict[str, object]
    """The values of frame.AXES that these cases share."""
    outcome: str
    """`crosses`, `always`, `never`, `one length`; `no dense`: no L has both times; `suspect`: some
    L has both, but none that can be trusted.
    """
    seq_len_kv: float | None = None
    """L from which DSA is faster at every longer measured L; only where it crosses."""
    interval: tuple[float, float] | None = None
    """The same from the ends of the two confidence intervals; None if one end does not cross."""
    first_length: int = 0
    last_length: int = 0
    last_speedup: float = math.nan
    dense: str = ""
    """The fastest dense attention at the last L: `flash_attn_3, bf16`."""
    flagged: bool = False
    """Some time that this rests on is in doubt."""
    left_out: tuple[str, ...] = ()
    """The suspect times that this would have rested on: `DSA at 64K`, `triton at 128K`."""

    @property
    def is_compared(self) -> bool:
        """Whether DSA stands beside dense attention at some L."""
        return self.outcome not in ("no dense", "suspect")


def crossing(
    lengths: Sequence[int], sparse: Sequence[float], dense: Sequence[float]
) -> float | None:
    """L at which the times meet for the last time, by log-log interpolation between neighbours.

    With r = ln(dense ÷ sparse), taken as linear in ln L between two lengths that were measured, the
    result is the zero behind which r stays positive. `lengths` ascend. None if r is positive at
    every length or not positive at the last one.
    """
    ratio = [math.log(d / s) for s, d in zip(sparse, dense, strict=True)]
    slower = [i for i, r in enumerate(ratio) if r <= 0]
    if not slower or slower[-1] == len(ratio) - 1:
        return None
    i = slower[-1]
    share = -ratio[i] / (ratio[i + 1] - ratio[i])
    low, high = math.log(lengths[i]), math.log(lengths[i + 1])
    return math.exp(low + share * (high - low))


def crossovers(table: pd.DataFrame) -> tuple[Crossover, ...]:
    """One crossover for each line of `ok` DSA cases that differ in L alone.

    Times that are suspect or invalid count for nothing but `left_out`.
    """
    measured = table[(table["op"] == "dsa") & table["seconds"].notna()]
    groups = measured.groupby(list(frame.AXES), dropna=False, sort=False)
    return tuple(_of_line(dict(zip(frame.AXES, key, strict=True)), rows) for key, rows in groups)


def _of_line(axes: dict[str, object], rows: pd.DataFrame) -> Crossover:
    rows = rows.sort_values("seq_len_kv")
    left_out = _left_out(rows)
    rows = rows[rows["speedup"].notna()]
    if rows.empty:
        return Crossover(
            axes=axes, outcome="suspect" if left_out else "no dense", left_out=left_out
        )
    lengths = [int(n) for n in rows["seq_len_kv"]]
    speedups = list(rows["speedup"])
    at = crossing(lengths, list(rows["seconds"]), list(rows["dense_seconds"]))
    early = crossing(lengths, list(rows["seconds_low"]), list(rows["dense_high"]))
    late = crossing(lengths, list(rows["seconds_high"]), list(rows["dense_low"]))
    if len(lengths) == 1:
        outcome = "one length"
    elif at is not None:
        outcome = "crosses"
    else:
        outcome = "always" if speedups[-1] > 1 else "never"
    last = rows.iloc[-1]
    flags = [*rows["flags"], *rows["dense_flags"]]
    return Crossover(
        axes=axes,
        outcome=outcome,
        seq_len_kv=at,
        interval=(early, late) if at and early and late else None,
        first_length=lengths[0],
        last_length=lengths[-1],
        last_speedup=float(speedups[-1]),
        dense=f"{last['dense_impl']}, {last['dense_precision']}",
        flagged=any(isinstance(f, str) and f for f in flags),
        left_out=left_out,
    )


def _left_out(rows: pd.DataFrame) -> tuple[str, ...]:
    """The suspect times of a line and of its opponents, the shortest L first."""
    found = []
    for row, is_trusted in zip(frame.rows(rows), frame.trusted(rows), strict=True):
        length = format_length(row["seq_len_kv"])
        if not is_trusted:
            found.append(f"DSA at {length}")
        if isinstance(row["suspect_dense"], str):
            found.append(f"{row['suspect_dense']} at {length}")
    return tuple(found)


def headline(table: pd.DataFrame, found: Sequence[Crossover], run_label: str) -> str:
    """One sentence on one run: where DSA beats dense attention, by how much, in each phase."""
    rows = table[table["run_label"] == run_label]
    mine = [c for c in found if c.axes["run_label"] == run_label]
    phases = [p for p in ("prefill", "decode", "train") if (rows["phase"] == p).any()]
    if not phases:
        return f"On {run_label} no case was measured."
    if not (rows["op"] == "dsa").any():
        return _without_dsa(run_label, rows)
    chosen = {p: choose([c for c in mine if c.axes["phase"] == p]) for p in phases}
    clauses = [
        _clause(phase, chosen[phase], chosen.get(previous or ""), rows)
        for previous, phase in zip([None, *phases], phases, strict=False)
    ]
    text = f"On {run_label}, {'; '.join(clauses)}."
    if any(c is not None and c.flagged for c in chosen.values()):
        text += " Some of these times carry a doubt flag: see the table."
    lost = list(dict.fromkeys(one for c in chosen.values() if c is not None for one in c.left_out))
    if lost:
        more = f" and {len(lost) - MAX_NAMED} more" if len(lost) > MAX_NAMED else ""
        text += f" Left out as suspect: {', '.join(lost[:MAX_NAMED])}{more}."
    return text


def _without_dsa(run_label: str, rows: pd.DataFrame) -> str:
    """What a run measured that asked for no DSA."""
    timed = rows[rows["seconds"].notna()]
    if timed.empty:
        return f"On {run_label} no case has a time ({_endings(rows)})."
    names = [str(op) for op in timed["op"].unique()]
    if names == ["dense_attention"]:
        return f"On {run_label}, dense attention was measured; no DSA beside it, so no crossover."
    operators = "1 operator was" if len(names) == 1 else f"{len(names)} operators were"
    return (
        f"On {run_label}, {operators} measured: {', '.join(names)}; "
        "no DSA beside dense attention, so no crossover."
    )


def _endings(rows: pd.DataFrame) -> str:
    return ", ".join(f"{n} {status}" for status, n in rows["status"].value_counts().items())


def choose(found: Sequence[Crossover]) -> Crossover | None:
    """The line a headline speaks of: of the default mode, k = 2048 if measured, the longest L, …"""

    def rank(c: Crossover) -> tuple[object, ...]:
        topk = c.axes["topk"]
        compared = c.is_compared
        return (
            compared,
            _mode_rank(c),
            topk == HEADLINE_TOPK,
            c.last_length,
            _number(topk),
            _number(c.axes["batch_size"]),
            c.last_speedup if compared else 0.0,
        )

    return max(found, key=rank, default=None)


def _mode_rank(c: Crossover) -> int:
    """3 for the mode that the phase has by default, 0 for the ones that answer other questions."""
    mode = c.axes["asked_mode"]
    if mode == AUTO_MODE:
        return 3
    usual = {"decode": "graph"}.get(str(c.axes["phase"]), "cold")
    return 2 if mode == usual else int(mode in ("graph", "cold"))


def _number(value: object) -> float:
    return float(value) if isinstance(value, Real) and value == value else 0.0


def describe(crossover: Crossover) -> str:
    """`k=2048, fp8`, and the mode if it was asked for: the DSA that a sentence speaks of."""
    topk, mode = _number(crossover.axes["topk"]), crossover.axes["asked_mode"]
    named = [f"k={topk:.0f}"] if topk else []
    named.append(str(crossover.axes["precision"]))
    return ", ".join(named + ([] if mode == AUTO_MODE else [str(mode)]))


def where(crossover: Crossover) -> str:
    """`in prefill`, `in decode at batch 32`."""
    phase = str(crossover.axes["phase"])
    batch = _number(crossover.axes["batch_size"])
    at_batch = f" at batch {batch:.0f}" if phase == "decode" or batch > 1 else ""
    return f"in {phase}{at_batch}"


def verdict(c: Crossover) -> str:
    """What a crossover says, as the end of a sentence whose subject is DSA."""
    last, times = format_length(c.last_length), format_ratio(c.last_speedup)
    dense = f"dense attention ({c.dense})"
    only = f"at L = {last}, the only L compared"
    fast = f"{times} as fast" if c.last_speedup > 1 else f"at {times} the speed of dense"
    match c.outcome:
        case "no dense":
            return "has no dense attention of the same shapes beside it"
        case "suspect":
            return "has no time beside dense attention that can be trusted"
        case "one length" if c.last_speedup > 1:
            return f"beats {dense} {only}: {times} as fast"
        case "one length":
            return f"does not beat {dense} {only}: {times} its speed"
        case "crosses":
            start = format_length(c.seq_len_kv or 0)
            return f"beats {dense} from L = {start} and is {fast} at {last}"
        case "always":
            span = f"{format_length(c.first_length)} to {last}"
            return f"beats {dense} at every L compared ({span}) and is {fast} at {last}"
        case _:
            return f"does not beat {dense} up to L = {last}, where it runs {fast}"


def _clause(phase: str, c: Crossover | None, before: Crossover | None, rows: pd.DataFrame) -> str:
    """What one phase gave; short where it only repeats the opponents of the phase before."""
    if c is not None and before is not None and _same_opponents(before, c):
        start, last = format_length(c.seq_len_kv or 0), format_length(c.last_length)
        return f"{where(c)} from L = {start}, {format_ratio(c.last_speedup)} as fast at {last}"
    if c is not None:
        return f"{where(c)} DSA ({describe(c)}) {verdict(c)}"
    ended = rows[(rows["phase"] == phase) & (rows["op"] == "dsa")]
    if ended.empty:
        return f"in {phase} no DSA case was asked for"
    return f"in {phase} no DSA case has a time ({_endings(ended)})"


def _same_opponents(a: Crossover, b: Crossover) -> bool:
    both_cross = a.outcome == b.outcome == "crosses"
    return both_cross and (describe(a), a.dense) == (describe(b), b.dense)
