"""Inputs of a prefill chunk that were captured in a model, from a .safetensors file.

Tensors of the file, each of a float dtype of 16 bits and more:
    index_q        [seq_len_q, index_heads, 128]  queries of the indexer, rotated
    index_k        [seq_len_kv, 128]              its keys
    index_weights  [seq_len_q, index_heads]       weights, index_heads^-1/2 · 128^-1/2 counted in,
                                                  without a scale of any quantisation
    q              [seq_len_q, num_heads, 576]    queries of the attention in the MQA form
    kv             [seq_len_kv, 576]              latents, then rotated keys

The chunk ends at position seq_len_kv. What is captured is quantised as made-up inputs are. All
inputs of one file hold the same values, so the heads are permuted by the seed: that changes no
selection, and still no result is that of another seed.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dsa_bench.kernels.dsa_inputs import (
    DsaPrefillInputs,
    IndexVectors,
    quantize_index_queries,
)
from dsa_bench.kernels.indexer import IndexerShape, causal_range, make_index_vectors
from dsa_bench.kernels.sparse_prefill import SparsePrefillShape
from dsa_bench.operator import Unsupported

DTYPES = ("F16", "BF16", "F32", "F64")


def expect_captured(path: str, index_shape: IndexerShape, shape: SparsePrefillShape) -> None:
    """Unsupported unless the file holds every tensor in the shape of the case; reads no values."""
    wanted = {
        "index_q": [shape.seq_len_q, index_shape.index_heads, index_shape.index_dim],
        "index_k": [shape.seq_len_kv, index_shape.index_dim],
        "index_weights": [shape.seq_len_q, index_shape.index_heads],
        "q": [shape.seq_len_q, shape.num_heads, shape.head_dim_qk],
        "kv": [shape.seq_len_kv, shape.head_dim_qk],
    }
    found = _headers(path)
    for name, sizes in wanted.items():
        if name not in found:
            raise Unsupported(f"{path} has no tensor {name} (it needs {', '.join(wanted)})")
        dtype, got = found[name]
        if dtype not in DTYPES:
            raise Unsupported(f"{path}: {name} must be one of {', '.join(DTYPES)}, got {dtype}")
        if got != sizes:
            raise Unsupported(
                f"{path}: {name} must be {sizes} as the case asks, got {got}"
                " (see -L, --seq-len-q, --heads and --preset)"
            )


def _headers(path: str) -> dict[str, tuple[str, list[int]]]:
    """Name -> dtype and sizes of every tensor of the file."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise Unsupported("captured inputs need safetensors (pip install safetensors)") from None
    if not Path(path).is_file():
        raise Unsupported(f"there is no file {path} (run where --inputs finds it)")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            return {name: (x.get_dtype(), list(x.get_shape())) for name, x in slices.items()}
    except (OSError, SafetensorError) as error:
        raise Unsupported(f"{path} is no .safetensors file that can be read: {error}") from None


def _load(path: str, device: torch.device | str, *names: str) -> tuple[Tensor, ...]:
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        return tuple(file.get_tensor(name).to(device) for name in names)


def _exact(path: str, device: torch.device | str, rows: Tensor) -> Iterator[IndexVectors]:
    q, weights, k = _load(path, device, "index_q", "index_weights", "index_k")
    k = k.float()
    for row in rows.tolist():
        yield IndexVectors(q[row : row + 1].float(), weights[row : row + 1].float(), k)


def load_prefill_inputs(
    path: str,
    index_shape: IndexerShape,
    shape: SparsePrefillShape,
    *,
    seed: int,
    device: torch.device | str,
    workspace_bytes: int,
) -> DsaPrefillInputs:
    """The chunk of the file; Unsupported where it isn't one of this case."""
    expect_captured(path, index_shape, shape)
    names = ("index_q", "index_weights", "index_k", "q", "kv")
    tensors = _load(path, device, *names)
    for name, tensor in zip(names, tensors, strict=True):
        if not tensor.isfinite().all().item():
            raise Unsupported(f"{path}: {name} must be finite (capture it again)")
    exact_q, exact_weights, k, q, kv = tensors
    generator = torch.Generator().manual_seed(seed)
    index_order, order = (
        torch.randperm(heads, generator=generator).to(device)
        for heads in (index_shape.index_heads, shape.num_heads)
    )
    index_k, index_k_scale = make_index_vectors(k.float(), index_shape.precision)
    index_q, index_weights = quantize_index_queries(
        exact_q[:, index_order].float(), exact_weights[:, index_order].float(),
        index_shape.precision,
    )  # fmt: skip
    return DsaPrefillInputs(
        index_q,
        index_k,
        index_k_scale,
        index_weights,
        *causal_range(shape.seq_len_q, shape.seq_len_kv, device),
        q[:, order].bfloat16(),
        kv.bfloat16(),
        shape.sm_scale,
        shape.topk,
        workspace_bytes,
        partial(_exact, path, device),
    )
