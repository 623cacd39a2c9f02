"""What a layer's time goes to, by groups of stages: figures and tables."""

from dataclasses import dataclass

import pandas as pd

from dsa_bench.contest import LAYER
from dsa_bench.reports import breakdown, frame, lines, naming, units
from dsa_bench.reports.chart import Axis, Figure
from dsa_bench.reports.digest import Digest
from dsa_bench.reports.series import LENGTH, bar_series, overlay
from dsa_bench.reports.sheet import Sheet

GLUE = "glue"
OTHER = "other"
GROUPS = {
    "projections": ("linear", "head_linear"),
    GLUE: (
        *("rms_norm", "quantize", "query_rope", "index_query", "cache_write", "cache_read"),
        "page_slots",
    ),
    "indexer": ("indexer", "paged_indexer"),
    "top-k": ("topk",),
    "attention": ("sparse_prefill", "masked_prefill", "sparse_decode", "dense_attention"),
    OTHER: (),
}
"""Group -> its stages, in the order in which bars are stacked; `other` has what is not named."""
GROUP_OF = {stage: group for group, stages in GROUPS.items() for stage in stages}
GLUE_TEXT = "norms, rotation, quantisation, index queries, caches, slots"


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """One layer at every L: seconds of each group, and the cases that they are of."""

    kind: str
    """`sparse` or `dense`."""
    title: str
    slug: str
    cases: pd.DataFrame
    groups: pd.DataFrame
    """Columns seq_len_kv, group, seconds, share, flags, doubt."""

    @property
    def top(self) -> float:
        """The highest of bars and timed calls."""
        bars = self.groups.groupby("seq_len_kv")["seconds"].sum()
        return float(max(bars.max(), self.cases["seconds"].max()))

    def share(self, group: str, length: float) -> float:
        """Share of the kernel time at one L."""
        at = self.groups[self.groups["seq_len_kv"] == length]
        return float(at.loc[at["group"] == group, "share"].sum())


def budgets(report: Digest) -> list[tuple[Budget, ...]]:
    """The sparse layer that the headline speaks of, and with it its dense opponent."""
    made = []
    for panel in lines.bar_panels(report, "seconds"):
        if panel.contest != LAYER.name:
            continue
        dense = breakdown.dense_peers(report.cases, panel.rows)
        parts = [("sparse", panel.rows), ("dense", dense[dense["seconds"].notna()])]
        pair = tuple(found for kind, rows in parts if (found := _budget(kind, rows, panel, report)))
        made += [pair] if pair else []
    return made


def figures(report: Digest) -> list[Figure]:
    """Stacked bars over L, those of the sparse and of the dense layer on the same axis."""
    return [
        _figure(budget, reach=max(each.top for each in pair))
        for pair in budgets(report)
        for budget in pair
    ]


def sheets(report: Digest) -> list[Sheet]:
    """Time and share of each group at each L."""
    return [_sheet(budget) for pair in budgets(report) for budget in pair]


def _budget(kind: str, rows: pd.DataFrame, panel: lines.Panel, report: Digest) -> Budget | None:
    stages = breakdown.stages_of(rows, report)
    if stages.empty:
        return None
    stages = stages.assign(
        group=stages["stage"].map(GROUP_OF).fillna(OTHER), seconds=pd.to_numeric(stages["seconds"])
    )
    groups = stages.groupby(["seq_len_kv", "group"], as_index=False, sort=True).agg(
        seconds=("seconds", "sum"), flags=("flags", "first"), doubt=("doubt", "first")
    )
    total = groups.groupby("seq_len_kv")["seconds"].transform("sum")
    place = panel.title.replace(", layer", "", 1)
    # of the dense layer neither k nor the sparse precision is true
    of_dense = f"{place.split(', k=')[0]}, {rows['precision'].iloc[-1]}"
    name = naming.operator_text(rows["op"].iloc[0])
    return Budget(
        kind=kind,
        title=f"{name}, {place if kind == 'sparse' else of_dense}",
        slug=f"{kind}-{panel.slug}",
        cases=rows,
        groups=groups.assign(share=groups["seconds"] / total.where(total > 0)),
    )


def _figure(budget: Budget, reach: float) -> Figure:
    bars = [
        bar_series(
            group,
            f"stage{rank}",
            budget.groups[budget.groups["group"] == group],
            "seconds",
            units.format_seconds,
        )
        for rank, group in enumerate(GROUPS)
    ]
    timed = overlay("timed call", budget.cases, "seconds", units.format_seconds)
    return Figure(
        name=f"budget-{budget.slug}",
        title=f"Budget of the {budget.title}",
        question="Which part of a layer takes the time?",
        answer=f"{_glue_sentence(budget)} Bars: the profiler's pass; diamonds: the timed call, "
        "launches and gaps included.",
        kind="bars",
        x=LENGTH,
        y=Axis(title="time of one call", text=units.format_seconds, log=False),
        series=(*(bar for bar in bars if bar.points), timed),
        reach=reach,
    )


def _glue_sentence(budget: Budget) -> str:
    lengths = sorted(budget.groups["seq_len_kv"].unique())
    told = [
        f"{units.format_spread(budget.share(GLUE, n))} at {units.format_length(n)}" for n in lengths
    ]
    return f"Glue ({GLUE_TEXT}), share of the kernel time: {', '.join(told)}."


def _sheet(budget: Budget) -> Sheet:
    found = [group for group in GROUPS if group != OTHER or (budget.groups["group"] == OTHER).any()]
    rows = []
    for length, part in budget.groups.groupby("seq_len_kv"):
        timed = budget.cases.loc[budget.cases["seq_len_kv"] == length, "seconds"].iloc[0]
        by_group = {str(row["group"]): row for row in frame.rows(part)}
        cells = [_cell(by_group.get(group)) for group in found]
        total = units.format_seconds(float(part["seconds"].sum()))
        name = units.format_length(float(str(length)))
        rows.append((name, *cells, total, units.format_seconds(float(timed))))
    return Sheet(
        title=f"Budget of the {budget.title}",
        head=("L", *found, "kernels", "timed call"),
        rows=tuple(rows),
        notes=(_glue_sentence(budget), "share: of the kernel time, from the profiler's pass"),
    )


def _cell(row: dict[str, object] | None) -> str:
    if row is None:
        return units.MISSING
    seconds, share = (float(str(row[name])) for name in ("seconds", "share"))
    return f"{units.format_seconds(seconds)} ({units.format_spread(share)})"
