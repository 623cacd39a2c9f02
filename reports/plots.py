"""Figures -> PNG and SVG files by matplotlib, without a display or a browser."""

import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from dsa_bench.reports import units
from dsa_bench.reports.chart import (
    DASHES,
    Axis,
    Figure,
    Mark,
    Series,
    axis_share,
    color,
    end_label,
    joined,
    label_heights,
    level_style,
    marker,
    ticks,
    x_domain,
    y_domain,
)
from dsa_bench.reports.digest import digest
from dsa_bench.reports.figures import figures
from dsa_bench.reports.frame import Run

SIZE_INCHES = (8.0, 4.8)
DPI = 150
CAPTION_WIDTH = 135
"""Characters of a line of the caption."""
MARKERS = {"circle": "o", "square": "s", "triangle-up": "^", "diamond": "D"}
HATCH = "///"
LABEL_GAP = 0.058
"""Least distance of two labels as a share of the height: one line of text."""
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    # the same figure gives the same file
    "svg.hashsalt": "dsa-bench",
    # a dollar sign in a label is money, not mathematics
    "text.parse_math": False,
}


def write_pngs(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write each figure as PNG and SVG; return the paths of the PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    return [write_figure(figure, folder) for figure in figures(digest(runs))]


def write_figure(figure: Figure, folder: Path) -> Path:
    """Write one figure as `<name>.png` and `<name>.svg`; return the path of the PNG file."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # a name in a script that the font lacks is drawn as boxes; that is no reason to stop
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        canvas = _draw(figure)
        path = folder / f"{figure.name}.png"
        canvas.savefig(path, dpi=DPI, metadata={"Software": "dsa-bench"})
        # the layout is found, and finding it again takes as long as drawing
        canvas.set_layout_engine("none")
        canvas.savefig(folder / f"{figure.name}.svg", metadata={"Date": None})
    return path


def _draw(figure: Figure) -> Canvas:
    canvas = Canvas(
        figsize=SIZE_INCHES,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1),
        facecolor=color("paper"),
    )
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    canvas.suptitle(
        figure.title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=color("ink")
    )
    axes.set_title(
        figure.question,
        loc="left",
        fontsize=10,
        color=color("muted"),
        pad=26 if figure.kind == "bars" else 8,
    )
    texts = filter(None, (figure.answer, figure.doubt_note))
    caption = "\n".join(textwrap.fill(text, CAPTION_WIDTH) for text in texts)
    canvas.supxlabel(caption, x=0.012, ha="left", fontsize=7.5, color=color("muted"))
    _frame(axes, figure)
    if figure.kind == "bars":
        _bars(axes, figure)
    else:
        _lines(axes, figure)
    return canvas


def _frame(axes: Axes, figure: Figure) -> None:
    axes.set_facecolor(color("paper"))
    low, high = y_domain(figure)
    if figure.y.log:
        axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(ticks(figure.y, low, high)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(_formatter(figure.y))
    axes.set_ylabel(figure.y.title, color=color("muted"))
    axes.set_xlabel(figure.x.title, color=color("muted"))
    axes.grid(axis="y", color=color("grid"), linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(colors=color("muted"), length=0)
    axes.tick_params(axis="y", pad=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(color("muted"))


def _formatter(axis: Axis) -> Callable[[float, float], str]:
    return lambda value, _: units.tick(axis.text(value))


def _lines(axes: Axes, figure: Figure) -> None:
    low, high = x_domain(figure)
    if figure.x.log:
        axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    shown = figure.lengths if figure.x.log else ticks(figure.x, low, high)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(_formatter(figure.x))
    axes.tick_params(axis="x", length=4)
    for mark in figure.marks:
        if mark.kind == "level":
            _level(axes, figure, mark)
    for series in figure.series:
        _line(axes, series)
    crossings = [m for m in figure.marks if m.kind == "crossing"]
    for rank, mark in enumerate(crossings):
        _crossing(axes, figure, mark, rank)
    for mark in figure.marks:
        if mark.kind == "lost" and mark.x and low <= mark.x <= high:
            axes.plot(
                mark.x,
                0.98,
                "x",
                clip_on=False,
                transform=axes.get_xaxis_transform(),
                color=color("lost"),
                markeredgewidth=1.6,
            )
    _label_lines(axes, figure)


def _line(axes: Axes, series: Series) -> None:
    xs, ys = [p.x for p in joined(series)], [p.y for p in joined(series)]
    shade = color(series.role)
    dashes = DASHES[series.style]
    is_bare = series.shape == "line"
    width = 1.5 if is_bare or series.role.startswith("dense") else 2.1
    style = (0, dashes) if dashes else "-"
    axes.plot(xs, ys, linestyle=style, color=shade, linewidth=width, clip_on=False, zorder=3)
    if is_bare:
        return
    for point in series.points:
        if point.low is not None and point.high is not None:
            axes.plot([point.x] * 2, [point.low, point.high], color=shade, linewidth=1.2, zorder=3)
        axes.plot(
            *(point.x, point.y, MARKERS[marker(series)] if point.is_trusted else "x"),
            color=shade,
            markerfacecolor=color("paper") if point.doubt else shade,
            markersize=6 if point.is_trusted else 7.5,
            markeredgewidth=1.0 if point.is_trusted else 2.0,
            clip_on=False,
            zorder=4,
        )


def _level(axes: Axes, figure: Figure, mark: Mark) -> None:
    assert mark.y is not None
    if figure.is_lead:
        axes.axhspan(mark.y, y_domain(figure)[1], color=color("win"), alpha=0.07, linewidth=0)
    dashes = DASHES[level_style(figure, mark)]
    style = (0, dashes) if dashes else "-"
    axes.axhline(mark.y, color=color("ink"), linewidth=1.0, linestyle=style, zorder=2)
    axes.annotate(
        mark.label,
        (1.0, mark.y),
        xycoords=axes.get_yaxis_transform(),
        xytext=(-5, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8.5,
        color=color("muted"),
    )


def _crossing(axes: Axes, figure: Figure, mark: Mark, rank: int) -> None:
    assert mark.x is not None and mark.y is not None
    shade = color(mark.role)
    axes.plot([mark.x] * 2, [y_domain(figure)[0], mark.y], ":", color=shade, linewidth=1.3)
    axes.plot(
        mark.x,
        mark.y,
        "o",
        color=shade,
        markerfacecolor=color("paper"),
        markersize=8.5,
        markeredgewidth=2,
        zorder=5,
    )
    axes.annotate(
        mark.label,
        (mark.x, 0.025 + 0.062 * rank),
        xycoords=axes.get_xaxis_transform(),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=11,
        fontweight="bold",
        color=shade,
    )


def _label_lines(axes: Axes, figure: Figure) -> None:
    drawn = [s for s in figure.series if s.points]
    wanted = [axis_share(figure, s.points[-1].y) for s in drawn]
    for series, height in zip(drawn, label_heights(wanted, LABEL_GAP), strict=True):
        axes.annotate(
            end_label(figure, series),
            (1.0, height),
            xycoords="axes fraction",
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            fontweight="bold" if series.role.startswith("sparse") else "normal",
            color=color(series.role),
        )


def _bars(axes: Axes, figure: Figure) -> None:
    place = {length: i for i, length in enumerate(figure.lengths)}
    bottom = dict.fromkeys(place, 0.0)
    for series in figure.series:
        at = [place[p.x] for p in series.points]
        ys = [p.y for p in series.points]
        shade = color(series.role)
        if series.shape == "points":
            axes.plot(
                at,
                ys,
                "D",
                color=shade,
                markeredgecolor=color("paper"),
                markersize=7,
                label=series.label,
            )
            continue
        base = [bottom[p.x] for p in series.points]
        axes.bar(
            at,
            ys,
            bottom=base,
            width=0.66,
            color=shade,
            edgecolor=color("paper"),
            linewidth=0.6,
            hatch=[HATCH if p.doubt else "" for p in series.points],
            label=series.label,
        )
        for point in series.points:
            bottom[point.x] += point.y
    axes.xaxis.set_major_locator(FixedLocator(list(place.values())))
    axes.set_xticklabels([units.format_length(n) for n in place])
    _legend(axes)


def _legend(axes: Axes) -> None:
    # in the order of the figure; matplotlib would put loose points before bars
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: isinstance(handles[i], Line2D))
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=7, frameon=False, fontsize=9,
        labelcolor=color("muted"), handlelength=1, borderaxespad=0.2, borderpad=0.2,
    )  # fmt: skip
