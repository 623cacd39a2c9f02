"""Sparse decode for Hopper in Gluon: `row_decode.py` for caches of 656-byte rows,
`seesaw_decode.py` for those of 576 bf16.

Any number of heads and queries; few queries are split over the selected keys.
"""

import torch
from torch import Tensor

from dsa_bench.kernels.paging import HEAD_DIM_V
from dsa_bench.kernels.row_decode import attend_fp8_rows
from dsa_bench.kernels.seesaw_decode import attend_bf16_rows
from dsa_bench.kernels.sparse_decode import (
    SparseDecodeInputs,
    SparseDecodeOutputs,
    SparseDecodeShape,
    check_arguments,
)
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "sparse_decode"


def sparse_decode(
    q: Tensor,
    kv_cache: Tensor,
    topk_slots: Tensor,
    *,
    sm_scale: float,
    attn_sink: Tensor | None = None,
    topk_lens: Tensor | None = None,
) -> SparseDecodeOutputs:
    """Sparse attention of new tokens over a paged cache; formula and conventions as in
    `sparse_decode.py`.

    Args:
        q: [batch_size, seq_len_q, num_heads, 576] bf16, contiguous.
        kv_cache: [num_pages, page_size, 656] uint8 or [num_pages, page_size, 576] bf16, contiguous.
        topk_slots: [batch_size, seq_len_q, topk] int32, contiguous.
        sm_scale: > 0.
        attn_sink: [num_heads] fp32.
        topk_lens: [batch_size, seq_len_q] int32.
    Returns:
        out [batch_size, seq_len_q, num_heads, 512] bf16, lse [batch_size, seq_len_q, num_heads]
        fp32.
    """
    check_arguments(q, kv_cache, topk_slots, sm_scale, attn_sink, topk_lens)
    out = torch.empty(*q.shape[:3], HEAD_DIM_V, dtype=torch.bfloat16, device=q.device)
    lse = torch.empty(*q.shape[:3], device=q.device)
    if out.numel() == 0 or topk_slots.shape[2] == 0:
        return SparseDecodeOutputs(out.zero_(), lse.fill_(float("inf")))
    attend = attend_fp8_rows if kv_cache.dtype == torch.uint8 else attend_bf16_rows
    attend(q, kv_cache, topk_slots, sm_scale, attn_sink, topk_lens, out, lse)
    return SparseDecodeOutputs(out, lse)


def run(inputs: SparseDecodeInputs) -> SparseDecodeOutputs:
    # the kernel for bf16 rows goes through all blocks whatever the lengths
    is_fp8 = inputs.kv_cache.dtype == torch.uint8
    return sparse_decode(
        inputs.q,
        inputs.kv_cache,
        inputs.topk_slots,
        sm_scale=inputs.sm_scale,
        attn_sink=inputs.attn_sink,
        topk_lens=inputs.topk_lens if is_fp8 else inputs.needed_lens,
    )


def supports(shape: SparseDecodeShape, machine: Machine) -> str | None:
    if not machine.is_hopper:
        return (
            f"gluon sparse_decode needs a Hopper GPU (sm_90), this is {machine.name} (use triton)"
        )
    return None


IMPLEMENTATIONS = (Implementation(name="gluon", run=run, supports=supports, priority=20),)
