"""Sparse decode: the reference, its check, its counts."""

import math
from dataclasses import replace

import pytest
import torch

from dsa_bench.kernels import attention, sparse_decode
from dsa_bench.kernels.paging import pack_mla_rows, unpack_mla_rows
from dsa_bench.kernels.sparse_decode import (
    OPERATOR,
    SparseDecodeInputs,
    SparseDecodeOutputs,
    SparseDecodeShape,
)
from dsa_bench.kernels.sparse_prefill import SparsePrefillInputs, make_attention_tensor
from dsa_bench.kernels.sparse_prefill import reference as prefill_reference
from dsa_bench.operator import Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile

INF = float("inf")
PRECISIONS = ("fp8", "bf16")


def small(precision="fp8", seed=0, seq_len_q=2, topk=12):
    shape = SparseDecodeShape(
        batch_size=3, seq_len_kv=40, topk=topk, seq_len_q=seq_len_q, num_heads=2, page_size=17,
        precision=precision,
    )  # fmt: skip
    inputs = OPERATOR.make_inputs(shape, seed=seed, device="cpu")
    return replace(inputs, q=inputs.q * 16)  # with weak scores every key counts alike


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def key_from_bytes(row):
    """576 values of one 656-byte row, by the layout's words."""
    data = bytes(row.tolist())
    e4m3 = torch.tensor(list(data[:512]), dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    scales = torch.frombuffer(bytearray(data[512:528]), dtype=torch.float32)
    rope = torch.frombuffer(bytearray(data[528:]), dtype=torch.bfloat16)
    latent = [float(e4m3[d]) * float(scales[d // 128]) for d in range(512)]
    return torch.cat([torch.tensor(latent, dtype=torch.float64), rope.double()])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_reference_matches_loops(precision):
    inputs = small(precision)
    cache = inputs.kv_cache.flatten(0, 1)
    actual = OPERATOR.reference(inputs)
    for b in range(3):
        for j in range(2):
            rows = [cache[s] for s in inputs.topk_slots[b, j].tolist()]
            k = [key_from_bytes(r) if precision == "fp8" else r.double() for r in rows]
            for h in range(2):
                scores = [inputs.sm_scale * float(inputs.q[b, j, h].double() @ x) for x in k]
                total = sum(math.exp(s) for s in scores)
                out = sum(math.exp(s) / total * x[:512] for s, x in zip(scores, k, strict=True))
                torch.testing.assert_close(actual.out[b, j, h].double(), out, rtol=2e-5, atol=2e-6)
                assert actual.lse[b, j, h].item() == pytest.approx(math.log(total), rel=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mutate", [hostile.plain, hostile.sparse_decode_wild])
def test_decode_is_prefill_over_the_unpacked_cache(precision, mutate):
    inputs = mutate(small(precision))
    lens = None if inputs.topk_lens is None else inputs.topk_lens.flatten()
    keys = unpack_mla_rows(inputs.kv_cache.flatten(0, 1))
    prefill = SparsePrefillInputs(
        inputs.q.flatten(0, 1), keys, inputs.topk_slots.flatten(0, 1), inputs.sm_scale,
        attn_sink=inputs.attn_sink, topk_lens=lens,
    )  # fmt: skip
    expected = prefill_reference(prefill)
    actual = OPERATOR.reference(inputs)
    assert_equal((actual.out.flatten(0, 1), actual.lse.flatten(0, 1)), (expected.out, expected.lse))
    assert actual.out.isfinite().all()


def test_fp8_cache_costs_little_accuracy():
    keys = make_attention_tensor(120, 576, generator=torch.Generator().manual_seed(1))
    slots = torch.arange(100, dtype=torch.int32).view(1, 1, 100)
    q = make_attention_tensor(1, 1, 4, 576, generator=torch.Generator().manual_seed(2))
    outs = [
        OPERATOR.reference(
            SparseDecodeInputs(q, pack_mla_rows(keys, p).unflatten(0, (12, 10)), slots, 0.1352338)
        ).out
        for p in PRECISIONS
    ]
    error = (outs[0] - outs[1]).norm() / outs[1].norm()
    assert 1e-4 < error < 0.03


def test_an_empty_query_gives_zero_and_infinity():
    inputs = small()
    slots = inputs.topk_slots.clone()
    slots[1, 0], slots[2, 1] = -1, 51 * 3
    outputs = OPERATOR.reference(replace(inputs, topk_slots=slots))
    for b, j in ((1, 0), (2, 1)):
        assert (outputs.out[b, j] == 0).all()
        assert (outputs.lse[b, j] == INF).all()
    assert outputs.lse[0].isfinite().all()


def test_reference_of_some_sequences_in_small_chunks(monkeypatch):
    inputs = hostile.sparse_decode_wild(small())
    whole = OPERATOR.reference(inputs)
    monkeypatch.setattr(attention, "REFERENCE_CHUNK_ELEMENTS", 1)
    rows = torch.tensor([2, 0])
    assert_equal(OPERATOR.reference(inputs, rows=rows), [x[rows] for x in whole])


def test_inputs_stay_inside_their_own_pages():
    inputs = small()
    per_sequence = 3 * 17  # 40 tokens take three pages of 17
    owner = inputs.topk_slots // per_sequence
    assert torch.equal(owner, torch.arange(3).view(3, 1, 1).expand_as(owner).to(torch.int32))
    assert (inputs.topk_slots % per_sequence < 40).all()
    assert all(len(set(row)) == 12 for row in inputs.topk_slots.flatten(0, 1).tolist())


def _one_wrong_column(inputs, right):
    out = right.out.clone()
    out[1, 1, 0, 7] += 0.02
    return right._replace(out=out)


def _next_page(inputs, right):
    cache = inputs.kv_cache.roll(1, 0)
    return OPERATOR.reference(replace(inputs, kv_cache=cache))


WRONG = {
    "zeros": lambda inputs, right: SparseDecodeOutputs(*map(torch.zeros_like, right)),
    "stale": lambda inputs, right: OPERATOR.reference(small(seed=9)),
    "mtp-queries-swapped": lambda inputs, right: SparseDecodeOutputs(*(x.flip(1) for x in right)),
    "heads-before-queries": lambda inputs, right: right._replace(lse=right.lse.mT.contiguous()),
    "log2": lambda inputs, right: right._replace(lse=right.lse / math.log(2)),
    "one-slot-short": lambda inputs, right: OPERATOR.reference(
        replace(inputs, topk_slots=inputs.topk_slots[..., 1:])
    ),
    "next-page": _next_page,
    "wrong-scale": lambda inputs, right: OPERATOR.reference(replace(inputs, sm_scale=576**-0.5)),
    "wrong-column": _one_wrong_column,
    "nan": lambda inputs, right: right._replace(lse=right.lse * float("nan")),
}


@pytest.mark.parametrize("name", WRONG)
def test_check_fails(name):
    inputs = small()
    right = OPERATOR.reference(inputs)
    assert hostile.passes(OPERATOR.check(inputs, right))
    assert not hostile.passes(OPERATOR.check(inputs, WRONG[name](inputs, right)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_budget_sees_a_head_that_the_tolerances_let_through(precision):
    inputs = small(precision, seq_len_q=3, topk=40)
    right = OPERATOR.reference(inputs)
    right = right._replace(out=right.out.bfloat16())
    assert hostile.passes(OPERATOR.check(inputs, right))
    right.out[1, 2, 0] *= 1.01
    passed = {check.name: check.passed for check in OPERATOR.check(inputs, right)}
    assert passed == {"out": True, "lse": True, "out_budget": False, "lse_budget": True}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_plain_reads_the_same_rows_of_the_cache(precision):
    inputs = hostile.sparse_decode_wild(small(precision))
    exact, plain = OPERATOR.reference(inputs), sparse_decode.plain(inputs)
    assert torch.equal(plain.lse.isinf(), exact.lse.isinf())
    # without the 2 % that the cache's fp8 would add
    assert 1e-3 < (plain.out.float() - exact.out).norm() / exact.out.norm() < 8e-3


def test_check_of_rows_looks_at_those_alone():
    inputs = small()
    right = OPERATOR.reference(inputs)
    wrong = right._replace(lse=right.lse.clone())
    wrong.lse[1] += 1
    assert hostile.passes(OPERATOR.check(inputs, wrong, rows=torch.tensor([0, 2])))
    assert not hostile.passes(OPERATOR.check(inputs, wrong, rows=torch.tensor([1])))


@pytest.mark.parametrize(("precision", "row_bytes"), [("fp8", 656), ("bf16", 1152)])
def test_cost_counted_by_hand(precision, row_bytes):
    shape = SparseDecodeShape(
        batch_size=2, seq_len_kv=9, topk=4, seq_len_q=3, num_heads=5, precision=precision
    )
    cost = OPERATOR.cost(shape)
    assert cost.flops == 2 * 5 * (576 + 512) * 4 * 6
    # of 9 rows a query leaves 5 out, three independent ones 9 · (5/9)³
    distinct = 2 * (9 - 125 / 81)
    expected = 6 * 5 * 576 * 2 + distinct * row_bytes + 6 * 4 * 4
    assert cost.bytes_read == pytest.approx(expected, rel=1e-12)
    assert cost.bytes_written == 6 * 5 * (512 * 2 + 4)


def test_one_query_reads_the_rows_that_it_selects():
    cost = OPERATOR.cost(SparseDecodeShape(batch_size=3, seq_len_kv=9, topk=4, num_heads=5))
    expected = 3 * (5 * 576 * 2 + 4 * (656 + 4))
    assert cost.bytes_read == pytest.approx(expected, rel=1e-12)


def test_distinct_rows_are_as_many_as_random_queries_select():
    shape = SparseDecodeShape(batch_size=40, seq_len_kv=64, topk=16, seq_len_q=3, num_heads=1)
    slots = OPERATOR.make_inputs(shape, seed=0, device="cpu").topk_slots
    counted = sum(len(set(sequence.flatten().tolist())) for sequence in slots)
    read = OPERATOR.cost(shape).bytes_read - 40 * 3 * (576 * 2 + 16 * 4)
    assert counted == pytest.approx(read / 656, rel=0.03)


def test_flops_a_token_of_v32():
    assert OPERATOR.cost(SparseDecodeShape(batch_size=1, seq_len_kv=32768)).flops == 278_528 * 2048


@pytest.mark.parametrize("precision", PRECISIONS)
def test_memory_is_what_the_tensors_take(precision):
    shape = SparseDecodeShape(
        batch_size=2, seq_len_kv=70, topk=8, seq_len_q=2, num_heads=3, precision=precision
    )
    inputs = OPERATOR.make_inputs(shape, seed=0, device="cpu")
    outputs = OPERATOR.reference(inputs)
    memory = OPERATOR.memory(shape)
    tensors = (inputs.q, inputs.kv_cache, inputs.topk_slots)
    assert memory.input_bytes == sum(x.nbytes for x in tensors)
    assert memory.output_bytes == outputs.out.numel() * 2 + outputs.lse.nbytes


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [({"topk": None}, "topk has no value"), ({"topk": 129}, "topk 129 is more than the 128 keys")],
    ids=["no-topk", "topk-129"],
)
def test_a_case_that_makes_no_sense(fields, sentence):
    known = {"seq_len_q": 1, "seq_len_kv": 128, "topk": 32, "phase": "decode"} | fields
    with pytest.raises(Unsupported, match=sentence):
        OPERATOR.shape(Case(op="sparse_decode", impl="reference", **known), PRESETS["v3.2"])
