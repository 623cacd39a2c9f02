"""What the commands print, as plain tables of text: cases, endings, checks, kernels, machine."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsa_bench.cost import SUSTAINED_PREFIX
from dsa_bench.finding import Finding
from dsa_bench.record import EQUAL_LENGTHS, RANDOM_INPUTS, Case, KernelTime, Record, StageTime
from dsa_bench.reports.units import (
    format_bandwidth,
    format_bytes,
    format_flops,
    format_seconds,
    format_share,
)
from dsa_bench.sizes import format_size
from dsa_bench.stats import median
from dsa_bench.sweep import Planned, shipped, summary


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTable:
    """A table of text, ready to be drawn."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    right: frozenset[str] = frozenset()
    """Columns of numbers."""
    spare: tuple[str, ...] = ()
    """Columns to do without where the terminal is narrow, in this order."""


COLUMN_GAP = 2
# a longer text is broken into lines
WRAPPED_WIDTH = 30


def fit(table: TextTable, width: int) -> TextTable:
    """The table without as many of its spare columns as it takes to fit into the width."""
    widths = {
        name: min(
            max(len(text) for text in (name, *column)),
            sys.maxsize if name in table.right else WRAPPED_WIDTH,
        )
        for name, *column in zip(table.head, *table.rows, strict=True)
    }
    dropped: list[str] = []
    for name in table.spare:
        needed = sum(w + COLUMN_GAP for n, w in widths.items() if n not in dropped) - COLUMN_GAP
        if needed <= width:
            break
        if name in widths:
            dropped.append(name)
    if not dropped:
        return table
    kept = [i for i, name in enumerate(table.head) if name not in dropped]
    return replace(
        table,
        head=tuple(table.head[i] for i in kept),
        rows=tuple(tuple(row[i] for i in kept) for row in table.rows),
        notes=(*table.notes, f"too narrow for: {', '.join(dropped)}"),
    )


def case_label(case: Case) -> str:
    """One line that names a case: `decode dsa L=8k q=1 k=2k fp8 batch=32 (triton+gluon)`."""
    parts = [case.phase, case.op, f"L={format_size(case.seq_len_kv)}"]
    parts.append(f"q={format_size(case.seq_len_q)}")
    if case.topk is not None:
        parts.append(f"k={format_size(case.topk)}")
    parts.append(case.precision)
    if case.phase == "decode":
        parts.append(f"batch={case.batch_size}")
    return f"{' '.join((*parts, *_others(case)))} ({case.impl_label})"


def _others(case: Case) -> tuple[str, ...]:
    """Axes that few cases have, where they are not at their default; of a path the file's name."""
    lengths = (f"lengths={case.lengths}",) if case.lengths != EQUAL_LENGTHS else ()
    ranks = (f"tp={case.tensor_parallel}",) if case.tensor_parallel != 1 else ()
    inputs = (f"inputs={Path(case.inputs).name}",) if case.inputs != RANDOM_INPUTS else ()
    weights = (f"weights={Path(case.weights).name}",) if case.weights else ()
    return (*lengths, *ranks, *inputs, *weights)


def ending(record: Record) -> str:
    """How a case ended: `ok 3.21 ms`, or the status with its reason."""
    if record.time and record.time.seconds:
        return f"{record.status} {format_seconds(median(record.time.seconds))}"
    return f"{record.status}: {record.reason}" if record.reason else record.status


def plan(planned: Sequence[Planned]) -> TextTable:
    """The cases that a run would take."""
    others = ("others",) if any(_others(item.case) for item in planned) else ()
    head = ("phase", "operator", "implementation", "L", "k", "precision", "batch", "queries",
            "heads", *others, "skipped because")  # fmt: skip
    rows = tuple(
        (
            *(item.case.phase, item.case.op, item.case.impl_label),
            format_size(item.case.seq_len_kv),
            "" if item.case.topk is None else format_size(item.case.topk),
            *(item.case.precision, str(item.case.batch_size)),
            *(format_size(item.case.seq_len_q), str(item.case.num_heads)),
            *(" ".join(_others(item.case)) for _ in others),
            item.reason,
        )
        for item in planned
    )
    skipped = sum(1 for item in planned if item.reason)
    note = f"to run: {len(rows) - skipped}, skipped: {skipped}"
    numbers = frozenset({"L", "k", "batch", "queries", "heads"})
    return TextTable(title="plan", head=head, rows=rows, notes=(note,), right=numbers)


def checks(records: Sequence[Record]) -> TextTable:
    """The verdict on each case, with the figure nearest to its limit."""
    rows = tuple((case_label(r.case), r.status, closest_figure(r.gate), r.reason) for r in records)
    counts: dict[str, int] = {}
    for record in records:
        counts[record.status] = counts.get(record.status, 0) + 1
    note = ", ".join(f"{count} {status}" for status, count in counts.items())
    head = ("case", "status", "nearest to its limit", "reason")
    return TextTable(title="check", head=head, rows=rows, notes=(note,))


def closest_figure(gate: Mapping[str, Any]) -> str:
    """`out max_abs 0.0004 of 0.001`: the figure that uses most of what it may."""
    found: list[tuple[float, str]] = []
    for check in gate.get("checks", ()):
        for name, limit in check["limits"].items():
            figure = check["figures"].get(name)
            if figure is not None and (figure or limit):
                share = figure / limit if limit else float("inf")
                found.append((share, f"{check['name']} {name} {figure:.3g} of {limit:.3g}"))
    return max(found)[1] if found else ""


def profile(record: Record, traces: Path) -> tuple[TextTable, ...]:
    """Stages, kernels and memory of one profiled case, and where its trace lies."""
    title = case_label(record.case)
    if record.status != "ok":
        return (TextTable(title=title, head=("status",), rows=((ending(record),),)),)
    trace = traces / f"{record.case.key}.trace.json.gz"
    timeline = traces / f"{record.case.key}.memory.csv"
    notes = tuple(
        f"{what}: {path}"
        for what, path in (("chrome trace", trace), ("memory timeline", timeline))
        if path.exists()
    )
    return (
        _stage_table(title, record.stages),
        _kernel_table(record.kernels, record.stages),
        TextTable(title="memory", head=("what", "bytes"), rows=_memory_rows(record),
                  notes=notes, right=frozenset({"bytes"})),
    )  # fmt: skip


def _stage_table(title: str, stages: Sequence[StageTime]) -> TextTable:
    total = sum(stage.seconds for stage in stages)
    rows = tuple(
        (s.name, s.impl, format_seconds(s.seconds), format_share(_share(s.seconds, total)))
        for s in stages
        if s.seconds > 0  # else it launched nothing: the one before did its work
    )
    numbers = frozenset({"time", "share"})
    head = ("stage", "implementation", "time", "share")
    return TextTable(title=title, head=head, rows=rows, right=numbers)


def _kernel_table(kernels: Sequence[KernelTime], stages: Sequence[StageTime]) -> TextTable:
    # of all stages: a record keeps the longest kernels alone
    total = sum(stage.seconds for stage in stages)
    order = list(dict.fromkeys(part for s in (stages, kernels) for part in _stage_names(s)))
    listed = sorted(kernels, key=lambda k: (order.index(k.stage), -k.seconds))
    rows = tuple(
        (k.stage, k.name, f"{k.calls:g}", format_seconds(k.seconds),
         format_share(_share(k.seconds, total)))
        for k in listed
    )  # fmt: skip
    head = ("stage", "kernel", "calls", "time", "share")
    return TextTable(
        title="kernels", head=head, rows=rows, right=frozenset({"calls", "time", "share"})
    )


def _stage_names(parts: Sequence[StageTime | KernelTime]) -> list[str]:
    return [part.name if isinstance(part, StageTime) else part.stage for part in parts]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _memory_rows(record: Record) -> tuple[tuple[str, str], ...]:
    if record.memory is None:
        return ()
    names = ("input", "output", "workspace", "peak", "predicted")
    return tuple((name, format_bytes(getattr(record.memory, f"{name}_bytes"))) for name in names)


def inventory(device: str) -> dict[str, Any]:
    """What `list` shows, as JSON."""
    from dsa_bench import machine, registry
    from dsa_bench.preset import PRESETS

    return {
        "implementations": registry.list_rows(machine.detect(device)),
        "plugins": [
            {"plugin": p.name, "from": p.source, "problem": p.problem or "none"}
            for p in registry.catalogue().plugins
        ],
        "presets": [
            {
                "preset": preset.name,
                "num_heads": preset.num_heads,
                "head_dim_qk": preset.head_dim_qk,
                "head_dim_v": preset.head_dim_v,
                "index_heads": preset.index_heads,
                "index_dim": preset.index_dim,
                "num_layers": preset.num_layers,
            }
            for preset in PRESETS.values()
        ],
        "sweeps": [{"sweep": name, "summary": summary(path)} for name, path in shipped().items()],
    }


def inventory_tables(found: Mapping[str, Any]) -> tuple[TextTable, ...]:
    """The same for people."""
    operators = tuple(
        (
            *(row["operator"], ", ".join(row["phases"]), row["implementation"]),
            _library(row),
            "yes" if row["available"] else row["reason"],
        )
        for row in found["implementations"]
    )
    return (
        TextTable(
            title="operators",
            head=("operator", "phases", "implementation", "library", "runs here"),
            rows=operators,
        ),
        *((_rows_table("plug-ins", found["plugins"]),) if found["plugins"] else ()),
        _rows_table("presets", found["presets"]),
        _rows_table("sweeps", found["sweeps"]),
    )


def findings_table(found: Sequence[Finding]) -> TextTable:
    """One row for each implementation and hostile input."""
    return TextTable(
        title="hostile inputs",
        head=("operator", "implementation", "input", "verdict", "reason"),
        rows=tuple((f.op, f.impl, f.name, f.verdict, f.reason) for f in found),
    )


def examined(found: Sequence[Finding]) -> str:
    """How one implementation did: `hostile inputs: topk torch fails 4 of 22`."""
    bad = sum(finding.is_bad for finding in found)
    return f"hostile inputs: {found[0].op} {found[0].impl} fails {bad or 'none'} of {len(found)}"


def _library(row: Mapping[str, Any]) -> str:
    """The foreign library and its version, or what to type to get it; empty for our own."""
    if not row["library"]:
        return ""
    return row["install"] or f"{row['library']} {row['version']}".strip()


def diagnosis(device: str, *, measure: bool = False) -> dict[str, Any]:
    """What `doctor` shows, as JSON; `measure` takes the ceilings anew."""
    from dsa_bench import machine, nvml
    from dsa_bench.ceilings import fresh_ceilings, known_ceilings

    before = nvml.processes_before()
    found = machine.detect(device)
    rows = machine.doctor_rows(found, before)
    if measure:
        ceilings = fresh_ceilings(found, busy=machine.busy_hint(found, before))
    else:
        ceilings = known_ceilings(found)
    return {
        "rows": rows,
        "ceilings": dict(ceilings.rates),
        "ceilings_measured": ceilings.measured,
        "ceilings_note": ceilings.note,
    }


def diagnosis_tables(found: Mapping[str, Any]) -> tuple[TextTable, ...]:
    """The same for people."""
    rates = found["ceilings"]
    ceilings = tuple(
        (name.rpartition("_per_")[0].replace("_", " "),
         _format_rate(name, rate), _format_rate(name, rates.get(SUSTAINED_PREFIX + name)))
        for name, rate in rates.items()
        if not name.startswith(SUSTAINED_PREFIX)
    )  # fmt: skip
    measured = found["ceilings_measured"]
    taken = f"measured {measured}" if measured else "not measured yet: dsa-bench doctor --measure"
    table = TextTable(
        title="ceilings",
        head=("ceiling", "burst", "sustained"),
        rows=ceilings,
        notes=tuple(filter(None, (taken, found["ceilings_note"]))),
        right=frozenset({"burst", "sustained"}),
    )
    return _rows_table("machine", found["rows"]), table


def _format_rate(name: str, rate: float | None) -> str:
    if rate is None:
        return ""
    return format_bandwidth(rate) if "bytes" in name else format_flops(rate)


def _rows_table(title: str, rows: Sequence[Mapping[str, Any]]) -> TextTable:
    head = tuple(dict.fromkeys(key for row in rows for key in row))
    return TextTable(
        title=title,
        head=head,
        rows=tuple(tuple(str(row.get(key, "")) for key in head) for row in rows),
    )
