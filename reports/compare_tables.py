"""A comparison as text: rows for the terminal, Markdown, JSON lines, and one sentence."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from dsa_bench.record import Case
from dsa_bench.reports.compare import Comparison, LeftOut, Row
from dsa_bench.reports.units import MISSING, clean, format_seconds

Label = Callable[[Case], str]
HEAD = ("verdict", "case", "BASE", "NEW", "NEW ÷ BASE", "95 % interval", "SM clock", "note")
NUMBERS = frozenset({"BASE", "NEW", "NEW ÷ BASE", "95 % interval"})
OPTIONAL = ("SM clock", "note")
"""Left out where no row has a text there."""
TOLD_APART_BY = ("mode", "preset", "num_heads", "batch_size", "seq_len_q", "seed")


def rows(found: Comparison, label: Label) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Head and rows of the table of verdicts."""
    names = labels([row.case for row in found.rows], label)
    table = [_cells(row, name) for row, name in zip(found.rows, names, strict=True)]
    kept = [
        i for i, title in enumerate(HEAD) if title not in OPTIONAL or any(row[i] for row in table)
    ]
    head = tuple(HEAD[i] for i in kept)
    return head, tuple(tuple(row[i] for i in kept) for row in table)


def left_out_rows(found: Comparison, label: Label) -> tuple[tuple[str, str], ...]:
    """Name and reason of each case without a verdict."""
    names = labels([each.case for each in found.left_out], label)
    return tuple(
        (name, clean(each.reason)) for name, each in zip(names, found.left_out, strict=True)
    )


def labels(cases: Sequence[Case], label: Label) -> tuple[str, ...]:
    """A name for each case; equal names get the fields that tell these cases apart."""
    plain = [clean(label(case)) for case in cases]
    alike: dict[str, list[Case]] = {}
    for case, name in zip(cases, plain, strict=True):
        alike.setdefault(name, []).append(case)
    apart = {
        name: [f for f in TOLD_APART_BY if len({getattr(case, f) for case in group}) > 1]
        for name, group in alike.items()
    }
    return tuple(
        clean(" ".join([name, *(f"{field}={getattr(case, field)}" for field in apart[name])]))
        for case, name in zip(cases, plain, strict=True)
    )


def summary(found: Comparison) -> str:
    """`40 cases: 38 same, 1 faster, 1 slower`, and how many could not be compared."""
    order = ("same", "faster", "slower", "broken", "inconclusive")
    parts = [f"{found.counts[verdict]} {verdict}" for verdict in order if found.counts[verdict]]
    count = len(found.rows)
    text = f"{count} case{'' if count == 1 else 's'}"
    text += f": {', '.join(parts)}" if parts else ""
    return f"{text}; not compared: {len(found.left_out)}" if found.left_out else text


def opening(found: Comparison) -> tuple[str, ...]:
    """What is compared with what, and what stands against it."""
    sides = (("BASE", found.base), ("NEW", found.new))
    return (
        *(f"{name} {side['path']}: {side['machine']}, {side['started']}" for name, side in sides),
        *found.caveats,
    )


def notes(found: Comparison) -> tuple[str, ...]:
    """How to read the table, and what would make it say more."""
    threshold = f"{100 * found.threshold:g} %"
    out = [
        "NEW ÷ BASE of the medians: above 1 is slower. faster, slower: the true ratio is more than"
        f" {threshold} from 1; same: it is less."
    ]
    if found.geometric_mean is not None:
        out.append(f"geometric mean of all ratios: {_ratio_text(found.geometric_mean)}")
    if found.counts["inconclusive"]:
        out.append(
            f"inconclusive: the interval is too wide to tell at {threshold}"
            " (measure both again with more --replicates, or with --effort precise)"
        )
    sides = [side for row in found.rows for side in (row.base, row.new) if side]
    if any(side.replicates == 1 for side in sides):
        out.append(
            "one process on a side: the interval leaves out how processes differ"
            " (measure with --replicates 3)"
        )
    return tuple(out)


def markdown(found: Comparison, label: Label) -> str:
    """A table that pastes into a pull request."""
    # loads pandas, which the terminal need not wait for
    from dsa_bench.reports.tables import escape_markdown

    head, body = rows(found, label)
    rule = ["---:" if title in NUMBERS else "---" for title in head]
    escaped = [[escape_markdown(text) for text in row] for row in body]
    parts = [f"**{escape_markdown(summary(found))}**"]
    parts.append("\n".join(f"* {escape_markdown(line)}" for line in opening(found)))
    if body:
        parts.append(_bars([list(head), rule, *escaped]))
    parts.append("\n".join(escape_markdown(note) for note in notes(found)))
    left_out = [[escape_markdown(text) for text in row] for row in left_out_rows(found, label)]
    if left_out:
        parts.append(_bars([["not compared", "why"], ["---", "---"], *left_out]))
    return "\n\n".join(parts) + "\n"


def json_objects(found: Comparison, label: Label) -> tuple[dict[str, Any], ...]:
    """One object a case, then a summary; SI units, null where there is no number."""
    names = labels([row.case for row in found.rows], label)
    cases = [_row_json(row, name) for row, name in zip(found.rows, names, strict=True)]
    names = labels([each.case for each in found.left_out], label)
    cases += [_left_out_json(*pair) for pair in zip(found.left_out, names, strict=True)]
    end = {
        "text": summary(found),
        "base": dict(found.base),
        "new": dict(found.new),
        "threshold": found.threshold,
        "counts": found.counts,
        "not_compared": len(found.left_out),
        "geometric_mean": _finite(found.geometric_mean),
        "caveats": list(found.caveats),
        "has_regression": found.has_regression,
    }
    return (*cases, {"summary": end})


def _cells(row: Row, name: str) -> tuple[str, ...]:
    base, new = (
        MISSING if side is None else format_seconds(side.seconds) for side in (row.base, row.new)
    )
    middle = _ratio_text(row.ratio.middle) if row.ratio else MISSING
    interval = MISSING
    if row.ratio:
        interval = f"{_ratio_text(row.ratio.low)} to {_ratio_text(row.ratio.high)}"
    return (row.verdict, name, base, new, middle, interval, _clock_text(row), clean(row.note))


def _clock_text(row: Row) -> str:
    clocks = [side.clock_mhz if side else None for side in (row.base, row.new)]
    if clocks == [None, None]:
        return ""
    base, new = (MISSING if clock is None else f"{clock:.0f}" for clock in clocks)
    return f"{base} → {new} MHz"


def _ratio_text(value: float) -> str:
    """Three decimals: at a threshold of 2 % the third figure counts."""
    return f"{value:.3f}"


def _row_json(row: Row, name: str) -> dict[str, Any]:
    ratio = row.ratio
    return {
        "key": row.case.key,
        "name": name,
        "case": row.case.to_json(),
        "verdict": row.verdict,
        "note": row.note,
        **_side_json("base", row.base),
        **_side_json("new", row.new),
        "ratio": _finite(ratio.middle if ratio else None),
        "ratio_low": _finite(ratio.low if ratio else None),
        "ratio_high": _finite(ratio.high if ratio else None),
        "log_se": _finite(ratio.log_se if ratio else None),
        "dof": _finite(ratio.dof if ratio else None),
        "p_unchanged": _finite(row.p_unchanged),
        "cycle_ratio": _finite(row.cycle_ratio),
    }


def _side_json(prefix: str, side: Any) -> dict[str, Any]:
    fields = ("seconds", "replicates", "clock_mhz")
    values = dataclasses.asdict(side) if side else {}
    return {f"{prefix}_{field}": _finite(values.get(field)) for field in fields}


def _left_out_json(each: LeftOut, name: str) -> dict[str, Any]:
    start = {"key": each.case.key, "name": name, "case": each.case.to_json()}
    return start | {"verdict": None, "not_compared": each.kind, "note": each.reason}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _bars(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
