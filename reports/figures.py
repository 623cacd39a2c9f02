"""Every figure once, as data: what it asks, its axes, lines and marks. Nothing is drawn here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dsa_bench.reports import crossover, frame, lines, published, units
from dsa_bench.reports.chart import Axis, Figure, Mark, Point, Series
from dsa_bench.reports.digest import Digest
from dsa_bench.reports.metrics import ceilings

LENGTH = Axis(title="sequence length L (tokens)", text=units.format_length, base=2)
MAX_CROSSINGS = 3
"""Crossings that one figure labels."""

PREFILL_CEILINGS = {
    "bf16_flops_per_second": "measured bf16 matmul rate",
    "fp8_flops_per_second": "measured fp8 matmul rate",
    "fp32_flops_per_second": "measured fp32 matmul rate",
}
TEXTS: dict[str, Callable[[float], str]] = {
    "seconds": units.format_seconds,
    "speedup": units.format_ratio,
    "usd_per_million_tokens": units.format_usd,
    "dense_error": units.format_error,
}
"""How a value of a column reads."""
DECODE_CEILINGS = {"copy_bytes_per_second": "measured copy rate"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Maker:
    """One kind of figure: a function from a digest to the figures it has data for."""

    name: str
    make: Callable[[Digest], Sequence[Figure]]


def figures(report: Digest) -> tuple[Figure, ...]:
    """All figures that have data, in the order in which a reader meets them."""
    return tuple(figure for maker in MAKERS for figure in maker.make(report))


def speedup(report: Digest) -> list[Figure]:
    """Time of the fastest dense attention over time of DSA, with the crossing of 1."""
    rows = report.cases[report.cases["speedup"].notna()]
    return [
        Figure(
            name=f"speedup-{panel.slug}",
            title=f"Speed-up over dense attention, {panel.title}",
            question="From which length is DSA faster, and by how much?",
            answer=" ".join(_crossing_answer(line, report) for line in panel.lines),
            x=LENGTH,
            y=Axis(title="times as fast as dense", text=units.format_ratio, base=2, log=True),
            series=tuple(_series(line, "speedup", _speedup_note) for line in panel.lines),
            marks=(
                Mark(kind="level", y=1.0, label="as fast as dense"),
                *_crossing_marks(panel, report),
            ),
            is_lead=True,
        )
        for panel in lines.panels(rows)
    ]


def latency(report: Digest) -> list[Figure]:
    """Time of one call, DSA and every dense implementation."""
    cases = report.cases
    rows = cases[cases["seconds"].notna() & cases["op"].isin(["dsa", "dense_attention"])]
    return [
        Figure(
            name=f"latency-{panel.slug}",
            title=f"Time of one layer, {panel.title}",
            question="How long does the attention of one layer take?",
            answer=_last_values(panel, "seconds", units.format_seconds),
            x=LENGTH,
            y=Axis(title="time of one call", text=units.format_seconds, log=True),
            series=tuple(_series(line, "seconds") for line in panel.lines),
            marks=tuple(_missing_marks(panel, cases)),
        )
        for panel in lines.panels(rows)
    ]


def cost(report: Digest) -> list[Figure]:
    """USD per million tokens; of decode the largest batch, of dense attention the fastest."""
    cases = report.cases
    rows = cases[
        cases["usd_per_million_tokens"].notna() & cases["op"].isin(["dsa", "dense_attention"])
    ]
    rows = lines.fastest_dense(lines.largest_batch(rows))
    made = []
    for panel in lines.panels(rows):
        price = float(panel.rows["gpu_hour_usd"].iloc[0])
        per_hour = frame.price_text(panel.rows.iloc[0])
        curves = published.series(panel, price) if published.is_comparable(panel) else ()
        beside = f" {published.caption(price)}" if curves else ""
        made.append(
            Figure(
                name=f"cost-{panel.slug}",
                title=f"Cost of a million tokens, {panel.title}",
                question="What does the attention of a token at position L cost?",
                answer=_last_values(panel, "usd_per_million_tokens", units.format_usd)
                + f" Attention only, all layers, at {per_hour}.{beside}",
                x=Axis(title=LENGTH.title, text=units.format_length, base=2, log=False),
                y=Axis(
                    title="USD per million tokens, attention only", text=units.format_usd, log=False
                ),
                series=(
                    *(_series(line, "usd_per_million_tokens") for line in panel.lines),
                    *curves,
                ),
            )
        )
    return made


def stage_times(report: Digest) -> list[Figure]:
    """Kernel time of each stage of DSA as stacked bars over L."""
    made = []
    for panel in lines.bar_panels(report, "speedup"):
        stages = report.stages[
            report.stages["key"].isin(panel.rows["key"])
            & report.stages["run"].isin(panel.rows["run"])
        ]
        if stages.empty:
            continue
        last = stages[stages["seq_len_kv"] == stages["seq_len_kv"].max()]
        largest = last.sort_values("seconds").iloc[-1]
        made.append(
            Figure(
                name=f"stages-{panel.slug}",
                title=f"Where the time goes, {panel.title}",
                question="Which stage of DSA takes the time?",
                answer=f"At {units.format_length(largest['seq_len_kv'])} the stage "
                f"{largest['stage']} takes {units.format_share(largest['share'])} of the kernel "
                "time. Bars: the profiler's pass; diamonds: the timed call, launches and gaps "
                "included.",
                kind="bars",
                x=LENGTH,
                y=Axis(title="time of one call", text=units.format_seconds, log=False),
                series=(
                    *(
                        _bar_series(
                            str(name), f"stage{min(i, 5)}", part, "seconds", units.format_seconds
                        )
                        for i, (name, part) in enumerate(stages.groupby("stage", sort=False))
                    ),
                    _overlay("timed call", panel.rows, "seconds", units.format_seconds),
                ),
            )
        )
    return made


def memory(report: Digest) -> list[Figure]:
    """Peak memory of one call, split; beside it the peak of the fastest dense attention."""
    made = []
    for panel in lines.bar_panels(report, "peak_bytes"):
        rows = panel.rows
        last = rows.sort_values("seq_len_kv").iloc[-1]
        dense = _dense_peers(report.cases, rows)
        parts = (
            ("inputs", "input_bytes"),
            ("outputs", "output_bytes"),
            ("workspace", "workspace_bytes"),
        )
        bars = [
            _bar_series(label, f"stage{i}", rows, column, units.format_bytes)
            for i, (label, column) in enumerate(parts)
        ]
        if not dense.empty:
            bars.append(_overlay("dense, peak", dense, "peak_bytes", units.format_bytes))
        made.append(
            Figure(
                name=f"memory-{panel.slug}",
                title=f"Memory, {panel.title}",
                question="How much device memory does one call need?",
                answer=f"At {units.format_length(last['seq_len_kv'])} the peak is "
                f"{units.format_bytes(last['peak_bytes'])}, of which "
                f"{units.format_bytes(last['workspace_bytes'])} is workspace (logits, parts)."
                + ("" if dense.empty else " Diamonds: the fastest dense attention."),
                kind="bars",
                x=LENGTH,
                y=Axis(title="bytes on the device", text=units.format_bytes, base=2, log=False),
                series=tuple(bars),
            )
        )
    return made


def rates(report: Digest) -> list[Figure]:
    """What each stage achieves: FLOP/s in prefill, bytes/s in decode, with the measured ceiling."""
    made = []
    for panel in lines.bar_panels(report, "speedup"):
        in_decode = panel.phase == "decode"
        column = "bytes_per_second" if in_decode else "flops_per_second"
        text = units.format_bandwidth if in_decode else units.format_flops
        stages = report.stages
        stages = stages[
            stages["key"].isin(panel.rows["key"]) & stages["run"].isin(panel.rows["run"])
        ]
        roles = {stage: f"stage{min(i, 5)}" for i, stage in enumerate(stages["stage"].unique())}
        stages = stages[stages[column].notna()]
        if stages.empty:
            continue
        limits = ceilings(report.runs[int(stages["run"].iloc[0])].header)
        wanted = DECODE_CEILINGS if in_decode else PREFILL_CEILINGS
        marks = tuple(
            Mark(kind="level", y=limits[name], label=label)
            for name, label in wanted.items()
            if name in limits
        )
        made.append(
            Figure(
                name=f"rates-{panel.slug}",
                title=f"Rate of each stage, {panel.title}",
                question="How near is each stage to what the machine can do?",
                answer="Bytes are counted once each, whatever a kernel reads again."
                if in_decode
                else "FLOPs count valid entries; only an fp8 stage can pass the bf16 rate. "
                "Stages without matrix products are left out.",
                x=LENGTH,
                y=Axis(title="traffic" if in_decode else "FLOP rate", text=text, log=False),
                series=tuple(
                    Series(
                        label=units.shorten(f"{stage} ({part['impl'].iloc[0]})"),
                        role=roles[stage],
                        points=_points(part, column, text),
                    )
                    for stage, part in stages.groupby("stage", sort=False)
                ),
                marks=marks,
            )
        )
    return made


def error(report: Digest) -> list[Figure]:
    """Distance of DSA's output from dense attention's on the same inputs."""
    rows = report.cases[(report.cases["dense_error"] > 0) & (report.cases["op"] == "dsa")]
    return [
        Figure(
            name=f"error-{panel.slug}",
            title=f"Distance from dense attention, {panel.title}",
            question="How far is the sparse output from the dense one?",
            answer="Relative L2 distance on this run's synthetic inputs. It says how much "
            "attention mass the selected tokens leave out here, not how good a trained model is.",
            x=LENGTH,
            y=Axis(title="relative L2 distance", text=units.format_error, log=True),
            series=tuple(_series(line, "dense_error") for line in panel.lines),
        )
        for panel in lines.panels(rows)
    ]


def operators(report: Digest) -> list[Figure]:
    """Time of operators that were measured on their own."""
    cases = report.cases
    rows = cases[cases["seconds"].notna() & ~cases["op"].isin(["dsa", "dense_attention"])]
    return [
        Figure(
            name=f"operators-{panel.slug}",
            title=f"Single operators, {panel.title}",
            question="How long does one operator take on its own?",
            answer=_last_values(panel, "seconds", units.format_seconds),
            x=LENGTH,
            y=Axis(title="time of one call", text=units.format_seconds, log=True),
            series=tuple(_series(line, "seconds") for line in panel.lines),
        )
        for panel in lines.panels(rows)
    ]


MAKERS = (
    Maker(name="speedup", make=speedup),
    Maker(name="cost", make=cost),
    Maker(name="latency", make=latency),
    Maker(name="stages", make=stage_times),
    Maker(name="memory", make=memory),
    Maker(name="rates", make=rates),
    Maker(name="error", make=error),
    Maker(name="operators", make=operators),
)


def _points(
    rows: pd.DataFrame,
    column: str,
    text: Callable[[float], str],
    note: Callable[[dict[str, Any]], str] | None = None,
) -> tuple[Point, ...]:
    """Points over L; only times have an interval."""
    return tuple(
        Point(
            x=float(row["seq_len_kv"]),
            y=float(row[column]),
            text=text(row[column]),
            low=float(row["seconds_low"]) if column == "seconds" and "seconds_low" in row else None,
            high=float(row["seconds_high"])
            if column == "seconds" and "seconds_high" in row
            else None,
            note=note(row) if note else "",
            flags=str(row.get("flags") or ""),
        )
        for row in frame.rows(rows.sort_values("seq_len_kv"))
        if pd.notna(row[column])
    )


def _series(
    line: lines.Line, column: str, note: Callable[[dict[str, Any]], str] | None = None
) -> Series:
    points = _points(line.rows, column, TEXTS[column], note)
    return Series(label=line.label, role=line.role, style=line.style, points=points)


def _bar_series(
    label: str, role: str, rows: pd.DataFrame, column: str, text: Callable[[float], str]
) -> Series:
    return Series(label=units.shorten(label), role=role, points=_points(rows, column, text))


def _overlay(label: str, rows: pd.DataFrame, column: str, text: Callable[[float], str]) -> Series:
    return Series(label=label, role="ink", shape="points", points=_points(rows, column, text))


def _speedup_note(row: dict[str, Any]) -> str:
    dense = f"{row['dense_impl']}, {row['dense_precision']}"
    own, other = units.format_seconds(row["seconds"]), units.format_seconds(row["dense_seconds"])
    return f"{own} against {other} of {dense}"


def _crossover_of(line: lines.Line, report: Digest) -> Any:
    matches = [c for c in report.crossovers if lines.same_axes(c.axes, line.rows.iloc[0])]
    return matches[0]


def _crossing_marks(panel: lines.Panel, report: Digest) -> list[Mark]:
    """Where each line meets 1; of many lines only the one that the headline speaks of.

    More than MAX_CROSSINGS labels lie on top of each other; the text below the figure has them all.
    """
    found = [(line, _crossover_of(line, report)) for line in panel.lines]
    found = [(line, each) for line, each in found if each.seq_len_kv is not None]
    if len(found) > MAX_CROSSINGS:
        chosen = crossover.choose([each for _, each in found])
        found = [(line, each) for line, each in found if each is chosen]
    return [
        Mark(
            kind="crossing",
            x=each.seq_len_kv,
            y=1.0,
            label=units.format_length(each.seq_len_kv),
            role=line.role,
        )
        for line, each in found
    ]


def _crossing_answer(line: lines.Line, report: Digest) -> str:
    found = _crossover_of(line, report)
    last = f"{units.format_ratio(found.last_speedup)} at {units.format_length(found.last_length)}"
    match found.outcome:
        case "crosses":
            start = units.format_length(found.seq_len_kv)
            spread = ""
            if found.interval:
                low, high = (units.format_length(end) for end in found.interval)
                spread = f" ({low} to {high})" if low != high else ""
            return f"{line.label}: faster from {start}{spread}, {last}."
        case "always":
            return f"{line.label}: faster at every L, {last}."
        case "one length":
            return f"{line.label}: {last}."
        case _:
            return f"{line.label}: not faster, {last}."


def _last_values(panel: lines.Panel, column: str, text: Callable[[float], str]) -> str:
    """At the longest L: the value of each line that reaches it."""
    longest = panel.rows["seq_len_kv"].max()
    values = []
    for line in panel.lines:
        at = line.rows[line.rows["seq_len_kv"] == longest]
        if not at.empty:
            values.append(f"{line.label} {text(at[column].iloc[0])}")
    return f"At {units.format_length(longest)}: {'; '.join(values)}."


def _missing_marks(panel: lines.Panel, cases: pd.DataFrame) -> list[Mark]:
    """A cross at each L where a case of this panel was wanted and gave no time."""
    lost = cases[cases["status"].isin(["wrong", "failed", "oom", "timeout"])]
    return [
        Mark(
            kind="lost",
            x=float(row["seq_len_kv"]),
            label=f"{lines.name_of(row)}: {row['status']}, {row['reason']}",
        )
        for row in frame.rows(lost)
        if lines.belongs(panel, row)
    ]


def _dense_peers(cases: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The dense cases that the DSA cases in `rows` are compared with."""
    keys = ["run", "phase", "seq_len_kv", "seq_len_q", "batch_size", "num_heads", "preset"]
    wanted = rows[[*keys, "dense_impl", "dense_precision"]].rename(
        columns={"dense_impl": "impl", "dense_precision": "precision"}
    )
    dense = cases[(cases["op"] == "dense_attention") & cases["peak_bytes"].notna()]
    return dense.merge(wanted, on=[*keys, "impl", "precision"], how="inner")
