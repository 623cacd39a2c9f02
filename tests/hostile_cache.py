"""Caches and queries whose numbers are hard on a sparse decode over 656-byte rows, and the exact
attention over them."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import compare_tensors
from dsa_bench.kernels.attention import DECODE_LSE_TOLERANCE, DECODE_OUT_TOLERANCE, budget_checks
from dsa_bench.kernels.paging import HEAD_DIM_V
from dsa_bench.kernels.sparse_decode import SparseDecodeInputs, SparseDecodeOutputs, plain
from tests.hostile import INF, NAN, Mutation, _fill_nan, _ints, assert_right

BLOCK_KV = 64
GROUPS = 4
LEAST_WRITTEN_SCALE = 2.0**-13
"""What `paging.pack_mla_rows` gives a row of zeros."""


class Rows(NamedTuple):
    """Views of a cache's rows: e4m3 bytes [rows, 512], scales [rows, 4], rope [rows, 64]."""

    values: Tensor
    scales: Tensor
    rope: Tensor


def opened(inputs: SparseDecodeInputs) -> tuple[SparseDecodeInputs, Rows]:
    """The inputs with copies of cache and queries, and the views to change that cache by."""
    cache = inputs.kv_cache.clone()
    rows = cache.flatten(0, 1)
    scales, rope = rows.view(torch.float32)[:, 128:132], rows.view(torch.bfloat16)[:, 264:]
    changed = dataclasses.replace(inputs, kv_cache=cache, q=inputs.q.clone())
    return changed, Rows(rows[:, :HEAD_DIM_V], scales, rope)


def _draw(like: Tensor, low: int, high: int, seed: int) -> Tensor:
    """2^n with n in low … high."""
    return torch.exp2(_ints(low, high + 1, like.shape, like.device, seed).float())


def odd_scales(inputs: Any) -> Any:
    """Scales that are no powers of two: in f16 and in bf16 not even numbers."""
    inputs, rows = opened(inputs)
    g = torch.Generator(device=rows.scales.device).manual_seed(20)
    rows.scales.mul_(1 + torch.rand(rows.scales.shape, generator=g, device=rows.scales.device))
    return inputs


def uneven_scales(inputs: Any) -> Any:
    """Smaller scales: the groups of a row by up to 2^12, whole rows by up to 2^30. Every other head
    looks at rope columns alone, so that small rows have weights as large as others."""
    inputs, rows = opened(inputs)
    rows.scales.mul_(_draw(rows.scales, -12, 0, 21)).mul_(_draw(rows.scales[:, :1], -30, 0, 22))
    inputs.q[:, :, ::2, :HEAD_DIM_V] = 0
    return inputs


def only_small_rows(inputs: Any) -> Any:
    """The same, and the first query lists rows of the smallest scales alone."""
    inputs, rows = opened(uneven_scales(inputs))
    own = inputs.topk_slots[0, 0].long()
    rows.scales[own] = _draw(rows.scales[own], -50, -38, 23)
    return inputs


def zero_rows(inputs: Any) -> Any:
    """Rows of zeros as a cache's writer leaves them; with some, the rope columns are 0 too."""
    inputs, rows = opened(inputs)
    rows.values[::3], rows.scales[::3] = 0, LEAST_WRITTEN_SCALE
    rows.rope[::6] = 0
    return inputs


def zero_scales(inputs: Any) -> Any:
    """Groups, and whole rows, of scale 0 whose values are not."""
    inputs, rows = opened(inputs)
    rows.scales.mul_(_ints(0, 2, rows.scales.shape, rows.scales.device, 24))
    rows.scales[::5] = 0
    return inputs


def loud_rows_of_nothing(inputs: Any) -> Any:
    """Rows of zeros, in all columns or in most, whose scale is 2^20 times larger than others'."""
    inputs, rows = opened(inputs)
    rows.scales.mul_(2.0**-20)
    rows.scales[::3] *= 2.0**20
    rows.values[::3, 128:], rows.values[::6] = 0, 0
    return inputs


def sinks_of_nothing(inputs: Any) -> Any:
    """One listed row in 50 has values of 0 and, by a rope column, a weight 2^17 times as large as
    the others', which are all that the output has."""
    inputs, rows = opened(inputs)
    sinks = inputs.topk_slots[..., 10::50].long()
    rows.values[sinks] = 0
    rows.rope[..., -1] = 0
    rows.rope[sinks, -1] = 12 / inputs.sm_scale
    inputs.q[..., -1] = 1
    return inputs


def loud_head(inputs: Any) -> Any:
    """A head 2^40 times larger than the others, one of zeros, and one so small that no fp32 number
    makes 2^14 of it."""
    inputs, _ = opened(inputs)
    heads = inputs.q.shape[2]
    inputs.q[:, :, 1 % heads] *= 2.0**40
    inputs.q[:, :, 2 % heads] = inputs.q[:, :, 2 % heads].sign() * 2.0**-115
    inputs.q[:, :, 3 % heads] = 0
    return inputs


def wide_queries(inputs: Any) -> Any:
    """Columns of a head that differ by up to 2^20."""
    inputs, _ = opened(inputs)
    inputs.q.mul_(_draw(inputs.q[:1, :1], -20, 0, 25))
    return inputs


FINITE: dict[str, Mutation] = {
    "odd-scales": odd_scales,
    "uneven-scales": uneven_scales,
    "small-rows": only_small_rows,
    "zero-rows": zero_rows,
    "zero-scales": zero_scales,
    "loud-nothing": loud_rows_of_nothing,
    "sinks-of-nothing": sinks_of_nothing,
    "loud-head": loud_head,
    "wide-queries": wide_queries,
}


def with_levels(levels: list[float], inputs: Any, *, crossing: bool = False) -> Any:
    """The logits of each block of 64 listed keys lie about its level: one rope column says so.

    Queries are to list different rows. The last level holds to the end. Where they are crossing,
    every other head has the levels negated.
    """
    inputs, rows = opened(inputs)
    block = torch.arange(inputs.topk_slots.shape[2], device=inputs.q.device) // BLOCK_KV
    level = torch.tensor(levels, device=block.device)[block.clamp(max=len(levels) - 1)]
    inputs.q[..., -1] = 1
    if crossing:
        inputs.q[:, :, 1::2, -1] = -1
    rows.rope[inputs.topk_slots.long(), -1] = (level / inputs.sm_scale).bfloat16()
    return inputs


LEVELS: dict[str, Mutation] = {
    "up": partial(with_levels, [-1000.0, 1000.0]),
    "down": partial(with_levels, [1000.0, -1000.0]),
    "crossing": partial(with_levels, [0.0, -1000.0, 1000.0], crossing=True),
    "far-below": partial(with_levels, [-1000.0]),
    "valley": partial(with_levels, [1000.0, -1000.0, 1004.0]),
    # each above the last by less than the slack of a reference, and by a little more
    "small-steps": partial(with_levels, [0.0, 4.0, 8.0, 12.0]),
    "steps": partial(with_levels, [-20.0, -14.0, -8.0, -2.0, 4.0]),
}


def nan_value(rows: Rows, wrong: Tensor) -> None:
    rows.values[wrong, 200] = 0x7F


def nan_scale(rows: Rows, wrong: Tensor) -> None:
    rows.scales[wrong, 2] = NAN


def nan_scales(rows: Rows, wrong: Tensor) -> None:
    rows.scales[wrong] = NAN


def nan_rope(rows: Rows, wrong: Tensor) -> None:
    rows.rope[wrong, 63] = NAN


def nan_row(rows: Rows, wrong: Tensor) -> None:
    for part in rows:
        _fill_nan(part, wrong[None])


NAN_PARTS = {
    "value": nan_value,
    "scale": nan_scale,
    "scales": nan_scales,
    "rope": nan_rope,
    "row": nan_row,
}


def nan_in_part(part: str, inputs: Any) -> Any:
    """NaN in that part of a row that the first query of sequence 1 lists. Its last query does not,
    where it has several; others may."""
    inputs, rows = opened(inputs)
    slots = inputs.topk_slots.clone()
    wrong = slots[1, 0, 3].clone()
    last = slots[1, 1:][-1:]
    last[last == wrong] = -1
    NAN_PARTS[part](rows, wrong.long())
    return dataclasses.replace(inputs, topk_slots=slots)


SPOILED_HEADS = {1: NAN, 2: INF, 5: -INF}
"""Heads of the queries of sequence 1, and what one of their columns is."""


def with_spoiled_heads(inputs: Any) -> Any:
    inputs, _ = opened(inputs)
    for column, (head, value) in zip((7, 300, 550), SPOILED_HEADS.items(), strict=True):
        inputs.q[1, :, head, column] = value
    return inputs


def assert_spoils_only_those_heads(inputs: Any, outputs: Any) -> None:
    """The spoiled heads are NaN throughout; their queries' other heads and the other queries are
    right."""
    assert outputs.out[1, :, list(SPOILED_HEADS)].isnan().all()
    every = torch.arange(inputs.q.shape[0], device=inputs.q.device)
    assert_right("sparse_decode", inputs, outputs, rows=every[every != 1])
    heads = [head for head in range(inputs.q.shape[2]) if head not in SPOILED_HEADS]
    sink = None if inputs.attn_sink is None else inputs.attn_sink[heads]
    fewer = dataclasses.replace(inputs, q=inputs.q[:, :, heads], attn_sink=sink)
    assert_right("sparse_decode", fewer, SparseDecodeOutputs(*(x[:, :, heads] for x in outputs)))


def attend_exactly(inputs: Any) -> SparseDecodeOutputs:
    """Attention over the rows as they are written, in fp64: no key is rounded to bf16."""
    cache, slots = inputs.kv_cache.flatten(0, 1), inputs.topk_slots.flatten(0, 1).long()
    valid = (slots >= 0) & (slots < cache.shape[0])
    if inputs.topk_lens is not None:
        position = torch.arange(slots.shape[1], device=slots.device)
        valid &= position < inputs.topk_lens.flatten()[:, None]
    rows = cache[torch.where(valid, slots, 0)]
    values = rows[..., :HEAD_DIM_V].contiguous().view(torch.float8_e4m3fn).double()
    scales = rows[..., HEAD_DIM_V:528].contiguous().view(torch.float32).double()
    rope = rows[..., 528:].contiguous().view(torch.bfloat16).double()
    values = (values.unflatten(-1, (GROUPS, -1)) * scales[..., None]).flatten(-2)
    k = torch.where(valid[..., None], torch.cat([values, rope], -1), 0.0)
    q = inputs.q.flatten(0, 1).double()
    logits = torch.einsum("qhd,qkd->qhk", q, k) * inputs.sm_scale
    logits.masked_fill_(~valid[:, None], -INF)
    lse = logits.logsumexp(-1)
    total = lse if inputs.attn_sink is None else torch.logaddexp(lse, inputs.attn_sink.double())
    weights = torch.exp(logits - total.where(valid.any(-1)[:, None], 0.0)[..., None])
    out = torch.einsum("qhk,qkd->qhd", weights, k[..., :HEAD_DIM_V])
    lse = lse.masked_fill(~valid.any(-1)[:, None], INF)
    shape = inputs.q.shape[:2]
    return SparseDecodeOutputs(out.unflatten(0, shape), lse.unflatten(0, shape))


def assert_near_exact(inputs: Any, outputs: Any) -> None:
    """The operator's tolerances and budget, held against the exact attention; and each head of each
    query, however small, to two roundings of bf16 and what fp32 logits of its size leave open."""
    exact = attend_exactly(inputs)
    for check in (
        compare_tensors("out", outputs.out, exact.out, DECODE_OUT_TOLERANCE),
        compare_tensors("lse", outputs.lse, exact.lse, DECODE_LSE_TOLERANCE),
        *budget_checks(outputs, exact, plain(inputs)),
    ):
        assert check.passed, check
    error = (outputs.out.double() - exact.out).norm(dim=-1)
    size = exact.out.norm(dim=-1)
    logits = exact.lse.where(exact.lse.isfinite(), 0.0).abs().clamp(min=1)
    assert (error <= size * (2.0**-8 + logits * 2.0**-22)).all(), (error / size).max()
