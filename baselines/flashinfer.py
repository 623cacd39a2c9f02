"""FlashInfer: dense prefill, latent decode and top-k on Hopper, from `flashinfer-python`.

Prefill is its ragged wrapper for one prompt, decode its wrapper for latent keys, both by their
Hopper kernels ("fa3"); causal there means aligned to the end of the keys, as here. The contiguous
cache is a view of pages, in order: of 64 tokens, or of 1 where the length is no multiple of 64 and
the same for all sequences.

lse of prefill is to base 2 and multiplied by ln 2 inside the timed call, 4 bytes a row and head; in
decode it is asked for natural.

`plan` shares out the work of a batch on the host. It depends on lengths and shape, alike for all
layers: an engine does it once a step. Here it is done at the first call of a shape and kept, so it
is not in the time.

Of its top-k functions `top_k_ragged_transform` fits the contract: it takes the k largest of
`lengths` logits from `row_starts` on and adds an offset to each index, which is the start again, so
that they are columns; the tail of a short row is -1. `lengths` is kv_end - kv_start, one small
kernel inside the timed call, and so is the copy of logits whose rows do not follow each other. NaN
counts there as the largest value, not as -inf.

Each part is compiled by nvcc at its first call, which takes minutes, and kept on disk.
"""

import importlib
import importlib.util
import itertools
import math
import shutil
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsa_bench.baselines.dense_attention import (
    DenseAttentionShape,
    DenseDecodeInputs,
    DenseInputs,
    DenseOutputs,
    DensePrefillInputs,
)
from dsa_bench.baselines.key_pages import PAGE_SIZE, KeyPages
from dsa_bench.kernels.decode_lengths import pages_of
from dsa_bench.kernels.topk import TopkInputs, TopkOutputs, TopkShape, refuse_options
from dsa_bench.library import Library
from dsa_bench.operator import Implementation, Machine

WORKSPACE_BYTES = 2**27
"""What their documentation advises for partial results."""
TILE_ROWS = 128
"""Rows (query, head) that a tile of their decode holds at most."""
PRECOMPILED = "flashinfer_jit_cache"


@cache
def load() -> Any:
    """The module, with what is needed of it."""
    module = importlib.import_module("flashinfer")
    needed = {
        "top_k_ragged_transform": module,
        "BatchPrefillWithRaggedKVCacheWrapper": module,
        "MLAPlanMetadata": importlib.import_module("flashinfer.mla"),
    }
    for name, place in needed.items():
        if not hasattr(place, name):
            raise ImportError(f"this flashinfer has no {name}")
    if importlib.util.find_spec(PRECOMPILED) is None:
        _check_compilers()
    return module


def _check_compilers() -> None:
    if shutil.which("ninja") is None:
        raise ImportError("it compiles with ninja, which is not on the PATH")
    find_cuda = importlib.import_module("flashinfer.jit.cpp_ext").get_cuda_path
    nvcc = Path(find_cuda()) / "bin" / "nvcc"
    if not nvcc.exists():
        raise ImportError(f"it compiles with nvcc, and there is no {nvcc} (set CUDA_HOME)")


LIBRARY = Library(
    title="FlashInfer",
    modules=("flashinfer",),
    distributions=("flashinfer-python",),
    install="pip install flashinfer-python",
    load=load,
)


@cache
def _workspace(device: torch.device) -> Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@lru_cache(maxsize=4)
def plan_prefill(
    seq_len_q: int,
    seq_len_kv: int,
    num_heads: int,
    head_dim_qk: int,
    head_dim_v: int,
    sm_scale: float,
    device: torch.device,
) -> Any:
    """A wrapper planned for one prompt."""
    wrapper = load().BatchPrefillWithRaggedKVCacheWrapper(_workspace(device), "NHD", backend="fa3")
    wrapper.plan(
        qo_indptr=torch.tensor([0, seq_len_q], dtype=torch.int32, device=device),
        kv_indptr=torch.tensor([0, seq_len_kv], dtype=torch.int32, device=device),
        num_qo_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim_qk=head_dim_qk,
        head_dim_vo=head_dim_v,
        causal=True,
        sm_scale=sm_scale,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    return wrapper


def prefill(q: Tensor, k: Tensor, v: Tensor, *, sm_scale: float) -> DenseOutputs:
    """MHA form, causal to the end of the keys."""
    seq_len_q, num_heads, width = q.shape
    wrapper = plan_prefill(seq_len_q, k.shape[0], num_heads, width, v.shape[-1], sm_scale, q.device)
    out, lse = wrapper.run(q, k, v, return_lse=True)
    return DenseOutputs(out, lse.mul_(math.log(2)))


def page_size_of(seq_len_kv: int) -> int:
    """Of a view of contiguous keys; of keys in pages that is their size."""
    return PAGE_SIZE if seq_len_kv % PAGE_SIZE == 0 else 1


@lru_cache(maxsize=4)
def plan_decode(
    lengths: tuple[int, ...],
    page_size: int,
    seq_len_q: int,
    num_heads: int,
    head_dim_v: int,
    head_dim_rope: int,
    sm_scale: float,
    device: torch.device,
) -> Any:
    """A wrapper planned for sequences of these lengths, whose pages follow each other; its tables
    are offsets (CSR)."""
    mla = importlib.import_module("flashinfer.mla")
    ends = [0, *itertools.accumulate(pages_of(lengths, page_size))]
    metadata = mla.MLAPlanMetadata.csr(
        qo_indptr=torch.arange(len(ends), dtype=torch.int32, device=device) * seq_len_q,
        kv_indptr=torch.tensor(ends, dtype=torch.int32, device=device),
        kv_indices=torch.arange(ends[-1], dtype=torch.int32, device=device),
        kv_len_arr=torch.tensor(lengths, dtype=torch.int32, device=device),
    )
    wrapper = mla.BatchMLAPagedAttentionWrapper(_workspace(device), backend="fa3")
    wrapper.plan(
        metadata=metadata,
        num_heads=num_heads,
        head_dim_ckv=head_dim_v,
        head_dim_kpe=head_dim_rope,
        page_size=page_size,
        # one query sees every key
        causal=seq_len_q > 1,
        sm_scale=sm_scale,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
        lse_mode="basee",
    )
    return wrapper


def decode(
    q: Tensor, kv: Tensor, *, head_dim_v: int, sm_scale: float, pages: KeyPages | None = None
) -> DenseOutputs:
    """MQA form; queries of all sequences in a row."""
    batch_size, seq_len_q, num_heads, width = q.shape
    lengths = (kv.shape[1],) * batch_size if pages is None else pages.lengths
    page_size = page_size_of(kv.shape[1])
    wrapper = plan_decode(
        lengths, page_size, seq_len_q, num_heads, head_dim_v, width - head_dim_v, sm_scale,
        q.device,
    )  # fmt: skip
    out, lse = wrapper.run(
        query=q.flatten(0, 1),
        kv_cache=kv.view(-1, page_size, width),
        return_lse=True,
        return_lse_base_on_e=True,
    )
    batched = (batch_size, seq_len_q)
    return DenseOutputs(out.unflatten(0, batched), lse.unflatten(0, batched))


@torch.no_grad()
def run(inputs: DenseInputs, /) -> DenseOutputs:
    if isinstance(inputs, DensePrefillInputs):
        return prefill(inputs.q, inputs.k, inputs.v, sm_scale=inputs.sm_scale)
    assert isinstance(inputs, DenseDecodeInputs)
    return decode(
        inputs.q,
        inputs.kv,
        head_dim_v=inputs.head_dim_v,
        sm_scale=inputs.sm_scale,
        pages=inputs.pages,
    )


@torch.no_grad()
def topk(inputs: TopkInputs, /) -> TopkOutputs:
    refuse_options(inputs, "flashinfer's top-k")
    return TopkOutputs(
        load().top_k_ragged_transform(
            inputs.index_logits.contiguous(),
            inputs.kv_start,
            inputs.kv_end - inputs.kv_start,
            inputs.topk,
            row_starts=inputs.kv_start,
        )
    )


def _needs_hopper(machine: Machine) -> str | None:
    if machine.device != "cuda" or not machine.is_hopper:
        return "flashinfer, as it is called here, needs a Hopper GPU (compute capability 9.0)"
    return None


def _supports_dense(shape: DenseAttentionShape, machine: Machine) -> str | None:
    reason = _needs_hopper(machine)
    if reason is not None:
        return reason
    if not shape.is_prefill and shape.seq_len_q > 1 and TILE_ROWS % shape.num_heads:
        return (
            f"flashinfer decodes several new tokens with a number of heads that divides {TILE_ROWS}"
            f" (with others it refuses some lengths), this case has {shape.num_heads}"
        )
    return LIBRARY.obstacle()


def _supports_topk(shape: TopkShape, machine: Machine) -> str | None:
    reason = _needs_hopper(machine)
    if reason is None and shape.logits != "fp32":
        reason = f"flashinfer's top-k is called here with fp32 logits, this case has {shape.logits}"
    return reason or LIBRARY.obstacle()


IMPLEMENTATIONS = {
    "dense_attention": (
        Implementation(
            name="flashinfer",
            run=run,
            supports=_supports_dense,
            library=LIBRARY,
            priority=25,
        ),
    ),
    "topk": (
        Implementation(
            name="flashinfer",
            run=topk,
            supports=_supports_topk,
            library=LIBRARY,
            priority=-10,
        ),
    ),
}
