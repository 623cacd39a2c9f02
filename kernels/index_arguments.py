"""What every kernel for index logits asks of its arguments: over contiguous keys, over a paged
cache."""

import torch
from torch import Tensor

from dsa_bench.expect import expect_same_device, expect_tensor
from dsa_bench.kernels.paging import INDEX_DIM, INDEX_ROW_BYTES


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


def check_paged_arguments(
    index_q: Tensor,
    index_cache: Tensor,
    index_weights: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    page_size: int,
) -> None:
    """Refuse what a kernel cannot read, in a sentence: `paged_indexer.py` has the shapes."""
    dtypes = (torch.float8_e4m3fn, torch.bfloat16)
    expect_tensor(
        "index_q",
        index_q,
        dtypes,
        batch_size=None,
        seq_len_q=None,
        index_heads=None,
        index_dim=INDEX_DIM,
    )
    batch_size, seq_len_q, heads, _ = index_q.shape
    is_fp8 = index_q.dtype == torch.float8_e4m3fn
    row = page_size * (INDEX_ROW_BYTES if is_fp8 else INDEX_DIM)
    cache_dtype = torch.uint8 if is_fp8 else torch.bfloat16
    expect_tensor("index_cache", index_cache, cache_dtype, num_pages=None, page=row)
    dims = {"batch_size": batch_size, "seq_len_q": seq_len_q}
    expect_tensor("index_weights", index_weights, torch.float32, **dims, index_heads=heads)
    expect_tensor("seq_lens", seq_lens, torch.int32, **dims)
    expect_tensor("block_table", block_table, torch.int32, batch_size=batch_size, max_pages=None)
    tensors = {
        "index_q": index_q,
        "index_cache": index_cache,
        "index_weights": index_weights,
        "seq_lens": seq_lens,
        "block_table": block_table,
    }
    expect_same_device(**tensors)
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}")
