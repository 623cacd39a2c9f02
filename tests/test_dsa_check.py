"""The check of `dsa`: right and wrong selections, and the attention over them."""

import pytest
import torch

from dsa_bench.kernels import dsa
from dsa_bench.kernels.dsa import OPERATOR, DsaOutputs, check_selection
from tests import hostile
from tests.dsa_cases import INF, SHAPES, decode_shape, in_bf16, make_inputs, prefill_shape


@pytest.mark.parametrize("shape", SHAPES)
def test_check_passes_the_reference_rounded_to_bf16(shape):
    inputs = make_inputs(shape)
    outputs = in_bf16(OPERATOR.reference(inputs))
    for check in OPERATOR.check(inputs, outputs):
        assert check.passed, check
    rows = torch.tensor([2, 0])
    for check in OPERATOR.check(inputs, outputs, rows=rows):
        assert check.passed, check


def test_lengths_do_not_hide_what_is_selected():
    """A selector that puts -1 first: attention that looks only as far as a list is long misses
    keys, and is wrong."""
    shape = decode_shape(batch_size=4, seq_len_kv=400, topk=40, lengths="one-long")
    inputs = make_inputs(shape)
    stages = dsa.reference_stages("decode")
    right = in_bf16(dsa.run_decode(inputs, stages))
    turned = right.topk_indices.flip(-1)
    assert all(c.passed for c in OPERATOR.check(inputs, right._replace(topk_indices=turned)))
    wrong = in_bf16(dsa.run_decode(inputs, stages, topk_indices=turned))
    assert (wrong.out - right.out).abs().max() > 0.1
    failed = {c.name for c in OPERATOR.check(inputs, wrong) if not c.passed}
    assert {"out", "lse"} <= failed


def _with_indices(change):
    """Outputs that are right for the selection that was made; the selection is changed."""

    def outputs(inputs, right):
        indices = change(right.topk_indices.clone())
        stages = dsa.reference_stages("prefill")
        out = stages["sparse_prefill"].run(inputs.attention_inputs(indices))
        return DsaOutputs(out.out, out.lse, indices)

    return outputs


def _repeat_one(indices):
    indices[3, 1] = indices[3, 0]
    return indices


def _drop_one(indices):
    indices[3, 1] = -1
    return indices


def _take_the_future(indices):
    indices[0, 0] = 39
    return indices


WRONG = {
    "zeros": lambda inputs, right: DsaOutputs(*map(torch.zeros_like, right)),
    "stale": lambda inputs, right: OPERATOR.reference(make_inputs(prefill_shape(), seed=9)),
    "out-of-another-selection": lambda inputs, right: right._replace(out=right.out.flip(0)),
    "one-repeated": _with_indices(_repeat_one),
    "one-dropped": _with_indices(_drop_one),
    "a-later-key": _with_indices(_take_the_future),
    "first-keys": _with_indices(
        lambda x: torch.arange(8, dtype=torch.int32).expand(6, 8).contiguous()
    ),
    "rows-swapped": _with_indices(lambda x: x.flip(0)),
    "log2": lambda inputs, right: right._replace(lse=right.lse * 1.4427),
    "nan": lambda inputs, right: right._replace(out=right.out * float("nan")),
}


@pytest.mark.parametrize("name", WRONG)
def test_check_fails(name):
    inputs = make_inputs(prefill_shape())
    right = OPERATOR.reference(inputs)
    assert not hostile.passes(OPERATOR.check(inputs, WRONG[name](inputs, right)))


@pytest.mark.parametrize("shape", [prefill_shape(), decode_shape()], ids=lambda shape: shape.phase)
def test_check_holds_attention_against_the_budget_of_its_own_selection(shape):
    inputs = make_inputs(shape)
    right = in_bf16(OPERATOR.reference(inputs))
    names = [check.name for check in OPERATOR.check(inputs, right)]
    assert names == ["topk_indices", "out", "lse", "out_budget", "lse_budget"]
    swapped = right._replace(out=right.out.flip(-2))
    passed = {check.name: check.passed for check in OPERATOR.check(inputs, swapped)}
    assert passed["topk_indices"]
    assert not passed["out_budget"]
    longer = right._replace(lse=right.lse + 0.5)
    passed = {check.name: check.passed for check in OPERATOR.check(inputs, longer)}
    assert passed["out_budget"]
    assert not passed["lse_budget"]


def test_check_fails_where_later_keys_fill_the_tail():
    """Every query lists all keys; attention has no mask of its own, so `out` agrees with that."""
    inputs = make_inputs(prefill_shape(seq_len_q=8, seq_len_kv=8))
    change = _with_indices(lambda x: torch.arange(8, dtype=torch.int32).expand(8, 8).contiguous())
    outputs = change(inputs, OPERATOR.reference(inputs))
    assert not hostile.passes(OPERATOR.check(inputs, outputs))


def test_order_of_the_selection_does_not_matter():
    inputs = make_inputs(prefill_shape())
    reordered = _with_indices(lambda x: x.flip(1))(inputs, OPERATOR.reference(inputs))
    assert hostile.passes(OPERATOR.check(inputs, reordered))


def selection_of(columns, topk=3):
    """Logits 8, 7, 6, 6 - 1e-6, 5, 1, -inf: rms near 6, so the boundary is fuzzy by about 0.05."""
    logits = torch.tensor([[8.0, 7.0, 6.0, 6.0 - 1e-5, 5.0, 1.0, -INF]])
    return check_selection(logits, torch.tensor([columns], dtype=torch.int32))


@pytest.mark.parametrize("columns", [[0, 1, 2], [2, 0, 1], [0, 1, 3]])
def test_a_swap_within_rounding_at_the_boundary_passes(columns):
    assert selection_of(columns).passed


@pytest.mark.parametrize(
    ("columns", "figure"),
    [
        ([0, 1, 4], "too_low"), ([1, 2, 3], "missed"), ([0, 0, 1], "repeated"),
        ([0, 1, -1], "wrong_count"), ([0, 1, 6], "wrong_count"), ([0, 1, 7], "wrong_count"),
        ([0, 1, 2**31 - 1], "wrong_count"),
    ],
)  # fmt: skip
def test_a_wrong_selection_is_named(columns, figure):
    check = selection_of(columns)
    assert not check.passed
    assert check.figures[figure] == 1


def test_a_selection_of_fewer_keys_than_topk():
    logits = torch.tensor([[3.0, 1.0, -INF, -INF], [-INF] * 4])
    right = torch.tensor([[1, -1, 0], [-1, -1, -1]], dtype=torch.int32)
    assert check_selection(logits, right).passed
    assert not check_selection(logits, torch.tensor([[1, -1, -1]] * 2).int()).passed
    assert not check_selection(logits, torch.tensor([[1, 0, 2]] * 2).int()).passed
