"""Figures of what one sparse line is made of: stages, memory, rates."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from dsa_bench.contest import ATTENTION, DENSE
from dsa_bench.reports import lines, units
from dsa_bench.reports.chart import Axis, Figure, Mark, Series
from dsa_bench.reports.digest import Digest
from dsa_bench.reports.metrics import SHAPE, ceilings, sustained_ceilings
from dsa_bench.reports.series import LENGTH, bar_series, overlay, points_of

PREFILL_CEILINGS = {
    "bf16_flops_per_second": "measured bf16 matmul rate",
    "fp8_flops_per_second": "measured fp8 matmul rate",
    "fp32_flops_per_second": "measured fp32 matmul rate",
}
FP8_NOTE = " Only an fp8 stage can pass the bf16 rate."
MAX_RATES = 6
"""Stages of which one figure shows the rates: those that take longest."""
SAME_LEVEL = 0.04
"""Share by which two levels must differ for both labels to be readable."""
DECODE_CEILINGS = {"copy_bytes_per_second": "measured copy rate"}


def stage_times(report: Digest) -> list[Figure]:
    """Kernel time of each stage of DSA as stacked bars over L; of a layer see `budget`."""
    made = []
    for panel in lines.bar_panels(report, "speedup"):
        stages = stages_of(panel.rows, report)
        if stages.empty or panel.contest != ATTENTION.name:
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
                        bar_series(
                            str(name), f"stage{min(i, 5)}", part, "seconds", units.format_seconds
                        )
                        for i, (name, part) in enumerate(stages.groupby("stage", sort=False))
                    ),
                    overlay("timed call", panel.rows, "seconds", units.format_seconds),
                ),
            )
        )
    return made


def memory(report: Digest) -> list[Figure]:
    """Peak memory of one call, split; beside it the peak of the fastest dense opponent."""
    made = []
    for panel in lines.bar_panels(report, "peak_bytes"):
        rows = panel.rows
        last = rows.sort_values("seq_len_kv").iloc[-1]
        dense = dense_peers(report.cases, rows)
        dense = dense[dense["peak_bytes"].notna()]
        parts = (
            ("inputs", "input_bytes"),
            ("outputs", "output_bytes"),
            ("workspace", "workspace_bytes"),
        )
        bars = [
            bar_series(label, f"stage{i}", rows, column, units.format_bytes)
            for i, (label, column) in enumerate(parts)
        ]
        if not dense.empty:
            bars.append(overlay("dense, peak", dense, "peak_bytes", units.format_bytes))
        made.append(
            Figure(
                name=f"memory-{panel.slug}",
                title=f"Memory, {panel.title}",
                question="How much device memory does one call need?",
                answer=f"At {units.format_length(last['seq_len_kv'])} the peak is "
                f"{units.format_bytes(last['peak_bytes'])}, of which "
                f"{units.format_bytes(last['workspace_bytes'])} is workspace (logits, parts)."
                + ("" if dense.empty else f" Diamonds: {panel.opponent}, the fastest."),
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
        stages = _longest(stages_of(panel.rows, report))
        roles = {stage: f"stage{min(i, 5)}" for i, stage in enumerate(stages["stage"].unique())}
        stages = stages[stages[column].notna()]
        if stages.empty:
            continue
        header = report.runs[int(stages["run"].iloc[0])].header
        marks = _ceiling_marks(header, DECODE_CEILINGS if in_decode else PREFILL_CEILINGS)
        by_fp8 = "bf16_flops_per_second" in ceilings(header) and "fp8" in set(stages["precision"])
        made.append(
            Figure(
                name=f"rates-{panel.slug}",
                title=f"Rate of each stage, {panel.title}",
                question="How near is each stage to what the machine can do?",
                answer="Bytes are counted once each, whatever a kernel reads again."
                if in_decode
                else f"FLOPs count valid entries.{FP8_NOTE if by_fp8 else ''} "
                "Stages without matrix products are left out.",
                x=LENGTH,
                y=Axis(title="traffic" if in_decode else "FLOP rate", text=text, log=False),
                series=tuple(
                    Series(
                        label=units.shorten(f"{stage} ({part['impl'].iloc[0]})"),
                        role=roles[stage],
                        points=points_of(part, column, text),
                    )
                    for stage, part in stages.groupby("stage", sort=False)
                ),
                marks=marks,
            )
        )
    return made


def stages_of(rows: pd.DataFrame, report: Digest) -> pd.DataFrame:
    """The stages of these cases, which are of one run."""
    stages = report.stages
    return stages[stages["key"].isin(rows["key"]) & stages["run"].isin(rows["run"])]


def _longest(stages: pd.DataFrame) -> pd.DataFrame:
    """The MAX_RATES stages that take the most time in all, in the order in which they run."""
    seconds = pd.to_numeric(stages["seconds"])
    total = seconds.groupby(stages["stage"]).sum().nlargest(MAX_RATES)
    return stages[stages["stage"].isin(total.index)]


def _ceiling_marks(header: Mapping[str, Any], names: Mapping[str, str]) -> tuple[Mark, ...]:
    """Levels of the measured rates: solid of a burst, dashed of seconds at a stretch; one for both
    where their labels would lie upon each other."""
    burst, sustained = ceilings(header), sustained_ceilings(header)
    marks = []
    for name, label in names.items():
        rate, lasting = burst.get(name), sustained.get(name)
        if rate and lasting and abs(lasting - rate) < SAME_LEVEL * rate:
            label, lasting = f"{label}, burst and sustained", None
        if rate is not None:
            marks.append(Mark(kind="level", y=rate, label=label, style="solid"))
        if lasting is not None:
            marks.append(Mark(kind="level", y=lasting, label=f"{label}, sustained", style="dashed"))
    return tuple(marks)


def dense_peers(cases: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The dense cases that the sparse cases in `rows` are compared with."""
    wanted = rows[[*SHAPE, "dense_impl", "dense_precision"]].rename(
        columns={"dense_impl": "impl", "dense_precision": "precision"}
    )
    dense = cases[cases["op"].isin(DENSE)]
    return dense.merge(wanted, on=[*SHAPE, "impl", "precision"], how="inner")
