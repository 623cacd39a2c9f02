"""From which length the sparse layer in its MQA form is faster than in its masked MHA form."""

from collections.abc import Sequence

import pandas as pd

from dsa_bench.contest import LAYER
from dsa_bench.reports import crossover, frame, naming
from dsa_bench.reports.crossover import Crossover
from dsa_bench.reports.units import format_length

GATHERED, MASKED = LAYER.sparse
SAME = (*(axis for axis in frame.AXES if axis not in ("op", "impl")), "seq_len_kv", "seq_len_q")
"""What two forms of one layer have in common."""
OTHER = {"seconds": "dense_seconds", "seconds_low": "dense_low", "seconds_high": "dense_high"}


def switches(table: pd.DataFrame) -> tuple[Crossover, ...]:
    """Where each line of the MQA form meets the masked form; of a form the fastest time counts.

    The masked form stands where a crossover has the dense opponent.
    """
    timed = table[table["op"].isin(LAYER.sparse) & table["seconds"].notna()]
    axes = [axis for axis in frame.AXES if axis not in ("op", "impl")]
    made = []
    for key, rows in timed.groupby(axes, dropna=False, sort=False):
        if set(rows["op"]) == {GATHERED, MASKED}:
            found = _of_line(dict(zip(axes, key, strict=True)), rows)
            made += [found] if found else []
    return tuple(made)


def _of_line(axes: dict[str, object], rows: pd.DataFrame) -> Crossover | None:
    is_trusted = frame.trusted(rows)
    best = rows[is_trusted].sort_values("seconds", kind="stable")
    best = best.drop_duplicates(["op", "seq_len_kv", "seq_len_q"])
    own, masked = (best[best["op"] == op] for op in (GATHERED, MASKED))
    beside = masked[[*SAME, *OTHER, "flags"]].rename(columns=OTHER | {"flags": "masked_flags"})
    own = own.drop(columns=list(OTHER.values()))
    both = own.merge(beside, on=list(SAME), how="inner").sort_values("seq_len_kv")
    if both.empty:
        return None
    outcome, at, interval = crossover.meeting(both)
    last = both.iloc[-1]
    return Crossover(
        axes=axes | {"op": GATHERED, "impl": str(last["impl"])},
        outcome=outcome,
        seq_len_kv=at,
        interval=interval,
        first_length=int(both["seq_len_kv"].iloc[0]),
        last_length=int(last["seq_len_kv"]),
        last_speedup=float(last["dense_seconds"] / last["seconds"]),
        flagged=any(flags for flags in [*both["flags"], *both["masked_flags"]]),
        left_out=tuple(
            f"{naming.operator_text(row['op'])} at {format_length(row['seq_len_kv'])}"
            for row in frame.rows(rows[~is_trusted].sort_values("seq_len_kv"))
        ),
    )


def sentence(found: Sequence[Crossover], run_label: str) -> str:
    """Where one run switches from the masked form to the other; empty if it did not measure both.

    One sentence a phase, and as in a headline what it rests on.
    """
    mine = [each for each in found if each.axes["run_label"] == run_label]
    phases = dict.fromkeys(str(each.axes["phase"]) for each in mine)
    chosen = [crossover.choose([c for c in mine if c.axes["phase"] == p]) for p in phases]
    return " ".join(_sentence(each) for each in chosen if each is not None)


def _sentence(c: Crossover) -> str:
    text = f"{crossover.where(c).capitalize()} the sparse layer ({crossover.describe(c)}) "
    last, masked = format_length(c.last_length), "than its masked form"
    match c.outcome:
        case "crosses":
            spread = ""
            if c.interval:
                low, high = (format_length(end) for end in c.interval)
                spread = f" ({low} to {high})" if low != high else ""
            text += f"is faster {masked} from L = {format_length(c.seq_len_kv or 0)}{spread}"
        case "always":
            span = f"{format_length(c.first_length)} to {last}"
            text += f"is faster {masked} at every L compared ({span})"
        case "one length":
            is_faster = "is" if c.last_speedup > 1 else "is not"
            text += f"{is_faster} faster {masked} at L = {last}, the only L compared"
        case _:
            text += f"is not faster {masked} up to L = {last}"
    doubts = ["some times carry a doubt flag"] if c.flagged else []
    doubts += [f"left out as suspect: {', '.join(c.left_out)}"] if c.left_out else []
    return f"{text} ({'; '.join(doubts)})." if doubts else f"{text}."
