"""Top-k: every implementation, emulated and on a GPU."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from dsa_bench.kernels import candidate_list, page_slots, row_topk, topk_gluon
from dsa_bench.kernels.hostile_rows import wild_pages
from dsa_bench.kernels.paging import Pages
from dsa_bench.kernels.topk import OPERATOR, TopkInputs, TopkOutputs
from dsa_bench.operator import Machine
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile
from tests.gluon_emulator import emulated_gluon
from tests.topk_rows import KINDS, assert_stable, full

INF, NAN = float("inf"), float("nan")
A100 = Machine(device="cuda", name="A100", capability=(8, 0), num_sms=108)
CPU = Machine(device="cpu", name="a CPU")


MISTAKES = [
    ("index_logits", lambda x: x.half(), TypeError, "index_logits must be float32 or bfloat16"),
    ("index_logits", lambda x: x[0], ValueError, "index_logits must be float32 or bfloat16 .num"),
    ("index_logits", lambda x: x[:, ::2], ValueError, "index_logits must be contiguous in its la"),
    ("kv_start", lambda x: x.long(), TypeError, "kv_start must be int32"),
    ("kv_end", lambda x: x[:2], ValueError, "kv_end must be int32 .num_rows=3"),
    ("topk", lambda x: 0, ValueError, "topk must be 1 … 4096, got 0"),
    ("topk", lambda x: 4097, ValueError, "topk must be 1 … 4096, got 4097"),
]


@pytest.mark.parametrize(
    ("name", "change", "kind", "sentence"), MISTAKES, ids=hostile.slugs(MISTAKES)
)
def test_gluon_refuses(name, change, kind, sentence):
    inputs = OPERATOR.make_inputs(full(3, 40, 4), seed=0, device="cpu")
    with pytest.raises(kind, match=sentence):
        topk_gluon.run(replace(inputs, **{name: change(getattr(inputs, name))}))


def pages_for(num_rows, page_size=16):
    return Pages(torch.arange(num_rows * 3, dtype=torch.int32).view(num_rows, 3), page_size)


WRONG_PAGES = [
    ({"pages": pages_for(3)}, ValueError, "give both pages and slots, or neither"),
    ({"slots": torch.empty(6, 4).int()}, ValueError, "give both pages and slots, or neither"),
    (
        {"pages": Pages(torch.zeros(3, 2), 16), "slots": torch.empty(6, 4).int()},
        TypeError, "block_table must be int32 .batch_size, max_pages.",
    ),
    (
        {"pages": Pages(torch.zeros(3).int(), 16), "slots": torch.empty(6, 4).int()},
        ValueError, "block_table must be int32 .batch_size, max_pages., got",
    ),
    (
        {"pages": pages_for(4), "slots": torch.empty(6, 4).int()},
        ValueError, "num_rows must be a multiple of the 4 sequences of block_table, got 6",
    ),
    (
        {"pages": pages_for(0), "slots": torch.empty(6, 4).int()},
        ValueError, "num_rows must be a multiple of the 0 sequences of block_table, got 6",
    ),
    (
        {"pages": pages_for(3, page_size=0), "slots": torch.empty(6, 4).int()},
        ValueError, "page_size must be 1 or more, got 0",
    ),
    (
        {"pages": pages_for(3), "slots": torch.empty(6, 4)},
        TypeError, "slots must be int32 .num_rows=6, topk=4., got float32",
    ),
    (
        {"pages": pages_for(3), "slots": torch.empty(5, 4).int()},
        ValueError, "slots must be int32 .num_rows=6, topk=4., got int32 .5, 4",
    ),
    (
        {"pages": pages_for(3), "slots": torch.empty(6, 9).int()[:, :4]},
        ValueError, "slots must be contiguous, got strides .9, 1",
    ),
    (
        {"pages": pages_for(3), "slots": torch.empty(6, 4, device="meta").int()},
        ValueError, "all tensors must be on one device, got .* slots on meta",
    ),
    (
        {"pages": Pages(pages_for(3).block_table.to("meta"), 16), "slots": torch.empty(6, 4).int()},
        ValueError, "all tensors must be on one device, got slots on cpu, block_table on meta",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "kind", "sentence"), WRONG_PAGES, ids=hostile.slugs(WRONG_PAGES)
)
def test_pages_that_do_not_fit_are_refused(options, kind, sentence):
    inputs = OPERATOR.make_inputs(full(6, 40, 4), seed=0, device="cpu")
    with pytest.raises(kind, match=sentence):
        row_topk.topk(inputs.index_logits, inputs.kv_start, inputs.kv_end, 4, **options)


def test_no_rows_have_no_slots():
    inputs = OPERATOR.make_inputs(full(1, 40, 4), seed=0, device="cpu")
    tensors = inputs.index_logits[:0], inputs.kv_start[:0], inputs.kv_end[:0]
    for batch_size in (0, 3):
        outputs = topk_gluon.run(TopkInputs(*tensors, 4, pages=pages_for(batch_size)))
        assert outputs.topk_indices.shape == outputs.topk_slots.shape == (0, 4)


def test_gluon_supports_says_why_not():
    assert topk_gluon.supports(full(1, 4096, 2048), A100) is None
    assert "sm_80 or newer, this is a CPU" in topk_gluon.supports(full(1, 4096, 2048), CPU)
    reason = topk_gluon.supports(full(1, 8192, 4097), A100)
    assert reason == "gluon topk takes topk up to 4096, this case has 4097"


def emulate(inputs, seed, **options):
    """By the kernels' own choice, or with some fields of it changed."""
    with emulated_gluon(seed=seed) as emulated, hostile.poisoned_outputs():
        kernels = emulated.load("dsa_bench.kernels.row_topk")
        choose = kernels.choose_config
        with patch.object(kernels, "choose_config", lambda *x: replace(choose(*x), **options)):
            return emulated.load("dsa_bench.kernels.topk_gluon").run(inputs)


NOT_HELD = {"is_held": False}
WAYS = {
    "one": {"parts": 1, "num_warps": 8, "elements": 8, **NOT_HELD},
    "one-sorted": {"parts": 1, "num_warps": 4, "elements": 16, **NOT_HELD},
    "parts": {"parts": 4, "num_warps": 4, "elements": 8, "select_warps": 4, **NOT_HELD},
    "parts-sorted": {"parts": 2, "num_warps": 8, "elements": 8, "select_warps": 8, **NOT_HELD},
    "held-one": {"parts": 1, "num_warps": 8, "elements": 8, "is_held": True},
}
SHORT_WAYS = ["one", "parts", "held-one"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_gluon_emulated(kind, way):
    """A program for each row, and several: with a threshold, and digit by digit without one."""
    mutate = hostile.MUTATIONS["topk"].get(kind, hostile.plain)
    seed, cols, topk = (0, 9000, 512) if "one" in way else (1, 9997, 2048)
    inputs = mutate(OPERATOR.make_inputs(full(6, cols, topk), seed=seed, device="cpu"))
    inputs = replace(inputs, sorted_indices=inputs.sorted_indices or "sorted" in way)
    assert_stable(inputs, emulate(inputs, seed, **WAYS[way]))


@pytest.mark.parametrize("kind", KINDS)
def test_gluon_emulated_rows_that_a_list_holds_whole(kind):
    """Whatever their values: they are listed without a threshold."""
    mutate = hostile.MUTATIONS["topk"].get(kind, hostile.plain)
    inputs = mutate(OPERATOR.make_inputs(full(3, 4901, 700), seed=3, device="cpu"))
    assert_stable(inputs, emulate(inputs, 2))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("kind", "page_size"), [("ties", 1), ("special", 17), ("constant", 64), ("plateau", 10**6)]
)
def test_gluon_emulated_writes_slots(kind, page_size, way):
    """Of rows by the list, digit by digit, and shorter than topk; three queries a sequence."""
    inputs = hostile.topk_rows(kind)(OPERATOR.make_inputs(full(6, 9000, 512), seed=2, device="cpu"))
    pages = wild_pages(inputs.kv_end, 9000, page_size=page_size)
    assert pages.seq_len_q(6) == 3
    inputs = replace(inputs, pages=pages, sorted_indices="sorted" in way)
    outputs = emulate(inputs, page_size, **WAYS[way])
    assert_stable(inputs, outputs)
    is_empty = (outputs.topk_indices < 0).all(1)
    assert is_empty.any() and (outputs.topk_slots[is_empty] == -1).all()
    without = emulate(replace(inputs, pages=None), page_size, **WAYS[way]).topk_indices
    assert torch.equal(without.sort(1).values, outputs.topk_indices.sort(1).values)


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_gluon_emulated_slots_of_one_query_a_sequence(num_rows):
    """Each row by its own row of the table; positions behind its last page have none."""
    inputs = OPERATOR.make_inputs(full(num_rows, 700, 300), seed=1, device="cpu")
    inputs = replace(inputs, pages=pages_for(num_rows, page_size=64))
    outputs = emulate(inputs, 3)
    assert_stable(inputs, outputs)
    assert 0 < (outputs.topk_slots == -1).sum(1).min() < 300


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["plain", "far", "one-cluster", "plateau"])
def test_gluon_emulated_reads_usual_rows_once(kind, way, monkeypatch):
    """A threshold divides them: none is done digit by digit, but for rows of one value."""
    seed, options = 11, WAYS[way]
    inputs = OPERATOR.make_inputs(full(3, 9000, 512), seed=seed, device="cpu")
    # of the plateaus, the one that begins below the 512 largest
    logits = hostile.TOPK_ROWS.get(kind, hostile.plain)(inputs.index_logits)[1:2]
    inputs = replace(inputs, kv_start=inputs.kv_start[1:2], kv_end=inputs.kv_end[1:2])

    def refuse(*args):
        raise RuntimeError("digit by digit")

    with emulated_gluon(seed=seed) as emulated:
        monkeypatch.setattr(emulated.load("dsa_bench.kernels.row_scan"), "divide_row", refuse)
        kernels = emulated.load("dsa_bench.kernels.row_topk")
        config = replace(kernels.choose_config(1, 9000, 512, 132), **options)
        ranges = (inputs.kv_start, inputs.kv_end, 512)
        out = kernels.topk(logits, *ranges, config=config)
        with pytest.raises(RuntimeError, match="digit by digit"):
            kernels.topk(torch.ones_like(logits), *ranges, config=config)
    assert_stable(replace(inputs, index_logits=logits), TopkOutputs(out))


@pytest.mark.parametrize("seed", [3, 13])
def test_gluon_emulated_reads_a_million_columns_once(seed, monkeypatch):
    """Of 14 seeds these are the two whose rows were done digit by digit, with a sample of 4096."""

    def refuse(*args):
        raise RuntimeError("digit by digit")

    inputs = OPERATOR.make_inputs(full(1, 2**20, 2048), seed=seed, device="cpu")
    with emulated_gluon(seed=seed) as emulated:
        monkeypatch.setattr(emulated.load("dsa_bench.kernels.row_scan"), "divide_row", refuse)
        outputs = emulated.load("dsa_bench.kernels.topk_gluon").run(inputs)
    assert_stable(inputs, outputs)


@pytest.mark.parametrize("way", SHORT_WAYS)
@pytest.mark.parametrize("listed", [0, 511, 512, 4032, 4033, 9000])
def test_gluon_emulated_with_a_threshold_that_lists_so_many(listed, way, monkeypatch):
    """A list that is too short, just full, or too long; the row is right all the same."""
    inputs = OPERATOR.make_inputs(full(1, 9000, 512), seed=12, device="cpu")
    values = inputs.index_logits[0].sort(descending=True).values
    with emulated_gluon(seed=12) as emulated:
        depth = emulated.load("dsa_bench.kernels.row_scan").depth_of(values)
        kernels = emulated.load("dsa_bench.kernels.row_topk")
        threshold = depth[listed - 1] if listed else depth[0] - 1
        chosen = threshold, torch.tensor(1, dtype=torch.int32)
        for name in ("row_topk", "row_scan", "held_row"):
            module = emulated.load(f"dsa_bench.kernels.{name}")
            monkeypatch.setattr(module, "choose_threshold", lambda *_: chosen)
        config = replace(kernels.choose_config(1, 9000, 512, 132), **WAYS[way])
        out = kernels.topk(
            inputs.index_logits, inputs.kv_start, inputs.kv_end, 512, config=config
        )  # fmt: skip
    assert_stable(inputs, TopkOutputs(out))


@pytest.mark.parametrize("topk", [1, 3, 257, 3000, 4096])
@pytest.mark.parametrize("cols", [4300, 8300])
def test_gluon_emulated_for_any_topk(topk, cols):
    inputs = OPERATOR.make_inputs(full(2, cols, topk), seed=topk, device="cpu")
    assert_stable(inputs, emulate(inputs, topk))


@pytest.mark.parametrize("way", SHORT_WAYS)
def test_gluon_emulated_looks_at_nothing_outside_the_range(way):
    inputs = OPERATOR.make_inputs(full(8, 6001, 300), seed=4, device="cpu")
    start = torch.tensor([1, 2, 3, 5, 6, 7, 1001, 999], dtype=torch.int32)
    end = start + torch.tensor([4990, 4032, 4033, 4096, 4097, 301, 300, 299], dtype=torch.int32)
    columns = torch.arange(6001)
    outside = (columns < start[:, None]) | (columns >= end[:, None])
    for filler in (NAN, INF):
        logits = inputs.index_logits.masked_fill(outside, filler)
        spoiled = replace(inputs, index_logits=logits, kv_start=start, kv_end=end)
        assert_stable(spoiled, emulate(spoiled, 5, **WAYS[way]))


@pytest.mark.parametrize("way", SHORT_WAYS)
def test_gluon_emulated_clamps_the_range(way):
    inputs = OPERATOR.make_inputs(full(5, 700, 300), seed=6, device="cpu")
    start = torch.tensor([-5, -(2**31), 650, 7, 2**31 - 1], dtype=torch.int32)
    end = torch.tensor([701, 2**31 - 1, 9999, -(2**31), -(2**31)], dtype=torch.int32)
    wild = replace(inputs, kv_start=start, kv_end=end)
    assert_stable(wild, emulate(wild, 7, **WAYS[way]))


def test_gluon_emulated_sorts_rows_longer_than_one_bitmap():
    inputs = OPERATOR.make_inputs(full(1, 300000, 700), seed=8, device="cpu")
    inputs = replace(inputs, sorted_indices=True, kv_start=inputs.kv_start + 5)
    assert_stable(inputs, emulate(inputs, 8, parts=1))


@pytest.mark.parametrize("topk", [512, 1024, 2048, 2560, 2561, 4096])
@pytest.mark.parametrize("length", [16384, 32768, 40000, 131072, 2**18, 2**19, 2**20])
def test_few_rows_of_random_logits_miss_their_threshold(length, topk):
    """The rank in a sample at which the list comes out too short is as far from the one that is
    taken as that at which it overflows, and no nearer than 3 sigmas; with topk 2048 and 32768
    columns 4.2, one row in 10^5. At 3.2 one call of 128 rows in seven was slow. Of longer rows than
    2^18 so many more are wanted, with topk above 2560, that one in 50 misses."""
    shares = [row_topk.choose_sample(length, topk) / length]
    config = row_topk.choose_config(128, length, topk, 132)
    if config.is_held:
        shares.append(1 / row_topk._held_vectors(config, length, 4))
    for share in shares:
        expected, most = topk * share, (candidate_list.list_words(topk, length) - 64) * share
        rank = min(expected + 4.25 * expected**0.5 + 1, (expected * most) ** 0.5)
        sigmas = (rank - expected) / expected**0.5, (most - rank) / most**0.5
        least = 2.2 if length > 2**18 and topk > 2560 else 3.0
        assert min(sigmas) > (4.2 if (length, topk) == (32768, 2048) else least)


@pytest.mark.parametrize("length", [1, 5000, 8192, 16384, 32768, 131072, 2**20])
def test_gluon_config_fits_the_case(length):
    for num_rows in (1, 32, 128, 4096):
        for topk in (1, 512, 2048, 4096):
            config = row_topk.choose_config(num_rows, length, topk, 132)
            assert topk + 64 < config.words
            assert config.parts <= candidate_list.MAX_PARTS
            if config.is_held:
                # all at once, in at most 64 registers a thread
                assert num_rows <= 2 * 132 and length <= config.num_warps * 32 * 64
            if config.parts > 1:
                # of at least 2048 columns, and no more than fill the machine
                assert length >= 2048 * config.parts and num_rows * config.parts < 4 * 132


SHAPES = [
    full(16, 8192, 2048), full(16, 20000, 512), full(16, 131072, 2048), full(16, 4100, 2048),
    full(9, 300000, 1024), full(64, 5000, 1), full(7, 4999, 257), full(33, 2048, 2048),
    full(5, 65537, 4096), full(5, 9000, 300), full(300, 40000, 2048), full(2, 2**20, 2048),
    full(130, 32767, 2048), full(130, 8191, 4096), full(130, 16001, 1024), full(300, 4999, 2048),
    full(140, 7001, 2048), full(600, 8192, 2048),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "shape", "mutate"), hostile.cases("topk", SHAPES))
def test_topk_matches_reference(name, shape, mutate):
    hostile.assert_implementation("topk", name, shape, mutate)


@pytest.mark.gpu
@pytest.mark.parametrize("name", hostile.names("topk"))
def test_topk_selects_the_same_twice(name):
    inputs = OPERATOR.make_inputs(SHAPES[2], seed=2, device="cuda")
    run = hostile.runnable("topk", name, SHAPES[2]).run
    first, second = (run(inputs).topk_indices.sort(1).values for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=hostile.label)
def test_gluon_takes_the_lowest_columns(shape, kind):
    implementation = hostile.runnable("topk", "gluon", shape)
    inputs = OPERATOR.make_inputs(shape, seed=1, device="cuda")
    inputs = hostile.MUTATIONS["topk"].get(kind, hostile.plain)(inputs)
    expected = OPERATOR.reference(replace(inputs, sorted_indices=True)).topk_indices
    actual = implementation.run(replace(inputs, sorted_indices=True)).topk_indices
    assert torch.equal(actual, expected)
    unsorted = implementation.run(replace(inputs, sorted_indices=False)).topk_indices
    assert torch.equal(unsorted.sort(1).values, expected.sort(1).values)


@pytest.mark.gpu
@pytest.mark.parametrize("is_sorted", [False, True], ids=["unsorted", "sorted"])
@pytest.mark.parametrize("page_size", [1, 17, 64, 2**20])
@pytest.mark.parametrize("kind", ["ties", "constant", "special"])
@pytest.mark.parametrize(
    "shape",
    [full(1, 131072, 2048), full(18, 20000, 512), full(300, 40000, 2048), full(18, 4100, 2048)],
    ids=hostile.label,
)
def test_gluon_writes_the_slots_of_its_columns(shape, kind, page_size, is_sorted):
    """With one page a sequence too, and one sequence of one query."""
    implementation = hostile.runnable("topk", "gluon", shape)
    inputs = hostile.topk_rows(kind)(OPERATOR.make_inputs(shape, seed=1, device="cuda"))
    pages = wild_pages(inputs.kv_end, shape.num_cols, page_size=page_size)
    inputs = replace(inputs, pages=pages, sorted_indices=is_sorted)
    with hostile.poisoned_outputs():
        indices, slots = implementation.run(inputs)
    hostile.assert_right("topk", inputs, TopkOutputs(indices, slots))
    batched = indices.view(pages.block_table.shape[0], -1, shape.topk)
    expected = page_slots.reference(
        page_slots.PageSlotsInputs(batched, pages.block_table, page_size)
    ).topk_slots
    assert torch.equal(slots, expected.view_as(slots))
    without = implementation.run(replace(inputs, pages=None))
    assert without.topk_slots is None
    assert torch.equal(without.topk_indices.sort(1).values, indices.sort(1).values)


@pytest.mark.gpu
@pytest.mark.parametrize("name", hostile.names("topk"))
def test_topk_of_a_causal_chunk(name):
    case = Case(op="topk", impl=name, phase="prefill", seq_len_kv=8192, seq_len_q=4096, topk=2048)
    shape = OPERATOR.shape(case, PRESETS["v3.2"])
    hostile.assert_implementation("topk", name, shape, hostile.plain)


# torch's own copies of so large a tensor leave no room for tests that run beside this one
@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in hostile.names("topk") if name != "torch"])
def test_topk_reads_logits_beyond_2_31_elements(name):
    shape = full(2**31 // 131072 + 20, 131072, 2048)
    implementation = hostile.runnable("topk", name, shape)
    logits = torch.zeros(shape.num_rows, shape.num_cols, device="cuda")
    logits[-20:].normal_(generator=torch.Generator(device="cuda").manual_seed(0))
    end = torch.full((shape.num_rows,), shape.num_cols, dtype=torch.int32, device="cuda")
    end[:-20] = 0
    inputs = TopkInputs(logits, torch.zeros_like(end), end, shape.topk)
    rows = torch.arange(shape.num_rows - 30, shape.num_rows, device="cuda")
    hostile.assert_right("topk", inputs, implementation.run(inputs), rows)
