"""The derived figures of a run once more, by other code than the tables': plain loops, no pandas.

What is worked out here from the raw samples is what the tables must show. Nothing is shared with
`stats`, `pool`, `frame` or `metrics`, so that a slip in one of them is seen; of the interval only
what any interval must satisfy is asked.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dsa_bench import doubt
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case, Record

DEFAULT_GPU_HOUR_USD = 2.0
WORST_FIRST = ("wrong", "failed", "timeout", "oom", "interrupted", "skipped", "ok")
FIGURES = (
    *("replicates", "samples", "seconds", "tokens", "seconds_per_token", "usd_per_million_tokens"),
    *("speedup", "flops", "bytes_read", "bytes_written", "flops_per_second", "bytes_per_second"),
    *("floor_seconds", "floor_share", "peak_bytes", "input_bytes", "output_bytes"),
    *("workspace_bytes", "predicted_bytes"),
)
"""Columns of the table of cases that are recomputed."""

OPPONENTS = {
    "dsa": "dense_attention",
    "dsa_fp8": "dense_attention",
    "dsa_layer": "dense_layer",
    "masked_layer": "dense_layer",
}

Row = dict[str, Any]


def figures(records: Sequence[Record], header: Mapping[str, Any]) -> dict[str, Row]:
    """Key of each case -> its status and FIGURES; what there is no value for is None."""
    by_case: dict[str, list[Record]] = {}
    for record in records:
        by_case.setdefault(record.case.key, []).append(record)
    rows = {key: _row(found, header) for key, found in by_case.items()}
    cases = {key: found[0].case for key, found in by_case.items()}
    for key, row in rows.items():
        if cases[key].op in OPPONENTS and row["is_trusted"]:
            row["speedup"] = _speedup(row, cases[key], cases, rows)
    return rows


def medians(records: Sequence[Record]) -> list[float]:
    """The median of each timed replicate."""
    return [statistics.median(r.time.seconds) for r in records if r.time and r.time.seconds]


def counted(records: Sequence[Record]) -> list[Record]:
    """The replicates of a case that count: not the interrupted ones, if others ended."""
    ended = [record for record in records if record.status != "interrupted"]
    return sorted(ended or records, key=lambda record: record.replicate)


def _row(found: Sequence[Record], header: Mapping[str, Any]) -> Row:
    used = counted(found)
    worst = min(used, key=lambda record: WORST_FIRST.index(record.status))
    row: Row = dict.fromkeys(FIGURES)
    row |= {"status": worst.status, "replicates": len(used), "is_trusted": False}
    row["tokens"] = worst.case.seq_len_q * worst.case.batch_size
    if worst.status != "ok":
        return row
    row |= {name: worst.cost.get(name) for name in ("flops", "bytes_read", "bytes_written")}
    if worst.memory:
        for part in ("peak", "input", "output", "workspace", "predicted"):
            row[f"{part}_bytes"] = getattr(worst.memory, f"{part}_bytes")
    middles = medians(used)
    if len(middles) == len(used):
        row |= _timed(used, middles, row, header)
    return row


def _timed(
    used: Sequence[Record], middles: Sequence[float], row: Row, header: Mapping[str, Any]
) -> Row:
    """What an `ok` case has by its time."""
    seconds = middles[0] if len(middles) == 1 else statistics.geometric_mean(middles)
    case, timings = used[0].case, [record.time for record in used if record.time]
    made: Row = {"seconds": seconds, "samples": sum(len(t.seconds) for t in timings)}
    made["is_trusted"] = doubt.is_trusted(flag for record in used for flag in record.flags)
    made["flops_per_second"] = _per_second(row["flops"], seconds)
    if row["bytes_read"] is not None and row["bytes_written"] is not None:
        moved = row["bytes_read"] + row["bytes_written"]
        made["bytes_per_second"] = _per_second(moved, seconds)
        floor = _floor(row["flops"], moved, case.precision, timings[0].mode, header)
        made["floor_seconds"] = floor
        made["floor_share"] = None if floor is None else floor / seconds
    if made["is_trusted"]:
        made["seconds_per_token"] = seconds / row["tokens"]
        price = (header.get("options") or {}).get("gpu_hour_usd")
        price = DEFAULT_GPU_HOUR_USD if price is None else price
        if case.preset in PRESETS:
            layers = PRESETS[case.preset].num_layers
            paid = price * layers * case.tensor_parallel
            made["usd_per_million_tokens"] = paid * made["seconds_per_token"] * 1e6 / 3600
    return made


def _per_second(amount: float | None, seconds: float) -> float | None:
    return amount / seconds if amount else None


def _speedup(row: Row, case: Case, cases: Mapping[str, Case], rows: Mapping[str, Row]) -> Any:
    """Time of the fastest trusted dense opponent of the same shape ÷ that of this case."""
    rivals = [
        rows[key]["seconds"]
        for key, other in cases.items()
        if other.op == OPPONENTS[case.op]
        and rows[key]["is_trusted"]
        and _shape(other) == _shape(case)
    ]
    return min(rivals) / row["seconds"] if rivals else None


def _shape(case: Case) -> tuple[Any, ...]:
    sizes = (case.seq_len_kv, case.seq_len_q, case.batch_size, case.lengths, case.num_heads)
    ranks = (case.tensor_parallel, case.inputs, case.weights)
    return (case.phase, *sizes, *ranks, case.preset, case.mode)


def _floor(
    flops: float | None, moved: float, precision: str, mode: str, header: Mapping[str, Any]
) -> float | None:
    """Least time by the machine's burst rates: max(FLOPs ÷ matrix rate, bytes ÷ memory rate)."""
    rates = {
        name: float(value)
        for name, value in (header.get("ceilings") or {}).items()
        if isinstance(value, int | float) and value > 0 and not name.startswith("sustained_")
    }
    matrix = {
        name.removesuffix("_per_second").removesuffix("_flops"): value
        for name, value in rates.items()
        if name.removesuffix("_per_second").endswith("_flops")
    }
    copy = rates.get("copy_bytes_per_second")
    if flops is None or not copy or not matrix or (precision == "fp8" and "fp8" not in matrix):
        return None
    if mode in ("warm", "sustained", "cpu"):
        copy = max(copy, rates.get("l2_bytes_per_second", math.inf))
    return max(flops / matrix.get(precision, max(matrix.values())), moved / copy)
