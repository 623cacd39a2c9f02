"""What tests of sparse prefill in fp8 share: inputs, weak and strong, plain and hostile, and a fp8
kernel in torch."""

import math
from dataclasses import replace

import pytest
import torch

from dsa_bench.kernels.sparse_prefill import SparsePrefillOutputs, SparsePrefillShape
from dsa_bench.kernels.sparse_prefill_fp8 import OPERATOR
from tests import hostile

INF, NAN = float("inf"), float("nan")
LOG2_E = 1 / math.log(2)


def make(seq_len_q=6, seq_len_kv=40, topk=16, num_heads=3, width=576, strong=1.0, seed=0):
    """Inputs whose scores are `strong` times as large; a power of two keeps q_rope exact."""
    shape = SparsePrefillShape(
        seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, topk=topk, num_heads=num_heads,
        head_dim_qk=width,
    )  # fmt: skip
    inputs = OPERATOR.make_inputs(shape, seed=seed, device="cpu")
    rope = None if inputs.q_rope is None else inputs.q_rope * strong
    return replace(inputs, q_scale=inputs.q_scale * strong, q_rope=rope)


def with_sink(inputs):
    return replace(inputs, attn_sink=torch.tensor([2.5, INF, -INF]))


def with_lens(inputs):
    topk = inputs.topk_indices.shape[1]
    lens = torch.tensor([topk, 0, 7, 99 + topk, -3, 1], dtype=torch.int32)
    return replace(inputs, topk_lens=lens)


def with_duplicates(inputs):
    indices = inputs.topk_indices.clone()
    indices[:, 1::2] = indices[:, ::2]
    indices[-1] = indices[-1, 0].clone()
    return replace(inputs, topk_indices=indices)


def with_odd_scales(inputs):
    """No powers of two, and another for each query head."""
    factors = torch.linspace(0.4, 2.9, 6 * 3).roll(7).view(6, 3)
    return replace(inputs, q_scale=inputs.q_scale * factors, kv_scale=inputs.kv_scale * 0.71)


def wild(inputs):
    """As hostile.sparse_prefill_wild: NaN in every key that no valid entry names."""
    indices = hostile._spoil(inputs.topk_indices, inputs.kv.shape[0])
    topk = indices.shape[1]
    lens = torch.tensor([5, topk, topk + 9, topk - 3, 0, hostile.LEAST], dtype=torch.int32)
    unread = ~hostile._is_listed(indices, lens, inputs.kv.shape[0])
    assert unread.any()
    keys = {"kv": inputs.kv.clone()}
    if inputs.k_rope is not None:
        keys["k_rope"] = inputs.k_rope.clone()
    for x in keys.values():
        hostile._fill_nan(x, unread)
    return with_sink(replace(inputs, topk_indices=indices, topk_lens=lens, **keys))


MUTATIONS = [hostile.plain, with_sink, with_lens, with_duplicates, with_odd_scales, wild]
mutations = pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
widths = pytest.mark.parametrize("width", [576, 512])


def in_order(weights):
    return weights


def online(inputs, *, rescale=torch.exp2, order=in_order, divide_rope=True):
    """A fp8 kernel in torch: blocks of 64 keys, weights in e4m3 times 2^4, and a maximum that is
    kept until it is passed by 2^4."""
    indices = inputs.topk_indices.long()
    valid = (indices >= 0) & (indices < inputs.kv.shape[0])
    if inputs.topk_lens is not None:
        valid &= torch.arange(indices.shape[1]) < inputs.topk_lens[:, None]
    listed = torch.where(valid, indices, 0)

    def gather(x):
        return torch.where(valid[..., None], x.float()[listed], 0.0)

    scale = inputs.q_scale * inputs.kv_scale
    k = gather(inputs.kv)
    scores = torch.einsum("qhd,qkd->qhk", inputs.q.float(), k)
    if inputs.q_rope is not None:
        divisor = scale if divide_rope else torch.ones_like(scale)
        rope = (inputs.q_rope.float() / divisor[..., None]).bfloat16().float()
        scores += torch.einsum("qhd,qkd->qhk", rope, gather(inputs.k_rope))
    scores *= (scale * inputs.sm_scale * LOG2_E)[..., None]
    scores.masked_fill_(~valid[:, None], -INF)

    largest = base = torch.full(scale.shape, -1e30)
    total, out = torch.zeros_like(base), torch.zeros(*base.shape, 512)
    for part, values in zip(scores.split(64, -1), k.split(64, 1), strict=True):
        largest = torch.maximum(largest, part.amax(-1))
        new = torch.where(largest > base + 4, largest, base)
        factor = rescale(base - new)
        weights = torch.exp2(part - (new - 4)[..., None])
        rounded = order(weights.to(torch.float8_e4m3fn).float())
        total = total * factor + weights.sum(-1)
        out = out * factor[..., None] + torch.einsum("qhk,qkd->qhd", rounded, values)
        base = new

    empty = total == 0
    denominator = total
    if inputs.attn_sink is not None:
        denominator = total + torch.exp2(inputs.attn_sink * LOG2_E - (base - 4))
    last = torch.where(empty, 0.0, inputs.kv_scale / denominator)
    lse = torch.where(empty, INF, (base - 4 + total.log2()) / LOG2_E)
    return SparsePrefillOutputs(
        (out * last[..., None]).bfloat16(), torch.where(empty, -INF, largest / LOG2_E), lse
    )
