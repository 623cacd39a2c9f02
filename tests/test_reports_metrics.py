"""Flattening and derived columns against numbers worked by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsa_bench import stats
from dsa_bench.record import Case, Record, StageTime
from dsa_bench.reports import frame, metrics, recompute
from tests.reports_runs import HEADER, FakeRun, doubtful_run, h100_run, ok

PREFILL = Case(op="dsa", impl="gluon", phase="prefill", seq_len_kv=8192, seq_len_q=4096, topk=2048)
DENSE = replace(PREFILL, op="dense_attention", impl="triton", topk=None)
DECODE = replace(PREFILL, phase="decode", seq_len_q=2, batch_size=32)


def run_of(*records: Record, **header: Any) -> FakeRun:
    return FakeRun(path=Path("results/x"), header=HEADER | header, records=list(records))


def row_of(table: Any, op: str = "dsa") -> Any:
    rows = table[table["op"] == op]
    assert len(rows) == 1
    return rows.iloc[0]


def test_median_and_interval_of_the_samples() -> None:
    table = frame.cases([run_of(ok(PREFILL, (3.0, 1.0, 2.0, 5.0, 4.0)))])
    row = row_of(table)
    # five samples cannot give 95 %: the interval is their range
    assert (row["seconds"], row["seconds_low"], row["seconds_high"]) == (3.0, 1.0, 5.0)
    assert row["samples"] == 5


def test_tokens_and_cost_by_hand() -> None:
    table = metrics.cases([run_of(ok(PREFILL, 0.004096), ok(DECODE, 0.000064))])
    prefill, decode = table.iloc[0], table.iloc[1]
    assert (prefill["tokens"], decode["tokens"]) == (4096, 64)
    # both take 1 µs a token and layer: 61 s of GPU time for a million tokens, at 2 USD an hour
    assert prefill["seconds_per_token"] == pytest.approx(1e-6)
    assert prefill["usd_per_million_tokens"] == pytest.approx(61 * 2 / 3600)
    assert decode["usd_per_million_tokens"] == pytest.approx(61 * 2 / 3600)


def test_price_of_the_run_is_used() -> None:
    run = run_of(ok(PREFILL, 0.004096), options={"gpu_hour_usd": 3.0})
    assert row_of(metrics.cases([run]))["usd_per_million_tokens"] == pytest.approx(61 * 3 / 3600)


def test_unknown_preset_has_no_cost() -> None:
    run = run_of(ok(replace(PREFILL, preset="v9"), 1.0))
    assert row_of(metrics.cases([run]))["usd_per_million_tokens"] != pytest.approx(0, nan_ok=False)
    assert metrics.cases([run])["usd_per_million_tokens"].isna().all()


def test_rates_and_floor_by_hand() -> None:
    cost = {"flops": 786e9, "bytes_read": 2e9, "bytes_written": 1e9}
    row = row_of(metrics.cases([run_of(ok(PREFILL, 0.004, cost=cost))]))
    assert row["flops_per_second"] == pytest.approx(196.5e12)
    assert row["bytes_per_second"] == pytest.approx(750e9)
    # both the matrix products and the bytes need 1 ms
    assert row["floor_seconds"] == pytest.approx(0.001)
    assert row["floor_share"] == pytest.approx(0.25)


def test_fp8_without_a_measured_fp8_rate_has_no_floor() -> None:
    cost = {"flops": 786e9, "bytes_read": 2e9, "bytes_written": 1e9}
    case = replace(PREFILL, precision="fp8")
    ceilings = {"copy_bytes_per_second": 3e12, "bf16_flops": 786e12}
    run = run_of(ok(case, 0.004, cost=cost), ceilings=ceilings)
    assert metrics.cases([run])["floor_share"].isna().all()
    bf16 = run_of(ok(PREFILL, 0.004, cost=cost), ceilings=ceilings)
    assert row_of(metrics.cases([bf16]))["floor_share"] == pytest.approx(0.25)


def test_speedup_is_over_the_fastest_ok_dense_of_the_same_shape() -> None:
    records = [
        ok(PREFILL, 0.002),
        ok(DENSE, 0.006),
        ok(replace(DENSE, impl="flash_attn_3", precision="fp8"), 0.005),
        # faster, but wrong, of another length, of another number of heads
        replace(ok(replace(DENSE, impl="sdpa_cudnn"), 0.001), status="wrong"),
        ok(replace(DENSE, seq_len_kv=4096), 0.001),
        ok(replace(DENSE, num_heads=64), 0.001),
    ]
    table = metrics.cases([run_of(*records)])
    row = row_of(table)
    assert row["speedup"] == pytest.approx(2.5)
    assert (row["dense_impl"], row["dense_precision"]) == ("flash_attn_3", "fp8")
    assert table.loc[table["op"] == "dense_attention", "speedup"].isna().all()


def test_speedup_is_over_dense_of_the_same_lengths() -> None:
    one = replace(DECODE, lengths="one-long")
    dense = [replace(case, op="dense_attention", topk=None) for case in (DECODE, one)]
    records = [ok(DECODE, 0.002), ok(one, 0.001), ok(dense[0], 0.006), ok(dense[1], 0.004)]
    table = metrics.cases([run_of(*records)])
    sparse = table[table["op"] == "dsa"]
    assert dict(zip(sparse["lengths"], sparse["speedup"], strict=True)) == {
        "equal": pytest.approx(3.0), "one-long": pytest.approx(4.0)
    }  # fmt: skip
    # a token costs what its call took, however long the sequences are
    assert list(table["tokens"]) == [64] * 4
    again = recompute.figures(records, HEADER)
    for row in table.to_dict("records"):
        expected = again[row["key"]]["speedup"]
        assert row["speedup"] == pytest.approx(
            math.nan if expected is None else expected, nan_ok=True
        )
    alone = metrics.cases([run_of(ok(one, 0.001), ok(dense[0], 0.006))])
    assert alone["speedup"].isna().all()


def test_speedup_needs_a_dense_case_of_the_same_run() -> None:
    table = metrics.cases([run_of(ok(PREFILL, 0.002)), run_of(ok(DENSE, 0.006))])
    assert table["speedup"].isna().all()


@pytest.mark.parametrize("status", ["wrong", "failed", "oom", "timeout", "skipped", "interrupted"])
def test_a_case_that_is_not_ok_has_no_time(status: str) -> None:
    stage = StageTime(
        name="topk", impl="x", seconds=1.0, flops=0.0, bytes_read=1.0, bytes_written=1.0
    )
    record = replace(ok(PREFILL, 0.002, stages=(stage,)), status=status)
    run = run_of(record)
    table = metrics.cases([run])
    for name in ("seconds", "seconds_low", "usd_per_million_tokens", "flops_per_second", "speedup"):
        assert table[name].isna().all(), name
    assert metrics.stages([run], table).empty


def test_the_last_ending_of_a_case_counts() -> None:
    failed = Record(case=PREFILL, status="failed", reason="died")
    table = frame.cases([run_of(failed, ok(PREFILL, 0.002))])
    assert list(table["status"]) == ["ok"]


def test_stage_shares_and_rates() -> None:
    stages = tuple(
        StageTime(name=name, impl="x", seconds=s, flops=f, bytes_read=1e9, bytes_written=1e9)
        for name, s, f in (("indexer", 0.003, 3e12), ("topk", 0.001, 0.0))
    )
    run = run_of(ok(PREFILL, 0.005, stages=stages))
    table = metrics.stages([run], metrics.cases([run])).set_index("stage")
    assert list(table["share"]) == pytest.approx([0.75, 0.25])
    assert table.loc["indexer", "flops_per_second"] == pytest.approx(1e15)
    assert table["flops_per_second"].isna().tolist() == [False, True]
    assert table.loc["topk", "bytes_per_second"] == pytest.approx(2e12)


def test_a_stage_that_launched_nothing_is_not_shown() -> None:
    """Top-k wrote the slots: page_slots stays in the record, for its cost, and took no time."""
    stages = tuple(
        StageTime(name=name, impl="x", seconds=s, flops=0.0, bytes_read=1e3, bytes_written=1e3)
        for name, s in (("topk", 3e-6), ("page_slots", 0.0), ("sparse_decode", 9e-6))
    )
    run = run_of(ok(DECODE, 2e-5, stages=stages))
    table = metrics.stages([run], metrics.cases([run]))
    assert list(table["stage"]) == ["topk", "sparse_decode"]
    assert list(table["share"]) == pytest.approx([0.25, 0.75])


def test_whole_prompts_are_a_line_of_their_own() -> None:
    shapes = [(4096, 4096), (8192, 4096), (1024, 1024), (2048, 2048)]
    records = [ok(replace(PREFILL, seq_len_kv=kv, seq_len_q=q, topk=512), 1.0) for kv, q in shapes]
    assert list(frame.cases([run_of(*records)])["chunk"]) == [4096, 4096, 0, 0]


def test_runs_of_one_machine_are_told_apart() -> None:
    one, two = run_of(), replace(run_of(), path=Path("results/y"))
    other = run_of(machine={"name": "NVIDIA H200"})
    assert frame.run_labels([one, other]) == ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]
    assert frame.run_labels([one, two]) == [
        "NVIDIA H100 80GB HBM3 (x)",
        "NVIDIA H100 80GB HBM3 (y)",
    ]
    assert len(set(frame.run_labels([one, one]))) == 2


def replicates_of(*seconds: tuple[float, ...]) -> list[Record]:
    return [ok(PREFILL, samples, replicate=i) for i, samples in enumerate(seconds)]


def test_replicates_are_one_case_of_pooled_samples() -> None:
    made = replicates_of((1.0,) * 8, (1.0,) * 8, (1.001,) * 8)
    row = row_of(frame.cases([run_of(*made)]))
    estimate = stats.pooled([r.time.seconds for r in made if r.time], blocks=[(), (), ()])
    shown = (row["seconds"], row["seconds_low"], row["seconds_high"])
    assert shown == (estimate.middle, estimate.low, estimate.high)
    assert (row["replicates"], row["samples"], row["flags"]) == (3, 24, "")
    assert row["seconds_low"] < 1.0 < row["seconds_high"]


def test_processes_that_differ_raise_a_flag() -> None:
    row = row_of(frame.cases([run_of(*replicates_of((1.0,) * 8, (1.05,) * 8, (1.1,) * 8))]))
    assert (row["flags"], row["doubt"]) == ("unsteady_processes", "noisy")


def test_one_failed_replicate_takes_the_time_of_the_case() -> None:
    good, other = replicates_of((1.0,) * 8, (1.0,) * 8)
    died = Record(case=PREFILL, status="failed", reason="worker died", replicate=2)
    wrong = Record(case=PREFILL, status="wrong", reason="cos 0.1", replicate=3)
    row = row_of(frame.cases([run_of(good, died, other)]))
    assert (row["status"], row["reason"]) == ("failed", "replicate 2: worker died")
    assert row["seconds"] is None or row["seconds"] != row["seconds"]
    row = row_of(frame.cases([run_of(died, good, wrong)]))
    assert (row["status"], row["reason"]) == ("wrong", "replicate 3: cos 0.1")


def test_an_interrupted_replicate_does_not_undo_those_that_ended() -> None:
    stopped = Record(case=PREFILL, status="interrupted", replicate=1)
    row = row_of(frame.cases([run_of(*replicates_of((1.0,) * 8), stopped)]))
    assert (row["status"], row["seconds"], row["replicates"]) == ("ok", 1.0, 1)
    assert row_of(frame.cases([run_of(stopped)]))["status"] == "interrupted"


def test_the_last_ending_of_a_replicate_counts() -> None:
    died = Record(case=PREFILL, status="failed", reason="died", replicate=1)
    one, two = replicates_of((1.0,) * 8, (1.0,) * 8)
    assert list(frame.cases([run_of(one, died, two)])["status"]) == ["ok"]


def test_flags_of_replicates_are_joined_and_unknown_ones_are_noisy() -> None:
    one, two = replicates_of((1.0,) * 8, (1.0,) * 8)
    one, two = replace(one, flags=("drift", "a,b")), replace(two, flags=("clock", "drift"))
    row = row_of(frame.cases([run_of(one, two)]))
    assert frame.flags_of(row) == ("drift", "a;b", "clock")
    assert row["doubt"] == "noisy"


def test_stages_are_the_median_over_replicates() -> None:
    def staged(replicate: int, seconds: float, name: str = "topk") -> Record:
        stage = StageTime(
            name=name, impl="x", seconds=seconds, flops=0.0, bytes_read=1.0, bytes_written=1.0
        )
        return ok(PREFILL, 1.0, replicate=replicate, stages=(stage,))

    run = run_of(staged(0, 3.0), staged(1, 1.0), staged(2, 2.0), staged(3, 90.0, "else"))
    assert list(frame.stages([run])["seconds"]) == [2.0]


def test_a_suspect_dense_is_no_opponent_however_fast() -> None:
    table = metrics.cases([doubtful_run()])
    rows = table[(table["op"] == "dsa") & (table["asked_mode"] == "auto")].set_index("seq_len_kv")
    assert (rows.loc[8192, "dense_impl"], rows.loc[8192, "suspect_dense"]) == (
        "flash_attn_3",
        "cheat",
    )
    assert rows.loc[8192, "speedup"] == pytest.approx(1.0)
    assert rows["suspect_dense"].notna().sum() == 1


def test_a_suspect_dense_that_is_slower_changes_nothing() -> None:
    slow = ok(replace(DENSE, impl="slow"), 9.0, flags=("launch_bound",))
    row = row_of(metrics.cases([run_of(ok(PREFILL, 1.0), ok(DENSE, 2.0), slow)]))
    assert row["speedup"] == 2.0 and not isinstance(row["suspect_dense"], str)


@pytest.mark.parametrize(
    ("flag", "counts"),
    [("drift", True), ("later", True), ("launch_bound", False), ("below_floor", False)],
)
def test_a_suspect_time_stays_visible_and_gives_nothing(flag: str, counts: bool) -> None:
    row = row_of(metrics.cases([run_of(ok(PREFILL, 1.0, flags=(flag,)), ok(DENSE, 2.0))]))
    assert row["seconds"] == 1.0
    for name in ("speedup", "seconds_per_token", "usd_per_million_tokens"):
        assert (row[name] == row[name]) == counts, name


def test_opponents_are_asked_in_the_same_mode() -> None:
    records = [
        ok(PREFILL, 1.0),
        ok(DENSE, 3.0),
        ok(replace(PREFILL, mode="warm"), 1.0),
        ok(replace(DENSE, mode="warm"), 2.0),
        ok(replace(PREFILL, mode="graph"), 1.0),
    ]
    table = metrics.cases([run_of(*records)])
    found = table[table["op"] == "dsa"].set_index("asked_mode")["speedup"]
    assert (found["auto"], found["warm"]) == (3.0, 2.0)
    assert found.isna()["graph"]
    assert set(table["mode"]) == {"cold"}


def test_energy_of_a_token() -> None:
    table = metrics.cases([doubtful_run()])
    read = table[table["joules_per_token"].notna()]
    # 600 J for 100 calls of 4096 tokens
    assert list(read["mode"]) == ["sustained"]
    assert read["joules_per_token"].iloc[0] == pytest.approx(6 / 4096)


def test_sustained_rates_are_no_ceiling() -> None:
    header = {
        "ceilings": {
            "copy_bytes_per_second": 3e12,
            "bf16_flops_per_second": 786e12,
            "sustained_bf16_flops_per_second": 600e12,
            "sustained_fp8_flops_per_second": 900e12,
        }
    }
    assert metrics.ceilings(header) == {
        "copy_bytes_per_second": 3e12,
        "bf16_flops_per_second": 786e12,
    }
    assert metrics.sustained_ceilings(header) == {
        "bf16_flops_per_second": 600e12,
        "fp8_flops_per_second": 900e12,
    }
    cost = {"flops": 786e9, "bytes_read": 2e9, "bytes_written": 1e9}
    row = row_of(metrics.cases([run_of(ok(PREFILL, 0.004, cost=cost), **header)]))
    assert row["floor_share"] == pytest.approx(0.25)


@pytest.mark.parametrize("value", [0.25, {"relative_l2": 0.25, "rows": 64}])
def test_dense_error_is_read(value: Any) -> None:
    table = frame.cases([run_of(ok(PREFILL, 1.0, gate={"dense_error": value}))])
    assert row_of(table)["dense_error"] == 0.25
    assert table["rounding_error"].isna().all()


def test_rounding_error_is_read_beside_dense_error() -> None:
    taken = {"relative_l2": 0.25, "mass_kept": 0.5, "recall": 0.75}
    gate = {"dense_error": taken, "rounding_error": {"relative_l2": 0.04}}
    row = row_of(frame.cases([run_of(ok(PREFILL, 1.0, gate=gate))]))
    names = ["dense_error", "rounding_error", "mass_kept", "recall"]
    assert [row[name] for name in names] == [0.25, 0.04, 0.5, 0.75]
    alone = {"rounding_error": {"relative_l2": 0.04}}
    row = row_of(frame.cases([run_of(ok(PREFILL, 1.0, gate=alone))]))
    assert row["rounding_error"] == 0.04 and row[["dense_error", "recall"]].isna().all()


def test_every_metric_is_a_column_and_explained() -> None:
    table = metrics.cases([h100_run(), doubtful_run()])
    for metric in metrics.METRICS:
        assert table[metric.name].notna().any(), metric.name
        assert metric.formula
        assert metric.better in ("", "lower", "higher")
