"""DeepGEMM, DeepSeek's CUDA kernels for Hopper: index logits, ragged and paged, in FP8.

`indexer`        `fp8_mqa_logits`, whose `cu_seq_len_k_start` and `_end` are kv_start and kv_end:
                 not cumulative, whatever their name says.
`paged_indexer`  `fp8_paged_mqa_logits`. Its schedule follows the lengths of the sequences, so the
                 kernel that makes it belongs to the call (5 to 7 µs).

Columns outside the range of a row are left undefined, as here. It compiles its kernels with nvcc
when a shape is first met.
"""

import importlib
from functools import cache
from typing import Any

import torch

from dsa_bench.kernels.indexer import IndexerInputs, IndexerOutputs, IndexerShape
from dsa_bench.kernels.paged_indexer import (
    PagedIndexerInputs,
    PagedIndexerOutputs,
    PagedIndexerShape,
)
from dsa_bench.kernels.paging import INDEX_ROW_BYTES
from dsa_bench.library import Library
from dsa_bench.operator import Implementation, Machine

HEADS_TAKEN = (32, 64)
PAGE_SIZE = 64
MAX_SEQ_LEN_Q = 2
"""New tokens of a sequence that its Hopper kernel takes."""


@cache
def load() -> Any:
    """The module, with the two functions needed."""
    module = importlib.import_module("deep_gemm")
    for name in ("fp8_mqa_logits", "fp8_paged_mqa_logits", "get_paged_mqa_logits_metadata"):
        if not hasattr(module, name):
            raise ImportError(f"this deep_gemm has no {name}")
    return module


LIBRARY = Library(
    title="DeepGEMM",
    modules=("deep_gemm",),
    distributions=("deep_gemm", "tokenspeed-deepgemm"),
    install="pip install tokenspeed-deepgemm",
    load=load,
)


@torch.no_grad()
def indexer(inputs: IndexerInputs, /) -> IndexerOutputs:
    logits = load().fp8_mqa_logits(
        inputs.index_q,
        (inputs.index_k, inputs.index_k_scale),
        inputs.index_weights,
        inputs.kv_start,
        inputs.kv_end,
        clean_logits=False,
    )
    return IndexerOutputs(logits)


@torch.no_grad()
def paged_indexer(inputs: PagedIndexerInputs, /) -> PagedIndexerOutputs:
    deep_gemm = load()
    batch_size, seq_len_q, index_heads, _ = inputs.index_q.shape
    schedule = deep_gemm.get_paged_mqa_logits_metadata(
        inputs.seq_lens, PAGE_SIZE, deep_gemm.get_num_sms()
    )
    logits = deep_gemm.fp8_paged_mqa_logits(
        inputs.index_q,
        inputs.index_cache.view(-1, PAGE_SIZE, 1, INDEX_ROW_BYTES),
        inputs.index_weights.view(-1, index_heads),
        inputs.seq_lens,
        inputs.block_table,
        schedule,
        inputs.block_table.shape[1] * PAGE_SIZE,
        clean_logits=False,
    )
    return PagedIndexerOutputs(logits.unflatten(0, (batch_size, seq_len_q)))


def _takes(index_heads: int, precision: str, machine: Machine) -> str | None:
    if machine.device != "cuda" or not machine.is_hopper:
        return "deep_gemm needs a Hopper GPU (compute capability 9.0)"
    if precision != "fp8":
        return f"deep_gemm scores fp8 keys only, these are {precision}"
    if index_heads not in HEADS_TAKEN:
        return f"deep_gemm takes 32 or 64 indexer heads, this case has {index_heads}"
    return None


def _supports_indexer(shape: IndexerShape, machine: Machine) -> str | None:
    return _takes(shape.index_heads, shape.precision, machine) or LIBRARY.obstacle()


def _supports_paged(shape: PagedIndexerShape, machine: Machine) -> str | None:
    reason = _takes(shape.index_heads, shape.precision, machine)
    if reason is not None:
        return reason
    if shape.page_size != PAGE_SIZE:
        return f"deep_gemm takes pages of {PAGE_SIZE} tokens, this case has {shape.page_size}"
    if shape.seq_len_q > MAX_SEQ_LEN_Q:
        return (
            f"deep_gemm takes {MAX_SEQ_LEN_Q} new tokens a sequence at most on Hopper,"
            f" this case has {shape.seq_len_q}"
        )
    return LIBRARY.obstacle()


IMPLEMENTATIONS = {
    "indexer": (
        Implementation(
            name="deep_gemm",
            run=indexer,
            supports=_supports_indexer,
            library=LIBRARY,
            priority=-10,
        ),
    ),
    "paged_indexer": (
        Implementation(
            name="deep_gemm",
            run=paged_indexer,
            supports=_supports_paged,
            library=LIBRARY,
            priority=-10,
        ),
    ),
}
