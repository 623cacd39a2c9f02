"""Figures -> Vega-Lite specifications; colours stay names of roles, for the page has two themes."""

from typing import Any

from dsa_bench.reports import units
from dsa_bench.reports.chart import (
    DASHES,
    Axis,
    Figure,
    Mark,
    Series,
    axis_share,
    end_label,
    label_heights,
    level_style,
    marker,
    ticks,
    x_domain,
    y_domain,
)

HEIGHT = 300
"""Pixels of the plotting area; the width is the page's."""
LABEL_GAP = 15 / HEIGHT


def spec(figure: Figure) -> dict[str, Any]:
    """The specification of one figure without `config()`; colours are `@role`."""
    layers = _bars(figure) if figure.kind == "bars" else [_axes(figure), *_lines(figure)]
    drawn = [] if figure.kind == "bars" else figure.series
    datasets = {_dataset(i): _rows(series) for i, series in enumerate(drawn)}
    return {
        "description": figure.title,
        "width": "container",
        "height": HEIGHT,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "padding": {"left": 4, "right": 6, "top": 10, "bottom": 4},
        "background": "transparent",
        "datasets": datasets,
        "layer": layers,
        "resolve": {"scale": {"y": "shared"}},
    }


def config() -> dict[str, Any]:
    """Fonts and colours that all figures share."""
    text = {
        "labelColor": "@muted",
        "titleColor": "@muted",
        "labelFontSize": 12,
        "titleFontSize": 12,
    }
    axis = {"domainColor": "@muted", "tickColor": "@muted", "gridColor": "@grid", **text}
    return {
        "font": "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif",
        "view": {"stroke": None},
        "axis": {**axis, "titleFontWeight": "normal", "titlePadding": 10, "labelPadding": 6},
        "legend": {**text, "orient": "top", "title": None, "symbolType": "square", "columns": 4},
        "text": {"fontSize": 12, "color": "@ink"},
    }


def _x(figure: Figure) -> dict[str, Any]:
    low, high = x_domain(figure)
    # on an even axis the short lengths would stand on each other
    shown = figure.lengths if figure.x.log else ticks(figure.x, low, high)
    kind = {"type": "log", "base": 2} if figure.x.log else {"type": "linear", "zero": False}
    return {
        "field": "x",
        "type": "quantitative",
        "scale": {**kind, "domain": [low, high], "nice": False},
        "axis": {
            "title": figure.x.title,
            "grid": False,
            "labelFlush": False,
            **_labels(figure.x, shown),
        },
    }


def _y(figure: Figure) -> dict[str, Any]:
    low, high = y_domain(figure)
    kind = (
        {"type": "log", "base": figure.y.base}
        if figure.y.log
        else {"type": "linear", "zero": False}
    )
    return {
        "field": "y",
        "type": "quantitative",
        "scale": {**kind, "domain": [low, high], "nice": False},
        "axis": {"title": figure.y.title, "domain": False, "ticks": False, "labelPadding": 11}
        | _labels(figure.y, ticks(figure.y, low, high)),
    }


def _labels(axis: Axis, values: list[float]) -> dict[str, Any]:
    """Ticks at these values with our own texts; the nearest value is taken, for Vega may round."""
    texts = [units.tick(axis.text(value)) for value in values]
    cases = [
        f"abs(datum.value - {v!r}) <= {abs(v) * 1e-6!r} ? '{t}' : "
        for v, t in zip(values, texts, strict=True)
    ]
    return {"values": values, "labelExpr": "".join(cases) + "''"}


def _dataset(index: int) -> str:
    """Name of a series' rows, which several layers share."""
    return f"series{index}"


def _rows(series: Series) -> list[dict[str, Any]]:
    rows = []
    for point in series.points:
        row: dict[str, Any] = {"x": point.x, "y": _short(point.y), "line": series.label}
        row |= {"L": units.format_length(point.x), "value": point.text}
        if point.low is not None and point.high is not None:
            row |= {"low": _short(point.low), "high": _short(point.high)}
            row["interval"] = (
                f"{units.format_seconds(point.low)} to {units.format_seconds(point.high)}"
            )
        row |= {"note": point.note} if point.note else {}
        row |= {"doubt": f"{point.doubt}: {point.flags}"} if point.doubt else {}
        row |= {} if point.is_trusted else {"apart": 1}
        rows.append(row)
    return rows


def _short(value: float) -> float:
    """Six figures: more than a screen shows, and half the text."""
    return float(f"{value:.6g}")


def _tooltip(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    titles = {"line": "line", "L": "L", "value": "value", "interval": "95 % interval"}
    titles |= {"note": "detail", "doubt": "in doubt"}
    present = [name for name in titles if any(name in row for row in rows)]
    return [{"field": name, "type": "nominal", "title": titles[name]} for name in present]


def _axes(figure: Figure) -> dict[str, Any]:
    """An invisible point that carries both axes; the other layers need not repeat them."""
    corner = {"x": x_domain(figure)[0], "y": y_domain(figure)[0]}
    mark = {"type": "point", "opacity": 0, "tooltip": None}
    encoding = {"x": _x(figure), "y": _y(figure)}
    return {"data": {"values": [corner]}, "mark": mark, "encoding": encoding}


def _lines(figure: Figure) -> list[dict[str, Any]]:
    x, y = ({"field": name, "type": "quantitative"} for name in "xy")
    layers: list[dict[str, Any]] = []
    for mark in figure.marks:
        if mark.kind == "level":
            layers += _level(figure, mark, y)
    for i, series in enumerate(figure.series):
        layers += _line(series, _dataset(i), x, y)
    crossings = [m for m in figure.marks if m.kind == "crossing"]
    for rank, mark in enumerate(crossings):
        layers += _crossing(figure, mark, rank, x, y)
    layers += _lost(figure, x, y)
    return layers + _line_labels(figure, x, y)


def _line(
    series: Series, dataset: str, x: dict[str, Any], y: dict[str, Any]
) -> list[dict[str, Any]]:
    """A path, the intervals of its points, and its points."""
    rows, data, color = _rows(series), {"name": dataset}, f"@{series.role}"
    wide = 2 if series.shape == "line" or series.role.startswith("dense") else 2.75
    path: dict[str, Any] = {"type": "line", "strokeWidth": wide, "color": color}
    path |= {"strokeCap": "round", "strokeDash": list(DASHES[series.style])}
    lone = any("apart" in row for row in rows)
    trusted: dict[str, Any] = {"transform": [{"filter": "!isValid(datum.apart)"}]} if lone else {}
    layers: list[dict[str, Any]] = [
        {"data": data, **trusted, "mark": path, "encoding": {"x": x, "y": y}}
    ]
    if series.shape == "line":
        return layers
    if any("low" in row for row in rows):
        ends = {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}}
        rule = {"type": "rule", "color": color, "strokeWidth": 1.5}
        layers.append({"data": data, "mark": rule, "encoding": ends})
    point = {"type": "point", "shape": marker(series), "size": 70, "color": color}
    point |= {"strokeWidth": 2, "opacity": 1}
    # a noisy time is hollow, a suspect one a cross
    fill = {"condition": {"test": "isValid(datum.doubt)", "value": "@paper"}, "value": color}
    encoding = {"x": x, "y": y, "fill": fill, "tooltip": _tooltip(rows)}
    layers.append({"data": data, **trusted, "mark": point, "encoding": encoding})
    if lone:
        cross = {"type": "text", "text": "✕", "fontSize": 15, "fontWeight": 700, "color": color}
        suspects = [{"filter": "isValid(datum.apart)"}]
        encoding = {"x": x, "y": y, "tooltip": _tooltip(rows)}
        layers.append({"data": data, "transform": suspects, "mark": cross, "encoding": encoding})
    return layers


def _level(figure: Figure, mark: Mark, y: dict[str, Any]) -> list[dict[str, Any]]:
    """A horizontal line; on the lead figures also paper tinted where DSA wins."""
    data = {"values": [{"y": mark.y, "top": y_domain(figure)[1], "label": mark.label}]}
    layers: list[dict[str, Any]] = []
    if figure.is_lead:
        ends = {"y": y, "y2": {"field": "top"}}
        layers.append(
            {
                "data": data,
                "mark": {"type": "rect", "color": "@win", "opacity": 0.07},
                "encoding": ends,
            }
        )
    rule = {
        "type": "rule",
        "color": "@ink",
        "strokeWidth": 1.25,
        "strokeDash": list(DASHES[level_style(figure, mark)]),
    }
    layers.append({"data": data, "mark": rule, "encoding": {"y": y}})
    # at the right end below the line: there the lines of DSA have mostly left the level upwards
    text = {
        "type": "text",
        "align": "right",
        "dx": -6,
        "dy": 10,
        "color": "@muted",
        "fontSize": 11.5,
    }
    layers.append(
        {
            "data": data,
            "mark": text,
            "encoding": {"y": y, "x": {"value": "width"}, "text": {"field": "label"}},
        }
    )
    return layers


def _crossing(
    figure: Figure, mark: Mark, rank: int, x: dict[str, Any], y: dict[str, Any]
) -> list[dict[str, Any]]:
    """A ring on the level, a thread down to the axis, and the length beside its foot."""
    data = {"values": [{"x": mark.x, "y": mark.y, "low": y_domain(figure)[0], "label": mark.label}]}
    color = f"@{mark.role}"
    thread = {"type": "rule", "color": color, "strokeWidth": 1.25, "strokeDash": [2, 3]}
    ring = {
        "type": "point",
        "shape": "circle",
        "size": 130,
        "color": color,
        "fill": "@paper",
        "strokeWidth": 2.5,
        "opacity": 1,
    }
    text = {
        "type": "text",
        "align": "left",
        "dx": 5,
        "color": color,
        "fontSize": 14,
        "fontWeight": 700,
    }
    # each on a row of its own, for crossings lie close together
    foot = {"value": HEIGHT - 10 - 17 * rank}
    tip = [{"field": "label", "type": "nominal", "title": "DSA is faster from L"}]
    return [
        {"data": data, "mark": thread, "encoding": {"x": x, "y": y, "y2": {"field": "low"}}},
        {"data": data, "mark": ring, "encoding": {"x": x, "y": y, "tooltip": tip}},
        {"data": data, "mark": text, "encoding": {"x": x, "y": foot, "text": {"field": "label"}}},
    ]


def _lost(figure: Figure, x: dict[str, Any], y: dict[str, Any]) -> list[dict[str, Any]]:
    """Crosses at the upper edge for cases without a time, inside the axis's ends only."""
    low, high = x_domain(figure)
    lost = [m for m in figure.marks if m.kind == "lost" and m.x and low <= m.x <= high]
    if not lost:
        return []
    at: dict[float, list[str]] = {}
    for mark in lost:
        at.setdefault(mark.x or 0.0, []).append(mark.label)
    rows = [{"x": place, "label": "; ".join(labels)} for place, labels in at.items()]
    cross = {"type": "text", "text": "✕", "fontSize": 14, "color": "@lost", "fontWeight": 700}
    tip = [{"field": "label", "type": "nominal", "title": "no time"}]
    return [
        {
            "data": {"values": rows},
            "mark": cross,
            "encoding": {"x": x, "y": {"value": 8}, "tooltip": tip},
        }
    ]


def _line_labels(figure: Figure, x: dict[str, Any], y: dict[str, Any]) -> list[dict[str, Any]]:
    """The name of each line right of its end, moved apart where ends lie close."""
    drawn = [s for s in figure.series if s.points]
    ends = [s.points[-1] for s in drawn]
    wanted = [axis_share(figure, p.y) for p in ends]
    layers = []
    for series, height in zip(drawn, label_heights(wanted, LABEL_GAP), strict=True):
        row = {"label": end_label(figure, series)}
        text = {
            "type": "text",
            "align": "left",
            "dx": 12,
            "color": f"@{series.role}",
            "fontSize": 12,
        }
        text["fontWeight"] = 600 if series.role.startswith("sparse") else 400
        place = {"x": {"value": "width"}, "y": {"value": round(HEIGHT * (1 - height), 1)}}
        layers.append(
            {
                "data": {"values": [row]},
                "mark": text,
                "encoding": {**place, "text": {"field": "label"}},
            }
        )
    return layers


def _bars(figure: Figure) -> list[dict[str, Any]]:
    stacked = [s for s in figure.series if s.shape != "points"]
    rows = [row | {"rank": rank} for rank, s in enumerate(stacked) for row in _rows(s)]
    order = [s.label for s in stacked]
    x = {
        "field": "L",
        "type": "ordinal",
        "sort": [units.format_length(n) for n in figure.lengths],
        "axis": {"title": figure.x.title, "labelAngle": 0, "grid": False, "ticks": False},
        "scale": {"paddingInner": 0.35, "paddingOuter": 0.25},
    }
    y = _y(figure)
    color = {
        "field": "line",
        "type": "nominal",
        "scale": {"domain": order, "range": [f"@{s.role}" for s in stacked]},
        "legend": {"title": None},
    }
    bar = {"type": "bar", "stroke": "@paper", "strokeWidth": 0.75}
    # Vega has no hatching: a bar in doubt is pale within a dashed outline
    in_doubt = {"test": "isValid(datum.doubt)"}
    encoding = {
        "x": x,
        "y": y | {"stack": "zero"},
        "color": color,
        "order": {"field": "rank", "type": "quantitative"},
        "fillOpacity": {"condition": in_doubt | {"value": 0.45}, "value": 1},
        "stroke": {"condition": in_doubt | {"value": "@ink"}, "value": "@paper"},
        "strokeDash": {"condition": in_doubt | {"value": [4, 3]}, "value": [1, 0]},
    }
    layers: list[dict[str, Any]] = [
        {"data": {"values": rows}, "mark": bar, "encoding": encoding | {"tooltip": _tooltip(rows)}}
    ]
    loose = [s for s in figure.series if s.shape == "points"]
    return layers + [_overlay(series, x, y) for series in loose]


def _overlay(series: Series, x: dict[str, Any], y: dict[str, Any]) -> dict[str, Any]:
    """Diamonds over the bars."""
    rows = _rows(series)
    point = {"type": "point", "shape": "diamond", "size": 90, "filled": True, "opacity": 1}
    point |= {"color": f"@{series.role}", "stroke": "@paper", "strokeWidth": 1.5}
    encoding = {"x": x, "y": y, "tooltip": _tooltip(rows)}
    return {"data": {"values": rows}, "mark": point, "encoding": encoding}
