"""One self-contained HTML page: loads nothing, and runs only the scripts whose hashes it names."""

import base64
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from dsa_bench import __version__, doubt
from dsa_bench.contest import CONTESTS
from dsa_bench.reports import crossover, frame, hostile, naming, tables, units, vega
from dsa_bench.reports.chart import PALETTE, Figure, color
from dsa_bench.reports.details import MEASURED_TITLES, details, strip
from dsa_bench.reports.digest import Digest, digest
from dsa_bench.reports.figures import figures
from dsa_bench.reports.metrics import METRICS

ASSETS = Path(__file__).parent / "assets"
BUNDLE = "window.vegaEmbed = vegaEmbed;"
"""What of the bundled libraries report.js uses."""
NUM_STATIC = 4
"""At most so many figures also stand as images; all of them would be too large."""
STATIC_WIDTH = 620
"""Pixels of the drawings that stand in where scripts are off."""

GLOSSARY = (
    (
        "L",
        "Sequence length in tokens; 1K = 1024. Prefill: the position at which the chunk of queries "
        "ends. Decode: tokens already in the cache.",
    ),
    ("k", "Tokens that the indexer selects for each query (DeepSeek-V3.2: 2048)."),
    ("DSA", "DeepSeek Sparse Attention, complete: indexer, top-k selection and sparse attention."),
    (
        "dense",
        "Attention over all tokens at the same model dimensions. A speed-up is over the fastest "
        "dense implementation with status ok and a time that isn't suspect, of the same shape and "
        "mode, in the same run.",
    ),
    (
        "layer",
        "From hidden state to output: projections, norms, rotation, caches and attention. Sparse "
        "in the MQA form, masked in the MHA form (for short prompts), dense as V3.1 has it.",
    ),
    ("speed-up", "Time of that dense attention divided by the time of DSA."),
    (
        "crossover",
        "The L from which DSA is faster at every longer L that was measured; between two measured "
        "L the times are taken as straight lines on logarithmic axes.",
    ),
    (
        "time",
        "Median of one call of one layer. ± is half the 95 % interval of the median, from order "
        "statistics that count samples which follow each other for less than independent ones.",
    ),
    (
        "$/M tokens",
        "USD per GPU-hour ÷ 3600 · ranks · seconds per token · layers · 10⁶. Attention only: no "
        "projections, no feed-forward layers, no communication; of a layer its projections, norms "
        "and caches, too. At the machine's price also where that is no GPU.",
    ),
    (
        "FLOP rate, traffic",
        "FLOPs and bytes that the mathematics needs at least, counted on valid entries and each "
        "byte once, divided by the time.",
    ),
    (
        "of floor",
        "The least time that FLOPs and bytes allow on this machine (its measured rates), divided "
        "by the time.",
    ),
    (
        "⚑, ✗",
        "The time carries a reason for doubt: noisy times (⚑) count, suspect and invalid ones (✗) "
        "stand in the table alone and enter no speed-up, cost, crossover or headline. Open the row "
        "to read why and what to do.",
    ),
    (
        "mode",
        f"How it was timed. {'; '.join(f'{m}: {t}' for m, t in tables.MODE_MEANINGS.items())}.",
    ),
    (
        "processes",
        "Fresh processes that repeated the case. The time is pooled over them, and ± covers how "
        "they differ.",
    ),
    (
        "status",
        "ok: right and timed. wrong: the output is not right. failed, oom, timeout: no output. "
        "skipped: the case makes no sense or cannot run here. Only ok cases have a time.",
    ),
)


def write_html(runs: Sequence[frame.Run], path: Path) -> None:
    """Write the report of these runs as one HTML file."""
    path.write_text(page(digest(runs)), encoding="utf-8")


def page(report: Digest) -> str:
    """The page as text."""
    drawn = figures(report)
    specs = {figure.name: vega.spec(figure) for figure in drawn}
    scripts = [_script(_bundle()), _script(_asset("report.js"))]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html").render(
        policy=_policy(scripts),
        style=Markup(f"{_palette_css()}\n{_asset('report.css')}"),
        scripts=[Markup(script) for script in scripts],
        data=_embed(
            {
                **{"specs": specs, "config": vega.config(), "strip": strip()},
                **{"details": details(report), "measured": MEASURED_TITLES},
            }
        ),
        report=report,
        tiles=_tiles(report),
        spent=[*tables.time_spent(report), *hostile.sentences(report)],
        doubts=tables.doubt_notes(report.cases),
        sheets=tables.sheets(report),
        hostile=hostile.parts(report),
        hostile_meaning=hostile.MEANING,
        groups=_groups(drawn),
        static={f.name: _static(specs[f.name]) for f in drawn[:NUM_STATIC] if f.is_lead},
        table=_table(report),
        lost=_lost(report),
        environments=[
            _environment(label, run) for label, run in zip(report.labels, report.runs, strict=True)
        ],
        metrics=METRICS,
        glossary=GLOSSARY,
        version=__version__,
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _finalize(value: Any) -> Any:
    """Text of the header, too, stays on its line and without control characters."""
    return units.clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@functools.cache
def _bundle() -> str:
    """Vega-Lite and all that it needs; bundling takes seconds, and gives the same each time."""
    return str(vl_convert.javascript_bundle(BUNDLE))


def _script(text: str) -> str:
    # the browser hashes what its parser hands on, in which a line always ends with \n
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "</script" in text.lower() or "<!--" in text:
        raise ValueError("a script must not contain </script or <!--, the page would end it there")
    return text


def _policy(scripts: Sequence[str]) -> str:
    """Content-Security-Policy: these inline scripts, inline styles, embedded images, no more."""
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{h}'" for h in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _embed(data: Any) -> Markup:
    """JSON that can stand inside a script element: no character that could end it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _palette_css() -> str:
    """The colours of all roles as custom properties, for both themes."""
    light = "".join(f"--{role}:{on_white};" for role, (on_white, _) in PALETTE.items())
    dark = "".join(f"--{role}:{on_dark};" for role, (_, on_dark) in PALETTE.items())
    return (
        f":root{{{light}}}\n:root[data-theme=dark]{{{dark}}}\n"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}\n"
        f"@media print{{:root:root:root{{{light}}}}}"
    )


def _static(spec: Mapping[str, Any]) -> str:
    """A lead figure as an image for readers without scripts."""
    fixed = _light(dict(spec) | {"config": vega.config()}) | {
        "width": STATIC_WIDTH,
        "background": color("paper"),
    }
    svg = vl_convert.vegalite_to_svg(fixed)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _light(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: v if k in ("values", "datasets") else _light(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_light(v) for v in value]
    if isinstance(value, str) and value[:1] == "@" and value[1:] in PALETTE:
        return color(value[1:])
    return value


def _tiles(report: Digest) -> list[dict[str, str]]:
    """What matters most of each phase of each run, as large numbers."""
    tiles = []
    phases = ("prefill", "decode", "train")
    names = [contest.name for contest in CONTESTS]
    for place in itertools.product(report.labels, names, phases):
        found = [
            c
            for c in report.crossovers
            if (c.axes["run_label"], c.contest, c.axes["phase"]) == place
        ]
        chosen = crossover.choose(found)
        if chosen is not None and chosen.is_compared:
            tiles.append(_tile(place[0] if len(report.labels) > 1 else "", chosen))
    return tiles


def _tile(label: str, chosen: crossover.Crossover) -> dict[str, str]:
    where = crossover.where(chosen).removeprefix("in ")
    last = units.format_length(chosen.last_length)
    name = naming.sparse_text(chosen.axes["op"])
    start, note = {
        "crosses": (units.format_length(chosen.seq_len_kv or 0), f"{name} is faster from this L"),
        "always": (
            f"≤ {units.format_length(chosen.first_length)}",
            f"{name} is faster at every L compared",
        ),
        "one length": (units.MISSING, "only one L was compared"),
    }.get(chosen.outcome, ("never", f"{name} is not faster up to {last}"))
    layer = naming.axis_text("contest", chosen.contest)
    return {
        "title": " · ".join(filter(None, (label, layer, where, crossover.describe(chosen)))),
        "start": start,
        "start_note": note,
        "speedup": units.format_ratio(chosen.last_speedup),
        "speedup_note": f"the speed of {chosen.dense} at {last}",
    }


def _groups(drawn: Sequence[Figure]) -> list[dict[str, Any]]:
    """The lead figures first, then the others, in their order."""
    return [
        {"is_lead": True, "figures": [f for f in drawn if f.is_lead]},
        {"is_lead": False, "figures": [f for f in drawn if not f.is_lead]},
    ]


def _table(report: Digest) -> dict[str, Any]:
    cases = tables.sorted_cases(tables.with_spread(report.cases))
    names = [column.name for column in tables.COLUMNS if column.name != "reason"]
    columns = tables.visible_columns(cases, names)
    rows = [
        {
            "id": f"{row['run']}-{row['key']}",
            "status": row["status"],
            "doubt": row["doubt"],
            "title": doubt.explain(frame.flags_of(row)).replace("\n", " · "),
            "reproduce": row["reproduce"],
            "cells": [_cell(column, row) for column in columns],
        }
        for row in frame.rows(cases)
    ]
    return {"columns": columns, "rows": rows}


def _cell(column: tables.Column, row: Mapping[str, Any]) -> dict[str, Any]:
    """Text of a cell; of a number also the value to sort by, empty where it is missing."""
    value = row[column.name]
    key = "" if units.is_missing(value) or not column.is_number else f"{float(value):.6g}"
    text = tables.cell_text(column, dict(row))
    return {"text": text, "key": key, "number": column.is_number, "name": column.name}


def _lost(report: Digest) -> list[dict[str, Any]]:
    rows = frame.rows(report.cases[report.cases["status"] != "ok"])
    return [
        row
        | {
            "where": " ".join((row["op"], row["impl"], row["precision"], *naming.unusual(row))),
            "L": units.format_length(row["seq_len_kv"]),
        }
        for row in rows
    ]


def _environment(label: str, run: frame.Run) -> dict[str, Any]:
    """Name and value of all that the header says, nested names joined by dots."""
    device = str(run.header.get("machine", {}).get("device", ""))
    price = frame.price_text({"device": device, "gpu_hour_usd": frame.gpu_hour_usd(run.header)})
    # the plan only says again which cases there are
    header = {k: v for k, v in run.header.items() if k not in ("schema", "plan")}
    rows = [("run folder", str(run.path)), *_flatten(header)]
    return {"label": label, "rows": rows, "price": price}


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, item in value.items():
        if isinstance(item, Mapping):
            rows += _flatten(item, f"{prefix}{name}.")
        else:
            text = " ".join(str(i) for i in item) if isinstance(item, list | tuple) else str(item)
            rows.append((f"{prefix}{name}", text))
    return rows
