"""Records as flat tables of cases, stages and kernels. The only place that flattens."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from dsa_bench import doubt
from dsa_bench.contest import CONTEST_OF
from dsa_bench.record import Record
from dsa_bench.reports.pool import Pooled, pool
from dsa_bench.reports.units import clean

DEFAULT_GPU_HOUR_USD = 2.0
"""Rental price that DeepSeek's own cost figure assumes; a run without a price takes it too."""

AXES = (
    "run_label",
    "preset",
    "op",
    "impl",
    "phase",
    "topk",
    "precision",
    "batch_size",
    "lengths",
    "num_heads",
    "tensor_parallel",
    "chunk",
    "inputs",
    "weights",
    "seed",
    "asked_mode",
)
"""What tells one line over L from another."""

CASE_COLUMNS = (
    *("run", "run_label", "machine", "device", "started", "gpu_hour_usd", "key"),
    *("contest", "op", "impl", "phase", "seq_len_kv", "seq_len_q", "chunk", "topk", "precision"),
    *("batch_size", "lengths", "num_heads", "tensor_parallel", "inputs", "weights"),
    *("preset", "seed", "asked_mode", "status", "reason"),
    *("flags", "doubt", "replicates"),
    *("mode", "samples", "stop", "seconds", "seconds_low", "seconds_high", "joules_per_call"),
    *("flops", "bytes_read", "bytes_written"),
    *("peak_bytes", "input_bytes", "output_bytes", "workspace_bytes", "predicted_bytes"),
    *("dense_error", "rounding_error", "mass_kept", "recall", "reproduce"),
)
STAGE_COLUMNS = ("run", "key", "stage", "impl", "seconds", "flops", "bytes_read", "bytes_written")
KERNEL_COLUMNS = ("run", "key", "stage", "kernel", "calls", "seconds")


class Run(Protocol):
    """What a report needs of a run folder that was read."""

    @property
    def path(self) -> Path: ...
    @property
    def header(self) -> Mapping[str, Any]: ...
    @property
    def records(self) -> Sequence[Record]: ...
    @property
    def findings(self) -> Sequence[Any]:
        """What implementations did on hostile inputs: dsa_bench.finding.Finding."""
        ...


def cases(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a case, its replicates pooled, in the order of the records.

    `contest` is that of the operator, empty where it is in none; `asked_mode` the mode that was
    asked for, `mode` the one that was used. `doubt` is empty, `noisy`, `suspect` or `invalid`, and
    empty where there is no time.
    """
    labels = run_labels(runs)
    made = [
        _case_row(index, run, labels[index], pooled)
        for index, run in enumerate(runs)
        for pooled in pool(run.records)
    ]
    table = pd.DataFrame(made, columns=list(CASE_COLUMNS))
    table["chunk"] = _chunks(table)
    return table


def stages(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a stage of an `ok` case, in the order in which the stages run; none for a stage that
    launched nothing because the one before did its work."""
    made = [
        {
            **{"run": index, "key": case.first.case.key, "stage": clean(stage.name)},
            **{"impl": clean(stage.impl), "seconds": stage.seconds, "flops": stage.flops},
            **{"bytes_read": stage.bytes_read, "bytes_written": stage.bytes_written},
        }
        for index, run in enumerate(runs)
        for case in pool(run.records)
        if case.status == "ok"
        for stage in case.stages
        if stage.seconds > 0
    ]
    return pd.DataFrame(made, columns=list(STAGE_COLUMNS))


def kernels(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a kernel of an `ok` case."""
    made = [
        {
            **{"run": index, "key": case.first.case.key, "stage": clean(kernel.stage)},
            **{"kernel": clean(kernel.name), "calls": kernel.calls, "seconds": kernel.seconds},
        }
        for index, run in enumerate(runs)
        for case in pool(run.records)
        if case.status == "ok"
        for kernel in case.kernels
    ]
    return pd.DataFrame(made, columns=list(KERNEL_COLUMNS))


def rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as dicts of column -> value."""
    names = [str(name) for name in table.columns]
    values = table.to_numpy(dtype=object).tolist()
    return [dict(zip(names, row, strict=True)) for row in values]


def run_labels(runs: Sequence[Run]) -> list[str]:
    """The machine's name; with the folder's name behind it where two runs share a machine."""
    names = [machine_name(run.header) for run in runs]
    count = Counter(names)
    labels = [
        name if count[name] == 1 else f"{name} ({clean(run.path.name)})"
        for name, run in zip(names, runs, strict=True)
    ]
    seen = Counter(labels)
    return [label if seen[label] == 1 else f"{label} #{i + 1}" for i, label in enumerate(labels)]


def machine_name(header: Mapping[str, Any]) -> str:
    """Name of the GPU, or of the CPU where that was measured."""
    return clean(str(header.get("machine", {}).get("name") or "unknown machine"))


def gpu_hour_usd(header: Mapping[str, Any]) -> float:
    """Price of an hour of this machine in USD."""
    value = header.get("options", {}).get("gpu_hour_usd")
    return DEFAULT_GPU_HOUR_USD if value is None else float(value)


def price_text(row: Any) -> str:
    """`$2 per GPU-hour`; of a CPU it is the machine's hour."""
    kind = "GPU" if row["device"] == "cuda" else "machine"
    return f"${row['gpu_hour_usd']:g} per {kind}-hour"


def flags_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The flags of a row of cases."""
    return tuple(flag for flag in str(row["flags"] or "").split(", ") if flag)


def trusted(table: pd.DataFrame) -> pd.Series:
    """Rows whose time may enter a comparison: neither suspect nor invalid."""
    return ~table["doubt"].isin(["suspect", "invalid"])


def _case_row(index: int, run: Run, label: str, pooled: Pooled) -> dict[str, Any]:
    case, header = pooled.first.case, run.header
    fields = case.to_json()
    asked_mode = fields.pop("mode")
    row: dict[str, Any] = {
        **fields,
        **{"run": index, "run_label": label, "machine": machine_name(header)},
        "device": str(header.get("machine", {}).get("device") or ""),
        "started": str(header.get("started") or ""),
        "gpu_hour_usd": gpu_hour_usd(header),
        **{"key": case.key, "impl": case.impl_label, "asked_mode": asked_mode},
        "contest": CONTEST_OF.get(case.op, ""),
        **{"status": pooled.status, "reason": pooled.reason, "doubt": ""},
        # a comma ends a flag's name
        "flags": ", ".join(flag.replace(",", ";") for flag in pooled.flags),
        **{"replicates": len(pooled.replicates), "reproduce": pooled.first.reproduce},
    }
    if pooled.status == "ok":
        row |= _measured(pooled)
    return {k: clean(v) if isinstance(v, str) else v for k, v in row.items()}


def _measured(pooled: Pooled) -> dict[str, Any]:
    """What an `ok` case has beside its names: time, cost, memory."""
    row: dict[str, Any] = {}
    record, timings = pooled.first, pooled.timings
    estimate = pooled.estimate
    if estimate:
        row |= {"mode": _joined(t.mode for t in timings), "stop": _joined(t.stop for t in timings)}
        row |= {"samples": sum(len(t.seconds) for t in timings)}
        row |= {"seconds": estimate.middle, "seconds_low": estimate.low}
        row |= {"seconds_high": estimate.high, "doubt": doubt.severity(pooled.flags)}
        row |= {"joules_per_call": pooled.joules_per_call}
    row |= {k: record.cost.get(k) for k in ("flops", "bytes_read", "bytes_written")}
    if record.memory:
        row |= {
            f"{part}_bytes": getattr(record.memory, f"{part}_bytes")
            for part in ("peak", "input", "output", "workspace", "predicted")
        }
    return row | _accuracy(record.gate)


def _joined(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(values))


def _accuracy(gate: Mapping[str, Any]) -> dict[str, float | None]:
    """What the gate took of the distances from dense attention and from bf16 tensors."""
    places = {
        "dense_error": ("dense_error", "relative_l2"),
        "rounding_error": ("rounding_error", "relative_l2"),
        "mass_kept": ("dense_error", "mass_kept"),
        "recall": ("dense_error", "recall"),
    }
    return {column: _figure(gate.get(place), name) for column, (place, name) in places.items()}


def _figure(found: Any, name: str) -> float | None:
    """One of the figures that were found; older records have one number, `relative_l2`."""
    figures = found if isinstance(found, Mapping) else {"relative_l2": found}
    value = figures.get(name)
    return float(value) if isinstance(value, int | float) else None


def _chunks(table: pd.DataFrame) -> pd.Series:
    """Queries of a prefill chunk; 0 for whole prompts, which form a line of their own over L.

    A case whose queries are its whole prompt belongs to the chunked line if that line has the same
    number of queries at another L (the first chunk of 4096 at L = 4096); else it is a whole prompt.
    """
    chunk = table["seq_len_q"].copy()
    if table.empty:
        return chunk
    lengths = table.groupby(["run", "phase", "seq_len_q"])["seq_len_kv"].transform("nunique")
    whole = (table["phase"] != "decode") & (table["seq_len_q"] == table["seq_len_kv"])
    return chunk.mask(whole & (lengths == 1), 0)
