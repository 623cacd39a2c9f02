"""Sparse prefill over e4m3 rows, for Hopper in Gluon: four warpgroups, each with one thing to do.

A program is launched for each SM and takes one piece of work, 64 heads of one query, after the
other. A piece goes through its keys in blocks of 64:

    loader  4 warps   gathers the listed rows into a ring of blocks, and the next query
    scores  4 warps   S = Q·Kᵀ, weights P = 2^(S - maximum) → ring of weights, with the factor that
                      outputs so far are to be multiplied by because the maximum grew
    left    4 warps   Oᵀ = Oᵀ · factor + Vᵀ·Pᵀ, columns   0..255 of the values
    right   4 warps   the same for columns 256..511

Each role has a file: `fp8_loader.py`, `fp8_scores.py`, `fp8_outputs.py`; what they share is in
`fp8_tiles.py`. Shared memory: query 40 KB, four blocks of keys 160 KB, two of weights 8 KB: 209 of
227 KB. Supports any number of heads (64 at a time, the rest of a tile is padding), queries and
keys, rows with and without rope columns. What was tried and what it gave:
`docs/kernels/sparse_prefill_fp8.md`.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsa_bench.kernels.attention import LOG2_E
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.fp8_loader import load
from dsa_bench.kernels.fp8_outputs import accumulate
from dsa_bench.kernels.fp8_scores import score
from dsa_bench.kernels.fp8_tiles import (
    Arguments,
    allocate_tiles,
)
from dsa_bench.kernels.sparse_prefill import SparsePrefillOutputs, SparsePrefillShape
from dsa_bench.kernels.sparse_prefill_fp8 import Fp8PrefillInputs, check_arguments
from dsa_bench.kernels.weight_ring import LEFT_READY, RIGHT_READY
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "sparse_prefill_fp8"
BLOCK_H, BLOCK_KV = 64, 64
OUTPUT_REGISTERS, LOADER_REGISTERS = 176, 48
"""A thread; what is left of 512, scores + 2 outputs + loader, are the scores'. With 168 for the
outputs ptxas runs their products one by one (C7512), with 184 or 56 for the loader the scores
spill, with 40 the loader does where lists are ragged."""
MAX_TOPK = 4096
"""All keys are summed in one accumulator of some 14 bits, and what is lost grows with them: 0.8 %
of `out` at topk 2048, where 3.1 % are allowed."""


# a 1 would be specialised to a constant, which an aggregate refuses
@gluon.jit(do_not_specialize=["num_pieces", "num_keys", "num_heads", "topk"])
def _sparse_prefill_fp8_kernel(
    q_ptr, q_rope_ptr, q_scale_ptr, kv_ptr, k_rope_ptr, kv_scale_ptr,
    indices_ptr, lens_ptr, sink_ptr, out_ptr, max_ptr, lse_ptr,
    num_pieces, num_keys, num_heads, topk, sm_scale_log2,
    NUM_BLOCKS: gl.constexpr, HAS_LENS: gl.constexpr, HAS_SINK: gl.constexpr,
    IS_RAGGED: gl.constexpr, HEADS_MASKED: gl.constexpr, HAS_ROPE: gl.constexpr,
    OUTPUT_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program: its four roles, piece after piece."""
    arguments = Arguments(
        q_ptr, q_rope_ptr, q_scale_ptr, kv_ptr, k_rope_ptr, kv_scale_ptr,
        indices_ptr, lens_ptr, sink_ptr, out_ptr, max_ptr, lse_ptr,
        num_pieces, num_keys, num_heads, topk, sm_scale_log2,
        NUM_BLOCKS, HAS_LENS, HAS_SINK, IS_RAGGED, HEADS_MASKED, HAS_ROPE,
    )  # fmt: skip
    tiles = allocate_tiles()
    # the first role alone has the arguments in constant memory; the others keep them in registers
    gl.warp_specialize(
        [
            (score, (arguments, tiles)),
            (accumulate, (arguments, tiles, gl.constexpr(0), LEFT_READY)),
            (accumulate, (arguments, tiles, gl.constexpr(128), RIGHT_READY)),
            (load, (arguments, tiles)),
        ],
        [4, 4, 4],
        [OUTPUT_REGISTERS, OUTPUT_REGISTERS, LOADER_REGISTERS],
    )


def sparse_prefill_fp8(
    q: Tensor,
    q_rope: Tensor | None,
    q_scale: Tensor,
    kv: Tensor,
    k_rope: Tensor | None,
    kv_scale: Tensor,
    topk_indices: Tensor,
    *,
    sm_scale: float,
    attn_sink: Tensor | None = None,
    topk_lens: Tensor | None = None,
) -> SparsePrefillOutputs:
    """Sparse multi-query attention of a prefill chunk in fp8; formula and conventions as in
    `sparse_prefill_fp8.py`.

    Args:
        q: [seq_len_q, num_heads, 512] e4m3, contiguous as all tensors here.
        q_rope: [seq_len_q, num_heads, 64] bf16, or None with k_rope.
        q_scale: [seq_len_q, num_heads] fp32, > 0.
        kv: [seq_len_kv, 512] e4m3.
        k_rope: [seq_len_kv, 64] bf16.
        kv_scale: [1] fp32, > 0.
        topk_indices: [seq_len_q, topk] int32, topk up to 4096.
        sm_scale: > 0.
        attn_sink: [num_heads] fp32.
        topk_lens: [seq_len_q] int32.
    Returns:
        out [seq_len_q, num_heads, 512] bf16, max_logits and lse [seq_len_q, num_heads] fp32.
    """
    check_arguments(
        q, q_rope, q_scale, kv, k_rope, kv_scale, topk_indices, sm_scale, attn_sink, topk_lens
    )
    (seq_len_q, num_heads, _), topk = q.shape, topk_indices.shape[1]
    if topk > MAX_TOPK:
        raise ValueError(f"topk must be up to {MAX_TOPK}, got {topk} (sparse_prefill takes more)")
    out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    max_logits = torch.empty(seq_len_q, num_heads, device=q.device)
    lse = torch.empty_like(max_logits)
    if out.numel() == 0 or topk == 0:
        return SparsePrefillOutputs(
            out.zero_(), max_logits.fill_(float("-inf")), lse.fill_(float("inf"))
        )
    num_pieces = seq_len_q * -(-num_heads // BLOCK_H)
    num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    _sparse_prefill_fp8_kernel[(min(num_pieces, num_sms),)](
        q, q_rope if q_rope is not None else out, q_scale,
        kv, k_rope if k_rope is not None else out, kv_scale,
        topk_indices, topk_lens if topk_lens is not None else topk_indices,
        attn_sink if attn_sink is not None else lse,
        out.view(torch.int32), max_logits, lse,
        num_pieces, kv.shape[0], num_heads, topk, sm_scale * LOG2_E,
        NUM_BLOCKS=-(-topk // BLOCK_KV),
        HAS_LENS=topk_lens is not None, HAS_SINK=attn_sink is not None,
        IS_RAGGED=topk_lens is not None or topk % BLOCK_KV != 0,
        HEADS_MASKED=num_heads % BLOCK_H != 0, HAS_ROPE=q_rope is not None,
        OUTPUT_REGISTERS=OUTPUT_REGISTERS, LOADER_REGISTERS=LOADER_REGISTERS, num_warps=4,
    )  # fmt: skip
    return SparsePrefillOutputs(out, max_logits, lse)


def run(inputs: Fp8PrefillInputs) -> SparsePrefillOutputs:
    return sparse_prefill_fp8(
        inputs.q, inputs.q_rope, inputs.q_scale, inputs.kv, inputs.k_rope, inputs.kv_scale,
        inputs.topk_indices, sm_scale=inputs.sm_scale, attn_sink=inputs.attn_sink,
        topk_lens=inputs.topk_lens,
    )  # fmt: skip


def supports(shape: SparsePrefillShape, machine: Machine) -> str | None:
    if not machine.is_hopper:
        return f"gluon sparse_prefill_fp8 needs a Hopper GPU (sm_90), this is {machine.name}"
    if shape.topk > MAX_TOPK:
        return (
            f"gluon sparse_prefill_fp8 takes topk up to {MAX_TOPK}, this case has {shape.topk}:"
            " sums of more e4m3 products lose too much"
        )
    return None


IMPLEMENTATIONS = (Implementation(name="gluon", run=run, supports=supports, priority=20),)


def compile_cases() -> list[CompileCase]:
    """The V3.2 shape, the one with every flag set, and rows without rope columns."""
    byte, bf16, fp32, int32 = "*fp8e4nv:16", "*bf16:16", "*fp32:16", "*i32:16"
    signature = {
        "q_ptr": byte, "q_rope_ptr": bf16, "q_scale_ptr": fp32, "kv_ptr": byte, "k_rope_ptr": bf16,
        "kv_scale_ptr": fp32, "indices_ptr": int32, "lens_ptr": int32, "sink_ptr": fp32,
        "out_ptr": int32, "max_ptr": fp32, "lse_ptr": fp32,
        "num_pieces": "i32", "num_keys": "i32", "num_heads": "i32", "topk": "i32",
        "sm_scale_log2": "fp32",
    }  # fmt: skip
    registers = {"OUTPUT_REGISTERS": OUTPUT_REGISTERS, "LOADER_REGISTERS": LOADER_REGISTERS}
    flags = ("HAS_LENS", "HAS_SINK", "IS_RAGGED", "HEADS_MASKED")
    return [
        CompileCase(
            name=f"sparse_prefill_fp8_gluon[{label}]",
            kernel=_sparse_prefill_fp8_kernel,
            signature=signature,
            constexprs={
                **dict.fromkeys(flags, value), **registers, "NUM_BLOCKS": 32, "HAS_ROPE": has_rope
            },
            options={"num_warps": 4},
            must_have={
                "QGMMA.64x64": 48,
                "HGMMA.64x64x16": 8 if has_rope else 0,
                "LDSM.16.MT88.4": 16,
                "LDGSTS": 36 if has_rope else 32,
            },
        )
        for label, value, has_rope in (
            ("plain", False, True), ("all-flags", True, True), ("no-rope", False, False),
        )
    ]  # fmt: skip
