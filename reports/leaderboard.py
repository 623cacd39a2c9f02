"""Who is fastest: the implementations of each operator, ranked shape by shape.

A place is taken among the trusted times of one shape, mode and run. Two whose intervals of the
median overlap are level: the order between them says nothing. What has no time stands behind, with
how it ended. An implementation that fails on hostile inputs keeps its place, with a mark.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pandas as pd

from dsa_bench.reports import frame, hostile, units
from dsa_bench.reports.digest import Digest
from dsa_bench.reports.naming import UNSAID, impl_text
from dsa_bench.reports.sheet import Sheet

SHAPE = (
    *("run", "op", "phase", "seq_len_kv", "seq_len_q", "topk", "precision", "batch_size"),
    *("lengths", "num_heads", "tensor_parallel", "inputs", "weights", "preset", "seed"),
    "asked_mode",
)
"""What the competitors have in common."""
TOLD = {"run_label": "run", "phase": "phase", "seq_len_kv": "L", "seq_len_q": "queries",
        "topk": "k", "precision": "precision", "batch_size": "batch", "lengths": "lengths",
        "num_heads": "heads", "tensor_parallel": "tp", "inputs": "inputs",
        "asked_mode": "mode"}  # fmt: skip
"""Columns that a ranking is told apart by; one that never changes, or is UNSAID, is left out."""
ALWAYS = ("phase", "seq_len_kv")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One implementation in a ranking."""

    impl: str
    seconds: float
    low: float
    high: float
    floor_share: float | None
    flaw: str = ""
    """`fails 4 of 22 hostile inputs`; empty where it fails on none, or none were tried."""

    @property
    def name(self) -> str:
        return f"{self.impl}{hostile.MARK if self.flaw else ''}"

    def is_level(self, other: "Place") -> bool:
        """The 95 % intervals of the two medians overlap."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """The implementations of one operator at one shape."""

    op: str
    row: Mapping[str, Any]
    """A case of it, for what tells the shape."""
    places: tuple[Place, ...]
    """The fastest first."""
    others: tuple[str, ...]
    """Without a time that counts: `sdpa (skipped)`."""

    @property
    def leaders(self) -> tuple[str, ...]:
        """The fastest and all that are level with it."""
        return tuple(p.impl for p in self.places if p.is_level(self.places[0]))


def rankings(
    cases: pd.DataFrame, flaws: Mapping[tuple[int, str], str] = MappingProxyType({})
) -> tuple[Ranking, ...]:
    """Every shape at which two or more implementations have a trusted time.

    `flaws` says of (run, key of a case) how it fails on hostile inputs.
    """
    table = cases.assign(trusted=frame.trusted(cases))
    found = []
    for _, group in table.groupby(list(SHAPE), sort=False, dropna=False):
        timed = group[group["trusted"] & group["seconds"].notna()].sort_values("seconds")
        if timed["impl"].nunique() < 2:
            continue
        rest = group[~group.index.isin(timed.index)]
        found.append(
            Ranking(
                op=str(group["op"].iloc[0]),
                row=frame.rows(group)[0],
                places=tuple(
                    _place(row, flaws.get((row["run"], row["key"]), ""))
                    for row in frame.rows(timed)
                ),
                others=tuple(_ending(row) for row in frame.rows(rest)),
            )
        )
    return tuple(found)


def _place(row: Mapping[str, Any], flaw: str) -> Place:
    seconds = float(row["seconds"])
    low, high = (row["seconds_low"], row["seconds_high"])
    share = row["floor_share"]
    return Place(
        impl=impl_text(str(row["impl"])),
        seconds=seconds,
        low=seconds if pd.isna(low) else float(low),
        high=seconds if pd.isna(high) else float(high),
        floor_share=None if pd.isna(share) else float(share),
        flaw=flaw,
    )


def _ending(row: Mapping[str, Any]) -> str:
    how = row["status"] if row["status"] != "ok" else row["doubt"]
    return f"{impl_text(str(row['impl']))} ({how})"


def standings(found: tuple[Ranking, ...]) -> dict[str, tuple[int, int, float]]:
    """impl, with its mark if it has one -> (shapes at which it leads, shapes at which it has a
    time, geometric mean of its time over that of the fastest there), the best mean first."""
    ratios: dict[str, list[float]] = {}
    led: dict[str, int] = {}
    names: dict[str, str] = {}
    for ranking in found:
        for place in ranking.places:
            ratios.setdefault(place.impl, []).append(place.seconds / ranking.places[0].seconds)
            led[place.impl] = led.get(place.impl, 0) + (place.impl in ranking.leaders)
            # a mark is longer than none
            names[place.impl] = max(names.get(place.impl, ""), place.name, key=len)
    means = {impl: math.exp(sum(map(math.log, r)) / len(r)) for impl, r in ratios.items()}
    return {
        names[impl]: (led[impl], len(ratios[impl]), means[impl])
        for impl in sorted(means, key=lambda name: means[name])
    }


def sheets(report: Digest) -> list[Sheet]:
    """One leaderboard an operator."""
    found = rankings(report.cases, hostile.flaws(report))
    ops = dict.fromkeys(ranking.op for ranking in found)
    return [_sheet(op, tuple(r for r in found if r.op == op)) for op in ops]


def _sheet(op: str, found: tuple[Ranking, ...]) -> Sheet:
    told = [name for name in TOLD if name in ALWAYS or _differs(found, name)]
    most = max(len(ranking.places) for ranking in found)
    names = [TOLD[name] for name in told]
    has_others = any(ranking.others for ranking in found)
    return Sheet(
        title=f"Leaderboard: {op}",
        head=(*names, *(f"{i + 1}." for i in range(most)), *["no time"] * has_others),
        rows=tuple(_row(ranking, told, most, has_others) for ranking in found),
        notes=(
            _note(found),
            "behind the first: its time over the fastest; ≈: the intervals of the two overlap",
            *_flaw_notes(found),
        ),
        num_names=len(names),
    )


def _flaw_notes(found: tuple[Ranking, ...]) -> list[str]:
    """What each mark stands for, once."""
    flawed = [place for ranking in found for place in ranking.places if place.flaw]
    return list(dict.fromkeys(f"{hostile.MARK} {p.impl}: {p.flaw}" for p in flawed))


def _differs(found: tuple[Ranking, ...], name: str) -> bool:
    values = {str(ranking.row[name]) for ranking in found}
    return len(values) > 1 or (name in UNSAID and values != {UNSAID[name]})


def _row(ranking: Ranking, told: list[str], most: int, has_others: bool) -> tuple[str, ...]:
    places = [_place_text(ranking, place) for place in ranking.places]
    blanks = [""] * (most - len(places))
    others = [", ".join(ranking.others)] * has_others
    return (*(_told(ranking.row[name], name) for name in told), *places, *blanks, *others)


def _told(value: Any, name: str) -> str:
    if pd.isna(value):
        return units.MISSING
    is_size = name in ("seq_len_kv", "seq_len_q", "topk")
    return units.format_length(value) if is_size else str(value)


def _place_text(ranking: Ranking, place: Place) -> str:
    first = ranking.places[0]
    if place is first:
        share = (
            ""
            if place.floor_share is None
            else f", {units.format_share(place.floor_share)} of floor"
        )
        return f"{place.name} {units.format_seconds(place.seconds)}{share}"
    level = "≈" if place.is_level(first) else ""
    return f"{place.name} {level}{units.format_ratio(place.seconds / first.seconds)}"


def _note(found: tuple[Ranking, ...]) -> str:
    parts = [
        f"{impl} leads or is level at {led} of {timed}, mean {units.format_ratio(mean)}"
        for impl, (led, timed, mean) in standings(found).items()
    ]
    return "; ".join(parts)
