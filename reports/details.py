"""What the page shows of a case when its row is opened: doubts, samples, stages, log."""

from typing import Any

from dsa_bench import doubt
from dsa_bench.record import Record, Telemetry, Timing
from dsa_bench.reports import frame, units
from dsa_bench.reports.digest import Digest
from dsa_bench.reports.pool import Pooled, pool
from dsa_bench.stats import median

MAX_SAMPLES = 64
"""Samples of one case that the page embeds; all of them stay in the run folder."""
MAX_LOG_LINES = 20
SLOWED_BY = {
    0x01: "idle",
    0x02: "clock setting",
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
    0x100: "display clock",
}
"""Names of the bits of NVML's clocks-event reasons."""
MEASURED_TITLES = (
    *("process", "mode", "samples", "visits", "beside", "input sets", "ended by", "overtaken"),
    *("spin", "flush", "event overhead", "SM clock", "highest", "power", "temperature"),
    *("slowed by", "neighbours"),
)


def details(report: Digest) -> dict[str, dict[str, Any]]:
    """By row of the table of cases: lists of texts, and samples as numbers."""
    found: dict[str, dict[str, Any]] = {}
    for index, run in enumerate(report.runs):
        for pooled in pool(run.records):
            shown = _of_case(pooled)
            if shown:
                found[f"{index}-{pooled.first.case.key}"] = shown
    for row in frame.rows(report.stages):
        found.setdefault(f"{row['run']}-{row['key']}", {}).setdefault("stages", []).append(
            [
                *(row["stage"], row["impl"], units.format_seconds(row["seconds"])),
                *(units.format_share(row["share"]), units.format_flops(row["flops_per_second"])),
                units.format_bandwidth(row["bytes_per_second"]),
            ]
        )
    for row in frame.rows(report.kernels):
        calls, seconds = units.format_number(row["calls"]), units.format_seconds(row["seconds"])
        found.setdefault(f"{row['run']}-{row['key']}", {}).setdefault("kernels", []).append(
            [row["kernel"], row["stage"], calls, seconds]
        )
    return found


def strip() -> dict[str, Any]:
    """Specification of a case's samples in time order; the page fills in `values`."""
    x = {"field": "i", "type": "quantitative", "title": "sample", "axis": {"grid": False}}
    y = {"field": "t", "type": "quantitative", "scale": {"zero": False}, "title": "time"}
    tip = [{"field": "i", "title": "sample"}, {"field": "t", "title": "time"}]
    hue = {"field": "r", "type": "nominal", "title": "process", "legend": {"orient": "right"}}
    hue |= {"scale": {"range": ["@sparse0", "@sparse1", "@sparse2", "@sparse3", "@sparse4"]}}
    return {
        "width": 520,
        "height": 90,
        "background": "transparent",
        "data": {"values": []},
        "mark": {"type": "point", "filled": True, "size": 22, "opacity": 0.85},
        "encoding": {"x": x, "y": y, "color": hue, "tooltip": tip},
    }


def _of_case(pooled: Pooled) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "flags": [[doubt.severity((f,)), units.clean(doubt.explain((f,)))] for f in pooled.flags],
        "log": [units.clean(line) for line in pooled.first.log[-MAX_LOG_LINES:]],
    }
    if pooled.status == "ok":
        shown["measured"] = [_measured(r, r.time) for r in pooled.replicates if r.time]
        shown["samples"] = _samples(pooled)
    if pooled.first.lost_workers:
        shown["log"].insert(0, f"workers lost over this case: {pooled.first.lost_workers}")
    return {name: value for name, value in shown.items() if value}


def _measured(record: Record, timing: Timing) -> list[str]:
    """The row under MEASURED_TITLES of one process."""
    read = timing.telemetry or Telemetry()
    count = f"{len(timing.seconds)}"
    if timing.calls_per_sample > 1:
        count += f" of {timing.calls_per_sample} calls"
    beside = len(timing.beside)
    return [
        *(str(record.replicate), units.clean(timing.mode), count),
        *(str(len(timing.blocks) or 1), f"{beside} in turn" if beside else "alone"),
        *(str(timing.input_sets), units.clean(timing.stop), str(len(timing.overtaken))),
        units.format_seconds(timing.spin_seconds or None),
        units.format_bytes(timing.flush_bytes or None),
        units.format_seconds(timing.event_overhead_seconds or None),
        _middle(read.sm_clock_mhz, "MHz"),
        units.MISSING if read.sm_clock_max_mhz is None else f"{read.sm_clock_max_mhz:.0f} MHz",
        _middle(read.power_w, "W"),
        _middle(read.temperature_c, "°C"),
        slowed_by(read.throttle_reasons) or units.MISSING,
        str(read.neighbours),
    ]


def _middle(values: tuple[float, ...], unit: str) -> str:
    return f"{median(values):.0f} {unit}" if values else units.MISSING


def slowed_by(reasons: int) -> str:
    """The set bits of NVML's clocks-event reasons by name: `power limit, heat (hardware)`."""
    named = [name for bit, name in SLOWED_BY.items() if reasons & bit]
    unknown = reasons & ~sum(SLOWED_BY)
    return ", ".join(named + ([f"{unknown:#x}"] if unknown else []))


def _samples(pooled: Pooled) -> dict[str, Any]:
    """The samples of each process in time order: sample numbers, times in one unit, its name."""
    scale, unit = _unit(median(pooled.timings[0].seconds) if pooled.timings else 1.0)
    room = max(2, MAX_SAMPLES // max(1, len(pooled.timings)))
    points = [
        [i, float(f"{seconds / scale:.4g}"), record.replicate]
        for record in pooled.replicates
        if record.time
        for i, seconds in thinned(record.time.seconds, room)
    ]
    return {"unit": unit, "points": points} if points else {}


def _unit(seconds: float) -> tuple[float, str]:
    steps = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
    return next((step for step in steps if seconds >= step[0]), (1e-9, "ns"))


def thinned(seconds: tuple[float, ...], room: int) -> list[tuple[int, float]]:
    """At most `room` samples with their numbers; the extremes of equal windows where thinned.

    Extremes and not medians: what a reader looks for is what the median hides.
    """
    numbered = list(enumerate(seconds))
    if len(numbered) <= room:
        return numbered
    windows = room // 2
    kept: set[tuple[int, float]] = set()
    for w in range(windows):
        part = numbered[w * len(numbered) // windows : (w + 1) * len(numbered) // windows]
        kept |= {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
    return sorted(kept)
