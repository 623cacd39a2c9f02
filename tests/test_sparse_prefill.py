"""Sparse prefill: the reference, its check, its counts."""

import math
from dataclasses import replace

import pytest
import torch

from dsa_bench.baselines.merge import merge_by_lse
from dsa_bench.kernels import attention, page_slots
from dsa_bench.kernels.sparse_prefill import (
    OPERATOR,
    SparsePrefillShape,
)
from dsa_bench.operator import Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile
from tests.sparse_prefill_loops import loops

INF, NAN = float("inf"), float("nan")


def small(seq_len_q=6, seq_len_kv=40, topk=16, num_heads=3, seed=0):
    shape = SparsePrefillShape(
        seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, topk=topk, num_heads=num_heads
    )
    inputs = OPERATOR.make_inputs(shape, seed=seed, device="cpu")
    return replace(inputs, q=inputs.q * 16)  # with weak scores every key counts alike


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def with_sink(inputs):
    return replace(inputs, attn_sink=torch.tensor([0.7, INF, -INF]))


def with_lens(inputs):
    return replace(inputs, topk_lens=torch.tensor([16, 0, 7, 99, -3, 1], dtype=torch.int32))


def with_duplicates(inputs):
    indices = inputs.topk_indices.clone()
    indices[:, 1::2] = indices[:, ::2]
    return replace(inputs, topk_indices=indices)


@pytest.mark.parametrize(
    "mutate",
    [hostile.plain, with_sink, with_lens, with_duplicates, hostile.sparse_prefill_wild,
     hostile.sparse_prefill_strided, hostile.sparse_prefill_paged],
    ids=lambda mutate: mutate.__name__,
)  # fmt: skip
def test_reference_matches_loops(mutate):
    inputs = mutate(small())
    expected = loops(inputs.q.double(), inputs.kv.double(), inputs, inputs.head_dim_v)
    assert_equal(OPERATOR.reference(inputs), expected)


def test_a_paged_cache_is_read_where_it_lies():
    """Pages in any order, NaN in those of others; slots as page_slots makes them."""
    inputs = replace(small(seq_len_kv=150, topk=90), attn_sink=torch.tensor([0.7, INF, -INF]))
    inputs.topk_indices[3, 50:] = -1
    cache = torch.full((7, 64, 576), NAN).bfloat16()
    table = torch.tensor([[5, 0, 3]], dtype=torch.int32)
    for page, keys in zip(table[0].tolist(), inputs.kv.split(64), strict=True):
        cache[page, : len(keys)] = keys
    listed = page_slots.PageSlotsInputs(inputs.topk_indices[None], table, 64)
    (slots,) = page_slots.reference(listed)
    paged = replace(inputs, kv=cache.flatten(0, 1), topk_indices=slots[0])
    assert paged.kv.data_ptr() == cache.data_ptr()
    for one, other in zip(OPERATOR.reference(paged), OPERATOR.reference(inputs), strict=True):
        assert torch.equal(one, other)


def test_order_of_indices_does_not_matter():
    inputs = small()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    shuffled = replace(inputs, topk_indices=inputs.topk_indices[:, order])
    assert_equal(OPERATOR.reference(shuffled), OPERATOR.reference(inputs))


def test_all_keys_selected_is_dense_attention():
    inputs = small(seq_len_q=1, topk=40)
    k = inputs.kv.double()
    logits = inputs.q[0].double() @ k.T * inputs.sm_scale
    expected = logits.softmax(-1) @ k[:, :512]
    actual = OPERATOR.reference(inputs)
    torch.testing.assert_close(actual.out[0].double(), expected, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(actual.lse[0].double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_two_halves_merged_by_lse_are_the_whole():
    inputs = small(seq_len_q=1)
    whole = OPERATOR.reference(inputs)
    parts = [
        OPERATOR.reference(replace(inputs, topk_indices=inputs.topk_indices[:, part]))
        for part in (slice(0, 5), slice(5, 16))
    ]
    out, lse = merge_by_lse(parts[0].out, parts[0].lse, parts[1].out, parts[1].lse)
    assert_equal((out, lse), (whole.out, whole.lse))


def test_a_repeated_index_counts_twice():
    inputs = small(seq_len_q=1, topk=2)
    pair = torch.tensor([[4, 4]], dtype=torch.int32)
    once = OPERATOR.reference(replace(inputs, topk_indices=pair[:, :1].contiguous()))
    twice = OPERATOR.reference(replace(inputs, topk_indices=pair))
    torch.testing.assert_close(twice.lse, once.lse + math.log(2))
    torch.testing.assert_close(twice.out, once.out)


def test_an_empty_row_gives_zero_and_infinities():
    inputs = with_sink(small())
    empty = replace(inputs, topk_indices=torch.full_like(inputs.topk_indices, -1))
    for outputs in (OPERATOR.reference(empty), OPERATOR.reference(replace(empty, attn_sink=None))):
        assert (outputs.out == 0).all()
        assert (outputs.max_logits == -INF).all()
        assert (outputs.lse == INF).all()


def test_sink_changes_the_output_alone():
    inputs = small()
    plain, sunk = OPERATOR.reference(inputs), OPERATOR.reference(with_sink(inputs))
    assert torch.equal(plain.lse, sunk.lse)
    assert torch.equal(plain.max_logits, sunk.max_logits)
    share = 1 / (1 + torch.exp(0.7 - plain.lse[:, 0, None]))
    torch.testing.assert_close(sunk.out[:, 0], plain.out[:, 0] * share)
    assert (sunk.out[:, 1] == 0).all()
    assert torch.equal(sunk.out[:, 2], plain.out[:, 2])


def test_reference_of_some_rows_in_small_chunks(monkeypatch):
    inputs = with_lens(small())
    whole = OPERATOR.reference(inputs)
    monkeypatch.setattr(attention, "REFERENCE_CHUNK_ELEMENTS", 1)
    rows = torch.tensor([3, 0, 2])
    assert_equal(OPERATOR.reference(inputs, rows=rows), [x[rows] for x in whole])


def test_inputs_list_each_visible_key_once():
    inputs = OPERATOR.make_inputs(
        SparsePrefillShape(seq_len_q=40, seq_len_kv=40, topk=16, num_heads=1), seed=3, device="cpu"
    )
    for i, row in enumerate(inputs.topk_indices.tolist()):
        used = [n for n in row if n >= 0]
        assert len(set(used)) == len(used) == min(i + 1, 16)
        assert max(used) <= i
    assert 0 in inputs.topk_indices[16:]
    assert 39 in inputs.topk_indices[39] or len(set(inputs.topk_indices[39].tolist())) == 16


def _off_by_one(inputs, right):
    return OPERATOR.reference(replace(inputs, topk_indices=inputs.topk_indices[:, :-1]))


def _shifted(inputs, right):
    return OPERATOR.reference(replace(inputs, topk_indices=inputs.topk_indices - 1))


def _wrong_scale(inputs, right):
    return OPERATOR.reference(replace(inputs, sm_scale=576**-0.5))


def _one_wrong_column(inputs, right):
    out = right.out.clone()
    out[2, 1, 300] += 0.02
    return right._replace(out=out)


def _one_nan(inputs, right):
    out = right.out.clone()
    out[5, 0, 511] = NAN
    return right._replace(out=out)


WRONG = {
    "zeros": lambda inputs, right: type(right)(*map(torch.zeros_like, right)),
    "stale": lambda inputs, right: OPERATOR.reference(small(seed=9)),
    "heads-swapped": lambda inputs, right: type(right)(*(x.flip(1) for x in right)),
    "queries-swapped": lambda inputs, right: type(right)(*(x.flip(0) for x in right)),
    "log2": lambda inputs, right: right._replace(lse=right.lse / math.log(2)),
    "unscaled-max": lambda inputs, right: right._replace(max_logits=right.max_logits * 1.001),
    "one-key-short": _off_by_one,
    "shifted-keys": _shifted,
    "wrong-scale": _wrong_scale,
    "wrong-column": _one_wrong_column,
    "nan": _one_nan,
}


@pytest.mark.parametrize("name", WRONG)
def test_check_fails(name):
    inputs = small(seq_len_q=6, seq_len_kv=40)
    right = OPERATOR.reference(inputs)
    assert hostile.passes(OPERATOR.check(inputs, right))
    assert not hostile.passes(OPERATOR.check(inputs, WRONG[name](inputs, right)))


def test_check_of_rows_looks_at_those_alone():
    inputs = small()
    right = OPERATOR.reference(inputs)
    wrong = right._replace(out=right.out.clone())
    wrong.out[3] += 1
    assert hostile.passes(OPERATOR.check(inputs, wrong, rows=torch.tensor([0, 5])))
    assert not hostile.passes(OPERATOR.check(inputs, wrong, rows=torch.tensor([3])))


def test_cost_counted_by_hand():
    # queries at positions 2, 3, 4 see 3, 4, 5 keys and take at most 4 of them: 11 pairs
    shape = SparsePrefillShape(seq_len_q=3, seq_len_kv=5, topk=4, num_heads=2)
    cost = OPERATOR.cost(shape)
    assert shape.pairs == 11
    assert cost.flops == 2 * 2 * (576 + 512) * 11
    assert cost.bytes_read == 2 * 3 * 2 * 576 + 2 * 5 * 576 + 4 * 3 * 4
    assert cost.bytes_written == 3 * 2 * (2 * 512 + 4 + 4)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 7, 3), (3, 9, 9), (9, 9, 9), (2, 9, 3)])
def test_pairs_are_the_sum_over_queries(sizes):
    seq_len_q, seq_len_kv, topk = sizes
    shape = SparsePrefillShape(seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, topk=topk)
    assert shape.pairs == sum(min(t + 1, topk) for t in range(seq_len_kv - seq_len_q, seq_len_kv))


def test_flops_a_token_of_v32():
    shape = SparsePrefillShape(seq_len_q=4096, seq_len_kv=131072)
    assert OPERATOR.cost(shape).flops / 4096 == 278_528 * 2048  # 570.4 MFLOP
    whole = SparsePrefillShape(seq_len_q=16384, seq_len_kv=16384)
    assert OPERATOR.cost(whole).flops == pytest.approx(8.76e12, rel=1e-3)


def test_memory_is_what_the_tensors_take():
    shape = SparsePrefillShape(seq_len_q=5, seq_len_kv=21, topk=8, num_heads=3)
    inputs = OPERATOR.make_inputs(shape, seed=0, device="cpu")
    out, largest, lse = OPERATOR.reference(inputs)
    memory = OPERATOR.memory(shape)
    tensors = (inputs.q, inputs.kv, inputs.topk_indices)
    assert memory.input_bytes == sum(x.nbytes for x in tensors)
    assert memory.output_bytes == out.numel() * 2 + largest.nbytes + lse.nbytes


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"topk": None}, "topk has no value"),
        ({"topk": 129}, "topk 129 is more than the 128 keys there are"),
        ({"seq_len_q": 129}, "seq_len_q 129 must be 1 … seq_len_kv 128"),
        ({"precision": "fp8"}, "sparse_prefill computes in bf16"),
    ],
)
def test_a_case_that_makes_no_sense(fields, sentence):
    known = {"seq_len_q": 64, "seq_len_kv": 128, "topk": 32, "phase": "prefill"} | fields
    with pytest.raises(Unsupported, match=sentence):
        OPERATOR.shape(Case(op="sparse_prefill", impl="reference", **known), PRESETS["v3.2"])
