"""Texts of the terminal: labels, endings, the nearest limit, the tables of a profile."""

from dataclasses import replace
from pathlib import Path

import pytest

from dsa_bench import show
from dsa_bench.record import Case, KernelTime, MemoryUse, Record, StageTime, Timing

CASE = Case(
    op="dsa", impl={"indexer": "triton", "topk": "gluon"}, phase="decode", seq_len_kv=131072,
    seq_len_q=2, topk=2048, precision="fp8", batch_size=32,
)  # fmt: skip


def stage(name: str, seconds: float) -> StageTime:
    return StageTime(
        name=name, impl="triton", seconds=seconds, flops=0, bytes_read=0, bytes_written=0
    )


def test_case_label_names_the_case() -> None:
    assert show.case_label(CASE) == "decode dsa L=128k q=2 k=2k fp8 batch=32 (triton+gluon)"
    ragged = replace(CASE, lengths="one-long", inputs="needle")
    said = "decode dsa L=128k q=2 k=2k fp8 batch=32 lengths=one-long inputs=needle (triton+gluon)"
    assert show.case_label(ragged) == said


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (Record(case=CASE, status="ok", time=Timing(mode="cold", seconds=(1e-3, 3e-3, 2e-3),
                                                    stop="settled")), "ok 2.00 ms"),
        (Record(case=CASE, status="skipped", reason="no GPU"), "skipped: no GPU"),
        (Record(case=CASE, status="ok"), "ok"),
    ],
)  # fmt: skip
def test_ending_is_the_median_or_the_reason(record: Record, text: str) -> None:
    assert show.ending(record) == text


def test_closest_figure_uses_most_of_its_limit() -> None:
    checks = [
        {
            "name": "out",
            "figures": {"cos": 2e-6, "outside": 0.0},
            "limits": {"cos": 5e-6, "outside": 0},
        },
        {"name": "lse", "figures": {"cos": 4e-6}, "limits": {"cos": 5e-6, "abs": 1e-3}},
    ]
    assert show.closest_figure({"checks": checks}) == "lse cos 4e-06 of 5e-06"
    checks.append({"name": "out", "figures": {"special": 3.0}, "limits": {"special": 0}})
    assert show.closest_figure({"checks": checks}) == "out special 3 of 0"
    assert show.closest_figure({}) == ""


def test_profile_tables_share_the_time_and_name_the_trace(tmp_path: Path) -> None:
    record = Record(
        case=CASE,
        status="ok",
        # a stage without time launched nothing
        stages=(stage("indexer", 3e-3), stage("topk", 1e-3), stage("page_slots", 0.0)),
        kernels=(
            KernelTime(name="a", stage="indexer", calls=1, seconds=1e-3),
            KernelTime(name="b", stage="topk", calls=2, seconds=1e-3),
            KernelTime(name="c", stage="indexer", calls=1, seconds=2e-3),
        ),
        memory=MemoryUse(peak_bytes=4 * 2**20, input_bytes=2**20, output_bytes=2**20,
                         workspace_bytes=2 * 2**20, predicted_bytes=2**20),
    )  # fmt: skip
    trace = tmp_path / f"{CASE.key}.trace.json.gz"
    trace.touch()
    stages, kernels, memory = show.profile(record, tmp_path)
    assert [row[0::3] for row in stages.rows] == [("indexer", "75 %"), ("topk", "25 %")]
    assert [(row[0], row[1], row[4]) for row in kernels.rows] == [
        ("indexer", "c", "50 %"), ("indexer", "a", "25 %"), ("topk", "b", "25 %")
    ]  # fmt: skip
    assert dict(memory.rows)["workspace"] == "2.00 MiB"
    assert memory.notes == (f"chrome trace: {trace}",)


def test_profile_of_a_failed_case_says_why(tmp_path: Path) -> None:
    record = Record(case=CASE, status="failed", reason="worker exited with code 1")
    (table,) = show.profile(record, tmp_path)
    assert table.rows == (("failed: worker exited with code 1",),)


@pytest.mark.parametrize(
    ("width", "head"),
    [(80, ("case", "time", "rate", "why")), (44, ("case", "time", "why")), (9, ("case", "why"))],
)
def test_narrow_table_does_without_spare_columns(width: int, head: tuple[str, ...]) -> None:
    table = show.TextTable(
        title="t", head=("case", "time", "rate", "why"), rows=(("a", "1 ms", "9 GB/s", "x" * 90),),
        right=frozenset({"time", "rate"}), spare=("of floor", "rate", "time"),
    )  # fmt: skip
    fitted = show.fit(table, width)
    assert fitted.head == head
    assert [len(row) for row in fitted.rows] == [len(head)]
    dropped = [name for name in ("rate", "time") if name not in head]
    assert fitted.notes == ((f"too narrow for: {', '.join(dropped)}",) if dropped else ())
