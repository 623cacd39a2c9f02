"""Paged lightning indexer: the reference, its check, and every implementation of it."""

from dataclasses import fields, replace

import pytest
import torch

from dsa_bench import registry
from dsa_bench.kernels import paged_indexer_triton
from dsa_bench.kernels.indexer import IndexerInputs
from dsa_bench.kernels.indexer import reference as indexer_reference
from dsa_bench.kernels.paged_indexer import OPERATOR, PagedIndexerOutputs, PagedIndexerShape
from dsa_bench.kernels.paging import unpack_index_pages
from dsa_bench.operator import Machine
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile

INF, NAN = float("inf"), float("nan")
H100 = Machine(device="cuda", name="H100", capability=(9, 0), num_sms=132)
A100 = Machine(device="cuda", name="A100", capability=(8, 0), num_sms=108)
CPU = Machine(device="cpu", name="a CPU")
PRECISIONS = ("fp8", "bf16")


def shape_of(batch_size, seq_len_kv, seq_len_q=1, precision="fp8", index_heads=64, page_size=64):
    return PagedIndexerShape(
        batch_size=batch_size, seq_len_kv=seq_len_kv, seq_len_q=seq_len_q, precision=precision,
        index_heads=index_heads, page_size=page_size,
    )  # fmt: skip


def small(precision="fp8", seed=0):
    shape = shape_of(3, 40, 2, precision, index_heads=4, page_size=17)
    return OPERATOR.make_inputs(shape, seed=seed, device="cpu")


@pytest.mark.parametrize("mutate", [hostile.plain, hostile.paged_indexer_ragged])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_reference_is_the_indexer_over_gathered_keys(precision, mutate):
    inputs = mutate(small(precision))
    values, scales = unpack_index_pages(inputs.index_cache, 17)
    actual = OPERATOR.reference(inputs).index_logits
    assert actual.shape == (3, 2, 51)
    for b in range(3):
        longest = int(inputs.seq_lens[b].max())
        where = [(int(inputs.block_table[b, s // 17]), s % 17) for s in range(longest)]
        keys = torch.stack([values[p, o] for p, o in where]) if where else torch.zeros(0, 128)
        scale = torch.tensor([float(scales[p, o]) for p, o in where])
        gathered = IndexerInputs(
            inputs.index_q[b], keys, scale, inputs.index_weights[b],
            torch.zeros(2, dtype=torch.int32), inputs.seq_lens[b],
        )  # fmt: skip
        expected = indexer_reference(gathered).index_logits
        torch.testing.assert_close(actual[b, :, :longest], expected, rtol=1e-5, atol=1e-6)
        assert (actual[b, :, longest:] == -INF).all()


def test_each_new_token_sees_itself_and_no_later_one():
    inputs = small()
    assert inputs.seq_lens.tolist() == [[39, 40]] * 3
    assert OPERATOR.reference(inputs).index_logits.isfinite().sum(-1).tolist() == [[39, 40]] * 3


def test_a_length_of_zero_gives_minus_infinity_alone():
    inputs = small()
    lens = torch.tensor([[0, 0], [0, 3], [1, 0]], dtype=torch.int32)
    logits = OPERATOR.reference(replace(inputs, seq_lens=lens)).index_logits
    assert logits.isfinite().sum(-1).tolist() == lens.tolist()


def test_pages_may_lie_anywhere():
    inputs = small()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    cache = torch.empty_like(inputs.index_cache)
    cache[order] = inputs.index_cache
    table = order[inputs.block_table.long()].to(torch.int32)
    moved = OPERATOR.reference(replace(inputs, index_cache=cache, block_table=table))
    assert torch.equal(moved.index_logits, OPERATOR.reference(inputs).index_logits)


def test_reference_of_some_sequences():
    inputs = hostile.paged_indexer_ragged(small())
    rows = torch.tensor([2, 0])
    some = OPERATOR.reference(inputs, rows=rows).index_logits
    assert torch.allclose(some, OPERATOR.reference(inputs).index_logits[rows])


def _shorter(inputs, right):
    return OPERATOR.reference(replace(inputs, seq_lens=inputs.seq_lens - 1)).index_logits


def _pages_in_order(inputs, right):
    table = inputs.block_table.sort(1).values.flip(1)
    return OPERATOR.reference(replace(inputs, block_table=table)).index_logits


def _interleaved(inputs, right):
    """Reads a page as if each token's scale came behind its values."""
    cache = inputs.index_cache.view(-1, 17, 132)
    values, scales = cache[..., :128].flatten(1), cache[..., 128:].flatten(1)
    wrong = replace(inputs, index_cache=torch.cat([values, scales], 1))
    return OPERATOR.reference(wrong).index_logits.nan_to_num(1.0)


def _one_wrong(value):
    def change(inputs, right):
        right[2, 1, 39] += value
        return right

    return change


WRONG = {
    "zeros": lambda inputs, right: torch.zeros_like(right),
    "stale": lambda inputs, right: OPERATOR.reference(small(seed=9)).index_logits,
    "last-key-missing": _shorter,
    "columns-shifted": lambda inputs, right: right.roll(1, 2),
    "queries-swapped": lambda inputs, right: right.flip(1),
    "sequences-swapped": lambda inputs, right: right.flip(0),
    "pages-in-order": _pages_in_order,
    "interleaved-scales": _interleaved,
    "one-wrong": _one_wrong(0.2),
    "one-nan": _one_wrong(NAN),
}


@pytest.mark.parametrize("name", WRONG)
def test_check_fails(name):
    inputs = small()
    right = OPERATOR.reference(inputs).index_logits
    assert hostile.passes(OPERATOR.check(inputs, PagedIndexerOutputs(right)))
    wrong = WRONG[name](inputs, right.clone())
    assert not hostile.passes(OPERATOR.check(inputs, PagedIndexerOutputs(wrong)))


def test_the_budget_sees_a_query_that_the_tolerance_lets_through():
    shape = PagedIndexerShape(batch_size=8, seq_len_kv=200, seq_len_q=2)
    inputs = OPERATOR.make_inputs(shape, seed=4, device="cpu")
    right = OPERATOR.reference(inputs).index_logits
    assert hostile.passes(OPERATOR.check(inputs, PagedIndexerOutputs(right)))
    right[3, 1] *= 1.0075
    fixed, budget = OPERATOR.check(inputs, PagedIndexerOutputs(right))
    assert fixed.passed
    assert not budget.passed
    some = OPERATOR.check(inputs, PagedIndexerOutputs(right), rows=torch.tensor([0, 5]))
    assert hostile.passes(some)


def test_check_ignores_columns_behind_the_length():
    inputs = hostile.paged_indexer_ragged(small())
    right = OPERATOR.reference(inputs).index_logits
    garbage = torch.where(right == -INF, torch.tensor([NAN, 7.0, INF]).repeat(17), right)
    assert hostile.passes(OPERATOR.check(inputs, PagedIndexerOutputs(garbage)))
    garbage[1:] = 5
    rows = torch.tensor([0])
    assert hostile.passes(OPERATOR.check(inputs, PagedIndexerOutputs(garbage), rows=rows))


@pytest.mark.parametrize(("precision", "element", "row"), [("fp8", 1, 132), ("bf16", 2, 256)])
def test_cost_counted_by_hand(precision, element, row):
    # two sequences of 5 keys, 2 new tokens each: they see 4 and 5
    shape = shape_of(2, 5, 2, precision, index_heads=8)
    cost = OPERATOR.cost(shape)
    assert shape.pairs == 18
    assert cost.flops == 2 * 8 * 128 * 18
    assert cost.bytes_read == 2 * 2 * 8 * (128 * element + 4) + 2 * 5 * row
    assert cost.bytes_written == 4 * 18


def test_flops_and_key_bytes_of_v32():
    cost = OPERATOR.cost(shape_of(1, 32768))
    assert cost.flops == 16_384 * 32768
    assert cost.bytes_read - 64 * 132 == pytest.approx(4.325e6, rel=1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_memory_is_what_the_tensors_take(precision):
    shape = shape_of(2, 70, 2, precision, index_heads=8)
    inputs = OPERATOR.make_inputs(shape, seed=0, device="cpu")
    memory = OPERATOR.memory(shape)
    tensors = [getattr(inputs, f.name) for f in fields(inputs)]
    assert memory.input_bytes == sum(x.nbytes for x in tensors if torch.is_tensor(x))
    assert memory.output_bytes == OPERATOR.reference(inputs).index_logits.nbytes


def test_shape_of_a_case():
    case = Case(
        op="paged_indexer", impl="reference", phase="decode", seq_len_kv=100, seq_len_q=2,
        batch_size=3, precision="bf16",
    )  # fmt: skip
    shape = OPERATOR.shape(case, PRESETS["v3.2"])
    assert shape == shape_of(3, 100, 2, "bf16")
    assert shape.max_pages == 2


MISTAKES = [
    ("index_q", lambda x: x.float(), TypeError, "index_q must be float8_e4m3fn or bfloat16"),
    ("index_q", lambda x: x[..., :64], ValueError, "index_q must be .*index_dim=128"),
    ("index_cache", lambda x: x.bfloat16(), TypeError, "index_cache must be uint8 .num_pages"),
    ("index_cache", lambda x: x[:, :-4], ValueError, "index_cache must be uint8 .num_pages, page="),
    ("index_weights", lambda x: x.half(), TypeError, "index_weights must be float32 .batch_size=3"),
    ("index_weights", lambda x: x.mT.contiguous().mT, ValueError, "index_weights must be contiguo"),
    ("seq_lens", lambda x: x.long(), TypeError, "seq_lens must be int32 .batch_size=3"),
    ("seq_lens", lambda x: x[:, :1], ValueError, "seq_lens must be int32 .*seq_len_q=2"),
    ("block_table", lambda x: x[:2], ValueError, "block_table must be int32 .batch_size=3"),
    ("block_table", lambda x: x.repeat(1, 2)[:, :3], ValueError, "block_table must be contiguous"),
    ("page_size", lambda x: x, ValueError, "page_size must be a power of two of 16"),
]


@pytest.mark.parametrize(
    ("name", "change", "kind", "sentence"), MISTAKES, ids=hostile.slugs(MISTAKES)
)
def test_triton_refuses(name, change, kind, sentence):
    inputs = small()
    with pytest.raises(kind, match=sentence):
        paged_indexer_triton.run(replace(inputs, **{name: change(getattr(inputs, name))}))


@pytest.mark.parametrize("heads", [4, 12])
def test_triton_refuses_odd_head_counts(heads):
    shape = shape_of(1, 40, index_heads=heads, page_size=16)
    inputs = OPERATOR.make_inputs(shape, seed=0, device="cpu")
    with pytest.raises(ValueError, match=f"index_heads must be a power of two .* got {heads}$"):
        paged_indexer_triton.run(inputs)


@pytest.mark.parametrize(
    ("machine", "shape", "sentence"),
    [
        (H100, shape_of(1, 99), None),
        (A100, shape_of(1, 99, precision="bf16"), None),
        (A100, shape_of(1, 99), "in fp8 needs sm_89 or newer, this is A100"),
        (CPU, shape_of(1, 99), "this is a CPU"),
        (H100, shape_of(1, 99, index_heads=6), "a power of two of 8 or more heads, this case has"),
        (H100, shape_of(1, 99, page_size=17), "page_size that is a power of two, this case has 17"),
    ],
    ids=["hopper", "bf16-ampere", "fp8-ampere", "cpu", "heads", "page"],
)
def test_triton_supports_says_why_not(machine, shape, sentence):
    reason = paged_indexer_triton.supports(shape, machine)
    assert reason is None if sentence is None else sentence in reason


INTERPRETED = [
    (1, 33, 1, 16, 16, hostile.plain),
    (2, 200, 3, 8, 16, hostile.paged_indexer_ragged),
    (3, 130, 2, 64, 32, hostile.paged_indexer_ragged),
    (2, 70, 9, 32, 64, hostile.paged_indexer_ragged),
]


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:.*NaN:RuntimeWarning")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("batch", "keys", "queries", "heads", "page_size", "mutate"), INTERPRETED)
def test_triton_interpreted(batch, keys, queries, heads, page_size, mutate, precision, monkeypatch):
    hostile.pretend_gpu(monkeypatch, 9)
    shape = shape_of(batch, keys, queries, precision, heads, page_size)
    inputs = mutate(OPERATOR.make_inputs(shape, seed=keys, device="cpu"))
    with hostile.poisoned_outputs():
        outputs = registry.implementation("paged_indexer", "triton").run(inputs)
    hostile.assert_right("paged_indexer", inputs, outputs)


SHAPES = [
    shape
    for precision in PRECISIONS
    for shape in (
        shape_of(3, 5000, 1, precision),
        shape_of(33, 700, 2, precision),
        shape_of(3, 700, 3, precision, page_size=32),
        shape_of(3, 700, 8, precision, index_heads=32, page_size=16),
        shape_of(1, 100, 4, precision, index_heads=16),
        shape_of(1, 131072, 1, precision, index_heads=8),
        shape_of(2, 700, 1, precision, page_size=17),
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "shape", "mutate"), hostile.cases("paged_indexer", SHAPES))
def test_paged_indexer_matches_reference(name, shape, mutate):
    hostile.assert_implementation("paged_indexer", name, shape, mutate)


@pytest.mark.gpu
@pytest.mark.parametrize("name", hostile.names("paged_indexer"))
def test_paged_indexer_reads_pages_beyond_2_31_bytes(name):
    shape = shape_of(2, 4096)
    implementation = hostile.runnable("paged_indexer", name, shape)
    inputs = OPERATOR.make_inputs(shape, seed=0, device="cuda")
    first = 2**31 // (64 * 132) + 3
    cache = inputs.index_cache.new_zeros(first + len(inputs.index_cache), 64 * 132)
    cache[first:] = inputs.index_cache
    far = replace(inputs, index_cache=cache, block_table=inputs.block_table + first)
    hostile.assert_right("paged_indexer", far, implementation.run(far))
