"""Where two curves meet, and what the headline says in each case that can happen."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from dsa_bench.record import Case, Record
from dsa_bench.reports import lines
from dsa_bench.reports.crossover import crossing
from dsa_bench.reports.digest import Digest, digest
from dsa_bench.reports.figures import figures
from dsa_bench.reports.units import format_ratio
from tests.reports_runs import HEADER, FakeRun, doubtful_run, h100_run, ok

SPARSE = Case(op="dsa", impl="gluon", phase="prefill", seq_len_kv=4096, seq_len_q=4096, topk=2048)
DENSE = replace(SPARSE, op="dense_attention", impl="flash_attn_3", topk=None)
LENGTHS = (4096, 8192, 16384)


@pytest.mark.parametrize(
    ("sparse", "dense", "expected"),
    [
        # ratio 1/2 -> 2: the middle on a logarithmic axis
        ((2.0, 1.0), (1.0, 2.0), math.sqrt(4096 * 8192)),
        # equal at the second length
        ((2.0, 1.0, 1.0), (1.0, 1.0, 3.0), 8192.0),
        # equal at the first length: faster behind it
        ((1.0, 1.0), (1.0, 2.0), 4096.0),
        # ratio 1/4 -> 2: two thirds of the way
        ((4.0, 1.0), (1.0, 2.0), 4096 * 2 ** (2 / 3)),
        # always faster, never faster, as fast everywhere
        ((1.0, 1.0), (2.0, 2.0), None),
        ((2.0, 2.0), (1.0, 1.0), None),
        ((1.0, 1.0), (1.0, 1.0), None),
        # faster, slower, faster: the last crossing counts
        ((1.0, 2.0, 1.0), (2.0, 1.0, 2.0), math.sqrt(8192 * 16384)),
        # faster, then slower: it does not stay faster
        ((1.0, 2.0), (2.0, 1.0), None),
        ((1.0,), (2.0,), None),
    ],
)
def test_crossing_is_interpolated_on_logarithmic_axes(
    sparse: tuple[float, ...], dense: tuple[float, ...], expected: float | None
) -> None:
    found = crossing(LENGTHS[: len(sparse)], sparse, dense)
    assert found == (None if expected is None else pytest.approx(expected))


def digest_of(sparse: dict[int, float], dense: dict[int, float], **fields: object) -> Digest:
    records = [ok(replace(SPARSE, seq_len_kv=n, **fields), s) for n, s in sparse.items()]
    records += [ok(replace(DENSE, seq_len_kv=n), s) for n, s in dense.items()]
    return digest([FakeRun(path=Path("r"), header=HEADER, records=records)])


@pytest.mark.parametrize(
    ("sparse", "dense", "outcome", "said"),
    [
        (
            {4096: 2.0, 8192: 2.0, 16384: 2.0},
            {4096: 1.0, 8192: 4.0, 16384: 8.0},
            "crosses",
            "in prefill DSA (k=2048, bf16) beats dense attention (flash_attn_3, bf16) from "
            "L = 5.7K and is 4.00× as fast at 16K.",  # noqa: RUF001
        ),
        (
            {4096: 1.0, 8192: 1.0},
            {4096: 2.0, 8192: 3.0},
            "always",
            "beats dense attention (flash_attn_3, bf16) at every L compared (4K to 8K) and is "
            "3.00× as fast at 8K.",  # noqa: RUF001
        ),
        (
            {4096: 4.0, 8192: 4.0},
            {4096: 2.0, 8192: 3.0},
            "never",
            "does not beat dense attention (flash_attn_3, bf16) up to L = 8K, where it runs at "
            "0.750× the speed of dense.",  # noqa: RUF001
        ),
        (
            {4096: 1.0, 8192: 4.0},
            {4096: 2.0, 8192: 3.0},
            "never",
            "does not beat dense attention (flash_attn_3, bf16) up to L = 8K",
        ),
        (
            {8192: 1.0},
            {8192: 3.0},
            "one length",
            "beats dense attention (flash_attn_3, bf16) at L = 8K, the only L compared: 3.00×",  # noqa: RUF001
        ),
        (
            {8192: 4.0},
            {8192: 3.0},
            "one length",
            "does not beat dense attention (flash_attn_3, bf16) at L = 8K, the only L compared",
        ),
        ({8192: 4.0}, {}, "no dense", "has no dense attention of the same shapes beside it"),
        ({8192: 4.0}, {4096: 1.0}, "no dense", "has no dense attention of the same shapes"),
    ],
)
def test_outcome_and_sentence(
    sparse: dict[int, float], dense: dict[int, float], outcome: str, said: str
) -> None:
    report = digest_of(sparse, dense)
    assert [c.outcome for c in report.crossovers] == [outcome]
    assert report.headlines[0].startswith("On NVIDIA H100 80GB HBM3, in prefill DSA (k=2048")
    assert said in report.headlines[0]


def test_interval_holds_the_crossover() -> None:
    found = [c for c in digest([h100_run()]).crossovers if c.outcome == "crosses"]
    assert len(found) == 5
    for one in found:
        assert one.interval is not None and one.seq_len_kv is not None
        low, high = one.interval
        assert low < one.seq_len_kv < high < 1.2 * low


def test_headline_prefers_the_k_of_the_model_and_the_largest_batch() -> None:
    assert digest([h100_run()]).headlines == (
        "On NVIDIA H100 80GB HBM3, in prefill DSA (k=2048, fp8) beats dense attention "
        "(flash_attn_3, bf16) from L = 11.9K and is 4.45× as fast at 128K; in decode at batch 128 "  # noqa: RUF001
        "from L = 5.1K, 5.85× as fast at 128K.",  # noqa: RUF001
    )


def test_headline_without_a_time_counts_the_endings() -> None:
    records = [
        Record(case=replace(SPARSE, seq_len_kv=n), status=status, reason="x")
        for n, status in ((4096, "oom"), (8192, "oom"), (16384, "failed"))
    ]
    report = digest([FakeRun(path=Path("r"), header=HEADER, records=records)])
    assert "in prefill no DSA case has a time (2 oom, 1 failed)." in report.headlines[0]


def test_headline_of_nothing() -> None:
    empty = digest([FakeRun(path=Path("r"), header={}, records=[])])
    assert empty.headlines == ("On unknown machine no case was measured.",)
    dense_only = digest_of({}, {4096: 1.0})
    assert dense_only.headlines[0].endswith(
        "dense attention was measured; no DSA beside it, so no crossover."
    )
    records = [ok(DENSE, 1.0), ok(replace(SPARSE, phase="decode", seq_len_q=1), 1.0)]
    mixed = digest([FakeRun(path=Path("r"), header=HEADER, records=records)])
    assert "in prefill no DSA case was asked for;" in mixed.headlines[0]


def test_headline_of_operators_alone_names_them() -> None:
    kernels = [ok(replace(SPARSE, op=op), 1.0) for op in ("indexer", "topk", "indexer")]
    report = digest([FakeRun(path=Path("r"), header=HEADER, records=kernels)])
    assert report.headlines == (
        "On NVIDIA H100 80GB HBM3, 2 operators were measured: indexer, topk; "
        "no DSA beside dense attention, so no crossover.",
    )
    lost = Record(case=replace(SPARSE, op="topk"), status="oom", reason="x")
    report = digest([FakeRun(path=Path("r"), header=HEADER, records=[lost])])
    assert report.headlines == ("On NVIDIA H100 80GB HBM3 no case has a time (1 oom).",)


def test_headline_says_that_a_time_is_in_doubt() -> None:
    records = [ok(replace(SPARSE), 1.0), ok(DENSE, 2.0, flags=("drift",))]
    report = digest([FakeRun(path=Path("r"), header=HEADER, records=records)])
    assert "Some of these times carry a doubt flag" in report.headlines[0]
    assert "doubt" not in digest_of({4096: 1.0}, {4096: 2.0}).headlines[0]


def test_headline_rests_on_trusted_times_alone_and_says_what_it_lost() -> None:
    report = digest([doubtful_run()])
    assert report.headlines == (
        "On NVIDIA H100 80GB HBM3, in prefill DSA (k=2048, bf16) beats dense attention "
        "(flash_attn_3, bf16) from L = 8K and is 2.00× as fast at 16K. Some of these times carry "  # noqa: RUF001
        "a doubt flag: see the table. Left out as suspect: cheat at 8K, DSA at 32K.",
    )


def test_a_line_without_a_trusted_time_has_no_crossover() -> None:
    records = [ok(SPARSE, 1.0, flags=("launch_bound",)), ok(DENSE, 2.0)]
    report = digest([FakeRun(path=Path("r"), header=HEADER, records=records)])
    assert [c.outcome for c in report.crossovers] == ["suspect"]
    assert "has no time beside dense attention that can be trusted" in report.headlines[0]
    assert "Left out as suspect: DSA at 4K." in report.headlines[0]


@pytest.mark.parametrize(
    ("phase", "modes", "chosen"),
    [
        ("prefill", ("sustained", "warm", "auto", "cold"), "auto"),
        ("prefill", ("sustained", "graph", "cold", "warm"), "cold"),
        ("decode", ("cold", "graph", "warm"), "graph"),
        ("decode", ("warm", "cold"), "cold"),
    ],
)
def test_headline_prefers_the_default_mode(phase: str, modes: tuple[str, ...], chosen: str) -> None:
    records = []
    for i, mode in enumerate(modes):
        records.append(ok(replace(SPARSE, phase=phase, mode=mode), 1.0 + i))
        records.append(ok(replace(DENSE, phase=phase, mode=mode), 10.0))
    report = digest([FakeRun(path=Path("r"), header=HEADER, records=records)])
    assert format_ratio(10 / (1 + modes.index(chosen))) in report.headlines[0]
    assert (f"bf16, {chosen})" in report.headlines[0]) == (chosen != "auto")


def test_lines_that_differ_in_one_axis_cross_apart() -> None:
    records = [ok(replace(SPARSE, topk=k), 1.0) for k in (512, 1024)]
    records += [ok(replace(SPARSE, precision="fp8"), 1.0), ok(replace(SPARSE, impl="triton"), 1.0)]
    report = digest([FakeRun(path=Path("r"), header=HEADER, records=records)])
    assert len(report.crossovers) == 4


FP8 = replace(DENSE, op="dense_attention_fp8", precision="fp8")


def with_fp8(*more: Record, sparse: str = "fp8") -> Digest:
    """DSA at 1 s, dense at 4 s in bf16 and 3 s in fp8, at 8K; then what is beside it."""
    records = [
        ok(replace(SPARSE, seq_len_kv=8192, precision=sparse), 1.0),
        ok(replace(DENSE, seq_len_kv=8192), 4.0),
        *more,
    ]
    return digest([FakeRun(path=Path("r"), header=HEADER, records=records)])


def test_fp8_dense_is_told_beside_and_counts_for_no_headline() -> None:
    slower = ok(replace(FP8, seq_len_kv=8192, impl="other"), 3.5)
    found = with_fp8(ok(replace(FP8, seq_len_kv=8192), 3.0), slower)
    (text,) = found.headlines
    assert "beats dense attention (flash_attn_3, bf16) at L = 8K, the only L" in text
    assert "4.00× as fast. Against dense attention in FP8, which is less exact: " in text  # noqa: RUF001
    assert "DSA in fp8 is 3.00× as fast in prefill at 8K (flash_attn_3)." in text  # noqa: RUF001
    (line,) = found.crossovers
    assert (line.dense, line.last_speedup) == ("flash_attn_3, bf16", 4.0)


@pytest.mark.parametrize(
    "more",
    [
        (),
        # another shape, a suspect time, no time
        (ok(replace(FP8, seq_len_kv=4096), 3.0),),
        (replace(ok(replace(FP8, seq_len_kv=8192), 0.5), flags=("below_floor",)),),
        (Record(case=replace(FP8, seq_len_kv=8192), status="skipped", reason="no library"),),
    ],
    ids=["none", "other shape", "suspect", "skipped"],
)
def test_without_a_fp8_dense_time_there_is_no_such_sentence(more: tuple[Record, ...]) -> None:
    (text,) = with_fp8(*more).headlines
    assert "in FP8" not in text
    assert "4.00× as fast" in text  # noqa: RUF001


def test_fp8_dense_is_drawn_as_dense() -> None:
    found = with_fp8(ok(replace(FP8, seq_len_kv=8192), 3.0))
    (panel,) = lines.panels(found.cases)
    assert [(line.label, line.role[:5]) for line in panel.lines][1:] == [
        ("dense flash_attn_3 bf16", "dense"),
        ("dense flash_attn_3 fp8", "dense"),
    ]


ALL_FP8 = replace(SPARSE, op="dsa_fp8", precision="fp8")


def all_fp8(seq_len_kv: int, seconds: float, error: float | None = None, **more: object) -> Record:
    gate = {} if error is None else {"rounding_error": {"relative_l2": error}}
    return ok(replace(ALL_FP8, seq_len_kv=seq_len_kv), seconds, gate=gate, **more)


def three_lengths(*more: Record, sparse: bool = True) -> Digest:
    """At 4K, 8K, 16K dense takes 1, 2, 8 s and in fp8 0.8, 1.5, 6 s; DSA 4 s, if it was asked."""
    records = []
    for length, slow, fast in ((4096, 1.0, 0.8), (8192, 2.0, 1.5), (16384, 8.0, 6.0)):
        dsa = ok(replace(SPARSE, seq_len_kv=length, precision="fp8"), 4.0)
        records += [dsa] if sparse else []
        records.append(ok(replace(DENSE, seq_len_kv=length), slow))
        records.append(ok(replace(FP8, seq_len_kv=length), fast))
    return digest([FakeRun(path=Path("r"), header=HEADER, records=[*records, *more])])


TIMES = (all_fp8(4096, 2.0, 0.04), all_fp8(8192, 2.0, 0.051), all_fp8(16384, 2.0, 0.03))


def test_dsa_with_attention_in_fp8_has_a_sentence_of_its_own() -> None:
    assert three_lengths(*TIMES).headlines == (
        "On NVIDIA H100 80GB HBM3, in prefill DSA (k=2048, fp8) beats dense attention "
        "(flash_attn_3, bf16) from L = 11.3K and is 2.00× as fast at 16K. Against dense attention "  # noqa: RUF001
        "in FP8, which is less exact: DSA in fp8 is 1.50× as fast in prefill at 16K "  # noqa: RUF001
        "(flash_attn_3). With attention in FP8 too, which is less exact (up to 5.1 % from bf16 on "
        "random inputs), in prefill DSA (k=2048, fp8) beats dense attention (flash_attn_3, bf16) "
        "from L = 8K and is 4.00× as fast at 16K; 3.00× as fast as dense attention in FP8 at 16K "  # noqa: RUF001
        "(flash_attn_3).",
    )


def test_the_sentence_says_what_it_knows() -> None:
    (text,) = with_fp8().headlines
    (more,) = with_fp8(all_fp8(8192, 0.5, 0.009)).headlines
    assert more.startswith(text)
    assert more.removeprefix(text) == (
        " With attention in FP8 too, which is less exact (0.9 % from bf16 on random inputs), in "
        "prefill DSA (k=2048, fp8) beats dense attention (flash_attn_3, bf16) at L = 8K, the only "
        "L compared: 8.00× as fast."  # noqa: RUF001
    )
    assert "which is less exact, in prefill" in three_lengths(all_fp8(8192, 1.0)).headlines[0]


def test_the_headline_is_of_dsa_whatever_dsa_fp8_has() -> None:
    """Also where only the less exact one has a time, or the other is suspect."""
    fast = [all_fp8(n, 0.1, 0.04) for n in (4096, 8192, 16384)]
    whole = three_lengths(*fast)
    told = whole.headlines[0].partition(". ")[0]
    assert "DSA (k=2048, fp8) beats dense attention (flash_attn_3, bf16) from L = 11.3K" in told
    assert [set(panel.rows["op"]) for panel in lines.bar_panels(whole, "speedup")] == [{"dsa"}]
    alone = three_lengths(*fast, sparse=False).headlines[0]
    assert alone.startswith(
        "On NVIDIA H100 80GB HBM3, in prefill no DSA case was asked for. With attention in FP8 too"
    )
    assert "beats dense attention (flash_attn_3, bf16) at every L compared (4K to 16K)" in alone
    suspect = ok(replace(SPARSE, precision="fp8"), 1.0, flags=("launch_bound",))
    records = [suspect, ok(DENSE, 2.0), all_fp8(4096, 0.5, 0.04)]
    (text,) = digest([FakeRun(path=Path("r"), header=HEADER, records=records)]).headlines
    assert "in prefill DSA (k=2048, fp8) has no time beside dense attention that can be" in text
    assert "With attention in FP8 too, which is less exact (4.0 % from bf16 on random" in text
    assert "Left out as suspect: DSA at 4K." in text


def test_doubt_in_dsa_fp8_is_told() -> None:
    noisy = three_lengths(*TIMES[:2], all_fp8(16384, 2.0, 0.03, flags=("drift",))).headlines[0]
    assert "Some of these times carry a doubt flag" in noisy
    lost = three_lengths(*TIMES[:2], all_fp8(16384, 2.0, flags=("launch_bound",))).headlines[0]
    assert "Left out as suspect: DSA fp8 attention at 16K." in lost
    assert "at 16K" not in lost.partition("With attention")[2].partition("Left out")[0]


def test_dsa_fp8_is_a_line_of_its_own_with_its_speedup() -> None:
    found = three_lengths(*TIMES)
    rows = found.cases[found.cases["op"] == "dsa_fp8"]
    assert list(rows["speedup"]) == [0.5, 1.0, 4.0]
    assert set(rows["dense_precision"]) == {"bf16"}
    (panel,) = lines.panels(found.cases)
    drawn = {line.label: (line.role, line.style) for line in panel.lines}
    assert list(drawn) == [
        "DSA k=2048 fp8", "DSA fp8 attention k=2048 fp8", "dense flash_attn_3 bf16",
        "dense flash_attn_3 fp8",
    ]  # fmt: skip
    own, other = (drawn[name] for name in list(drawn)[:2])
    assert own[0].startswith("sparse") and other[0].startswith("sparse") and own != other
    (chart,) = [figure for figure in figures(found) if figure.name == "speedup-prefill"]
    assert [series.label for series in chart.series] == list(drawn)[:2]
    assert [m.label for m in chart.marks if m.kind == "crossing"] == ["11.3K", "8K"]
