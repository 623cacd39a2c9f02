"""Sparse prefill for Hopper in Gluon: a program has a query and 64 heads, in three warpgroups.

The schedule is `seesaw.py`'s: K rows gathered by cp.async into shared memory, O and half of P in
registers, the other half of P through shared memory. Programs of one query run side by side, so
that its rows are gathered once from HBM and meet in L2. It should be bound by tensor cores;
measured, shared-memory traffic (4 KB a 64 × 64 × 16 product) and L2 bandwidth bind it. Supports any
number of heads (64 at a time, the rest of a tile is padding), queries and keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsa_bench.kernels.attention import LOG2_E
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.seesaw import (
    KeyList,
    Result,
    allocate_tiles,
    attend_left,
    attend_right,
    load_bf16_rows,
    load_query,
)
from dsa_bench.kernels.sparse_prefill import (
    SparsePrefillInputs,
    SparsePrefillOutputs,
    SparsePrefillShape,
    check_arguments,
)
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "sparse_prefill"
BLOCK_H = 64
PAIR = 128
"""Keys of two blocks, the step of the main loop."""
HEAD_DIM_QK, HEAD_DIM_V = 576, 512


# a 1 would be specialised to a constant, which KeyList refuses
@gluon.jit(do_not_specialize=["num_keys", "topk"])
def _sparse_prefill_kernel(
    q_ptr, kv_ptr, indices_ptr, lens_ptr, sink_ptr, out_ptr, max_ptr, lse_ptr,
    num_keys, num_heads, topk, qk_scale_log2,
    stride_q_row, stride_q_head, stride_kv_row, stride_indices_row,
    NUM_PAIRS: gl.constexpr, HAS_LENS: gl.constexpr, HAS_SINK: gl.constexpr,
    IS_RAGGED: gl.constexpr, HEADS_MASKED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program: one query, 64 of its heads."""
    head_tiles = (num_heads + 63) // 64
    row = (gl.program_id(0) // head_tiles).to(gl.int64)
    first_head = (gl.program_id(0) % head_tiles) * 64
    length = topk
    if HAS_LENS:
        length = gl.minimum(gl.load(lens_ptr + row), topk)
    keys = KeyList(indices_ptr + row * stride_indices_row, length, num_keys, NUM_PAIRS, IS_RAGGED)
    first_row = (gl.program_id(0) // head_tiles) * num_heads + first_head
    result = Result(
        out_ptr, lse_ptr, max_ptr, sink_ptr, first_row, first_head, num_heads,
        False, True, HAS_SINK, HEADS_MASKED,
    )  # fmt: skip
    tiles = allocate_tiles(128, 128)
    load_query(
        q_ptr + row * stride_q_row + first_head * stride_q_head,
        stride_q_head,
        num_heads - first_head,
        tiles,
        HEADS_MASKED,
    )
    gl.warp_specialize(
        [
            (attend_left, (tiles, keys, result, qk_scale_log2)),
            (attend_right, (tiles, keys, result, qk_scale_log2)),
            (load_bf16_rows, (kv_ptr, stride_kv_row, keys, tiles)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsePrefillConfig:
    """Registers a thread: 4 · (2 consumers + loader) must not exceed 12 · 168."""

    consumer_registers: int = 224
    loader_registers: int = 56


def choose_config(num_heads: int, topk: int) -> SparsePrefillConfig:
    """One for all shapes: 224/56 is best from 32K keys on.

    H100, one run, 4096 queries, 128 heads, topk 2048, TFLOP/s at 8K / 32K / 128K keys:
    224/56 623 / 584 / 522, 216/72 645 / 544 / 496, 208/88 636 / 557 / 507, 232/40 610 / 568 / 508.
    """
    return SparsePrefillConfig()


def sparse_prefill(
    q: Tensor,
    kv: Tensor,
    topk_indices: Tensor,
    *,
    sm_scale: float,
    attn_sink: Tensor | None = None,
    topk_lens: Tensor | None = None,
) -> SparsePrefillOutputs:
    """Sparse multi-query attention of a prefill chunk; formula and conventions as in
    `sparse_prefill.py`.

    Args:
        q: [seq_len_q, num_heads, 576] bf16, strides multiples of 16 elements.
        kv: [seq_len_kv, 576] bf16, row stride a multiple of 16 elements.
        topk_indices: [seq_len_q, topk] int32.
        sm_scale: > 0.
        attn_sink: [num_heads] fp32.
        topk_lens: [seq_len_q] int32.
    Returns:
        out [seq_len_q, num_heads, 512] bf16, max_logits and lse [seq_len_q, num_heads] fp32.
    """
    check_arguments(q, kv, topk_indices, sm_scale, attn_sink, topk_lens)
    (seq_len_q, num_heads, _), topk = q.shape, topk_indices.shape[1]
    out = torch.empty(seq_len_q, num_heads, HEAD_DIM_V, dtype=torch.bfloat16, device=q.device)
    max_logits = torch.empty(seq_len_q, num_heads, device=q.device)
    lse = torch.empty_like(max_logits)
    if out.numel() == 0 or topk == 0:
        return SparsePrefillOutputs(
            out.zero_(), max_logits.fill_(float("-inf")), lse.fill_(float("inf"))
        )
    config = choose_config(num_heads, topk)
    _sparse_prefill_kernel[(seq_len_q * -(-num_heads // BLOCK_H),)](
        q, kv, topk_indices, topk_lens if topk_lens is not None else topk_indices,
        attn_sink if attn_sink is not None else lse, out, max_logits, lse,
        kv.shape[0], num_heads, topk, sm_scale * LOG2_E,
        q.stride(0), q.stride(1), kv.stride(0), topk_indices.stride(0),
        NUM_PAIRS=-(-topk // PAIR), HAS_LENS=topk_lens is not None, HAS_SINK=attn_sink is not None,
        IS_RAGGED=topk_lens is not None or topk % PAIR != 0, HEADS_MASKED=num_heads % BLOCK_H != 0,
        CONSUMER_REGISTERS=config.consumer_registers, LOADER_REGISTERS=config.loader_registers,
        num_warps=4,
    )  # fmt: skip
    return SparsePrefillOutputs(out, max_logits, lse)


def run(inputs: SparsePrefillInputs) -> SparsePrefillOutputs:
    return sparse_prefill(
        inputs.q,
        inputs.kv,
        inputs.topk_indices,
        sm_scale=inputs.sm_scale,
        attn_sink=inputs.attn_sink,
        topk_lens=inputs.topk_lens,
    )


def supports(shape: SparsePrefillShape, machine: Machine) -> str | None:
    if not machine.is_hopper:
        return (
            f"gluon sparse_prefill needs a Hopper GPU (sm_90), this is {machine.name} (use triton)"
        )
    if (shape.head_dim_qk, shape.head_dim_v) != (HEAD_DIM_QK, HEAD_DIM_V):
        return (
            "gluon sparse_prefill needs head_dim 576/512,"
            f" this case has {shape.head_dim_qk}/{shape.head_dim_v}"
        )
    return None


IMPLEMENTATIONS = (Implementation(name="gluon", run=run, supports=supports, priority=20),)


def compile_cases() -> list[CompileCase]:
    """The V3.2 shape, and the one with every flag set."""
    bf16, fp32, int32, size = "*bf16:16", "*fp32:16", "*i32:16", "i32:16"
    signature = {
        "q_ptr": bf16, "kv_ptr": bf16, "indices_ptr": int32, "lens_ptr": int32, "sink_ptr": fp32,
        "out_ptr": bf16, "max_ptr": fp32, "lse_ptr": fp32,
        "num_keys": "i32", "num_heads": size, "topk": "i32", "qk_scale_log2": "fp32",
        "stride_q_row": size, "stride_q_head": size, "stride_kv_row": size,
        "stride_indices_row": size,
    }  # fmt: skip
    config = choose_config(128, 2048)
    registers = {
        "CONSUMER_REGISTERS": config.consumer_registers,
        "LOADER_REGISTERS": config.loader_registers,
    }
    flags = ("HAS_LENS", "HAS_SINK", "IS_RAGGED", "HEADS_MASKED")
    return [
        CompileCase(
            name=f"sparse_prefill_gluon[{label}]",
            kernel=_sparse_prefill_kernel,
            signature=signature,
            constexprs={**dict.fromkeys(flags, value), **registers, "NUM_PAIRS": 16},
            options={"num_warps": 4},
            must_have={"HGMMA.64x256": 16, "HGMMA.64x64": 72, "LDGSTS": 72},
        )
        for label, value in (("plain", False), ("all-flags", True))
    ]
