"""Which cases share a line over L, which lines a figure, and how both are named and coloured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import pandas as pd

from dsa_bench.contest import ATTENTION, CONTEST_OF, CONTESTS, DENSE, DENSE_BESIDE, SPARSE
from dsa_bench.record import PHASES
from dsa_bench.reports import crossover, frame, naming, units
from dsa_bench.reports.digest import Digest
from dsa_bench.reports.metrics import SHAPE

MAX_LINES = 8
"""More lines than this are hard to tell apart: the figure is split."""
SPLIT_ORDER = (
    *("preset", "weights", "num_heads", "tensor_parallel", "chunk", "inputs", "lengths"),
    *("batch_size", "seed", "asked_mode"),
)
"""Axes by which a figure is split, the first that varies first; run, phase and contest always."""
PANEL_AXES = ("run_label", *SPLIT_ORDER)
"""Axes that sparse and dense have in common."""
PHASE_RANKS = {phase: rank for rank, phase in enumerate(PHASES)}
CONTEST_RANKS = {contest.name: rank for rank, contest in enumerate(CONTESTS)}
DRAWN_AS_DENSE = DENSE | DENSE_BESIDE
STYLES = ("solid", "dashed", "dashdot", "dotted")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Cases that differ in L alone."""

    rows: pd.DataFrame
    label: str
    role: str
    style: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """Lines that are drawn in one figure."""

    rows: pd.DataFrame
    phase: str
    contest: str
    """`attention`, `layer`, or empty for operators on their own."""
    fixed: Mapping[str, Any]
    """Axes that all its cases share, and that a title may name."""
    lines: tuple[Line, ...]
    title: str
    slug: str
    """The title as part of a file name."""

    @property
    def opponent(self) -> str:
        """`dense attention` or `the dense layer`."""
        return naming.DENSE.get(self.contest, naming.DENSE[ATTENTION.name])


def panels(rows: pd.DataFrame, by: Sequence[str] = ()) -> list[Panel]:
    """Split rows by contest, run, phase, ranks, `by`, then until none has more than MAX_LINES."""
    rows = rows.assign(
        phase_rank=rows["phase"].map(PHASE_RANKS).fillna(len(PHASE_RANKS)),
        contest_rank=rows["contest"].map(CONTEST_RANKS).fillna(len(CONTEST_RANKS)),
    )
    groups = rows.groupby(["contest_rank", "run", "phase_rank", "phase", "tensor_parallel", *by])
    parts = [part for _, group in groups for part in _split(group)]
    made = [_panel(part, rows) for part in parts]
    return _unique_slugs(made)


def bar_panels(report: Digest, column: str) -> list[Panel]:
    """One sparse line for each contest, run and phase, the one the headline speaks of, as bars."""
    rows = report.cases[report.cases["op"].isin(SPARSE) & report.cases["seconds"].notna()]
    if column == "peak_bytes":
        rows = rows[rows["peak_bytes"].notna()]
    made = []
    for place, group in rows.groupby(["contest", "run_label", "phase"], sort=False):
        candidates = [
            c
            for c in report.crossovers
            if (c.contest, c.axes["run_label"], c.axes["phase"]) == place
        ]
        chosen = crossover.choose(candidates)
        if chosen is None:
            continue
        mine = group[[same_axes(chosen.axes, row) for _, row in group.iterrows()]]
        if mine.empty:
            continue
        panel = _panel(mine, rows)
        told = crossover.describe(chosen).split(", ")
        title = ", ".join(dict.fromkeys([panel.title, *(t for t in told if t not in panel.title)]))
        batch = f"batch {mine['batch_size'].iloc[0]}"
        if panel.phase == "decode" and batch not in title:
            title = f"{title}, {batch}"
        made.append(replace(panel, rows=mine, title=title))
    return _unique_slugs(made)


def largest_batch(rows: pd.DataFrame) -> pd.DataFrame:
    """Of decode only the largest batch that has a sparse case: the one nearest to a service."""
    if rows.empty:
        return rows
    decode = rows[rows["phase"] == "decode"]
    is_sparse = decode["op"].isin(SPARSE)
    place = ["run", "contest"]
    largest = decode["batch_size"].where(is_sparse).groupby([decode[p] for p in place])
    # where nothing sparse has a time, of all
    wanted = largest.transform("max").fillna(decode.groupby(place)["batch_size"].transform("max"))
    return rows.drop(index=decode.index[decode["batch_size"] != wanted])


def fastest_dense(rows: pd.DataFrame) -> pd.DataFrame:
    """All sparse cases, and of each shape the fastest dense case under the names of them all."""
    dense = rows[rows["op"].isin(DENSE)].sort_values("seconds", kind="stable")
    dense = dense.drop_duplicates(list(SHAPE))
    groups = dense.groupby(["run", "contest", "phase"])
    names = groups["impl"].transform(lambda s: " / ".join(sorted(set(s))))
    return pd.concat([rows[~rows["op"].isin(DENSE)], dense.assign(impl=names, precision="")])


def same_axes(axes: Mapping[str, object], row: Any) -> bool:
    """Whether a row has these values; a missing k equals a missing k."""
    return all(row[k] == v or (row[k] != row[k] and v != v) for k, v in axes.items())


def name_of(row: Mapping[str, Any]) -> str:
    """`DSA k=2048 fp8`, `dense flash_attn_3 bf16`, `topk gluon`."""
    return _label(row, ("op", "impl", "topk", "precision"))


def belongs(panel: Panel, row: Mapping[str, Any]) -> bool:
    """Whether a case without a time would have been drawn in this panel."""
    alike = all(row[k] == v for k, v in panel.fixed.items() if k in PANEL_AXES)
    is_rival = CONTEST_OF.get(row["op"]) == panel.contest
    return bool(row["phase"] == panel.phase and alike and is_rival)


def _split(rows: pd.DataFrame) -> list[pd.DataFrame]:
    if _num_lines(rows) <= MAX_LINES:
        return [rows]
    for axis in SPLIT_ORDER:
        if rows[axis].nunique() > 1:
            return [part for _, group in rows.groupby(axis, sort=True) for part in _split(group)]
    return [rows]


def _num_lines(rows: pd.DataFrame) -> int:
    return int(rows.groupby(list(frame.AXES), dropna=False).ngroups)


def _panel(rows: pd.DataFrame, everything: pd.DataFrame) -> Panel:
    fixed = {a: rows[a].iloc[0] for a in PANEL_AXES if rows[a].nunique() == 1}
    phase = str(rows["phase"].iloc[0])
    contest = str(rows["contest"].iloc[0])
    # a title names what tells this figure from the others, and the batch, which a time needs
    of_phase = everything[(everything["phase"] == phase) & (everything["contest"] == contest)]
    telling = [
        a
        for a in fixed
        if of_phase[a].nunique() > 1 or (a in naming.UNSAID and fixed[a] != naming.UNSAID[a])
    ]
    if "run_label" not in telling and everything["run_label"].nunique() > 1:
        telling.insert(0, "run_label")
    if phase == "decode" and "batch_size" in fixed and "batch_size" not in telling:
        telling.append("batch_size")
    named = {"contest": contest} | {axis: fixed[axis] for axis in telling}
    texts = [naming.axis_text(axis, value) for axis, value in named.items()]
    title = ", ".join([phase, *filter(None, texts)])
    varying = [a for a in frame.AXES if a not in ("op", "phase") and a not in fixed]
    return Panel(
        rows=rows,
        phase=phase,
        contest=contest,
        fixed=fixed,
        lines=tuple(_lines(rows, varying)),
        title=title,
        slug=slug_of(title),
    )


def slug_of(title: str) -> str:
    """A title as part of a file name: letters, digits and hyphens."""
    return "-".join(
        "".join(c if c.isascii() and c.isalnum() else " " for c in title).split()
    ).lower()


def _lines(rows: pd.DataFrame, varying: Sequence[str]) -> list[Line]:
    groups = [group for _, group in rows.groupby(list(frame.AXES), dropna=False, sort=False)]
    firsts = [group.iloc[0] for group in groups]
    sparse = [f for f in firsts if f["op"] not in DRAWN_AS_DENSE]
    shown = _telling_axes(sparse, varying)
    color_axis = "topk" if "topk" in shown else (shown[0] if shown else "")
    colors = _ranks(sparse, [color_axis] if color_axis else [])
    styles = _ranks(sparse, [a for a in shown if a != color_axis])
    dense = _ranks([f for f in firsts if f["op"] in DRAWN_AS_DENSE], ["impl", "precision"])
    dense_styles = _ranks(firsts, [a for a in varying if a in PANEL_AXES])
    made = []
    for group, first in zip(groups, firsts, strict=True):
        if first["op"] in DRAWN_AS_DENSE:
            key = (first["impl"], first["precision"])
            role = f"dense{min(dense[key], 2)}"
            style = STYLES[dense_styles[_key(first, [a for a in varying if a in PANEL_AXES])] % 4]
            label = _label(
                first, ("op", "impl", "precision", *(a for a in varying if a in PANEL_AXES))
            )
        else:
            role = f"sparse{colors[_key(first, [color_axis] if color_axis else [])] % 6}"
            style = STYLES[styles[_key(first, [a for a in shown if a != color_axis])] % 4]
            label = _label(first, tuple(dict.fromkeys(("op", "topk", "precision", *shown))))
        made.append(Line(rows=group, label=label, role=role, style=style))
    return sorted(made, key=lambda line: line.rows["op"].iloc[0] in DRAWN_AS_DENSE)


def _telling_axes(firsts: Sequence[Any], varying: Sequence[str]) -> list[str]:
    """Of the axes that vary in a figure, those that tell one sparse line from another."""
    axes = [a for a in ("op", *varying) if len({_key(f, [a]) for f in firsts}) > 1]
    # implementations of stages differ with the precision: named only where nothing else tells
    without = [a for a in axes if a != "impl"]
    enough = len({_key(f, without) for f in firsts}) == len({_key(f, axes) for f in firsts})
    return without if enough else axes


def _key(row: Any, axes: Sequence[str]) -> tuple[Any, ...]:
    return tuple(None if row[a] != row[a] else row[a] for a in axes)


def _ranks(firsts: Sequence[Any], axes: Sequence[str]) -> dict[tuple[Any, ...], int]:
    """Rank of each combination of values: the largest number first, else as they come."""
    keys = list(dict.fromkeys(_key(f, axes) for f in firsts))
    if all(isinstance(v, Real) for key in keys for v in key):
        keys = sorted(keys, reverse=True)
    return {key: i for i, key in enumerate(keys)}


def _label(row: Any, axes: Sequence[str]) -> str:
    return units.shorten(" ".join(t for axis in axes if (t := naming.axis_text(axis, row[axis]))))


def _unique_slugs(made: Sequence[Panel]) -> list[Panel]:
    """The same panels with a number behind a slug that came before: each is the stem of a file."""
    seen: dict[str, int] = {}
    unique = []
    for panel in made:
        seen[panel.slug] = seen.get(panel.slug, 0) + 1
        slug = panel.slug if seen[panel.slug] == 1 else f"{panel.slug}-{seen[panel.slug]}"
        unique.append(replace(panel, slug=slug))
    return unique
