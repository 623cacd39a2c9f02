"""Sparse prefill over e4m3 queries, keys and values: the mathematics of `sparse_prefill`.

A latent value is its e4m3 number times a scale; the rope columns stay bf16, as in DeepSeek's cache:

    q̂[i, h] = (q[i, h] · q_scale[i, h], q_rope[i, h])        k̂[n] = (kv[n] · kv_scale, k_rope[n])
    out[i, h] = softmax over p of (sm_scale · ⟨q̂[i, h], k̂[n_p]⟩) · kv[n_p] · kv_scale
    with n_p = topk_indices[i, p]

Shapes:
    q             [seq_len_q, num_heads, 512]  e4m3
    q_rope        [seq_len_q, num_heads, 64]   bf16   None where there are no rope columns
    q_scale       [seq_len_q, num_heads]       fp32   > 0
    kv            [seq_len_kv, 512]            e4m3   one key for all heads, which is the value too
    k_rope        [seq_len_kv, 64]             bf16   None with q_rope
    kv_scale      [1]                          fp32   > 0
    topk_indices, attn_sink, topk_lens, out, max_logits, lse: as in `sparse_prefill`

One scale for all keys: e4m3 is a floating-point format, so a key 2^8 times smaller than the largest
keeps its three bits, and a scale a key would have to be gathered with it and multiplied into each
weight. `quantize` takes powers of two for both scales, so that dividing by them is exact.

Conventions: those of `sparse_prefill`. The reference starts from the rounded inputs
(`fp8_attention.py`); how far the rounded ones are from bf16 attention is a figure beside it,
`rounding_error`, on which no verdict rests.

Source: DeepSeek-V3.2 report, section 2.1; FlashAttention-3 (weights in e4m3, summed before they
are rounded).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsa_bench.accuracy import Check
from dsa_bench.expect import expect_same_device, expect_tensor
from dsa_bench.kernels import fp8, sparse_prefill
from dsa_bench.kernels.attention import AttentionRow, attend
from dsa_bench.kernels.fp8_attention import (
    check_outputs,
    logit_units,
    out_tolerance,
    out_units,
    round_weights,
    sampled,
)
from dsa_bench.kernels.sparse_prefill import (
    SparsePrefillInputs,
    SparsePrefillOutputs,
    SparsePrefillShape,
)
from dsa_bench.operator import Cost, Memory, Operator, Unsupported
from dsa_bench.preset import Preset
from dsa_bench.record import Case

WIDTH, ROPE = 512, 64
FIGURE_ROWS = 8


@dataclass(frozen=True, slots=True)
class Fp8PrefillInputs:
    q: Tensor
    q_rope: Tensor | None
    q_scale: Tensor
    kv: Tensor
    k_rope: Tensor | None
    kv_scale: Tensor
    topk_indices: Tensor
    sm_scale: float
    attn_sink: Tensor | None = None
    topk_lens: Tensor | None = None
    exact: Callable[[], SparsePrefillInputs] | None = None
    """Makes the bf16 inputs again that these were rounded from."""

    def select(self, rows: Tensor) -> "Fp8PrefillInputs":
        """The same keys, only the queries in `rows`."""
        return dataclasses.replace(
            self,
            q=self.q[rows],
            q_rope=None if self.q_rope is None else self.q_rope[rows],
            q_scale=self.q_scale[rows],
            topk_indices=self.topk_indices[rows],
            topk_lens=None if self.topk_lens is None else self.topk_lens[rows],
            exact=None,
        )


def quantize(inputs: SparsePrefillInputs) -> Fp8PrefillInputs:
    """bf16 inputs -> e4m3 latents with power-of-two scales, a query head's and all keys'."""
    q, q_scale = fp8.quantize(inputs.q[..., :WIDTH], WIDTH, fp8.LATENT_SCALE_FLOOR)
    latents = inputs.kv[:, :WIDTH]
    largest = latents.abs().amax().float() / fp8.E4M3_MAX if latents.numel() else torch.ones(())
    kv_scale = fp8.round_up_to_power_of_two(largest.clamp_min(fp8.LATENT_SCALE_FLOOR).reshape(1))
    has_rope = inputs.kv.shape[1] > WIDTH
    return Fp8PrefillInputs(
        q=q,
        q_rope=inputs.q[..., WIDTH:].contiguous() if has_rope else None,
        q_scale=q_scale.squeeze(-1),
        kv=(latents / kv_scale.bfloat16()).to(torch.float8_e4m3fn),
        k_rope=inputs.kv[:, WIDTH:].contiguous() if has_rope else None,
        kv_scale=kv_scale,
        topk_indices=inputs.topk_indices,
        sm_scale=inputs.sm_scale,
        attn_sink=inputs.attn_sink,
        topk_lens=inputs.topk_lens,
    )


def make_inputs(
    shape: SparsePrefillShape, *, seed: int, device: torch.device | str
) -> Fp8PrefillInputs:
    """The inputs that `sparse_prefill` makes of this seed, rounded."""

    def exact() -> SparsePrefillInputs:
        return sparse_prefill.make_inputs(shape, seed=seed, device=device)

    return dataclasses.replace(quantize(exact()), exact=exact)


def dequantize(inputs: Fp8PrefillInputs, rows: Tensor | None = None) -> SparsePrefillInputs:
    """The rounded inputs in fp32, of all queries or of these."""
    inputs = inputs if rows is None else inputs.select(rows)
    q = inputs.q.float() * inputs.q_scale.unsqueeze(-1)
    kv = inputs.kv.float() * inputs.kv_scale
    if inputs.q_rope is not None and inputs.k_rope is not None:
        q = torch.cat([q, inputs.q_rope.float()], -1)
        kv = torch.cat([kv, inputs.k_rope.float()], -1)
    return SparsePrefillInputs(
        q, kv, inputs.topk_indices, inputs.sm_scale, WIDTH, inputs.attn_sink, inputs.topk_lens
    )


def reference(inputs: Fp8PrefillInputs, *, rows: Tensor | None = None) -> SparsePrefillOutputs:
    """`sparse_prefill.reference` over the rounded inputs."""
    return sparse_prefill.reference(dequantize(inputs, rows))


def plain(inputs: Fp8PrefillInputs, *, rows: Tensor | None = None) -> SparsePrefillOutputs:
    """The same with the roundings of a fp8 kernel: the measure of its error."""
    return _attend_rounded_rows(dequantize(inputs, rows))


def _attend_rounded_rows(inputs: SparsePrefillInputs) -> SparsePrefillOutputs:
    return sparse_prefill.attend_rows(inputs, None, _attend_rounded)


def _attend_rounded(
    q: Tensor, k: Tensor, valid: Tensor, sm_scale: float, head_dim_v: int, attn_sink: Tensor | None
) -> AttentionRow:
    """`attend` of [rows, heads, …] over [rows, keys, …] with `round_weights`."""
    k = k.masked_fill(~valid[..., None], 0.0)
    logits = torch.matmul(q, k.mT).mul(sm_scale).masked_fill(~valid[:, None], float("-inf"))
    if not k.shape[1]:
        nothing = logits.new_full(q.shape[:2], float("-inf"))
        return AttentionRow(q.new_zeros(*q.shape[:2], head_dim_v).bfloat16(), nothing, -nothing)
    weights, largest, lse = round_weights(logits)
    out = torch.matmul(weights, k[..., :head_dim_v])
    if attn_sink is not None:
        share = torch.exp(lse - torch.logaddexp(lse, attn_sink.expand_as(lse)))
        out = out * share.nan_to_num(nan=0.0)[..., None]
    is_empty = ~valid.any(-1)[:, None]
    return AttentionRow(out.bfloat16(), largest, lse.masked_fill(is_empty, float("inf")))


def check(
    inputs: Fp8PrefillInputs, outputs: SparsePrefillOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """All outputs against the fp32 reference; limits as in `fp8_attention.py`."""
    actual = outputs if rows is None else SparsePrefillOutputs(*(x[rows] for x in outputs))
    exact = dequantize(inputs, rows)
    k = exact.kv[_listed(exact)]
    k = k[k.isfinite().all(1)]
    longest = k.norm(dim=1).max() if len(k) else k.new_zeros(())
    magnitudes = sparse_prefill.attend_rows(exact, None, _attend_magnitudes).out
    return check_outputs(
        actual,
        sparse_prefill.reference(exact),
        _attend_rounded_rows(exact),
        out_tolerance(k[:, :WIDTH]),
        out_unit=out_units(magnitudes, k[:, :WIDTH]),
        logit_unit=logit_units(exact.q.norm(dim=-1), longest, inputs.sm_scale),
    )


def _attend_magnitudes(q: Tensor, k: Tensor, *args: Any) -> AttentionRow:
    """`attend` whose values are the magnitudes of the keys': queries are blind to those columns."""
    q = torch.cat([q.new_zeros(*q.shape[:2], WIDTH), q], -1)
    return attend(q, torch.cat([k[..., :WIDTH].abs(), k], -1), *args)


def _listed(inputs: SparsePrefillInputs) -> Tensor:
    """Numbers of some keys that queries name; those that nobody names may be NaN."""
    indices = inputs.topk_indices
    valid = (indices >= 0) & (indices < inputs.kv.shape[0])
    if inputs.topk_lens is not None:
        positions = torch.arange(indices.shape[1], device=indices.device)
        valid &= positions < inputs.topk_lens[:, None]
    return sampled(indices[valid]).long()


def figures(
    inputs: Fp8PrefillInputs, outputs: SparsePrefillOutputs, *, rows: Tensor | None = None
) -> dict[str, Any]:
    """`rounding_error` of a few rows."""
    if inputs.exact is None:
        return {}
    if rows is None:
        rows = torch.arange(outputs.out.shape[0], device=outputs.out.device)
    rows = rows[:FIGURE_ROWS]
    wanted = sparse_prefill.reference(inputs.exact(), rows=rows)
    return rounding_error(outputs.out[rows], wanted.out)


def rounding_error(out: Tensor, wanted: Tensor) -> dict[str, Any]:
    """`rounding_error`: ‖out - wanted‖ / ‖wanted‖; `wanted` is the same attention in fp32 over the
    bf16 tensors. Nothing where that is 0."""
    length, difference = wanted.norm(), (out.float() - wanted).norm()
    if not length:
        return {}
    return {"rounding_error": {"relative_l2": (difference / length).item()}}


def check_arguments(
    q: Tensor,
    q_rope: Tensor | None,
    q_scale: Tensor,
    kv: Tensor,
    k_rope: Tensor | None,
    kv_scale: Tensor,
    topk_indices: Tensor,
    sm_scale: float,
    attn_sink: Tensor | None,
    topk_lens: Tensor | None,
) -> None:
    """Refuse what a kernel cannot read, in a sentence."""
    e4m3, bf16, fp32, int32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int32
    expect_tensor("q", q, e4m3, seq_len_q=None, num_heads=None, head_dim_v=WIDTH)
    queries, heads = q.shape[:2]
    expect_tensor("q_scale", q_scale, fp32, seq_len_q=queries, num_heads=heads)
    expect_tensor("kv", kv, e4m3, seq_len_kv=None, head_dim_v=WIDTH)
    expect_tensor("kv_scale", kv_scale, fp32, one=1)
    if (q_rope is None) != (k_rope is None):
        raise ValueError("q_rope and k_rope must be given both or neither")
    if q_rope is not None and k_rope is not None:
        expect_tensor("q_rope", q_rope, bf16, seq_len_q=queries, num_heads=heads, rope=ROPE)
        expect_tensor("k_rope", k_rope, bf16, seq_len_kv=kv.shape[0], rope=ROPE)
    expect_tensor("topk_indices", topk_indices, int32, seq_len_q=queries, topk=None)
    if attn_sink is not None:
        expect_tensor("attn_sink", attn_sink, fp32, num_heads=heads)
    if topk_lens is not None:
        expect_tensor("topk_lens", topk_lens, int32, seq_len_q=queries)
    tensors = {
        "q": q, "q_rope": q_rope, "q_scale": q_scale, "kv": kv, "k_rope": k_rope,
        "topk_indices": topk_indices,
    }  # fmt: skip
    expect_same_device(**tensors, kv_scale=kv_scale, attn_sink=attn_sink, topk_lens=topk_lens)
    if not sm_scale > 0:
        raise ValueError(f"sm_scale must be > 0, got {sm_scale} (V3.2: 0.1352338)")
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, got strides {tuple(tensor.stride())}"
                " (pass x.contiguous())"
            )


def cost(shape: SparsePrefillShape) -> Cost:
    """The FLOP of `sparse_prefill`; a byte a latent column, two a rope column, and the scales."""
    heads = shape.seq_len_q * shape.num_heads
    row = 2.0 * shape.head_dim_qk - shape.head_dim_v
    return Cost(
        flops=sparse_prefill.cost(shape).flops,
        bytes_read=heads * (row + 4.0)
        + shape.listed_keys * row
        + 4.0 * (shape.seq_len_q * shape.topk + 1),
        bytes_written=heads * (2.0 * shape.head_dim_v + 8.0),
    )


def memory(shape: SparsePrefillShape) -> Memory:
    heads = shape.seq_len_q * shape.num_heads
    row = 2 * shape.head_dim_qk - shape.head_dim_v
    return Memory(
        input_bytes=(heads + shape.seq_len_kv) * row
        + 4 * (heads + shape.seq_len_q * shape.topk + 1),
        output_bytes=heads * (2 * shape.head_dim_v + 8),
    )


def shape_of(case: Case, preset: Preset) -> SparsePrefillShape:
    if case.precision != "fp8":
        raise Unsupported(
            f"sparse_prefill_fp8 computes in fp8, got precision {case.precision}"
            " (add --precision fp8, or take sparse_prefill)"
        )
    shape = sparse_prefill.shape_of(dataclasses.replace(case, precision="bf16"), preset)
    expect_widths(shape)
    return shape


def expect_widths(shape: SparsePrefillShape) -> None:
    """Raise Unsupported where latents or rope columns are not as wide as here."""
    if shape.head_dim_v != WIDTH or shape.head_dim_qk not in (WIDTH, WIDTH + ROPE):
        raise Unsupported(
            f"sparse_prefill_fp8 has {WIDTH} latent columns and {ROPE} or no rope columns,"
            f" this preset has head_dim {shape.head_dim_qk}/{shape.head_dim_v}"
        )


OPERATOR = Operator(
    name="sparse_prefill_fp8",
    summary="sparse_prefill over fp8 queries, keys and values, with fp8 weights",
    phases=("prefill",),
    axes=frozenset({"topk", "num_heads", "inputs", "precision"}),
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=check,
    cost=cost,
    memory=memory,
    num_rows=lambda shape: shape.seq_len_q,
    figures=figures,
    finite=("out",),
    precisions=("fp8",),
)
