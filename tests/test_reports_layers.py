"""Whole layers in the reports: opponents, switch point, budget, accuracy; apart from attention."""

from dataclasses import replace
from pathlib import Path

import pytest

from dsa_bench import schedule
from dsa_bench.contest import BESIDE, CONTESTS, DENSE, DENSE_BESIDE, SPARSE, SPARSE_BESIDE
from dsa_bench.record import Case, Record
from dsa_bench.reports import budget, html, naming, recompute, switch, tables
from dsa_bench.reports.chart import Figure, y_domain
from dsa_bench.reports.digest import Digest, digest
from dsa_bench.reports.figures import figures
from dsa_bench.reports.verify import Contents, verify
from dsa_bench.store import Line
from dsa_bench.sweep import Planned
from tests.reports_layers import GAPS, layer_record, layer_run, pattern_run, seconds_of
from tests.reports_runs import HEADER, LENGTHS, FakeRun, h100_run, ok


def run_of(records: list[Record]) -> FakeRun:
    return FakeRun(path=Path("results/r"), header=HEADER, records=records)


def both_run() -> FakeRun:
    """Attention and layers in one run."""
    return run_of([*h100_run().records, *layer_run().records])


def by_name(report: Digest) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures(report)}


def test_an_operator_is_in_one_contest_on_one_side() -> None:
    operators = [op for contest in CONTESTS for op in contest.operators]
    assert len(set(operators)) == len(operators) == len(SPARSE | DENSE | BESIDE)
    assert len(operators) == len(SPARSE) + len(DENSE) + len(DENSE_BESIDE)
    assert SPARSE_BESIDE == SPARSE & BESIDE == set(naming.SPARSE_BESIDE)
    assert set(operators) == set(naming.OPERATORS)
    pairs = {op: c.dense for c in CONTESTS for op in (*c.sparse, *c.sparse_beside)}
    assert pairs == recompute.OPPONENTS


def test_layers_are_compared_with_dense_layers_alone() -> None:
    cases = digest([both_run()]).cases
    rows = cases[(cases["op"] == "dsa_layer") & (cases["seq_len_kv"] == 131072)]
    for _, row in rows.iterrows():
        expected = seconds_of("dense_layer", row["phase"], 131072)
        assert row["speedup"] == pytest.approx(expected / row["seconds"])
    # at 4K the dense attention takes 0.8 ms, the dense layer 7 ms
    sparse = cases[
        (cases["op"] == "dsa") & (cases["phase"] == "prefill") & cases["speedup"].notna()
    ]
    assert set(sparse["dense_impl"]) == {"flash_attn_3"}
    masked = cases[(cases["op"] == "masked_layer") & (cases["seq_len_kv"] == 4096)]
    assert masked["speedup"].tolist() == [pytest.approx(7.0 / 6.8)]


@pytest.mark.parametrize(
    "axes", [{"tensor_parallel": 8}, {"inputs": "needle"}, {"weights": "w.safetensors"}]
)
def test_an_opponent_has_the_same_ranks_inputs_and_weights(axes: dict[str, object]) -> None:
    own = layer_record("dsa_layer", "prefill", 8192, **axes)
    other = layer_record("dense_layer", "prefill", 8192)
    alike = layer_record("dense_layer", "prefill", 8192, **axes)
    assert digest([run_of([own, other])]).cases["speedup"].isna().all()
    found = digest([run_of([own, other, alike])]).cases["speedup"].iloc[0]
    assert found == pytest.approx(9.0 / 12.4)
    expected = recompute.figures([own, other, alike], HEADER)[own.case.key]
    assert expected["speedup"] == pytest.approx(found)


def test_cost_counts_every_rank() -> None:
    one, eight = (
        digest([run_of([layer_record("dsa_layer", "prefill", 8192, tensor_parallel=n)])])
        for n in (1, 8)
    )
    # 12.4 ms for 4096 tokens of 61 layers at $2
    assert one.cases["usd_per_million_tokens"].iloc[0] == pytest.approx(
        2 / 3600 * 12.4e-3 / 4096 * 61 * 1e6
    )
    ratio = eight.cases["usd_per_million_tokens"] / one.cases["usd_per_million_tokens"]
    assert ratio.iloc[0] == pytest.approx(8)


def test_headline_of_layers_alone() -> None:
    # 5 + 0.5 x = 12 + 0.05 x at 15.6K; straight on logarithmic axes between 8K and 16K
    (headline,) = digest([layer_run()]).headlines
    assert headline == (
        "On NVIDIA H100 80GB HBM3, in prefill the sparse layer (k=2048, fp8) beats the dense layer "
        "(torch+triton, fp8) from L = 15.5K and is 3.75× as fast at 128K; in decode at batch 128 "  # noqa: RUF001
        "the sparse layer (k=2048, fp8) beats the dense layer (torch+triton, fp8) at every L "
        "compared (4K to 128K) and is 7.28× as fast at 128K. "  # noqa: RUF001
        "In prefill the sparse layer (k=2048, fp8) is faster than its masked form from L = 12.1K."
    )


def test_headline_of_attention_and_layers_keeps_them_apart() -> None:
    (headline,) = digest([both_run()]).headlines
    first, second = headline.split(". In prefill the sparse layer (k=2048, fp8) beats")
    assert first in digest([h100_run()]).headlines[0]
    assert second.startswith(" the dense layer (torch+triton, fp8) from L = 15.5K")


def test_headline_of_dense_layers_alone() -> None:
    records = [layer_record("dense_layer", "prefill", 8192)]
    assert (
        digest([run_of(records)])
        .headlines[0]
        .endswith("the dense layer was measured; no sparse layer beside it, so no crossover.")
    )


def test_figures_of_layers_stand_apart() -> None:
    made = by_name(digest([both_run()]))
    assert {"speedup-prefill", "speedup-prefill-layer-tp-1", "speedup-prefill-layer-tp-8"} <= set(
        made
    )
    for figure in made.values():
        labels = " ".join(s.label for s in figure.series)
        assert not ("layer" in labels and "DSA" in labels), figure.name
    labels = [s.label for s in made["latency-prefill-layer-tp-1"].series]
    assert labels == [
        "sparse layer k=2048 fp8",
        "masked layer k=2048 fp8",
        "dense layer torch+triton fp8",
    ]
    # the stages of attention have their figure, those of a layer are a budget
    assert [name for name in made if name.startswith("stages")] == [
        "stages-prefill",
        "stages-decode-batch-128",
    ]
    alone = by_name(digest([h100_run()]))
    assert alone["speedup-prefill"].answer == made["speedup-prefill"].answer


def forms(masked: dict[int, float], gathered: dict[int, float], **fields: object) -> Digest:
    """A run of both forms with these times."""
    records = []
    for op, times in (("masked_layer", masked), ("dsa_layer", gathered)):
        for length, seconds in times.items():
            case = layer_record(op, "prefill", length).case
            records.append(ok(case, seconds, **(fields if op == "masked_layer" else {})))
    return digest([run_of(records)])


@pytest.mark.parametrize(
    ("masked", "gathered", "said"),
    [
        # a ratio of 1/2, then of 2: the middle of 4K and 8K on a logarithmic axis
        ({4096: 1.0, 8192: 2.0}, {4096: 2.0, 8192: 1.0, 16384: 1.0}, "from L = 5.7K."),
        ({4096: 2.0, 8192: 2.0}, {4096: 1.0, 8192: 1.0}, "at every L compared (4K to 8K)."),
        ({4096: 1.0, 8192: 1.0}, {4096: 2.0, 8192: 2.0}, "is not faster than its masked form up"),
        ({8192: 1.0}, {4096: 3.0, 8192: 2.0}, "is not faster than its masked form at L = 8K, the"),
        ({8192: 3.0}, {4096: 3.0, 8192: 2.0}, "is faster than its masked form at L = 8K, the only"),
    ],
)
def test_switch_point(masked: dict[int, float], gathered: dict[int, float], said: str) -> None:
    report = forms(masked, gathered)
    assert len(report.switches) == 1
    assert f"In prefill the sparse layer (k=2048, fp8) {said}" in report.headlines[0] or (
        said in report.headlines[0]
    )


def test_switch_point_rests_on_trusted_times() -> None:
    lengths = {4096: 1.0, 8192: 2.0}
    report = forms(lengths, {4096: 2.0, 8192: 1.0}, flags=("launch_bound",))
    assert report.switches == ()
    noisy = forms(lengths, {4096: 2.0, 8192: 1.0}, flags=("drift",))
    assert "L = 5.7K (some times carry a doubt flag)." in noisy.headlines[0]


def test_switch_point_has_an_interval() -> None:
    spread = (0.9, 0.95, 1.0, 1.0, 1.0, 1.0, 1.05, 1.1)
    records = []
    for op, times in (("masked_layer", (1.0, 2.0)), ("dsa_layer", (2.0, 1.0))):
        for length, seconds in zip((4096, 8192), times, strict=True):
            case = layer_record(op, "prefill", length).case
            records.append(ok(case, tuple(seconds * factor for factor in spread)))
    (found,) = digest([run_of(records)]).switches
    assert found.interval is not None and found.seq_len_kv is not None
    assert found.interval[0] < found.seq_len_kv < found.interval[1]
    assert switch.sentence([found], str(found.axes["run_label"])).endswith("K).")


def test_a_run_without_one_of_the_forms_has_no_switch_point() -> None:
    records = [r for r in layer_run().records if r.case.op != "masked_layer"]
    report = digest([run_of(records)])
    assert report.switches == () and "masked" not in report.headlines[0]


def test_budget_adds_up_and_names_the_glue() -> None:
    report = digest([layer_run()])
    (sparse, dense), _ = budget.budgets(report)
    assert (sparse.kind, dense.kind) == ("sparse", "dense")
    kernels = seconds_of("dsa_layer", "prefill", 32768) - GAPS
    at = sparse.groups[sparse.groups["seq_len_kv"] == 32768].set_index("group")["seconds"]
    assert at.to_dict() == {
        "projections": pytest.approx(0.3 * kernels),
        "glue": pytest.approx(0.1 * kernels),
        "indexer": pytest.approx(0.2 * kernels),
        "top-k": pytest.approx(0.1 * kernels),
        "attention": pytest.approx(0.3 * kernels),
    }
    assert sparse.share(budget.GLUE, 32768) == pytest.approx(0.1)
    assert dense.share(budget.GLUE, 32768) == pytest.approx(0.15)
    made = by_name(report)
    names = [f"budget-{kind}-prefill-layer-tp-1" for kind in ("sparse", "dense")]
    assert y_domain(made[names[0]]) == y_domain(made[names[1]])
    assert "10.0 % at 32K" in made[names[0]].answer


def test_a_stage_that_no_group_names_is_not_lost() -> None:
    record = layer_record("dsa_layer", "prefill", 8192)
    stages = tuple(replace(s, name="new" if s.name == "topk" else s.name) for s in record.stages)
    run = run_of([replace(record, stages=stages), layer_record("dense_layer", "prefill", 8192)])
    report = digest([run])
    ((sparse, _),) = budget.budgets(report)
    assert sparse.share(budget.OTHER, 8192) == pytest.approx(0.1)
    assert sparse.groups["share"].sum() == pytest.approx(1.0)
    sheet = budget.sheets(report)[0]
    assert sheet.head == (
        *("L", "projections", "glue", "indexer", "top-k", "attention", "other"),
        *("kernels", "timed call"),
    )
    assert sheet.rows[0][0] == "8K" and "(10.0 %)" in sheet.rows[0][6]


def test_accuracy_has_a_panel_for_each_pattern_where_it_was_taken() -> None:
    made = by_name(digest([pattern_run()]))
    for name in ("error", "mass"):
        found = {n for n in made if n.startswith(name)}
        assert found == {
            f"{name}-prefill-layer-needle-inputs",
            f"{name}-prefill-layer-random-inputs",
        }
    needle = made["mass-prefill-layer-needle-inputs"]
    assert [s.label for s in needle.series] == ["sparse layer k=512 fp8", "sparse layer k=2048 fp8"]
    assert {p.y for s in needle.series for p in s.points} == {0.99}
    (recall,) = [figure for name, figure in made.items() if name.startswith("recall")]
    assert {p.y for s in recall.series for p in s.points} == {0.9}
    assert "Inputs: needle" in recall.answer


def test_markdown_and_page_show_layers() -> None:
    report = digest([both_run()])
    text = tables.markdown(report)
    assert text.index("## prefill\n") < text.index("## prefill, layer\n")
    attention = text[text.index("## prefill\n") : text.index("## prefill, layer\n")]
    assert "dsa_layer" not in attention and "| recall |" not in attention
    layers = text[text.index("## prefill, layer\n") : text.index("## decode")]
    assert "| tp |" in layers and "| recall |" in layers and "99.5 %" in layers
    assert "## Budget of the sparse layer, prefill" in text
    assert "is faster than its masked form from L = 12.1K" in text
    page = html.page(report)
    assert "Budget of the dense layer, prefill" in page and "its masked form" in page
    assert "Slope of the cost over L" in page


def test_other_tables_do_not_trouble_the_check_of_the_markdown() -> None:
    run = layer_run()
    lines = [Line(number=i, data=b"{}", record=r) for i, r in enumerate(run.records, start=1)]
    text = tables.markdown(digest([run]))
    contents = Contents(path=run.path, header=run.header, lines=lines, markdown=text)
    (check,) = [c for c in verify(contents) if c.name == "report.md"]
    assert (check.count, check.findings) == (len(run.records), ())
    (check,) = [c for c in verify(contents) if c.name == "figures"]
    assert check.findings == () and check.count > 0


def test_layers_of_one_shape_take_turns() -> None:
    def item(op: str, **axes: object) -> Planned:
        topk = None if op.startswith("dense") else 2048
        base = {"phase": "prefill", "seq_len_kv": LENGTHS[0], "seq_len_q": 4096, "topk": topk}
        return Planned(case=Case(op=op, impl="triton", **(base | axes)), reason="")  # type: ignore[arg-type]

    layers = [item("dsa_layer"), item("masked_layer"), item("dense_layer")]
    attention = [item("dsa"), item("dense_attention")]
    ranks = [item("dsa_layer", tensor_parallel=8), item("dense_layer", tensor_parallel=8)]
    needle = [item("dsa_layer", inputs="needle")]
    loaded = [item("dsa_layer", weights="w.safetensors")]
    mixed = [*attention[:1], *layers, *ranks, *needle, *loaded, *attention[1:]]
    made = [list(group.items) for group in schedule.groups(mixed)]
    assert made == [attention, layers, ranks, needle, loaded]
