"""Every figure once, as data: what it asks, its axes, lines and marks. Nothing is drawn here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsa_bench.reports import breakdown, budget, curves, estimate_view, fidelity
from dsa_bench.reports.chart import Figure
from dsa_bench.reports.digest import Digest


@dataclass(frozen=True, kw_only=True, slots=True)
class Maker:
    """One kind of figure: a function from a digest to the figures it has data for."""

    name: str
    make: Callable[[Digest], Sequence[Figure]]


def figures(report: Digest) -> tuple[Figure, ...]:
    """All figures that have data, in the order in which a reader meets them."""
    return tuple(figure for maker in MAKERS for figure in maker.make(report))


MAKERS = (
    Maker(name="speedup", make=curves.speedup),
    Maker(name="cost", make=curves.cost),
    Maker(name="latency", make=curves.latency),
    Maker(name="estimate", make=estimate_view.figures),
    Maker(name="budget", make=budget.figures),
    Maker(name="stages", make=breakdown.stage_times),
    Maker(name="memory", make=breakdown.memory),
    Maker(name="rates", make=breakdown.rates),
    Maker(name="error", make=fidelity.error),
    Maker(name="mass", make=fidelity.mass),
    Maker(name="recall", make=fidelity.recall),
    Maker(name="operators", make=curves.operators),
)
