"""Columns that are derived where they are shown: each a name, unit, direction and formula."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dsa_bench import cost
from dsa_bench.contest import DENSE, SPARSE
from dsa_bench.preset import PRESETS
from dsa_bench.reports import frame

SHAPE = (
    *("run", "contest", "phase", "seq_len_kv", "seq_len_q", "batch_size", "lengths", "num_heads"),
    *("tensor_parallel", "inputs", "weights", "preset", "asked_mode"),
)
"""A dense case is the opponent of a sparse one if these agree; ratios count only within one run."""
SUSTAINED = "sustained_"
"""Begins the name of a rate that the machine keeps up when it is hot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One derived column of the table of cases."""

    name: str
    unit: str
    better: str
    """`lower` or `higher`; empty where neither is better."""
    formula: str
    compute: Callable[[pd.DataFrame], pd.Series]


def cases(runs: Sequence[frame.Run]) -> pd.DataFrame:
    """The table of cases with all derived columns."""
    table = _add_dense(frame.cases(runs))
    table["floor_seconds"] = _floor_seconds(table, runs)
    for metric in METRICS:
        table[metric.name] = metric.compute(table)
    return table


def stages(runs: Sequence[frame.Run], table: pd.DataFrame) -> pd.DataFrame:
    """The table of stages with the axes of their cases, rates, and shares of the kernel time."""
    # `op` and `impl` of the case are left out: a stage has its own implementation
    axes = [a for a in frame.AXES if a not in ("op", "impl")]
    keep = ["run", "key", "seq_len_kv", "seq_len_q", *axes]
    cases_of = table.assign(
        case_impl=table["impl"], case_op=table["op"], case_seconds=table["seconds"]
    )
    # a doubt about the call is one about its stages: they ran on the same machine just then
    keep += ["case_impl", "case_op", "case_seconds", "flags", "doubt"]
    joined = frame.stages(runs).merge(cases_of[keep], on=["run", "key"], how="inner")
    total = joined.groupby(["run", "key"])["seconds"].transform("sum")
    joined["share"] = joined["seconds"] / total.where(total > 0)
    joined["flops_per_second"] = _rate(joined["flops"], joined["seconds"])
    moved = joined["bytes_read"] + joined["bytes_written"]
    joined["bytes_per_second"] = _rate(moved, joined["seconds"])
    return joined


def layers(preset: str) -> int | None:
    """Layers of a model preset; None for one that this version does not know."""
    known = PRESETS.get(preset)
    return known.num_layers if known else None


def ceilings(header: Mapping[str, Any]) -> dict[str, float]:
    """Measured rates of the machine, under the names that `cost.floor_seconds` reads.

    Those of a short burst: a sustained rate is no limit, so a floor from it would not be one.
    """
    return {k: v for k, v in _all_ceilings(header).items() if not k.startswith(SUSTAINED)}


def sustained_ceilings(header: Mapping[str, Any]) -> dict[str, float]:
    """The rates that the machine kept up for seconds, under the names of the burst ones."""
    found = _all_ceilings(header)
    return {k.removeprefix(SUSTAINED): v for k, v in found.items() if k.startswith(SUSTAINED)}


def _all_ceilings(header: Mapping[str, Any]) -> dict[str, float]:
    found = {k: v for k, v in (header.get("ceilings") or {}).items() if isinstance(v, int | float)}
    return {
        f"{k}_per_second" if k.endswith("_flops") else k: float(v)
        for k, v in found.items()
        if v > 0
    }


def _rate(amount: pd.Series, seconds: pd.Series) -> pd.Series:
    """Amount per second; missing where either is zero or missing."""
    amount, seconds = pd.to_numeric(amount), pd.to_numeric(seconds)
    return amount.where(amount > 0) / seconds.where(seconds > 0)


def _add_dense(table: pd.DataFrame) -> pd.DataFrame:
    """Beside each sparse case: time, interval, name of the fastest `ok` dense case of its shape.

    What is suspect is no opponent, however fast; `suspect_dense` names the fastest such case if it
    would have been the opponent.
    """
    for name in ("seconds", "seconds_low", "seconds_high"):
        table[name] = pd.to_numeric(table[name])
    dense = table[table["op"].isin(DENSE) & table["seconds"].notna()]
    is_trusted = frame.trusted(dense)
    columns = {
        "seconds": "dense_seconds",
        "seconds_low": "dense_low",
        "seconds_high": "dense_high",
        "impl": "dense_impl",
        "precision": "dense_precision",
        "flags": "dense_flags",
        "doubt": "dense_doubt",
    }
    beside = _fastest(dense[is_trusted])[[*SHAPE, *columns]].rename(columns=columns)
    merged = table.merge(beside, on=list(SHAPE), how="left", validate="many_to_one")
    suspects = _fastest(dense[~is_trusted])[[*SHAPE, "seconds", "impl"]]
    suspects = suspects.rename(columns={"seconds": "suspect_seconds", "impl": "suspect_dense"})
    merged = merged.merge(suspects, on=list(SHAPE), how="left", validate="many_to_one")
    for name in ("dense_seconds", "dense_low", "dense_high", "suspect_seconds"):
        merged[name] = pd.to_numeric(merged[name])
    # False also where there is no suspect; a suspect without a rival would have been the opponent
    is_beaten = ~(merged["suspect_seconds"] < merged["dense_seconds"].fillna(math.inf))
    is_other = ~merged["op"].isin(SPARSE)
    merged["suspect_dense"] = merged["suspect_dense"].astype(object).mask(is_beaten | is_other)
    merged.loc[is_other, list(columns.values())] = None
    for name in ("dense_seconds", "dense_low", "dense_high"):
        merged[name] = pd.to_numeric(merged[name])
    return merged.drop(columns="suspect_seconds")


def _fastest(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.sort_values("seconds", kind="stable").drop_duplicates(list(SHAPE))


def _trusted_seconds(table: pd.DataFrame) -> pd.Series:
    """Times from which something may be derived."""
    return table["seconds"].where(frame.trusted(table))


def _floor_seconds(table: pd.DataFrame, runs: Sequence[frame.Run]) -> pd.Series:
    limits = [ceilings(run.header) for run in runs]
    floors = [_floor(row, limits[row["run"]]) for row in frame.rows(table)]
    return pd.Series(floors, index=table.index, dtype="float64")


def _floor(row: Mapping[str, Any], limits: Mapping[str, float]) -> float | None:
    """Least time of one case; also the bf16 parts of a composition are held to the fp8 rate."""
    needed = {name: row[name] for name in ("flops", "bytes_read", "bytes_written")}
    if pd.isna(row["seconds"]) or any(pd.isna(v) for v in needed.values()):
        return None
    # below the fp8 rate that nobody measured, a floor would not be one
    if row["precision"] == "fp8" and "fp8_flops_per_second" not in limits:
        return None
    return cost.floor_seconds(needed, limits, row["precision"], str(row["mode"]))


def _tokens(table: pd.DataFrame) -> pd.Series:
    return table["seq_len_q"] * table["batch_size"]


def _usd(table: pd.DataFrame) -> pd.Series:
    values = [
        cost.usd_per_million_tokens(
            row["seconds_per_token"],
            num_layers=count,
            gpu_hour_usd=row["gpu_hour_usd"],
            num_gpus=row["tensor_parallel"],
        )
        if (count := layers(row["preset"])) and pd.notna(row["seconds_per_token"])
        else None
        for row in frame.rows(table)
    ]
    return pd.Series(values, index=table.index, dtype="float64")


METRICS = (
    Metric(
        name="tokens",
        unit="",
        better="",
        formula="batch_size · seq_len_q: query tokens of one call",
        compute=_tokens,
    ),
    Metric(
        name="seconds_per_token",
        unit="s",
        better="lower",
        formula="median seconds ÷ tokens, one layer; not of a suspect time",
        compute=lambda t: _trusted_seconds(t) / t["tokens"],
    ),
    Metric(
        name="usd_per_million_tokens",
        unit="USD",
        better="lower",
        formula="USD per GPU-hour ÷ 3600 · ranks · seconds per token · layers · 10⁶; attention or "
        "attention layers only, communication left out",
        compute=_usd,
    ),
    Metric(
        name="joules_per_token",
        unit="J",
        better="lower",
        formula="energy of the whole card in one call ÷ tokens, one layer; mode sustained alone",
        compute=lambda t: pd.to_numeric(t["joules_per_call"]).where(frame.trusted(t)) / t["tokens"],
    ),
    Metric(
        name="flops_per_second",
        unit="FLOP/s",
        better="higher",
        formula="FLOPs of the valid entries ÷ median seconds",
        compute=lambda t: _rate(t["flops"], t["seconds"]),
    ),
    Metric(
        name="bytes_per_second",
        unit="B/s",
        better="higher",
        formula="(bytes read + written, each once) ÷ median seconds",
        compute=lambda t: _rate(t["bytes_read"] + t["bytes_written"], t["seconds"]),
    ),
    Metric(
        name="speedup",
        unit="×",  # noqa: RUF001
        better="higher",
        formula="seconds of the fastest ok dense attention (of a layer: dense layer; same shape, "
        "inputs, mode and run) ÷ seconds; no suspect time on either side",
        compute=lambda t: t["dense_seconds"] / _trusted_seconds(t),
    ),
    Metric(
        name="floor_share",
        unit="",
        better="higher",
        formula="floor ÷ seconds; floor = max(FLOPs ÷ matmul rate, bytes ÷ copy rate), measured",
        compute=lambda t: t["floor_seconds"] / t["seconds"],
    ),
)
