"""DeepSeek's published costs of its service, as curves that can stand beside measured ones."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from dsa_bench.reports import lines, units
from dsa_bench.reports.chart import Point, Series

COSTS = Path(__file__).parent / "data" / "published_costs.json"
NUM_HEADS = 128
"""Query heads of the model whose costs are published."""


@cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(COSTS.read_text(encoding="utf-8"))
    return data


def is_comparable(panel: lines.Panel) -> bool:
    """DeepSeek's figures are of a GPU, the full model, at a position (not over a whole prompt)."""
    row = panel.rows.iloc[0]
    full = row["preset"] == "v3.2" and row["num_heads"] == NUM_HEADS
    return bool(full and row["device"] == "cuda" and row["chunk"] > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One published curve at the price of a run."""

    model: str
    attention: str
    """`dense` or `dsa`."""
    vertices: tuple[tuple[float, float], ...]
    """(L, USD per million tokens), L ascends from 0."""


def curves(phase: str, gpu_hour_usd: float) -> tuple[Curve, ...]:
    """The curves of one phase, scaled to this price of a GPU."""
    data = _data()
    scale = gpu_hour_usd / data["gpu_hour_usd"]
    return tuple(
        Curve(
            model=str(curve["model"]),
            attention=str(curve["attention"]),
            vertices=tuple((float(x), scale * float(y)) for x, y in curve["points"]),
        )
        for curve in data["curves"]
        if curve["phase"] == phase
    )


def series(panel: lines.Panel, gpu_hour_usd: float) -> tuple[Series, ...]:
    """DeepSeek's curves at the L of this panel, less their value at L = 0, at this price."""
    measured = sorted({float(n) for n in panel.rows["seq_len_kv"]})
    made = []
    for curve in curves(panel.phase, gpu_hour_usd):
        (_, at_zero), (end, _) = curve.vertices[0], curve.vertices[-1]
        xs = sorted(
            {x for x in measured if x <= end} | {x for x, _ in curve.vertices if x >= measured[0]}
        )
        points = [(x, interpolate(curve.vertices, x) - at_zero) for x in xs]
        made.append(_dotted(curve, points))
    return tuple(one for one in made if one.points)


def absolute(phase: str, gpu_hour_usd: float) -> tuple[Series, ...]:
    """DeepSeek's curves as they were published, at this price."""
    return tuple(_dotted(curve, curve.vertices) for curve in curves(phase, gpu_hour_usd))


def _dotted(curve: Curve, points: Sequence[tuple[float, float]]) -> Series:
    return Series(
        label=f"DeepSeek {curve.model} (published)",
        role="published_dense" if curve.attention == "dense" else "published_sparse",
        style="dotted",
        shape="line",
        points=tuple(Point(x=x, y=y, text=units.format_usd(y)) for x, y in points),
    )


def interpolate(vertices: Sequence[tuple[float, float]], x: float) -> float:
    """Value at `x` of straight lines between vertices that ascend in x; constant beyond them."""
    for (x0, y0), (x1, y1) in pairwise(vertices):
        if x <= x1:
            return y0 + (y1 - y0) * max(0.0, x - x0) / (x1 - x0)
    return vertices[-1][1]


def caption(gpu_hour_usd: float) -> str:
    """What the published curves are, where they come from and what was done to them."""
    return source(
        gpu_hour_usd, "; its cost at L = 0 is taken off, so that what grows with L remains"
    )


def source(gpu_hour_usd: float, done: str = "") -> str:
    """What the dotted curves are and where they come from; `done` to them."""
    data = _data()
    price = f"${data['gpu_hour_usd']:g}"
    scaled = f", scaled from {price}" if gpu_hour_usd != data["gpu_hour_usd"] else ""
    return (
        f"Dotted: DeepSeek's service on {data['gpu']} at ${gpu_hour_usd:g} per GPU-hour{scaled}, "
        f"whole model{done}. Source: {data['source']}."
    )
