"""What every kernel for index logits over contiguous keys asks of its arguments."""

import torch
from torch import Tensor

from dsa_bench.expect import expect_same_device, expect_tensor


def check_arguments(
    index_q: Tensor,
    index_k: Tensor,
    index_k_scale: Tensor,
    index_weights: Tensor,
    kv_start: Tensor,
    kv_end: Tensor,
) -> None:
    """Refuse what the kernel cannot read, in a sentence."""
    dtypes = (torch.float8_e4m3fn, torch.bfloat16)
    expect_tensor("index_q", index_q, dtypes, seq_len_q=None, index_heads=None, index_dim=None)
    num_queries, heads, dim = index_q.shape
    expect_tensor("index_k", index_k, index_q.dtype, seq_len_kv=None, index_dim=dim)
    fp32, int32 = torch.float32, torch.int32
    expect_tensor("index_k_scale", index_k_scale, fp32, seq_len_kv=index_k.shape[0])
    expect_tensor("index_weights", index_weights, fp32, seq_len_q=num_queries, index_heads=heads)
    expect_tensor("kv_start", kv_start, int32, seq_len_q=num_queries)
    expect_tensor("kv_end", kv_end, int32, seq_len_q=num_queries)
    tensors = {"index_q": index_q, "index_k": index_k, "index_weights": index_weights}
    expect_same_device(**tensors, index_k_scale=index_k_scale, kv_start=kv_start, kv_end=kv_end)
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}")
    if heads & (heads - 1) or dim & (dim - 1) or dim < 32:
        raise ValueError(f"index_heads and index_dim must be powers of two, got {heads} and {dim}")
