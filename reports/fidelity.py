"""Figures of how near the sparse output is to the dense one: a panel for each kind of inputs."""

from collections.abc import Callable
from dataclasses import dataclass

from dsa_bench.contest import SPARSE
from dsa_bench.record import RANDOM_INPUTS
from dsa_bench.reports import lines, units
from dsa_bench.reports.chart import Axis, Figure
from dsa_bench.reports.digest import Digest
from dsa_bench.reports.series import LENGTH, line_series


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measure:
    """One figure of the gate, and the words round it."""

    name: str
    column: str
    title: str
    question: str
    meaning: str
    axis: str
    text: Callable[[float], str]
    log: bool = False


ERROR = _Measure(
    name="error",
    column="dense_error",
    title="Distance from dense attention",
    question="How far is the sparse output from the dense one?",
    meaning="Relative L2 distance. It says how much the tokens that were not selected matter on "
    "these inputs, not how good a trained model is.",
    axis="relative L2 distance",
    text=units.format_error,
    log=True,
)
MASS = _Measure(
    name="mass",
    column="mass_kept",
    title="Attention mass kept",
    question="How much of the dense attention lies on the selected tokens?",
    meaning="Share of the dense softmax that falls on the selection, mean over heads and queries.",
    axis="share of attention mass",
    text=units.format_spread,
)
RECALL = _Measure(
    name="recall",
    column="recall",
    title="Recall of the selection",
    question="How many of the tokens that exact scores select does the selection hold?",
    meaning="Share of the top-k of exact fp32 index scores that was selected.",
    axis="share of the exact top-k",
    text=units.format_spread,
)


def error(report: Digest) -> list[Figure]:
    """Distance of the sparse output from the dense one on the same inputs."""
    return _figures(report, ERROR)


def mass(report: Digest) -> list[Figure]:
    """Share of the dense attention that the selection keeps."""
    return _figures(report, MASS)


def recall(report: Digest) -> list[Figure]:
    """Share of the exact selection that the one of the kernels holds."""
    return _figures(report, RECALL)


def _figures(report: Digest, measure: _Measure) -> list[Figure]:
    rows = report.cases[(report.cases[measure.column] > 0) & report.cases["op"].isin(SPARSE)]
    return [
        Figure(
            name=f"{measure.name}-{panel.slug}",
            title=f"{measure.title}, {panel.title}",
            question=measure.question,
            answer=f"{measure.meaning} {_inputs_text(str(panel.rows['inputs'].iloc[0]))}",
            x=LENGTH,
            y=Axis(title=measure.axis, text=measure.text, log=measure.log),
            series=tuple(line_series(line, measure.column) for line in panel.lines),
        )
        for panel in lines.panels(rows, by=("inputs",))
    ]


def _inputs_text(inputs: str) -> str:
    kind = "made-up random" if inputs == RANDOM_INPUTS else inputs
    return f"Inputs: {units.shorten(kind, 60)}."
