"""The model-level estimate against arithmetic by hand, and what it says of its assumptions."""

from dataclasses import replace
from pathlib import Path

import pytest

from dsa_bench.cost import all_reduce_seconds
from dsa_bench.operator import UsageError
from dsa_bench.reports import estimate, estimate_view
from dsa_bench.reports.digest import digest
from dsa_bench.reports.estimate import Estimate
from dsa_bench.reports.figures import figures
from tests.reports_layers import layer_run, seconds_of
from tests.reports_runs import HEADER, FakeRun, h100_run

PREFILL = 2 / 3600 * 61 * 1e6 / 4096
"""USD per million tokens of a second of one prefill layer."""
DECODE = 2 / 3600 * 61 * 1e6 / 128


def estimates(**options: object) -> dict[tuple[str, int], Estimate]:
    run = layer_run()
    run.header = HEADER | {"options": HEADER["options"] | options}
    return {(e.phase, e.num_gpus): e for e in estimate.estimates(digest([run]))}


def test_estimate_by_hand() -> None:
    found = estimates()
    assert list(found) == [("prefill", 1), ("prefill", 8), ("decode", 1)]
    prefill = found["prefill", 1]
    # the dense layer is a straight line with 5 ms at 0; V3.1 is published at 0.0529 there
    assert prefill.is_calibrated
    assert prefill.rest_usd == pytest.approx(0.0529 - 5e-3 * PREFILL)
    dense, sparse = prefill.curves
    assert dense.at(131072) == pytest.approx(69e-3 * PREFILL + prefill.rest_usd)
    # the rest is shared
    assert sparse.at(131072) == pytest.approx(18.4e-3 * PREFILL + prefill.rest_usd)
    # at 8K the masked form takes 9.6 ms, the other 12.4
    assert sparse.at(8192) == pytest.approx(9.6e-3 * PREFILL + prefill.rest_usd)
    assert [p.op for p in sparse.points][:3] == ["masked_layer", "masked_layer", "dsa_layer"]
    # between measured L on a straight line, and none beyond them
    middle = (sparse.at(32768) + sparse.at(65536)) / 2  # type: ignore[operator]
    assert sparse.at(49152) == pytest.approx(middle)
    assert sparse.at(2048) is None and sparse.at(262144) is None
    decode = found["decode", 1]
    assert decode.line.axes["batch_size"] == 128
    assert decode.curves[0].at(131072) == pytest.approx(
        seconds_of("dense_layer", "decode", 131072) * DECODE + decode.rest_usd
    )


def test_the_rest_is_never_below_zero_and_may_be_configured() -> None:
    eight = estimates()["prefill", 8]
    assert eight.rest_usd == 0.0 and eight.is_calibrated
    found = estimates(rest_usd={"prefill": 0.03})
    assert (found["prefill", 1].rest_usd, found["prefill", 1].is_calibrated) == (0.03, False)
    assert found["decode", 1].is_calibrated
    assert found["prefill", 1].curves[0].at(131072) == pytest.approx(69e-3 * PREFILL + 0.03)
    assert "$0.0300, configured" in estimate_view.assumptions(found["prefill", 1])


def test_communication_is_priced_from_the_stated_bandwidth() -> None:
    assert all_reduce_seconds(1e9, ranks=4, bytes_per_second=1e9) == pytest.approx(1.5)
    assert all_reduce_seconds(1e9, ranks=1, bytes_per_second=1e9) == 0
    for link in (450.0, 225.0):
        eight = estimates(link_gbps=link, rest_usd={"prefill": 0.0})["prefill", 8]
        # 7/8 of 14336 bytes there and back, 61 layers, 8 GPUs at $2
        seconds = 2 * 7 / 8 * 14336 / (link * 1e9)
        assert eight.communication_usd == pytest.approx(seconds * 61 * 8 * 2 / 3600 * 1e6)
        assert eight.curves[0].at(131072) == pytest.approx(
            8 * 69e-3 * PREFILL + eight.communication_usd
        )
        text = estimate_view.assumptions(eight)
        assert (
            f"priced, not measured: a ring all-reduce of [tokens, 7168] bf16 a layer at {link:g}"
            in text
        )
    assert estimates()["prefill", 1].communication_usd == 0
    assert "priced" not in estimate_view.assumptions(estimates()["prefill", 1])


def test_slopes_are_told_per_1024_tokens() -> None:
    dense, sparse = estimates()["prefill", 1].curves
    first, ours, theirs = dense.slopes()  # type: ignore[misc]
    assert (first, ours) == (4096, pytest.approx(0.5e-3 * PREFILL))
    assert theirs == pytest.approx((0.6658 - 0.0529) / 128)
    first, ours, theirs = sparse.slopes()  # type: ignore[misc]
    # above 8K alone: below them the masked form is the faster one
    assert (first, ours) == (16384, pytest.approx(0.05e-3 * PREFILL))
    assert theirs == pytest.approx((0.1871 - 0.0999) / (131072 - 6748) * 1024)
    assert replace(sparse, points=sparse.points[:3]).slopes() is None


def test_tables_tell_the_distance() -> None:
    report = digest([layer_run()])
    sheets = {sheet.title: sheet for sheet in estimate_view.sheets(report)}
    sheet = sheets["Whole model, estimate against published, prefill"]
    rest = 0.0529 - 5e-3 * PREFILL
    ours = 69e-3 * PREFILL + rest
    row = next(r for r in sheet.rows if r[0].startswith("V3.1") and r[1] == "128K")
    assert row[2:] == (
        f"${ours:.3f}", "$0.666", f"{ours / 0.6658:.3f}×", f"-${0.6658 - ours:.4f}",  # noqa: RUF001
    )  # fmt: skip
    assert [r[1] for r in sheet.rows] == ["16K", "32K", "64K", "128K"] * 2
    slopes = sheets["Slope of the cost over L"]
    assert len(slopes.rows) == 6
    assert slopes.rows[0][-1] == f"{0.5e-3 * PREFILL / (0.6129 / 128):.3f}×"  # noqa: RUF001


def test_figure_has_the_published_curves_as_they_are() -> None:
    made = {f.name: f for f in figures(digest([layer_run()]))}
    figure = made["estimate-prefill"]
    curves = {s.label: s for s in figure.series}
    published = curves["DeepSeek V3.1-Terminus (published)"].points
    assert (published[0].x, published[0].y, published[-1].y) == (0, 0.0529, 0.6658)
    assert "calibrated to one published number" in figure.answer
    assert "H800" in figure.answer and "taken off" not in figure.answer
    assert "estimate-prefill-tp-8" in made and "estimate-decode" in made


@pytest.mark.parametrize(
    "change", [{"preset": "v3.2-cpu", "num_heads": 16}, {"num_heads": 64}, {"op": "dsa"}]
)
def test_only_the_full_model_is_estimated(change: dict[str, object]) -> None:
    run = layer_run()
    run.records = [replace(r, case=replace(r.case, **change)) for r in run.records]
    report = digest([run])
    assert estimate.estimates(report) == () and estimate_view.sheets(report) == []


def test_neither_a_cpu_nor_attention_alone_is_estimated() -> None:
    run = layer_run()
    run.header = HEADER | {"machine": HEADER["machine"] | {"device": "cpu"}}
    assert estimate.estimates(digest([run])) == ()
    assert estimate.estimates(digest([h100_run()])) == ()


def test_one_dense_length_calibrates_nothing() -> None:
    records = [
        r
        for r in layer_run().records
        if (r.case.op, r.case.tensor_parallel, r.case.phase) == ("dsa_layer", 1, "prefill")
        or (r.case.op == "dense_layer" and r.case.seq_len_kv == 8192 and r.case.phase == "prefill")
    ]
    run = FakeRun(path=Path("r"), header=HEADER, records=records)
    assert estimate.estimates(digest([run])) == ()
    run.header = estimate.assume(HEADER, rest_usd="prefill=0.05")
    found = {e.num_gpus: e for e in estimate.estimates(digest([run]))}
    assert found[1].rest_usd == 0.05
    assert [len(curve.points) for curve in found[1].curves] == [1, 6]


def test_assumptions_of_the_command_line() -> None:
    made = estimate.assume(HEADER, rest_usd="prefill=0.03, decode=0.05", link_gbps=100.0)
    assert made["options"]["rest_usd"] == {"prefill": 0.03, "decode": 0.05}
    assert made["options"]["link_gbps"] == 100.0 and made["options"]["effort"] == "standard"
    assert estimate.assume(HEADER) == HEADER
    for text in (
        "0.03",
        "later=1",
        "prefill",
        "prefill=x",
        "prefill=-1",
        "prefill=nan",
        "decode=inf",
    ):
        with pytest.raises(UsageError, match="--rest-usd must"):
            estimate.parse_rest(text)
