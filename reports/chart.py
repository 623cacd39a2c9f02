"""The parts of a figure as plain data, the colours, and where labels stand."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PALETTE: dict[str, tuple[str, str]] = {
    # after Okabe and Ito, told apart with every kind of colour blindness; (on white, on dark)
    "sparse0": ("#0072b2", "#56b4e9"),
    "sparse1": ("#d55e00", "#f08a3c"),
    "sparse2": ("#009e73", "#3fcf9f"),
    "sparse3": ("#b0578d", "#e39ac4"),
    "sparse4": ("#a07800", "#e0b93a"),
    "sparse5": ("#5b5bb5", "#a3a3f0"),
    "dense0": ("#1b1f24", "#f0f3f6"),
    "dense1": ("#6e7681", "#a5aeb8"),
    "dense2": ("#9aa3ad", "#7d8590"),
    "stage0": ("#56b4e9", "#56b4e9"),
    "stage1": ("#e69f00", "#e69f00"),
    "stage2": ("#0072b2", "#2f86c9"),
    "stage3": ("#cc79a7", "#cc79a7"),
    "stage4": ("#009e73", "#3fb68f"),
    "stage5": ("#8a8f98", "#8a8f98"),
    "published_dense": ("#6e7681", "#a5aeb8"),
    "published_sparse": ("#0072b2", "#56b4e9"),
    "ink": ("#1b1f24", "#f0f3f6"),
    "muted": ("#59636e", "#9ba5b0"),
    "grid": ("#e6e9ed", "#2b323b"),
    "win": ("#009e73", "#3fcf9f"),
    "lost": ("#c3342b", "#ff7b72"),
    "paper": ("#ffffff", "#161b22"),
}
"""Colour of each role on light and on dark paper."""

SHAPES = ("circle", "square", "triangle-up", "diamond")
DASHES = {"solid": (), "dashed": (7, 4), "dashdot": (8, 3, 2, 3), "dotted": (2, 3)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One axis: what it shows, how a tick reads, and where the ticks of a logarithmic one lie."""

    title: str
    text: Callable[[float], str]
    base: int = 10
    log: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One value over L, with what a reader sees when pointing at it."""

    x: float
    y: float
    text: str
    low: float | None = None
    high: float | None = None
    note: str = ""
    flags: str = ""
    """Reasons for doubt."""
    doubt: str = ""
    """`noisy`: drawn hollow; `suspect` or `invalid`: a cross that no line joins."""

    @property
    def is_trusted(self) -> bool:
        """Whether a line may go through it."""
        return self.doubt not in ("suspect", "invalid")


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line, one part of the bars, or loose points."""

    label: str
    role: str
    """Key of PALETTE."""
    points: tuple[Point, ...]
    style: str = "solid"
    """Key of DASHES."""
    shape: str = ""
    """Empty: line with markers; `line`: no markers; `points`: markers over bars."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """`level`: horizontal at y; `crossing`: where a line meets it; `lost`: a case without time."""

    kind: str
    label: str
    x: float | None = None
    y: float | None = None
    role: str = "ink"
    style: str = ""
    """Key of DASHES; empty: solid in a lead figure, else dashed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """All that a drawing needs, whoever draws."""

    name: str
    """Letters, digits and hyphens: the stem of a file."""
    title: str
    question: str
    answer: str
    """What the data say, worked out from them."""
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    kind: str = "lines"
    """`lines`, or `bars`: stacked, one bar for each L."""
    is_lead: bool = False
    """Belongs on the first screen."""
    reach: float = 0.0
    """The y axis goes at least so far: figures to be compared have one scale."""

    @property
    def lengths(self) -> list[float]:
        """All measured L of the figure, ascending; published curves do not count."""
        drawn = [s for s in self.series if s.shape != "line"]
        return sorted({p.x for s in drawn for p in s.points})

    @property
    def doubt_note(self) -> str:
        """How its points in doubt are drawn; empty where there are none."""
        found = {p.doubt for s in self.series for p in s.points} - {""}
        if self.kind == "bars":
            return "Hatched or pale: a time in doubt." if found else ""
        notes = ["Hollow: noisy."] if "noisy" in found else []
        if found - {"noisy"}:
            notes.append("Cross, not joined by the line: suspect or invalid.")
        return " ".join(notes)


def y_domain(figure: Figure) -> tuple[float, float]:
    """Ends of the y axis: all values and levels, with room above and below."""
    values = [v for s in figure.series for p in s.points for v in (p.y, p.low, p.high) if v]
    values += [m.y for m in figure.marks if m.y]
    if figure.kind == "bars":
        values = [*_bar_tops(figure), *values, figure.reach]
    positive = [v for v in values if v > 0]
    if not positive:
        return (0.1, 1.0) if figure.y.log else (0.0, 1.0)
    low, high = min(positive), max(positive)
    if not figure.y.log:
        return 0.0, high * 1.08
    # a fourteenth of the span at each end, at least a quarter of a doubling
    pad = max((math.log(high) - math.log(low)) / 14, math.log(2) / 4)
    return math.exp(math.log(low) - pad), math.exp(math.log(high) + pad)


def x_domain(figure: Figure) -> tuple[float, float]:
    """Ends of the x axis; one length alone still gets an axis."""
    xs = [p.x for s in figure.series for p in s.points] + [m.x for m in figure.marks if m.x]
    low, high = min(xs), max(xs)
    if not figure.x.log:
        return 0.0, high
    return (low / 2**0.5, high * 2**0.5) if low == high else (low, high)


def ticks(axis: Axis, low: float, high: float) -> list[float]:
    """Round values between the ends: powers of 2, 1-2-5 steps of decades, or even steps."""
    if not axis.log:
        return _even_ticks(low, high, axis.base)
    found = _log_ticks(axis.base, low, high)
    return found if len(found) > 1 else _even_ticks(low, high, 10)


def end_label(figure: Figure, series: Series) -> str:
    """The name of a line at the right edge; of one that ends before the edge, also where."""
    last = series.points[-1].x
    if last >= x_domain(figure)[1] or len(figure.lengths) == 1:
        return series.label
    return f"{series.label}, to {figure.x.text(last)}"


def label_heights(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights (0 bottom, 1 top) near the wanted ones, in their order, at least `gap` apart.

    Neighbours that are too close form a group that is spread round its mean; groups that touch are
    joined until none touch, so each label moves as little as it can.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[int]] = []
    for i in order:
        groups.append([i])
        while (
            len(groups) > 1
            and _bottom(groups[-1], wanted, gap) < _top(groups[-2], wanted, gap) + gap
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    heights = [0.0] * len(wanted)
    for group in groups:
        for rank, i in enumerate(group):
            heights[i] = _bottom(group, wanted, gap) + rank * gap
    return heights


def _bottom(group: Sequence[int], wanted: Sequence[float], gap: float) -> float:
    middle = sum(wanted[i] for i in group) / len(group)
    return middle - gap * (len(group) - 1) / 2


def _top(group: Sequence[int], wanted: Sequence[float], gap: float) -> float:
    return _bottom(group, wanted, gap) + gap * (len(group) - 1)


def _bar_tops(figure: Figure) -> list[float]:
    stacked = [s for s in figure.series if s.shape != "points"]
    return [
        sum(p.y for s in stacked for p in s.points if p.x == length) for length in figure.lengths
    ]


def _log_ticks(base: int, low: float, high: float) -> list[float]:
    if base == 2:
        powers = range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9) + 1)
        return [2.0**p for p in powers]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    # few decades need steps between them
    steps = (1.0, 2.0, 5.0) if len(decades) <= 4 else (1.0,)
    # from text, for 5 * 10**-4 is not the number nearest to 0.0005
    values = [float(f"{step:.0f}e{d}") for d in decades for step in steps]
    return [v for v in values if low <= v <= high]


def _even_ticks(low: float, high: float, base: int) -> list[float]:
    rough = (high - low) / 5
    if rough <= 0:
        return [low]
    if base == 2:
        step = 2.0 ** math.ceil(math.log2(rough))
    else:
        decade = 10.0 ** math.floor(math.log10(rough))
        step = next(m * decade for m in (1, 2, 5, 10) if m * decade >= rough)
    first = math.ceil(low / step)
    return [float(f"{step * i:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def color(role: str, dark: bool = False) -> str:
    """Colour of a role."""
    return PALETTE[role][1 if dark else 0]


def marker(series: Series) -> str:
    """Shape of a line's markers: one for each colour, so that neither is needed alone."""
    digits = series.role[-1]
    offset = 1 if series.role.startswith("dense") else 0
    return SHAPES[(int(digits) + offset) % len(SHAPES)] if digits.isdigit() else "diamond"


def level_style(figure: Figure, mark: Mark) -> str:
    """Key of DASHES for a horizontal line."""
    return mark.style or ("solid" if figure.is_lead else "dashed")


def joined(series: Series) -> list[Point]:
    """The points that the line goes through."""
    return [point for point in series.points if point.is_trusted]


def axis_share(figure: Figure, value: float) -> float:
    """Height of a value on the y axis, 0 at the bottom and 1 at the top."""
    low, high = y_domain(figure)
    if figure.y.log:
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return (value - low) / (high - low)
