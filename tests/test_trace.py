"""From trace events to times by stage and kernel: hand-made events, and real profiles."""

import csv
from pathlib import Path
from typing import Any

import pytest

from dsa_bench import trace
from dsa_bench.record import MAX_KERNELS, StageTime
from tests import fake_operator
from tests.fake_operator import FakeShape


def stage(name: str, impl: str = "triton") -> StageTime:
    return StageTime(
        name=name, impl=impl, seconds=0.0, flops=10.0, bytes_read=2.0, bytes_written=1.0
    )


def mark(name: str, ts: float, dur: float) -> dict[str, Any]:
    return {"ph": "X", "cat": "user_annotation", "name": name, "ts": ts, "dur": dur, "tid": 1}


def launch(correlation: int, ts: float, cat: str = "cuda_runtime") -> dict[str, Any]:
    args = {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": "launch", "ts": ts, "dur": 1, "tid": 1, "args": args}


def kernel(
    name: str, correlation: int, ts: float, dur: float, cat: str = "kernel"
) -> dict[str, Any]:
    args = {"correlation": correlation, "stream": 7}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 7, "args": args}


# two calls; the GPU runs late, so that by its own clock each kernel lies in another mark
EVENTS: list[dict[str, Any]] = [
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    launch(1, 5),  # a flush before the call
    kernel("flush", 1, 60, 500),
    mark(trace.CALL_MARK, 10, 40),
    mark("stage:indexer", 10, 10),
    mark("stage:topk", 20, 10),
    launch(2, 12, "cuda_driver"),
    launch(3, 22),
    launch(4, 24),
    launch(5, 45),  # in the call, outside of every stage
    kernel("_indexer_kernel", 2, 600, 100),
    kernel("_topk_kernel", 3, 700, 20),
    kernel("Memset (Device)", 4, 720, 2, "gpu_memset"),
    kernel("void at::native::CatArrayBatchedCopy<float, 4>(int)", 5, 722, 6),
    mark(trace.CALL_MARK, 1010, 40),
    mark("stage:indexer", 1010, 10),
    mark("stage:topk", 1020, 10),
    launch(12, 1012, "cuda_driver"),
    launch(13, 1022),
    launch(14, 1023),
    kernel("_indexer_kernel", 12, 1600, 200),
    kernel("_topk_kernel", 13, 1800, 20),
    kernel("_topk_kernel", 14, 1820, 20),
]


def test_kernels_belong_to_the_stage_that_launched_them() -> None:
    found = trace.summarise(EVENTS, [stage("indexer"), stage("topk", "gluon")], device="cuda")
    seconds = {s.name: s.seconds for s in found.stages}
    assert seconds == pytest.approx({"indexer": 150e-6, "topk": 31e-6, "other": 3e-6})
    assert [(s.name, s.impl, s.flops) for s in found.stages] == [
        ("indexer", "triton", 10.0),
        ("topk", "gluon", 10.0),
        ("other", "", 0.0),
    ]


def test_kernel_table_is_per_call_and_sorted() -> None:
    found = trace.summarise(EVENTS, [stage("indexer"), stage("topk")], device="cuda")
    assert [(k.name, k.stage, k.calls) for k in found.kernels] == [
        ("_indexer_kernel", "indexer", 1.0),
        ("_topk_kernel", "topk", 1.5),
        ("CatArrayBatchedCopy", "other", 0.5),
        ("Memset (Device)", "topk", 0.5),
    ]
    assert found.kernels[1].seconds == pytest.approx(30e-6)


def test_plain_operator_has_one_stage_for_everything_in_the_call() -> None:
    found = trace.summarise(EVENTS, [stage("topk")], device="cuda")
    assert [s.name for s in found.stages] == ["topk"]
    assert found.stages[0].seconds == pytest.approx(184e-6)


def test_kernel_without_a_recorded_launch_belongs_to_its_owner() -> None:
    owner = mark("stage:b", 60, 40) | {"args": {"External id": 9}}
    lost = kernel("_lost", 77, 900, 5)
    lost["args"]["External id"] = 9
    events = [mark(trace.CALL_MARK, 0, 100), mark("stage:a", 0, 60), owner, lost]
    found = trace.summarise(events, [stage("a"), stage("b")], device="cuda")
    assert [s.seconds for s in found.stages] == pytest.approx([0.0, 5e-6])


def test_kernel_table_has_a_limit() -> None:
    events = [mark(trace.CALL_MARK, 0, 100)]
    for i in range(50):
        events += [launch(i, i), kernel(f"k{i}", i, 200 + i, i + 1)]
    found = trace.summarise(events, [stage("topk")], device="cuda")
    assert len(found.kernels) == MAX_KERNELS
    assert found.kernels[0].name == "k49" and found.stages[0].seconds == pytest.approx(1275e-6)


def test_cpu_self_times_take_off_what_is_inside() -> None:
    def op(name: str, ts: float, dur: float, tid: int = 1) -> dict[str, Any]:
        return {"ph": "X", "cat": "cpu_op", "name": name, "ts": ts, "dur": dur, "tid": tid}

    events = [
        mark(trace.CALL_MARK, 0, 100),
        mark("stage:a", 0, 60),
        mark("stage:b", 60, 40),
        op("outer", 10, 40),
        op("inner", 15, 20),
        op("innermost", 20, 5),
        op("second", 40, 5),
        op("elsewhere", 12, 7, tid=2),
        op("last", 70, 9),
    ]
    found = trace.summarise(events, [stage("a"), stage("b")], device="cpu")
    assert {k.name: round(k.seconds * 1e6) for k in found.kernels} == {
        "outer": 15,
        "inner": 15,
        "innermost": 5,
        "second": 5,
        "elsewhere": 7,
        "last": 9,
    }
    assert [s.seconds for s in found.stages] == pytest.approx([47e-6, 9e-6])


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("_indexer_kernel", "_indexer_kernel"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, "
            "std::array<char*, 1ul> >(int, at::native::FillFunctor<float>, std::array<char*, 1>)",
            "vectorized_elementwise_kernel<FillFunctor>",
        ),
        (
            "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, 4>(float*, int)",
            "CatArrayBatchedCopy",
        ),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD (Device -> Device)"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT"),
        ("x" * 300, "x" * trace.MAX_NAME),
    ],
)
def test_kernel_names_are_shortened(name: str, short: str) -> None:
    assert trace.shorten(name) == short


def run_affine(inputs: Any) -> Any:
    from dsa_bench.operator import Implementation

    stages = {
        "double": Implementation(name="good", run=fake_operator.good),
        "shift": Implementation(name="good", run=lambda i: fake_operator.FakeOutputs(i.x + 1)),
    }
    return fake_operator.compose("prefill", stages)(inputs)


def test_real_profile_on_the_cpu_has_both_stages_and_leaves_files(tmp_path: Path) -> None:
    inputs = fake_operator.make_inputs(FakeShape(num_rows=4096), seed=0, device="cpu")
    keep = tmp_path / "traces" / "case"
    found = trace.trace_case(
        run_affine, inputs, stages=[stage("double"), stage("shift")], device="cpu", keep=keep
    )
    assert [s.name for s in found.stages] == ["double", "shift"]
    assert all(0 < s.seconds < 1 for s in found.stages)
    adds = {k.stage: k.calls for k in found.kernels if k.name == "aten::add"}
    assert adds == {"double": 1.0, "shift": 1.0}
    events = trace.read_events(keep.with_name("case.trace.json.gz"))
    assert sum(e.get("name") == trace.CALL_MARK for e in events) == 3
    with keep.with_name("case.memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["seconds"]) == 0.0
    assert max(int(r["allocated_bytes"]) for r in rows) >= inputs.x.nbytes


@pytest.mark.gpu
def test_real_profile_on_the_gpu_has_both_stages() -> None:
    inputs = fake_operator.make_inputs(FakeShape(num_rows=2**21), seed=0, device="cuda")
    flushed: list[int] = []

    def flush() -> None:
        inputs.x.zero_()
        flushed.append(1)

    found = trace.trace_case(
        run_affine,
        inputs,
        stages=[stage("double"), stage("shift")],
        device="cuda",
        before=flush,
    )
    assert [s.name for s in found.stages] == ["double", "shift"]
    assert len(flushed) == 3
    for each in found.stages:
        assert 0.5e12 < 2 * inputs.x.nbytes / each.seconds < 10e12
    assert {(k.stage, k.calls) for k in found.kernels} == {("double", 1.0), ("shift", 1.0)}
