"""What our own kernels of dense attention take: widths of V3.2, contiguous, causal to the end."""

import torch
from torch import Tensor

from dsa_bench.baselines.dense_attention import DenseAttentionShape
from dsa_bench.baselines.key_pages import PAGE_SIZE, KeyPages
from dsa_bench.expect import expect_same_device, expect_tensor

NOPE, ROPE = 128, 64
HEAD_DIM_QK_MHA, HEAD_DIM_V_MHA = NOPE + ROPE, 128
HEAD_DIM_QK, HEAD_DIM_V = 512 + ROPE, 512
NUM_SMS_H100 = 132
"""What the choice of parts assumes where there is no GPU to ask."""


def check_prefill(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse what is not q [seq_len_q, num_heads, 192], k [seq_len_kv, num_heads, 192],
    v [seq_len_kv, num_heads, 128], bf16 and contiguous."""
    expect_tensor(
        "q", q, torch.bfloat16, seq_len_q=None, num_heads=None, head_dim_qk=HEAD_DIM_QK_MHA
    )
    heads = q.shape[1]
    expect_tensor(
        "k", k, torch.bfloat16, seq_len_kv=None, num_heads=heads, head_dim_qk=HEAD_DIM_QK_MHA
    )
    keys = k.shape[0]
    expect_tensor(
        "v", v, torch.bfloat16, seq_len_kv=keys, num_heads=heads, head_dim_v=HEAD_DIM_V_MHA
    )
    expect_same_device(q=q, k=k, v=v)
    _expect_contiguous(q=q, k=k, v=v)
    _expect_causal(q.shape[0], keys)


def check_decode(q: Tensor, kv: Tensor, pages: KeyPages | None = None) -> None:
    """Refuse what is not q [batch_size, seq_len_q, num_heads, 576], kv [batch_size, seq_len_kv,
    576] or with pages [num_pages, 64, 576], bf16 and contiguous."""
    expect_tensor(
        "q",
        q,
        torch.bfloat16,
        batch_size=None,
        seq_len_q=None,
        num_heads=None,
        head_dim_qk=HEAD_DIM_QK,
    )
    dims = {"batch_size": q.shape[0], "seq_len_kv": None}
    if pages is not None:
        dims = {"num_pages": None, "page_size": PAGE_SIZE}
    expect_tensor("kv", kv, torch.bfloat16, **dims, head_dim_qk=HEAD_DIM_QK)
    expect_same_device(q=q, kv=kv)
    _expect_contiguous(q=q, kv=kv)
    if pages is None:
        _expect_causal(q.shape[1], kv.shape[1])
        return
    expect_tensor("seq_lens", pages.seq_lens, torch.int32, batch_size=q.shape[0])
    expect_tensor(
        "block_table", pages.block_table, torch.int32, batch_size=q.shape[0], max_pages=None
    )
    expect_same_device(q=q, seq_lens=pages.seq_lens, block_table=pages.block_table)
    _expect_contiguous(seq_lens=pages.seq_lens, block_table=pages.block_table)
    _expect_causal(q.shape[1], min(pages.lengths, default=q.shape[1]))


def _expect_contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, got strides {tensor.stride()} (pass x.contiguous())"
            )


def _expect_causal(seq_len_q: int, seq_len_kv: int) -> None:
    """The queries are the last tokens of the keys, so the first of them must see one."""
    if seq_len_q > seq_len_kv:
        raise ValueError(f"seq_len_q {seq_len_q} must be at most seq_len_kv {seq_len_kv}")


def obstacle_of_widths(name: str, shape: DenseAttentionShape) -> str | None:
    """Why the kernels called `name` cannot take the head widths, or None."""
    widths = (shape.head_dim_qk, shape.head_dim_v)
    prefill, decode = (HEAD_DIM_QK_MHA, HEAD_DIM_V_MHA), (HEAD_DIM_QK, HEAD_DIM_V)
    form = prefill if shape.is_prefill else decode
    if widths == form:
        return None
    return (
        f"{name} dense_attention needs head widths {form[0]}/{form[1]} in {shape.phase},"
        f" this case has {widths[0]}/{widths[1]}"
    )


def num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return NUM_SMS_H100
    return torch.cuda.get_device_properties(device).multi_processor_count
