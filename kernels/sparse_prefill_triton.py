"""Sparse prefill in plain Triton, for every GPU with bf16 tensor cores.

One program owns a query and up to 64 of its heads, and walks the query's list of keys in blocks
(`listed_attention.py`): rows are gathered by asynchronous copies into shared memory, two blocks in
flight; queries stay in shared memory, the output in registers. Programs of one query run side by
side, so that its rows meet in L2. Softmax and products alternate, so the tensor cores idle half of
the time: 280 TFLOP/s on an H100 at 8K keys (128 heads, topk 2048), where Gluon's two warpgroups
reach 642. A list ends at its `topk_lens`. Supports any number of heads, keys and
entries, head_dim 576/512 and 512/512.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_bench.kernels.attention import LOG2_E
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.listed_attention import (
    HALF_V,
    LN_2,
    Tiling,
    ask_device,
    attend_bf16_rows,
    choose_tiling,
    natural_sum,
    output_factor,
    store_columns,
)
from dsa_bench.kernels.sparse_prefill import (
    SparsePrefillInputs,
    SparsePrefillOutputs,
    SparsePrefillShape,
    check_arguments,
)
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "sparse_prefill"
HEAD_DIM_V = 512
HEAD_DIMS_QK = (576, 512)
"""With and without the rotated tail."""


@triton.jit
def _sparse_prefill_kernel(
    q_ptr, kv_ptr, indices_ptr, lens_ptr, sink_ptr, out_ptr, max_ptr, lse_ptr,
    num_keys, num_heads, topk, qk_scale_log2,
    stride_q_row, stride_q_head, stride_kv_row, stride_indices_row,
    HAS_LENS: tl.constexpr, HAS_SINK: tl.constexpr, HAS_ROPE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One program: one query, BLOCK_H of its heads."""
    head_tiles = tl.cdiv(num_heads, BLOCK_H)
    row = (tl.program_id(0) // head_tiles).to(tl.int64)
    first_head = (tl.program_id(0) % head_tiles) * BLOCK_H
    offs_h = tl.arange(0, BLOCK_H)
    is_head = offs_h < num_heads - first_head
    length = topk
    if HAS_LENS:
        length = tl.minimum(tl.load(lens_ptr + row), topk)
    q_ptrs = q_ptr + row * stride_q_row + first_head.to(tl.int64) * stride_q_head
    q_ptrs += offs_h[:, None] * stride_q_head
    acc_left, acc_right, row_max, row_sum = attend_bf16_rows(
        q_ptrs, is_head, kv_ptr, stride_kv_row, num_keys, indices_ptr + row * stride_indices_row,
        length, qk_scale_log2, HAS_ROPE, BLOCK_H, BLOCK_KV, NUM_STAGES,
    )  # fmt: skip
    factor = output_factor(row_max, row_sum, sink_ptr + first_head, offs_h, is_head, HAS_SINK)
    WIDTH: tl.constexpr = 2 * HALF_V
    first_row = row * num_heads + first_head
    out_ptr += first_row * WIDTH
    store_columns(out_ptr, offs_h, acc_left, factor, is_head, WIDTH)
    store_columns(out_ptr + HALF_V, offs_h, acc_right, factor, is_head, WIDTH)
    # log2 of no sum is -inf, of NaN it is NaN
    max_logits = tl.where(row_sum > 0, row_max * LN_2, tl.log2(row_sum))
    tl.store(max_ptr + first_row + offs_h, max_logits, mask=is_head)
    tl.store(lse_ptr + first_row + offs_h, natural_sum(row_max, row_sum), mask=is_head)


def choose_config(num_heads: int, capability: tuple[int, int]) -> Tiling:
    """The tile: there are always enough queries to fill the GPU."""
    return choose_tiling(num_heads, capability)


def sparse_prefill(
    q: Tensor,
    kv: Tensor,
    topk_indices: Tensor,
    *,
    sm_scale: float,
    attn_sink: Tensor | None = None,
    topk_lens: Tensor | None = None,
) -> SparsePrefillOutputs:
    """Sparse multi-query attention of a prefill chunk, as `sparse_prefill.py` defines it.

    Args:
        q: [seq_len_q, num_heads, 576 or 512] bf16, strides multiples of 16 elements.
        kv: [seq_len_kv, 576 or 512] bf16, row stride a multiple of 16 elements.
        topk_indices: [seq_len_q, topk] int32.
        sm_scale: > 0.
        attn_sink: [num_heads] fp32.
        topk_lens: [seq_len_q] int32.
    Returns:
        out [seq_len_q, num_heads, 512] bf16, max_logits and lse [seq_len_q, num_heads] fp32.
    """
    check_arguments(q, kv, topk_indices, sm_scale, attn_sink, topk_lens, HEAD_DIMS_QK)
    (seq_len_q, num_heads, head_dim_qk), topk = q.shape, topk_indices.shape[1]
    out = torch.empty(seq_len_q, num_heads, HEAD_DIM_V, dtype=torch.bfloat16, device=q.device)
    max_logits = torch.empty(seq_len_q, num_heads, device=q.device)
    lse = torch.empty_like(max_logits)
    if out.numel() == 0:
        return SparsePrefillOutputs(out, max_logits, lse)
    config = choose_config(num_heads, ask_device(q.device)[0])
    _sparse_prefill_kernel[(seq_len_q * -(-num_heads // config.block_h),)](
        q, kv, topk_indices, topk_lens if topk_lens is not None else topk_indices,
        attn_sink if attn_sink is not None else lse, out, max_logits, lse,
        kv.shape[0], num_heads, topk, sm_scale * LOG2_E,
        q.stride(0), q.stride(1), kv.stride(0), topk_indices.stride(0),
        HAS_LENS=topk_lens is not None, HAS_SINK=attn_sink is not None,
        HAS_ROPE=head_dim_qk > HEAD_DIM_V, BLOCK_H=config.block_h, BLOCK_KV=config.block_kv,
        NUM_STAGES=config.num_stages, num_warps=config.num_warps, num_stages=config.num_stages,
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
    if machine.capability is None or machine.capability < (8, 0):
        return f"triton sparse_prefill needs sm_80 or newer, this is {machine.name}"
    if shape.head_dim_qk not in HEAD_DIMS_QK or shape.head_dim_v != HEAD_DIM_V:
        return (
            "triton sparse_prefill needs head_dim 576/512 or 512/512,"
            f" this case has {shape.head_dim_qk}/{shape.head_dim_v}"
        )
    return None


IMPLEMENTATIONS = (Implementation(name="triton", run=run, supports=supports, priority=10),)


def compile_cases() -> list[CompileCase]:
    """The V3.2 shape, the one with every flag set, and few heads, which wgmma cannot take."""
    bf16, fp32, int32, size = "*bf16:16", "*fp32:16", "*i32:16", "i32:16"
    signature = {
        "q_ptr": bf16, "kv_ptr": bf16, "indices_ptr": int32, "lens_ptr": int32, "sink_ptr": fp32,
        "out_ptr": bf16, "max_ptr": fp32, "lse_ptr": fp32,
        "num_keys": "i32", "num_heads": size, "topk": size, "qk_scale_log2": "fp32",
        "stride_q_row": size, "stride_q_head": size, "stride_kv_row": size,
        "stride_indices_row": size,
    }  # fmt: skip
    cases = []
    for label, num_heads, flags, has_rope in (
        ("plain", 128, False, True),
        ("all-flags", 128, True, True),
        ("no-rope", 128, False, False),
        ("heads32", 32, True, True),
        ("heads16", 16, True, True),
    ):
        config = choose_config(num_heads, (9, 0))
        products = {"HGMMA.64x": 72 if has_rope else 64} if config.block_h == 64 else {"HMMA": 64}
        cases.append(
            CompileCase(
                name=f"sparse_prefill_triton[{label}]",
                kernel=_sparse_prefill_kernel,
                signature=signature,
                constexprs={
                    "HAS_LENS": flags,
                    "HAS_SINK": flags,
                    "HAS_ROPE": has_rope,
                    "BLOCK_H": config.block_h,
                    "BLOCK_KV": config.block_kv,
                    "NUM_STAGES": config.num_stages,
                },
                options={"num_warps": config.num_warps, "num_stages": config.num_stages},
                must_have={**products, "LDGSTS": 16},
                # an address of the epilogue, put away before the loop, and one read again in it
                max_spill_bytes=0 if has_rope else 16,
            )
        )
    return cases
