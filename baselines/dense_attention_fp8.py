"""Dense attention over e4m3 queries, keys and values: the mathematics of `dense_attention`.

A value is its e4m3 number times a fp32 scale, amax / 448, made outside the timed call from the
bf16 tensors of `dense_attention`. With q̂ = q · q_scale and so on:

    out[i, h] = Σ_n softmax over n of (sm_scale · ⟨q̂[i, h], k̂[n, h]⟩) · v̂[n, h]
    lse[i, h] = ln Σ_n exp(sm_scale · ⟨q̂[i, h], k̂[n, h]⟩)
    over n = 0 … seq_len_kv - seq_len_q + i

Prefill, the MHA form of one prompt, has one scale a head:
    q    [seq_len_q, num_heads, 192]    e4m3     q_scale  [num_heads]  fp32
    k    [seq_len_kv, num_heads, 192]   e4m3     k_scale  [num_heads]  fp32
    v    [seq_len_kv, num_heads, 128]   e4m3     v_scale  [num_heads]  fp32
    out  [seq_len_q, num_heads, 128]    bf16
    lse  [seq_len_q, num_heads]         fp32     natural logarithm

Decode, the MQA form of a batch, has one scale a tensor:
    q    [batch_size, seq_len_q, num_heads, 576]  e4m3     q_scale   [1]  fp32
    kv   [batch_size, seq_len_kv, 576]            e4m3     kv_scale  [1]  fp32
    out  [batch_size, seq_len_q, num_heads, 512]  bf16     values are kv's first 512 columns
    lse  [batch_size, seq_len_q, num_heads]       fp32     natural logarithm
or, with `pages`, as in `dense_attention`:
    kv   [num_pages, 64, 576]                     e4m3

Conventions: those of `dense_attention`. The reference starts from the rounded inputs, so what was
lost when they were rounded is not held against a kernel, and no verdict speaks of it. A kernel
rounds the weights of the softmax to e4m3 as well, for their product with the values: that is the
error it is allowed.

Source: FlashAttention-3 (descales of a head), FlashMLA's dense decode in fp8 (one descale).
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_bench.accuracy import Check, Tolerance
from dsa_bench.baselines import dense_attention
from dsa_bench.baselines.dense_attention import (
    INPUT_CHUNK_ELEMENTS,
    Attended,
    DenseAttentionShape,
    DenseDecodeInputs,
    DenseInputs,
    DenseOutputs,
    DensePrefillInputs,
    attend_rows,
    kv_rows,
    make_pages,
    make_tensor,
)
from dsa_bench.baselines.key_pages import KeyPages
from dsa_bench.kernels import fp8_attention
from dsa_bench.kernels.fp8 import E4M3_MAX
from dsa_bench.kernels.fp8_attention import sampled
from dsa_bench.operator import Cost, Memory, Operator, Unsupported
from dsa_bench.preset import Preset
from dsa_bench.record import Case

SCALE_FLOOR = 1e-12
"""Of a tensor that is all zeros."""
PIECE_KEYS = 4096
"""Keys that one accumulator may sum. Hopper adds e4m3 products with some 14 bits, so what is lost
grows with the keys. The libraries sum all keys of a query, or of a part of its split, in one
accumulator: on an H100 the output of 128K keys is 53 % off, in pieces of 8192 keys 4.1 %, of 4096
keys, whose results are joined in fp32, 1.9 %, where 3.1 % are allowed (`docs/results/h100`).
Source: https://github.com/Dao-AILab/flash-attention/pull/2250."""
PARTIAL_RESULTS = 132
"""Parts, beyond one a sequence, that a decode is split into: an H100 has as many SMs."""


@dataclass(frozen=True, slots=True)
class Fp8PrefillInputs:
    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor
    sm_scale: float


@dataclass(frozen=True, slots=True)
class Fp8DecodeInputs:
    q: Tensor
    kv: Tensor
    q_scale: Tensor
    kv_scale: Tensor
    sm_scale: float
    head_dim_v: int = 512
    pages: KeyPages | None = None


Fp8Inputs = Fp8PrefillInputs | Fp8DecodeInputs


def quantize(x: Tensor, *, per_head: bool) -> tuple[Tensor, Tensor]:
    """e4m3 values and their scales, amax / 448: [num_heads] of dimension -2, or [1] of all.

    In parts: in fp32 the keys of 128K tokens would take 13 GB.
    """
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    size = max(1, INPUT_CHUNK_ELEMENTS // math.prod(x.shape[1:]))
    summed = tuple(d for d in range(x.dim()) if not per_head or d != x.dim() - 2)
    largest = torch.stack([part.float().abs().amax(summed) for part in x.split(size)]).amax(0)
    scale = (largest / E4M3_MAX).clamp_min(SCALE_FLOOR)
    divisor = scale.unsqueeze(-1) if per_head else scale
    for part, target in zip(x.split(size), values.split(size), strict=True):
        target.copy_((part.float() / divisor).clamp_(-E4M3_MAX, E4M3_MAX))
    return values, scale.reshape(-1)


def make_inputs(shape: DenseAttentionShape, *, seed: int, device: torch.device | str) -> Fp8Inputs:
    """The tensors that `dense_attention` makes of this seed, each rounded as soon as it is made."""
    g = torch.Generator(device=device).manual_seed(seed)
    heads, width = shape.num_heads, shape.head_dim_qk
    if shape.is_prefill:
        q, q_scale = quantize(
            make_tensor(shape.seq_len_q, heads, width, generator=g), per_head=True
        )
        k, k_scale = quantize(
            make_tensor(shape.seq_len_kv, heads, width, generator=g), per_head=True
        )
        v, v_scale = quantize(
            make_tensor(shape.seq_len_kv, heads, shape.head_dim_v, generator=g), per_head=True
        )
        return Fp8PrefillInputs(q, k, v, q_scale, k_scale, v_scale, shape.sm_scale)
    q, q_scale = quantize(
        make_tensor(shape.batch_size, shape.seq_len_q, heads, width, generator=g), per_head=False
    )
    kv, kv_scale = quantize(make_tensor(*kv_rows(shape), width, generator=g), per_head=False)
    pages = make_pages(shape, device)
    return Fp8DecodeInputs(q, kv, q_scale, kv_scale, shape.sm_scale, shape.head_dim_v, pages)


def _unscaled(inputs: Fp8Inputs) -> tuple[DenseInputs, Tensor]:
    """The scales of queries and keys put into fp32 queries, and the factor that is left to `out`.

    Keys and values stay e4m3; whoever attends widens them in parts.
    """
    q = inputs.q.float()
    if isinstance(inputs, Fp8PrefillInputs):
        q *= (inputs.q_scale * inputs.k_scale).unsqueeze(-1)
        factor = inputs.v_scale.unsqueeze(-1)
        return DensePrefillInputs(q, inputs.k, inputs.v, inputs.sm_scale), factor
    q *= inputs.q_scale * inputs.kv_scale
    unscaled = DenseDecodeInputs(q, inputs.kv, inputs.sm_scale, inputs.head_dim_v, inputs.pages)
    return unscaled, inputs.kv_scale


def reference(inputs: Fp8Inputs, *, rows: Tensor | None = None) -> DenseOutputs:
    """The formula in fp32 over the rounded inputs.

    A row is a query in prefill, a sequence in decode.
    """
    unscaled, factor = _unscaled(inputs)
    out, lse = dense_attention.reference(unscaled, rows=rows)
    return DenseOutputs(out.mul_(factor), lse)


def plain(inputs: Fp8Inputs, *, rows: Tensor | None = None) -> DenseOutputs:
    """The same with the roundings of a fp8 kernel: the measure of its error."""
    unscaled, factor = _unscaled(inputs)
    out, lse = attend_rows(unscaled, rows, torch.float32, _attend_chunk_rounded)
    return DenseOutputs(out.mul_(factor).bfloat16(), lse)


def _attend_chunk_rounded(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, sm_scale: float
) -> Attended:
    """Attention with weights that are rounded to e4m3 before they meet the values."""
    logits = torch.einsum("qhd,khd->qhk", q, k) * sm_scale
    weights, _, lse = fp8_attention.round_weights(logits.masked_fill_(hidden, float("-inf")))
    return Attended(torch.einsum("qhk,khd->qhd", weights, v), lse)


def out_tolerance(inputs: Fp8Inputs) -> Tolerance:
    if isinstance(inputs, Fp8PrefillInputs):
        values = sampled(inputs.v).float() * inputs.v_scale.unsqueeze(-1)
    else:
        keys = sampled(inputs.kv.flatten(0, 1)[:, : inputs.head_dim_v])
        values = keys.float() * inputs.kv_scale
    return fp8_attention.out_tolerance(values)


def check(
    inputs: Fp8Inputs, outputs: DenseOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """Both outputs against the fp32 reference; limits as in `fp8_attention.py`."""
    actual = outputs
    if rows is not None:
        lse = None if outputs.lse is None else outputs.lse[rows]
        actual = DenseOutputs(outputs.out[rows], lse)
    return fp8_attention.check_outputs(
        actual, reference(inputs, rows=rows), plain(inputs, rows=rows), out_tolerance(inputs)
    )


def cost(shape: DenseAttentionShape) -> Cost:
    """The FLOP of `dense_attention`; one byte an element of the inputs, and their scales."""
    heads = shape.queries * shape.num_heads
    num_scales = 3 * shape.num_heads if shape.is_prefill else 2
    return Cost(
        flops=dense_attention.cost(shape).flops,
        bytes_read=heads * shape.head_dim_qk + shape.kv_elements + 4.0 * num_scales,
        bytes_written=heads * (2.0 * shape.head_dim_v + 4.0),
    )


def num_pieces(seq_len_kv: int) -> int:
    """Pieces of PIECE_KEYS keys."""
    return -(-seq_len_kv // PIECE_KEYS)


def memory(shape: DenseAttentionShape) -> Memory:
    """Inputs and outputs exactly; the fp32 results of the pieces, if there are several, and in
    decode of the parts of a split, where pieces have queries and bf16 results of their own too; of
    different lengths these also stand in a table with room for the longest."""
    needed = cost(shape)
    heads = shape.seq_len_q * shape.num_heads
    pieces = sum(num_pieces(n) for n in shape.seq_lens)
    is_cut = pieces > shape.batch_size
    room = 0
    if shape.is_prefill:
        parts, row_bytes = pieces if is_cut else 0, 0
    else:
        parts = pieces + PARTIAL_RESULTS
        row_bytes = 2 * shape.head_dim_v + shape.head_dim_qk if is_cut else 0
        if is_cut and shape.is_ragged:
            room = 2 * shape.head_dim_v * shape.batch_size * num_pieces(shape.seq_len_kv)
    return Memory(
        input_bytes=int(needed.bytes_read) + shape.room_elements + shape.table_bytes,
        output_bytes=int(needed.bytes_written),
        workspace_bytes=heads * (4 * parts * (shape.head_dim_v + 1) + pieces * row_bytes + room),
    )


def shape_of(case: Case, preset: Preset) -> DenseAttentionShape:
    if case.precision != "fp8":
        raise Unsupported(
            f"dense_attention_fp8 computes in fp8, got precision {case.precision}"
            " (add --precision fp8, or take dense_attention)"
        )
    return dense_attention.shape_of(dataclasses.replace(case, precision="bf16"), preset)


OPERATOR = Operator(
    name="dense_attention_fp8",
    summary="dense attention over fp8 queries, keys and values, with fp8 weights",
    phases=("prefill", "decode"),
    axes=frozenset({"batch_size", "lengths", "num_heads", "precision"}),
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=check,
    cost=cost,
    memory=memory,
    num_rows=dense_attention.OPERATOR.num_rows,
    always_checked=dense_attention.OPERATOR.always_checked,
    finite=("out",),
    precisions=("fp8",),
)
