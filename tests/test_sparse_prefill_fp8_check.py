"""Sparse prefill in fp8: what its check lets through and what not."""

import math
from dataclasses import replace

import pytest
import torch

from dsa_bench.kernels.sparse_prefill_fp8 import OPERATOR, plain
from tests import hostile
from tests.fp8_prefill import (
    INF,
    LOG2_E,
    NAN,
    make,
    mutations,
    online,
    with_duplicates,
    with_lens,
    with_odd_scales,
    with_sink,
)


def swap_pairs(weights):
    """Weights of keys 0 1 2 3 … stand at 1 0 3 2 …"""
    return weights.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


SIZES = {"seq_len_q": 6, "seq_len_kv": 310, "topk": 130}


# plain rounds its logits to bf16, which is too much for the fixed tolerance where they pass 50
@mutations
@pytest.mark.parametrize(
    ("run", "strong", "width"),
    [(plain, 1.0, 512), (plain, 64.0, 576), (online, 1.0, 576), (online, 16.0, 512),
     (online, 1024.0, 576)],
)  # fmt: skip
def test_check_passes_a_kernel_that_rounds_its_weights(run, strong, width, mutate):
    inputs = mutate(make(**SIZES, width=width, strong=strong))
    for check in OPERATOR.check(inputs, run(inputs)):
        assert check.passed, check
        # a limit of NaN, from keys that must not be read, lets everything through
        assert all(map(math.isfinite, check.limits.values())), check


def online_with(**changes):
    """The right kernel over other inputs: a change is a value, or makes one of the right inputs."""

    def run(inputs):
        made = {name: x(inputs) if callable(x) else x for name, x in changes.items()}
        return online(replace(inputs, **made))

    return run


def online_then(name, change):
    def run(inputs):
        right = online(inputs)
        return right._replace(**{name: change(getattr(right, name), inputs)})

    return run


def without_one(inputs):
    indices = inputs.topk_indices.clone()
    indices[2, 70] = -1
    return indices


def each_once(inputs):
    indices = inputs.topk_indices.clone()
    for row in indices:
        for p, n in enumerate(row.tolist()):
            row[p] = -1 if n in row[:p] else n
    return indices


def clamped(inputs):
    return inputs.topk_indices.clamp(0, inputs.kv.shape[0] - 1)


def one_invalid(inputs):
    indices = inputs.topk_indices.clone()
    indices[4, 9] = inputs.kv.shape[0]
    return replace(inputs, topk_indices=indices)


def finite_sink(inputs):
    """e^2.5 beside 130 weak weights of 1: a share below 2^-4 is hidden by what e4m3 may lose."""
    return replace(inputs, attn_sink=torch.full((3,), 2.5))


def spoiled(error):
    def change(out, inputs):
        out[2, 1, 300] += error
        return out

    return change


WRONG = {
    "kv-scale-not-in-out": (1, hostile.plain, "out",
        online_then("out", lambda out, inputs: out / inputs.kv_scale)),
    "kv-scale-not-in-scores": (1, hostile.plain, "lse_budget",
        online_with(q_scale=lambda inputs: inputs.q_scale / inputs.kv_scale)),
    "scale-of-next-head": (1, hostile.plain, "lse_budget",
        online_with(q_scale=lambda inputs: inputs.q_scale.roll(1, 1))),
    "scale-of-next-query": (1, hostile.plain, "lse_budget",
        online_with(q_scale=lambda inputs: inputs.q_scale.roll(1, 0))),
    "rope-not-divided": (1, hostile.plain, "lse_budget",
        lambda inputs: online(inputs, divide_rope=False)),
    "rope-ignored": (1, hostile.plain, "lse_budget", online_with(q_rope=None, k_rope=None)),
    "rope-of-next-key": (1, hostile.plain, "lse_budget",
        online_with(k_rope=lambda inputs: inputs.k_rope.roll(1, 0))),
    "key-dropped": (1, hostile.plain, "lse_budget", online_with(topk_indices=without_one)),
    "last-two-keys-dropped": (1, hostile.plain, "lse_budget",
        online_with(topk_indices=lambda inputs: inputs.topk_indices[:, :128])),
    "keys-shifted": (1, hostile.plain, "out",
        online_with(topk_indices=lambda inputs: inputs.topk_indices - 1)),
    "repeated-key-counted-once": (1, with_duplicates, "lse_budget",
        online_with(topk_indices=each_once)),
    "invalid-index-clamped": (1, one_invalid, "lse_budget", online_with(topk_indices=clamped)),
    "lens-ignored": (1, with_lens, "out", online_with(topk_lens=None)),
    "sink-ignored": (1, finite_sink, "out_budget", online_with(attn_sink=None)),
    "infinite-sink-ignored": (1, with_sink, "out", online_with(attn_sink=None)),
    "sink-in-lse": (1, finite_sink, "lse_budget",
        online_then("lse", lambda lse, inputs: torch.logaddexp(lse, inputs.attn_sink))),
    "sink-in-log2": (1, finite_sink, "out_budget",
        online_with(attn_sink=lambda inputs: inputs.attn_sink / LOG2_E)),
    "lse-in-log2": (1, hostile.plain, "lse_budget",
        online_then("lse", lambda lse, inputs: lse * LOG2_E)),
    "max-in-log2": (1, hostile.plain, "max_logits_budget",
        online_then("max_logits", lambda largest, inputs: largest * LOG2_E)),
    "lse-of-empty-row-negative": (1, with_lens, "lse",
        online_then("lse", lambda lse, inputs: lse.where(lse < INF, -INF))),
    "wrong-column": (1, hostile.plain, "out", online_then("out", spoiled(0.03))),
    "nan": (1, hostile.plain, "out", online_then("out", spoiled(NAN))),
    # weak weights lie within one step of e4m3, so that their order says nothing
    "pairs-swapped": (16, hostile.plain, "out_budget",
        lambda inputs: online(inputs, order=swap_pairs)),
    # ... and no maximum passes that of the first block by 2^4
    "not-rescaled": (64, hostile.plain, "lse_budget",
        lambda inputs: online(inputs, rescale=torch.ones_like)),
}  # fmt: skip
"""(how strong the scores are, inputs, a check that must fail, kernel)"""


@pytest.mark.parametrize("name", WRONG)
def test_check_fails_what_is_wrong(name):
    strong, mutate, seen, run = WRONG[name]
    inputs = mutate(with_odd_scales(make(**SIZES, strong=strong)))
    found = {check.name: check.passed for check in OPERATOR.check(inputs, run(inputs))}
    assert list(found) == [
        "out", "out_budget", "max_logits", "max_logits_budget", "lse", "lse_budget"
    ]  # fmt: skip
    assert not found[seen]


@pytest.mark.parametrize("name", ["max_logits", "lse"])
def test_logarithms_may_have_the_error_of_hoppers_sums(name):
    inputs = make(**SIZES)

    def found(error):
        checks = OPERATOR.check(inputs, online_then(name, lambda x, _: x + error)(inputs))
        return {check.name: check.passed for check in checks}

    assert all(found(3 * 2.0**-13).values())
    assert not found(2.0**-10)[f"{name}_budget"]


def test_check_of_some_rows_sees_those_alone():
    inputs = make()
    wrong = online(inputs)
    wrong.out[3] += 1
    assert hostile.passes(OPERATOR.check(inputs, wrong, rows=torch.tensor([0, 5])))
    assert not hostile.passes(OPERATOR.check(inputs, wrong, rows=torch.tensor([3])))
    assert not hostile.passes(OPERATOR.check(inputs, wrong))


def test_a_weak_head_has_no_limit_of_a_strong_one():
    inputs = make(**SIZES)
    strong = torch.tensor([1.0, 512.0, 1.0])
    rope = inputs.q_rope * strong[:, None].bfloat16()
    inputs = replace(inputs, q_scale=inputs.q_scale * strong, q_rope=rope)
    largest = online(inputs).max_logits

    def fails(head):
        moved = largest.clone()
        moved[2, head] += 2.0**-7 if largest[2, head].abs() < 1 else 2.0**-9 * largest[2, head]
        wrong = online(inputs)._replace(max_logits=moved)
        (check,) = (x for x in OPERATOR.check(inputs, wrong) if x.name == "max_logits")
        return not check.passed

    assert fails(0) and fails(2) and not fails(1)
