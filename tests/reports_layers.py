"""Runs of whole layers for the tests of the reports: straight lines over L, not measured."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsa_bench.record import Case, MemoryUse, Record, StageTime
from tests.reports_runs import HEADER, LENGTHS, FakeRun, ok

SECONDS = {
    # (phase, operator) -> seconds at L = 0, and per 1024 tokens of L
    ("prefill", "dense_layer"): (5e-3, 0.5e-3),
    ("prefill", "dsa_layer"): (12e-3, 0.05e-3),
    ("prefill", "masked_layer"): (4e-3, 0.7e-3),
    ("decode", "dense_layer"): (0.1e-3, 0.06e-3),
    ("decode", "dsa_layer"): (0.3e-3, 0.006e-3),
}
SHARES: Mapping[str, Mapping[str, float]] = {
    # of the kernel time
    "dsa_layer": {
        **{"linear": 0.2, "rms_norm": 0.02, "quantize": 0.01, "query_rope": 0.02},
        **{"index_query": 0.02, "cache_write": 0.03, "head_linear": 0.1, "indexer": 0.2},
        **{"topk": 0.1, "sparse_prefill": 0.3},
    },
    "masked_layer": {"linear": 0.3, "cache_read": 0.1, "masked_prefill": 0.6},
    "dense_layer": {
        **{"linear": 0.2, "head_linear": 0.1, "rms_norm": 0.05, "cache_write": 0.1},
        "dense_attention": 0.55,
    },
}
GAPS = 50e-6
"""What a timed call takes beside its kernels."""
MAX_MASKED = 16384


def seconds_of(op: str, phase: str, length: int) -> float:
    """Time of one call: a straight line over L."""
    start, slope = SECONDS[phase, op]
    return start + slope * length / 1024


def layer_record(op: str, phase: str, length: int, **axes: Any) -> Record:
    """An `ok` record of one layer with stages, memory and accuracy."""
    shape = {"seq_len_q": 4096} if phase == "prefill" else {"seq_len_q": 1, "batch_size": 128}
    topk = None if op == "dense_layer" else 2048
    impl = {stage: "triton" for stage in SHARES[op]} | {"linear": "torch"}
    case = Case(
        **{"op": op, "impl": impl, "phase": phase, "seq_len_kv": length, "topk": topk}
        | {"precision": "fp8", **shape, **axes}
    )
    seconds = seconds_of(op, phase, length)
    stages = tuple(
        StageTime(name=name, impl=impl[name], seconds=share * (seconds - GAPS), flops=1e12,
                  bytes_read=1e9, bytes_written=1e8)
        for name, share in SHARES[op].items()
    )  # fmt: skip
    memory = MemoryUse(peak_bytes=3 * 2**30, input_bytes=2**30, output_bytes=2**30,
                       workspace_bytes=2**30, predicted_bytes=3 * 2**30)  # fmt: skip
    gate: dict[str, Any] = {}
    if topk:
        figures = {"relative_l2": 0.02, "mass_kept": 0.97, "recall": 0.995}
        gate["dense_error"] = figures
    cost = {"flops": 1e12, "bytes_read": 1e9, "bytes_written": 1e8}
    return ok(case, seconds, stages=stages, memory=memory, gate=gate, cost=cost)


def layer_run() -> FakeRun:
    """Layers of both phases on one GPU; the masked form up to MAX_MASKED; tp 8 in prefill."""
    records = []
    for length in LENGTHS:
        ops = ["dense_layer", "dsa_layer"] + (["masked_layer"] if length <= MAX_MASKED else [])
        records += [layer_record(op, "prefill", length) for op in ops]
        for op in ("dense_layer", "dsa_layer"):
            records.append(layer_record(op, "prefill", length, tensor_parallel=8))
            records += [layer_record(op, "decode", length, batch_size=n) for n in (32, 128)]
    return FakeRun(path=Path("results/layers"), header=HEADER, records=records)


def pattern_run() -> FakeRun:
    """Sparse layers on two kinds of inputs, one of them from a record without recall."""
    records = []
    for inputs, mass in (("random", 0.8), ("needle", 0.99)):
        for topk in (512, 2048):
            for length in (16384, 32768):
                made = layer_record("dsa_layer", "prefill", length, inputs=inputs, topk=topk)
                figures = {"relative_l2": 0.1, "mass_kept": mass}
                figures |= {"recall": 0.9} if inputs == "needle" else {}
                records.append(replace(made, gate={"dense_error": figures}))
    return FakeRun(path=Path("results/patterns"), header=HEADER, records=records)
