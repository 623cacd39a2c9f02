"""Figures as data, and what the drawers make of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsa_bench.record import Case, Record
from dsa_bench.reports import chart, lines, plots, published, units, vega
from dsa_bench.reports.chart import Axis, Figure, Point, Series
from dsa_bench.reports.digest import digest
from dsa_bench.reports.figures import MAKERS, figures
from tests.reports_runs import (
    HEADER,
    LENGTHS,
    FakeRun,
    doubtful_run,
    h100_run,
    hostile_run,
    ok,
)


def by_name(run: FakeRun) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures(digest([run]))}


def test_a_run_gives_every_figure_it_has_data_for() -> None:
    names = list(by_name(h100_run()))
    assert names == [
        "speedup-prefill",
        "speedup-decode",
        "cost-prefill",
        "cost-decode-batch-128",
        "latency-prefill",
        "latency-decode-batch-1",
        "latency-decode-batch-32",
        "latency-decode-batch-128",
        "stages-prefill",
        "stages-decode-batch-128",
        "memory-prefill",
        "memory-decode-batch-128",
        "rates-prefill",
        "rates-decode-batch-128",
        "error-prefill",
        "error-decode",
    ]
    # a run of the attention alone has nothing on layers, and these records have no recall
    missing = {maker.name for maker in MAKERS} - {name.split("-")[0] for name in names}
    assert missing == {"operators", "budget", "estimate", "mass", "recall"}


def test_speedup_figure_holds_the_crossovers() -> None:
    figure = by_name(h100_run())["speedup-prefill"]
    assert figure.is_lead
    assert [s.label for s in figure.series] == [
        "DSA k=512 fp8",
        "DSA k=1024 fp8",
        "DSA k=2048 fp8",
    ]
    # the k of the model has the first colour
    assert [s.role for s in figure.series] == ["sparse2", "sparse1", "sparse0"]
    assert [p.x for p in figure.series[0].points] == list(LENGTHS)
    assert [(m.kind, m.label) for m in figure.marks] == [
        ("level", "as fast as dense"),
        ("crossing", "6.7K"),
        ("crossing", "11.9K"),
    ]
    assert "DSA k=2048 fp8: faster from 11.9K" in figure.answer


def test_dense_lines_are_grey_and_lost_cases_marked() -> None:
    figure = by_name(h100_run())["latency-prefill"]
    roles = {s.label: s.role for s in figure.series}
    assert roles["dense flash_attn_3 bf16"] == "dense0"
    assert len({role for role in roles.values() if role.startswith("dense")}) == 3
    lost = [m.label for m in figure.marks if m.kind == "lost"]
    assert len(lost) == 3
    assert any("signal 11" in label for label in lost)


def test_doubtful_points_carry_their_flag() -> None:
    figure = by_name(h100_run())["latency-decode-batch-1"]
    flagged = [p for s in figure.series for p in s.points if p.flags]
    assert len(flagged) == 2
    assert [(p.flags, p.doubt) for p in flagged] == [("noisy_samples", "noisy")] * 2
    assert figure.doubt_note == "Hollow: noisy."
    assert by_name(h100_run())["latency-prefill"].doubt_note == ""
    # the noisy dense time makes the speed-up over it noisy, too
    speedup = by_name(h100_run())["speedup-decode"]
    assert [(s.label, p.x, p.flags) for s in speedup.series for p in s.points if p.doubt] == [
        ("DSA k=2048 fp8 batch 1", LENGTHS[1], "dense: noisy_samples")
    ]


def test_suspect_times_are_seen_but_not_joined_and_no_speedup() -> None:
    made = by_name(doubtful_run())
    latency = {s.label: s for s in made["latency-prefill"].series}
    own = latency["DSA k=2048 bf16 default mode"]
    assert [(p.x, p.doubt) for p in own.points] == [
        (4096, ""), (8192, ""), (16384, "noisy"), (32768, "suspect"),
    ]  # fmt: skip
    assert [p.x for p in chart.joined(own)] == [4096, 8192, 16384]
    assert "Cross, not joined" in made["latency-prefill"].doubt_note
    speedup = made["speedup-prefill"]
    lines_of = {s.label: [p.x for p in s.points] for s in speedup.series}
    assert lines_of["DSA k=2048 bf16 default mode"] == [4096, 8192, 16384]
    assert lines_of["DSA k=2048 bf16 warm"] == [4096, 8192, 16384, 32768, 65536]
    assert speedup.answer.endswith("Left out as suspect: cheat at 8K, DSA at 32K.")
    assert "cheat" not in " ".join(s.label for s in made["cost-prefill"].series)


def test_drawers_show_doubt(tmp_path: Path) -> None:
    figure = by_name(doubtful_run())["latency-prefill"]
    layers = vega.spec(figure)["layer"]
    texts = [layer for layer in layers if layer["mark"].get("text") == "✕"]
    crosses = [layer for layer in texts if "transform" in layer]
    assert len(crosses) == 2
    paths = [layer for layer in layers if layer["mark"].get("type") == "line"]
    filtered = [p for p in paths if p.get("transform") == [{"filter": "!isValid(datum.apart)"}]]
    assert len(filtered) == 2 and len(paths) == 6
    svg = plots.write_figure(figure, tmp_path).with_suffix(".svg").read_text(encoding="utf-8")
    assert "not joined by the line" in svg


def test_bars_of_a_doubtful_time_are_hatched(tmp_path: Path) -> None:
    run = h100_run()
    plain = by_name(run)["stages-prefill"]
    run.records = [
        replace(r, flags=("drift",)) if r.case.seq_len_kv == LENGTHS[-1] else r for r in run.records
    ]
    figure = by_name(run)["stages-prefill"]
    assert {(p.x, p.doubt) for s in figure.series for p in s.points} == {
        (n, "noisy" if n == LENGTHS[-1] else "") for n in LENGTHS
    }
    assert figure.doubt_note.startswith("Hatched") and plain.doubt_note == ""
    for one, is_hatched in ((plain, False), (figure, True)):
        svg = plots.write_figure(one, tmp_path).with_suffix(".svg").read_text(encoding="utf-8")
        assert ("<pattern" in svg) == is_hatched
    # memory is measured apart from time
    assert by_name(run)["memory-prefill"].doubt_note == ""


def test_ceilings_of_a_burst_are_solid_and_sustained_ones_dashed() -> None:
    run = h100_run()
    run.header = run.header | {
        "ceilings": run.header["ceilings"] | {"sustained_bf16_flops_per_second": 600e12}
    }
    figure = by_name(run)["rates-prefill"]
    assert [(m.label, m.y, chart.level_style(figure, m)) for m in figure.marks] == [
        ("measured bf16 matmul rate", 786e12, "solid"),
        ("measured bf16 matmul rate, sustained", 600e12, "dashed"),
        ("measured fp8 matmul rate", 1.5e15, "solid"),
    ]


@pytest.mark.parametrize(("lasting", "labels"), [(760e12, ["burst and"]), (740e12, ["", ""])])
def test_levels_whose_labels_would_meet_are_one(lasting: float, labels: list[str]) -> None:
    run = h100_run()
    rates = {"bf16_flops_per_second": 786e12, "sustained_bf16_flops_per_second": lasting}
    run.header = run.header | {"ceilings": rates}
    marks = by_name(run)["rates-prefill"].marks
    assert [m.y for m in marks] == [786e12, lasting][: len(labels)]
    assert all(label in m.label for m, label in zip(marks, labels, strict=True))


def test_rates_of_a_cpu_do_not_speak_of_fp8() -> None:
    run = h100_run()
    assert "only an fp8 stage" in by_name(run)["rates-prefill"].answer.lower()
    run.header = run.header | {"ceilings": {"fp32_flops_per_second": 1e12}}
    assert "fp8" not in by_name(run)["rates-prefill"].answer


def test_stage_bars_add_up_to_the_kernel_time() -> None:
    run = h100_run()
    figure = by_name(run)["stages-prefill"]
    bars = [s for s in figure.series if s.shape != "points"]
    assert [s.label for s in bars] == ["indexer", "topk", "sparse_prefill"]
    wanted = next(
        r for r in run.records if r.case.topk == 2048 and r.case.seq_len_kv == LENGTHS[-1]
    )
    total = sum(s.points[-1].y for s in bars)
    assert total == pytest.approx(sum(stage.seconds for stage in wanted.stages))
    assert "the stage indexer takes 62 %" in figure.answer


def test_memory_beside_dense() -> None:
    figure = by_name(h100_run())["memory-decode-batch-128"]
    dense = figure.series[-1]
    assert (dense.label, dense.shape) == ("dense, peak", "points")
    assert dense.points[-1].y == pytest.approx(128 * 131072 * 1152, rel=0.01)


def test_published_curves_stand_beside_the_measured_ones() -> None:
    figure = by_name(h100_run())["cost-prefill"]
    curves = {s.label: s for s in figure.series if s.role.startswith("published")}
    dense = curves["DeepSeek V3.1-Terminus (published)"].points
    # 0.6658 - 0.0529 at 128K, a straight line from L = 0
    assert dense[-1].y == pytest.approx(0.6129)
    assert dense[0].y == pytest.approx(0.6129 * 4096 / 131072)
    sparse = {p.x: p.y for p in curves["DeepSeek V3.2-Exp (published)"].points}
    # 64K in the published table: 0.1412
    assert sparse[65536] == pytest.approx(0.1412 - 0.0611, abs=3e-4)
    assert "constant" not in figure.answer and "L = 0 is taken off" in figure.answer
    assert "H800" in figure.answer and "attention only" in figure.y.title


def test_published_curves_follow_the_price() -> None:
    run = h100_run()
    run.header = run.header | {"options": {"gpu_hour_usd": 4.0}}
    figure = by_name(run)["cost-prefill"]
    dense = next(s for s in figure.series if s.role == "published_dense")
    assert dense.points[-1].y == pytest.approx(2 * 0.6129)
    assert "scaled from $2" in figure.answer


def test_published_curves_are_left_out_where_nothing_compares() -> None:
    run = h100_run()
    run.records = [
        replace(r, case=replace(r.case, num_heads=8, preset="v3.2-cpu")) for r in run.records
    ]
    figure = by_name(run)["cost-prefill"]
    assert not [s for s in figure.series if s.role.startswith("published")]
    assert "DeepSeek" not in figure.answer


def test_published_data_name_their_source() -> None:
    data = json.loads(published.COSTS.read_text(encoding="utf-8"))
    assert "DeepSeek-V3.2-Exp" in data["source"] and "figure 3" in data["source"]
    for curve in data["curves"]:
        xs = [x for x, _ in curve["points"]]
        assert xs == sorted(xs) and xs[0] == 0 and xs[-1] == 131072


def test_interpolation_of_published_vertices() -> None:
    vertices = [(0.0, 1.0), (10.0, 2.0), (20.0, 6.0)]
    values = [published.interpolate(vertices, x) for x in (0.0, 5.0, 10.0, 15.0, 20.0, 30.0)]
    assert values == [1.0, 1.5, 2.0, 4.0, 6.0, 6.0]


def test_no_figure_has_too_many_lines() -> None:
    for figure in by_name(h100_run()).values():
        own = [s for s in figure.series if not s.role.startswith("published")]
        assert len(own) <= lines.MAX_LINES


def test_two_runs_get_figures_of_their_own() -> None:
    other = h100_run(2)
    other.header = other.header | {"machine": {"name": "NVIDIA H200", "device": "cuda"}}
    made = figures(digest([h100_run(), other]))
    names = [figure.name for figure in made]
    assert len(set(names)) == len(names) == 32
    assert names[:2] == [
        "speedup-prefill-nvidia-h100-80gb-hbm3",
        "speedup-decode-nvidia-h100-80gb-hbm3",
    ]
    memory = next(f for f in made if f.name.startswith("memory-prefill-nvidia-h200"))
    assert len(memory.series[0].points) == len(LENGTHS)


def test_single_operators_have_a_figure() -> None:
    run = h100_run()
    run.records = [
        replace(r, case=replace(r.case, op="topk", impl="gluon"))
        for r in run.records
        if r.case.op == "dsa" and r.case.phase == "prefill"
    ]
    figure = by_name(run)["operators-prefill"]
    assert figure.series[0].label == "topk k=512 fp8"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.52, 0.48], [0.55, 0.45]),
        ([0.5, 0.5, 0.5], [0.4, 0.5, 0.6]),
        # the spread pair runs into the third, so the three share the room
        ([0.5, 0.5, 0.6], [0.5333 - 0.1, 0.5333, 0.5333 + 0.1]),
    ],
)
def test_labels_keep_apart(wanted: list[float], expected: list[float]) -> None:
    heights = chart.label_heights(wanted, 0.1)
    assert sorted(heights) == pytest.approx(sorted(expected), abs=1e-3)
    # the order of the labels is the order of the lines
    ranks = sorted(range(len(wanted)), key=lambda i: wanted[i])
    assert ranks == sorted(range(len(wanted)), key=lambda i: heights[i])


def test_a_line_that_ends_early_says_where() -> None:
    def line(label: str, *lengths: int) -> Series:
        points = tuple(Point(x=length, y=1.0, text="") for length in lengths)
        return Series(label=label, role="dense0", points=points)

    length = Axis(title="L", text=units.format_length, base=2)
    figure = Figure(
        name="a", title="", question="", answer="", x=length, y=Axis(title="", text=str),
        series=(line("long", 8192, 32768, 131072), line("short", 8192, 32768)),
    )  # fmt: skip
    assert [chart.end_label(figure, s) for s in figure.series] == ["long", "short, to 32K"]
    alone = replace(figure, series=(line("one length", 8192),))
    assert chart.end_label(alone, alone.series[0]) == "one length"
    assert '"short, to 32K"' in json.dumps(vega.spec(figure))


@pytest.mark.parametrize(
    ("axis", "low", "high", "expected"),
    [
        (Axis(title="", text=str, base=2), 3000, 20000, [4096, 8192, 16384]),
        (Axis(title="", text=str), 0.8e-3, 12e-3, [1e-3, 2e-3, 5e-3, 1e-2]),
        (Axis(title="", text=str, log=False), 0.0, 0.65, [0.0, 0.2, 0.4, 0.6]),
        (
            Axis(title="", text=str, base=2, log=False),
            0.0,
            40.0,
            [0.0, 8.0, 16.0, 24.0, 32.0, 40.0],
        ),
    ],
)
def test_ticks_are_round(axis: Axis, low: float, high: float, expected: list[float]) -> None:
    assert chart.ticks(axis, low, high) == expected


def test_every_role_has_a_colour_and_marker_of_its_own() -> None:
    for name in ("speedup-prefill", "speedup-decode", "latency-prefill"):
        series = by_name(h100_run())[name].series
        looks = {(chart.color(s.role), chart.marker(s)) for s in series}
        assert len(looks) == len(series)
        assert len({chart.color(s.role, dark=True) for s in series}) == len(series)


def test_specification_is_json_with_known_roles_only() -> None:
    for figure in by_name(h100_run()).values():
        text = json.dumps(vega.spec(figure), allow_nan=False)
        roles = {part.split('"')[0] for part in text.split('"@')[1:]}
        assert roles <= set(chart.PALETTE), figure.name


def test_one_point_alone_is_drawn(tmp_path: Path) -> None:
    axis = Axis(title="L", text=str, base=2)
    series = Series(label="x", role="sparse0", points=(Point(x=4096, y=1.0, text="1"),))
    figure = Figure(
        name="one",
        title="t",
        question="q",
        answer="a",
        x=axis,
        y=replace(axis, base=10),
        series=(series,),
    )
    low, high = chart.x_domain(figure)
    assert low < 4096 < high
    assert plots.write_figure(figure, tmp_path).stat().st_size > 1000


def test_pictures_are_written_and_repeatable(tmp_path: Path) -> None:
    figure = by_name(h100_run())["stages-prefill"]
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        path = plots.write_figure(figure, folder)
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    svg = (first / "stages-prefill.svg").read_text(encoding="utf-8")
    assert "Where the time goes" in svg and "sparse_prefill" in svg
    assert svg == (second / "stages-prefill.svg").read_text(encoding="utf-8")


def test_hostile_names_can_be_drawn(tmp_path: Path) -> None:
    made = figures(digest([hostile_run()]))
    assert {f.name for f in made} >= {"speedup-prefill", "latency-prefill", "stages-prefill"}
    for figure in made:
        assert all(c.isascii() and (c.isalnum() or c == "-") for c in figure.name)
    path = plots.write_figure(made[0], tmp_path)
    assert "<script" not in path.with_suffix(".svg").read_text(encoding="utf-8")


def test_of_many_crossings_only_the_headlines_is_marked() -> None:
    def case(op: str, impl: str, seq_len_kv: int, seconds: float, **more: object) -> Record:
        point = {"op": op, "impl": impl, "phase": "decode", "seq_len_kv": seq_len_kv}
        return ok(Case.from_json(point | {"seq_len_q": 1} | more), seconds)

    records = [case("dense_attention", "fa", n * 1024, n * 1e-5) for n in (4, 128)]
    for topk in (512, 1024, 2048):
        for precision in ("bf16", "fp8"):
            for n in (4, 128):
                seconds = (5 + topk / 1024 + (precision == "bf16")) * 1e-5
                records.append(case("dsa", "x", n * 1024, seconds, topk=topk, precision=precision))
    run = FakeRun(path=Path("results/many"), header=HEADER, records=records)
    (figure,) = [f for name, f in by_name(run).items() if name.startswith("speedup")]
    crossings = [m for m in figure.marks if m.kind == "crossing"]
    # 7e-5 s is dense at 7K
    assert [m.label for m in crossings] == ["7K"]
    assert figure.answer.count("faster from") == 6
    # what is told beside the headline is marked too
    beside = [case("dsa_fp8", "x", n * 1024, 6e-5, topk=2048, precision="fp8") for n in (4, 128)]
    run.records = [*records, *beside]
    (figure,) = [f for name, f in by_name(run).items() if name.startswith("speedup")]
    crossings = [m for m in figure.marks if m.kind == "crossing"]
    assert sorted(m.label for m in crossings) == ["6K", "7K"]
