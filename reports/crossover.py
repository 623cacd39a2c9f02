"""From which length sparse is faster than dense, and the sentence that says so."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import pandas as pd

from dsa_bench.contest import CONTESTS, SPARSE, SPARSE_BESIDE, Contest
from dsa_bench.record import AUTO_MODE, EQUAL_LENGTHS, RANDOM_INPUTS
from dsa_bench.reports import beside, frame, naming
from dsa_bench.reports.units import format_length, format_ratio

HEADLINE_TOPK = 2048
"""Tokens that DeepSeek-V3.2 selects: the k of the headline where it was measured."""

MAX_NAMED = 4
"""Suspect times that a headline names; the others are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossover:
    """Where one line of sparse cases over L meets the fastest dense opponent."""

    axes: dict[str, object]
    """The values of frame.AXES that these cases share."""
    outcome: str
    """`crosses`, `always`, `never`, `one length`; `no dense`: no L has both times; `suspect`: some
    L has both, but none that can be trusted.
    """
    seq_len_kv: float | None = None
    """L from which sparse is faster at every longer measured L; only where it crosses."""
    interval: tuple[float, float] | None = None
    """The same from the ends of the two confidence intervals; None if one end does not cross."""
    first_length: int = 0
    last_length: int = 0
    last_speedup: float = math.nan
    dense: str = ""
    """The fastest dense opponent at the last L: `flash_attn_3, bf16`."""
    flagged: bool = False
    """Some time that this rests on is in doubt."""
    left_out: tuple[str, ...] = ()
    """The suspect times that this would have rested on: `DSA at 64K`, `triton at 128K`."""

    @property
    def contest(self) -> str:
        """`attention` or `layer`."""
        return naming.contest_of(self.axes["op"])

    @property
    def is_compared(self) -> bool:
        """Whether sparse stands beside dense at some L."""
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
    """One crossover for each line of `ok` sparse cases that differ in L alone.

    Times that are suspect or invalid count for nothing but `left_out`.
    """
    measured = table[table["op"].isin(SPARSE) & table["seconds"].notna()]
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
    outcome, at, interval = meeting(rows)
    last = rows.iloc[-1]
    flags = [*rows["flags"], *rows["dense_flags"]]
    return Crossover(
        axes=axes,
        outcome=outcome,
        seq_len_kv=at,
        interval=interval,
        first_length=lengths[0],
        last_length=lengths[-1],
        last_speedup=float(speedups[-1]),
        dense=f"{naming.impl_text(last['dense_impl'])}, {last['dense_precision']}",
        flagged=any(isinstance(f, str) and f for f in flags),
        left_out=left_out,
    )


def meeting(rows: pd.DataFrame) -> tuple[str, float | None, tuple[float, float] | None]:
    """(outcome, L, interval) of rows that ascend in L, with their opponents' times beside them."""
    lengths = [int(n) for n in rows["seq_len_kv"]]
    own, other = (list(rows[name]) for name in ("seconds", "dense_seconds"))
    at = crossing(lengths, own, other)
    early = crossing(lengths, list(rows["seconds_low"]), list(rows["dense_high"]))
    late = crossing(lengths, list(rows["seconds_high"]), list(rows["dense_low"]))
    interval = (early, late) if at and early and late else None
    if len(lengths) == 1:
        return "one length", at, interval
    if at is not None:
        return "crosses", at, interval
    return ("always" if own[-1] < other[-1] else "never"), at, interval


def _left_out(rows: pd.DataFrame) -> tuple[str, ...]:
    """The suspect times of a line and of its opponents, the shortest L first."""
    found = []
    for row, is_trusted in zip(frame.rows(rows), frame.trusted(rows), strict=True):
        length = format_length(row["seq_len_kv"])
        if not is_trusted:
            found.append(f"{naming.operator_text(row['op'])} at {length}")
        if isinstance(row["suspect_dense"], str):
            found.append(f"{row['suspect_dense']} at {length}")
    return tuple(found)


def headline(table: pd.DataFrame, found: Sequence[Crossover], run_label: str) -> str:
    """One sentence for each contest of a run: where sparse beats dense, and by how much."""
    rows = table[table["run_label"] == run_label]
    mine = [c for c in found if c.axes["run_label"] == run_label]
    if rows.empty:
        return f"On {run_label} no case was measured."
    if not rows["op"].isin(SPARSE).any():
        return _without_sparse(run_label, rows)
    chosen: list[Crossover] = []
    sentences = []
    for contest in CONTESTS:
        asked = rows[rows["contest"] == contest.name]
        if asked["op"].isin(SPARSE).any():
            text, used = _sentence(contest, asked, mine)
            texts, others = _less_exact(contest, asked, mine)
            against = beside.sentences(contest, asked, [c.axes for c in used])
            losing = [c for line in used for c in _losing_batches(line, mine)]
            told = [
                f"With {naming.axis_text('lengths', c.axes['lengths'])} {where(c)} it {verdict(c)}."
                for c in losing
            ]
            sentences += [text, *told, *against, *texts]
            chosen += [*used, *losing, *others]
    sentences[0] = f"On {run_label}, {sentences[0][0].lower()}{sentences[0][1:]}"
    if any(c.flagged for c in chosen):
        sentences.append("Some of these times carry a doubt flag: see the table.")
    lost = list(dict.fromkeys(one for c in chosen for one in c.left_out))
    if lost:
        more = f" and {len(lost) - MAX_NAMED} more" if len(lost) > MAX_NAMED else ""
        sentences.append(f"Left out as suspect: {', '.join(lost[:MAX_NAMED])}{more}.")
    return " ".join(sentences)


def _sentence(
    contest: Contest, rows: pd.DataFrame, found: Sequence[Crossover]
) -> tuple[str, list[Crossover]]:
    """What the phases of one contest gave, and the lines that this speaks of."""
    phases = [p for p in ("prefill", "decode", "train") if (rows["phase"] == p).any()]
    found = [c for c in found if c.axes["op"] in contest.sparse]
    chosen = {p: choose([c for c in found if c.axes["phase"] == p]) for p in phases}
    clauses = [
        _clause(contest, phase, chosen[phase], chosen.get(previous or ""), rows)
        for previous, phase in zip([None, *phases], phases, strict=False)
    ]
    text = "; ".join(clauses)
    return f"{text[:1].upper()}{text[1:]}.", [c for c in chosen.values() if c is not None]


def _losing_batches(line: Crossover, found: Sequence[Crossover]) -> list[Crossover]:
    """The same line over batches of other lengths, where sparse is faster only from a longer L."""

    def rest(c: Crossover) -> dict[str, object]:
        return {axis: value for axis, value in c.axes.items() if axis != "lengths"}

    same = [c for c in found if c.is_compared and c is not line and rest(c) == rest(line)]
    return [c for c in same if _first_faster(c) > _first_faster(line)]


def _first_faster(c: Crossover) -> float:
    """L from which sparse is faster at every longer measured L: 0 at all of them, ∞ at none."""
    if c.outcome == "crosses":
        return c.seq_len_kv or 0.0
    return 0.0 if c.last_speedup > 1 else math.inf


def _less_exact(
    contest: Contest, rows: pd.DataFrame, found: Sequence[Crossover]
) -> tuple[list[str], list[Crossover]]:
    """A sentence for each phase of a sparse operator that is shown beside, and their lines."""
    texts, used = [], []
    sparse = naming.sparse_text(contest.sparse[0])
    places = [(c.axes["op"], c.axes["phase"]) for c in found]
    for place in dict.fromkeys(p for p in places if p[0] in contest.sparse_beside):
        c = choose([c for c, its in zip(found, places, strict=True) if its == place])
        assert c is not None
        more, error = naming.SPARSE_BESIDE[str(place[0])], beside.rounding_text(rows, c.axes)
        told = f"{where(c)} {sparse} ({describe(c)}) {verdict(c)}"
        against = beside.against(contest, rows, c.axes)
        texts.append(f"With {more}, which is less exact{error}, {told}{against}.")
        used.append(c)
    return texts, used


def _without_sparse(run_label: str, rows: pd.DataFrame) -> str:
    """What a run measured that asked for nothing sparse."""
    timed = rows[rows["seconds"].notna()]
    if timed.empty:
        return f"On {run_label} no case has a time ({_endings(rows)})."
    names = [str(op) for op in timed["op"].unique()]
    for contest in CONTESTS:
        if names == [contest.dense]:
            sparse = naming.operator_text(contest.sparse[0])
            return (
                f"On {run_label}, {naming.DENSE[contest.name]} was measured; "
                f"no {sparse} beside it, so no crossover."
            )
    operators = "1 operator was" if len(names) == 1 else f"{len(names)} operators were"
    return (
        f"On {run_label}, {operators} measured: {', '.join(names)}; "
        "no DSA beside dense attention, so no crossover."
    )


def _endings(rows: pd.DataFrame) -> str:
    return ", ".join(f"{n} {status}" for status, n in rows["status"].value_counts().items())


def choose(found: Sequence[Crossover]) -> Crossover | None:
    """The line a headline speaks of: of the default mode, whole, k = 2048, the longest L, …"""

    def rank(c: Crossover) -> tuple[object, ...]:
        topk = c.axes["topk"]
        compared = c.is_compared
        return (
            # what is less exact stands for nothing but itself
            c.axes["op"] not in SPARSE_BESIDE,
            compared,
            _mode_rank(c),
            c.axes["inputs"] == RANDOM_INPUTS,
            c.axes["lengths"] == EQUAL_LENGTHS,
            # the masked form is one for short prompts
            c.axes["op"] != "masked_layer",
            -_number(c.axes["tensor_parallel"]),
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
    """`k=2048, fp8`, and what was asked for beyond the defaults: the line of a sentence."""
    defaults: dict[str, object] = {"tensor_parallel": 1, "inputs": RANDOM_INPUTS, "weights": ""}
    defaults |= {"lengths": EQUAL_LENGTHS, "asked_mode": AUTO_MODE}
    told = ["topk", "precision", *(a for a, d in defaults.items() if crossover.axes[a] != d)]
    return ", ".join(t for a in told if (t := naming.axis_text(a, crossover.axes[a])))


def where(crossover: Crossover) -> str:
    """`in prefill`, `in decode at batch 32`."""
    phase = str(crossover.axes["phase"])
    batch = _number(crossover.axes["batch_size"])
    at_batch = f" at batch {batch:.0f}" if phase == "decode" or batch > 1 else ""
    return f"in {phase}{at_batch}"


def verdict(c: Crossover) -> str:
    """What a crossover says, as the end of a sentence whose subject is sparse."""
    last, times = format_length(c.last_length), format_ratio(c.last_speedup)
    opponent = naming.DENSE[c.contest]
    dense = f"{opponent} ({c.dense})"
    only = f"at L = {last}, the only L compared"
    fast = f"{times} as fast" if c.last_speedup > 1 else f"at {times} the speed of dense"
    match c.outcome:
        case "no dense":
            return f"has no {opponent.removeprefix('the ')} of the same shapes beside it"
        case "suspect":
            return f"has no time beside {opponent} that can be trusted"
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


def _clause(
    contest: Contest, phase: str, c: Crossover | None, before: Crossover | None, rows: pd.DataFrame
) -> str:
    """What one phase gave; short where it only repeats the opponents of the phase before."""
    if c is not None and before is not None and _same_opponents(before, c):
        start, last = format_length(c.seq_len_kv or 0), format_length(c.last_length)
        return f"{where(c)} from L = {start}, {format_ratio(c.last_speedup)} as fast at {last}"
    if c is not None:
        return f"{where(c)} {naming.sparse_text(c.axes['op'])} ({describe(c)}) {verdict(c)}"
    ended = rows[(rows["phase"] == phase) & rows["op"].isin(contest.sparse)]
    sparse = naming.operator_text(contest.sparse[0])
    if ended.empty:
        return f"in {phase} no {sparse} case was asked for"
    return f"in {phase} no {sparse} case has a time ({_endings(ended)})"


def _same_opponents(a: Crossover, b: Crossover) -> bool:
    both_cross = a.outcome == b.outcome == "crosses"
    same_op = a.axes["op"] == b.axes["op"]
    return both_cross and same_op and (describe(a), a.dense) == (describe(b), b.dense)
