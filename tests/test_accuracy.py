"""Tolerances and budgets: the figures by hand, an honest kernel, and mistakes of real kernels."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from dsa_bench import accuracy, registry
from dsa_bench.accuracy import (
    BF16_ROUNDING,
    LOG_ROUNDING,
    Tolerance,
    compare_logs_to_budget,
    compare_tensors,
    compare_to_budget,
    finite_check,
)
from dsa_bench.kernels import sparse_prefill
from dsa_bench.kernels.attention import AttentionRow, attend, attend_plain
from dsa_bench.kernels.sparse_prefill import OPERATOR, SparsePrefillShape
from tests import hostile

INF, NAN = float("inf"), float("nan")


def test_relative_figures_by_hand():
    expected = torch.tensor([[3.0, 4.0], [0.0, 10.0], [1.0, INF]])
    actual = torch.tensor([[3.0, 4.5], [0.3, 10.4], [1.0, INF]])
    check = compare_to_budget("out", actual, expected, expected)
    assert check.figures == pytest.approx(
        {
            "rms_error": math.sqrt(0.5 / 126),
            "worst_vector": 0.5 / 5,
            "worst_element": 0.5 / 4,
            "special": 0,
        },
        rel=1e-6,
    )
    # plain is exact here, so the limits are the floors
    assert check.limits == {
        "rms_error": 2**-9, "worst_vector": 2**-8, "worst_element": 3 * 2**-8, "special": 0
    }  # fmt: skip
    assert not check.passed


def test_the_limit_is_a_multiple_of_the_error_of_plain():
    expected = torch.linspace(1, 2, 60).view(3, 4, 5)
    plain = expected * 1.01
    limits = compare_to_budget("out", expected, expected, plain, factor=3).limits
    for name in ("rms_error", "worst_vector", "worst_element"):
        assert limits[name] == pytest.approx(0.03, rel=1e-5)
    assert compare_to_budget("out", expected * 1.0199, expected, plain).passed
    assert not compare_to_budget("out", expected * 1.0201, expected, plain).passed
    assert not compare_to_budget("out", expected * 0.9799, expected, plain).passed


def test_figures_do_not_depend_on_the_chunks(monkeypatch):
    g = torch.Generator().manual_seed(0)
    expected, error = torch.randn(7, 3, 5, generator=g), torch.randn(7, 3, 5, generator=g)
    mask = torch.rand(7, 3, 5, generator=g) > 0.3
    whole = compare_to_budget("x", expected + error, expected, expected, mask=mask)
    monkeypatch.setattr(accuracy, "CHUNK_ELEMENTS", 10)
    parts = compare_to_budget("x", expected + error, expected, expected, mask=mask)
    assert parts.figures == pytest.approx(whole.figures)
    assert whole.figures["worst_element"] > 0.1


def test_what_the_mask_hides_does_not_count():
    expected = torch.tensor([[1.0, 2.0, 3.0]])
    mask = torch.tensor([[True, True, False]])
    hidden = torch.tensor([[1.0, 2.0, NAN]])
    assert compare_to_budget("x", hidden, expected, expected, mask=mask).passed
    assert not compare_to_budget("x", hidden, expected, expected).passed
    assert not compare_to_budget("x", hidden.flip(1), expected.flip(1), expected, mask=mask).passed


def test_a_vector_that_cancels_is_measured_by_the_median():
    expected = torch.tensor([[1e-3, 0.0], [3.0, 4.0], [5.0, 12.0]])
    actual = expected.clone()
    actual[0, 0] += 0.01  # ten times its size, and a rounding of what was added up
    figures = compare_to_budget("x", actual, expected, expected).figures
    assert figures["worst_vector"] == pytest.approx(0.01 / 5)
    assert figures["worst_element"] == pytest.approx(0.01 / 4)
    # above the median each is measured by itself
    actual[2, 1] += 1.3
    assert compare_to_budget("x", actual, expected, expected).figures[
        "worst_vector"
    ] == pytest.approx(1.3 / 13)


def test_a_vector_of_zeros_is_measured_by_the_rest():
    expected = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    near, far = expected.clone(), expected.clone()
    near[0, 0], far[0, 0] = 0.005, 0.03
    figures = compare_to_budget("x", far, expected, expected).figures
    assert figures["worst_vector"] == pytest.approx(0.03 / math.sqrt(18))
    assert figures["worst_element"] == pytest.approx(0.03 / 3)
    assert compare_to_budget("x", near, expected, expected).passed
    assert not compare_to_budget("x", far, expected, expected).passed
    nothing = torch.zeros(2, 3)
    assert compare_to_budget("x", nothing, nothing, nothing).passed
    assert not compare_to_budget("x", nothing + 0.01, nothing, nothing).passed
    assert compare_to_budget("x", nothing[:0], nothing[:0], nothing[:0]).passed


def test_logarithms_are_compared_absolutely():
    expected = torch.tensor([8.0, 0.0, INF])
    plain = expected + torch.tensor([0.01, 0.0, 0.0])
    check = compare_logs_to_budget("lse", expected, expected, plain)
    assert check.passed
    assert check.limits["worst_error"] == pytest.approx(0.02, rel=1e-4)
    assert check.limits["rms_error"] == pytest.approx(0.02 / math.sqrt(2), rel=1e-4)
    off = expected + torch.tensor([0.0, 0.03, 0.0])
    assert not compare_logs_to_budget("lse", off, expected, plain).passed
    assert compare_logs_to_budget("lse", off, expected, plain, absolute_floor=0.04).passed
    floor = compare_logs_to_budget("lse", expected, expected, expected).limits["worst_error"]
    assert floor == 8 * LOG_ROUNDING
    lost = torch.tensor([8.0, NAN, INF])
    assert compare_logs_to_budget("lse", lost, expected, plain).figures["special"] == 1
    assert not compare_logs_to_budget("lse", lost, expected, plain).passed


@pytest.mark.parametrize(
    "compare",
    [
        partial(compare_tensors, tolerance=Tolerance(abs=1, rel=1, cos=1)),
        partial(compare_to_budget, plain=torch.zeros(2, 3)),
        partial(compare_logs_to_budget, plain=torch.zeros(2, 3)),
    ],
    ids=["tolerance", "budget", "logs"],
)
def test_another_shape_fails(compare):
    check = compare("x", torch.zeros(2, 1), torch.zeros(2, 3))
    assert not check.passed
    assert check.figures == {"shape_differs": 1.0}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_finite_check_sees_one_element(value, monkeypatch):
    monkeypatch.setattr(accuracy, "CHUNK_ELEMENTS", 16)
    out = torch.zeros(9, 2, 4, dtype=torch.bfloat16)
    check = finite_check("out", out)
    assert (check.name, check.passed, check.figures) == ("out_finite", True, {"not_finite": 0.0})
    out[8, 1, 3] = value
    assert finite_check("out", out).figures == {"not_finite": 1.0}
    assert not finite_check("out", out).passed
    assert finite_check("out", out[:0]).passed


def attend_online(q, k, valid, sm_scale, head_dim_v, sink, weights_dtype=torch.bfloat16, stale=-1):
    """As the kernels do it: blocks of 64 keys, weights rounded to bf16 before they are divided.

    `stale`: the block at which the running sum of values is not rescaled.
    """
    q, k = q.float(), k.float()
    largest = torch.full(q.shape[:2], -INF)
    total, out = torch.zeros_like(largest), torch.zeros(*q.shape[:2], head_dim_v)
    for number, begin in enumerate(range(0, k.shape[1], 64)):
        part = slice(begin, begin + 64)
        logits = torch.einsum("qhd,qkd->qhk", q, k[:, part]) * sm_scale
        logits.masked_fill_(~valid[:, None, part], -INF)
        new = torch.maximum(largest, logits.amax(-1))
        shrink, weights = torch.exp(largest - new), torch.exp(logits - new[..., None])
        total = total * shrink + weights.sum(-1)
        kept = out if number == stale else out * shrink[..., None]
        rounded = weights.to(weights_dtype).float()
        out = kept + torch.einsum("qhk,qkd->qhd", rounded, k[:, part, :head_dim_v])
        largest = new
    return AttentionRow((out / total[..., None]).bfloat16(), largest, largest + total.log())


def attention_case(topk, seed, gain=1):
    shape = SparsePrefillShape(seq_len_q=8, seq_len_kv=max(64, topk), topk=topk, num_heads=8)
    inputs = OPERATOR.make_inputs(shape, seed=seed, device="cpu")
    return replace(inputs, q=inputs.q * gain)


def run(inputs, attend_keys):
    return sparse_prefill.attend_rows(inputs, None, attend_keys)


@pytest.mark.parametrize("gain", [1, 8, 64])
@pytest.mark.parametrize("topk", [1, 2, 16, 512])
def test_an_honest_kernel_keeps_to_two_thirds_of_the_budget(topk, gain):
    inputs = attention_case(topk, seed=topk, gain=gain)
    checks = OPERATOR.check(inputs, run(inputs, attend_online))
    budgets = [check for check in checks if check.name.endswith("_budget")]
    assert [check.name for check in budgets] == ["out_budget", "max_logits_budget", "lse_budget"]
    for check in budgets:
        for name, value in check.figures.items():
            assert value <= check.limits[name] / 1.5, check


def test_plain_is_off_by_roundings_to_bf16_and_no_more():
    inputs = hostile.sparse_prefill_wild(attention_case(64, seed=2, gain=8))
    expected, plain = OPERATOR.reference(inputs), sparse_prefill.plain(inputs)
    assert plain.out.dtype == torch.bfloat16
    assert torch.equal(plain.lse.isinf(), expected.lse.isinf())
    error = (plain.out.float() - expected.out).norm() / expected.out.norm()
    assert BF16_ROUNDING / 4 < error < BF16_ROUNDING
    finite = expected.lse.isfinite()
    assert 1e-6 < (plain.lse - expected.lse)[finite].abs().max() < 0.02


def test_plain_takes_no_keys():
    rows = [f(torch.ones(2, 3, 576), torch.ones(2, 0, 576), torch.ones(2, 0).bool(), 1.0, 512, None)
            for f in (attend, attend_plain)]  # fmt: skip
    for one, other in zip(*rows, strict=True):
        assert torch.equal(one, other.float())


def _changed(change):
    """The rounded output of the right kernel with a part of it changed."""

    def mutate(inputs, right):
        out = right.out.clone()
        change(out)
        return right._replace(out=out)

    return mutate


def _other_keys(change):
    """`out` over other keys than those listed; lse stays right."""

    def mutate(inputs, right):
        indices = inputs.topk_indices.clone()
        change(indices)
        wrong = run(replace(inputs, topk_indices=indices), attend_online)
        return right._replace(out=wrong.out)

    return mutate


def _off_by_one(indices):
    indices[3] = (indices[3] - 1).clamp(min=0)


def _drop(indices):
    indices[:, 7] = -1


def _swap_heads(out):
    out[3] = out[3].flip(0)


def _fp8_weights(inputs, right):
    return run(inputs, partial(attend_online, weights_dtype=torch.float8_e4m3fn))


def _no_rescale(inputs, right):
    return run(inputs, partial(attend_online, stale=3))


def _log2(inputs, right):
    return right._replace(lse=right.lse / math.log(2))


SHORT, WEAK, LONG = (256, 2), (1024, 5), (2048, 2)
"""topk and seed. With a thousand keys and weak scores all rows are nearly the mean of the keys."""
MISTAKES = {
    # name: (case, mutation, do the fixed tolerances see it?)
    "zeros": (WEAK, _changed(lambda out: out.zero_()), True),
    "zero-head": (WEAK, _changed(lambda out: out[3, 2].zero_()), True),
    "zero-columns": (WEAK, _changed(lambda out: out[3, 2, 128:136].zero_()), True),
    "stale-query": (WEAK, _changed(lambda out: out[3].copy_(out[2].clone())), False),
    "stale-head": (WEAK, _changed(lambda out: out[3, 2].copy_(out[2, 2].clone())), False),
    "heads-swapped": (WEAK, _changed(_swap_heads), False),
    "keys-off-by-one": (LONG, _other_keys(_off_by_one), False),
    "no-rescale": (WEAK, _no_rescale, False),
    "log2": (WEAK, _log2, True),
    "head-scaled-2%": (SHORT, _changed(lambda out: out[3, 2].mul_(1.02)), True),
    "head-scaled-1%": (SHORT, _changed(lambda out: out[3, 2].mul_(1.01)), False),
    "dropped-key": (SHORT, _other_keys(_drop), True),
    "fp8-weights": (SHORT, _fp8_weights, False),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_budget_sees_what_fixed_tolerances_let_through(name):
    case, mutate, seen_before = MISTAKES[name]
    inputs = attention_case(*case)
    right = run(inputs, attend_online)
    assert hostile.passes(OPERATOR.check(inputs, right))
    checks = OPERATOR.check(inputs, mutate(inputs, right))
    fixed = [check for check in checks if not check.name.endswith("_budget")]
    budgets = [check for check in checks if check.name.endswith("_budget")]
    assert hostile.passes(fixed) != seen_before
    assert not hostile.passes(budgets)


def test_eight_bits_of_weights_are_hidden_by_averaging():
    """What no error of `out` can show: of 1024 equal weights the roundings cancel."""
    inputs = attention_case(*WEAK)
    checks = OPERATOR.check(inputs, _fp8_weights(inputs, None))
    assert hostile.passes(checks)


def test_attention_says_that_its_output_is_finite_in_every_row():
    finite = {name: registry.operator(name).finite for name in registry.operators()}
    attention = dict.fromkeys(
        (
            *("sparse_prefill", "sparse_decode", "dsa", "dsa_fp8", "dense_attention"),
            *("dense_attention_fp8", "sparse_prefill_fp8", "masked_prefill"),
            *("dsa_layer", "masked_layer", "dense_layer"),
        ),
        ("out",),
    )
    assert {name: outputs for name, outputs in finite.items() if outputs} == attention
