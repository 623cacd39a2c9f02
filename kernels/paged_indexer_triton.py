"""Lightning indexer over a paged cache in Triton: a program scores a sequence on some pages.

As in `indexer_triton.py` keys are the rows of the product and heads × queries its columns. One tile
is one page; the pages of a sequence are divided over programs so that small batches fill the GPU.
With one query a sequence the work is bound by reading 132 bytes a key. Supports fp8 and bf16
caches, any seq_len_q, lengths that differ by query, pages that are a power of two.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.index_arguments import check_paged_arguments
from dsa_bench.kernels.paged_indexer import (
    PagedIndexerInputs,
    PagedIndexerOutputs,
    PagedIndexerShape,
)
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "paged_indexer"
MAX_COLUMNS = 256
"""heads × queries of one tile: a row of scores must fit into registers."""


@triton.jit
def _paged_indexer_kernel(
    q_ptr, keys_ptr, scales_ptr, weights_ptr, lens_ptr, table_ptr, logits_ptr,
    seq_len_q, max_pages, pages_a_program, stride_page, stride_scale_page, stride_logits_row,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HAS_SCALE: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q queries of one sequence, `pages_a_program` of its pages."""
    sequence = tl.program_id(0).to(tl.int64)
    first_page = tl.program_id(1) * pages_a_program
    first_q = tl.program_id(2) * BLOCK_Q
    offs_q = first_q + tl.arange(0, BLOCK_Q)
    is_query = offs_q < seq_len_q
    row_q = sequence * seq_len_q + offs_q
    lens = tl.load(lens_ptr + row_q, mask=is_query, other=0)
    longest = tl.max(lens, 0)
    last_page = tl.minimum(first_page + pages_a_program, (longest + PAGE_SIZE - 1) // PAGE_SIZE)
    last_page = tl.minimum(last_page, max_pages)
    offs_d = tl.arange(0, DIM)
    offs_row = tl.arange(0, BLOCK_Q * HEADS)
    is_row = first_q * HEADS + offs_row < seq_len_q * HEADS
    row = (sequence * seq_len_q + first_q) * HEADS + offs_row
    q = tl.load(q_ptr + row[:, None] * DIM + offs_d[None, :], mask=is_row[:, None], other=0.0)
    weights = tl.load(weights_ptr + row, mask=is_row, other=0.0)
    offs_kv = tl.arange(0, PAGE_SIZE)
    logits_ptrs = logits_ptr + row_q[None, :] * stride_logits_row + offs_kv[:, None]
    for i in tl.range(first_page, last_page, num_stages=NUM_STAGES):
        page = tl.load(table_ptr + sequence * max_pages + i).to(tl.int64)
        k = tl.load(keys_ptr + page * stride_page + offs_kv[:, None] * DIM + offs_d[None, :])
        scores = tl.dot(k, tl.trans(q))  # [PAGE_SIZE, BLOCK_Q * HEADS]
        scores = tl.maximum(scores, 0.0) * weights[None, :]
        logits = tl.sum(tl.reshape(scores, [PAGE_SIZE, BLOCK_Q, HEADS]), 2)
        if HAS_SCALE:
            scale = tl.load(scales_ptr + page * stride_scale_page + offs_kv)
            logits = logits * scale[:, None]
        position = i * PAGE_SIZE + offs_kv
        tl.store(logits_ptrs + i * PAGE_SIZE, logits, mask=position[:, None] < lens[None, :])


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedIndexerConfig:
    block_q: int
    pages_a_program: int
    num_warps: int
    num_stages: int


def choose_config(
    batch_size: int, seq_len_q: int, max_pages: int, heads: int, precision: str, num_sms: int
) -> PagedIndexerConfig:
    """Eight programs for each SM, of four pages or more.

    H100, context 32K, fp8: batch 1 takes 9 µs with 4 pages a program and 13 µs with 8; batch 32
    and 128 differ by 3 % between 8 and 32 pages.
    """
    block_q = 1
    while block_q < seq_len_q and 2 * block_q * heads <= MAX_COLUMNS:
        block_q *= 2
    programs = batch_size * -(-seq_len_q // block_q)
    wanted = max(1, -(-8 * num_sms // programs))
    pages = max(4, -(-max_pages // wanted))
    return PagedIndexerConfig(
        block_q=block_q,
        pages_a_program=pages,
        num_warps=4,
        num_stages=6 if precision == "fp8" else 4,
    )


def paged_indexer(
    index_q: Tensor,
    index_cache: Tensor,
    index_weights: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    page_size: int,
) -> Tensor:
    """Index logits of new tokens; formula and conventions as in `paged_indexer.py`.

    Args:
        index_q: [batch_size, seq_len_q, index_heads, 128] e4m3 or bf16, contiguous.
        index_cache: [num_pages, page_size · 132] uint8 (for e4m3) or [num_pages, page_size · 128]
            bf16, contiguous.
        index_weights: [batch_size, seq_len_q, index_heads] fp32, contiguous.
        seq_lens: [batch_size, seq_len_q] int32, contiguous.
        block_table: [batch_size, max_pages] int32, contiguous.
    Returns:
        [batch_size, seq_len_q, max_pages · page_size] fp32; undefined at and beyond seq_lens.
    """
    check_paged_arguments(index_q, index_cache, index_weights, seq_lens, block_table, page_size)
    batch_size, seq_len_q, heads, dim = index_q.shape
    if page_size & (page_size - 1) or page_size < 16:
        raise ValueError(f"page_size must be a power of two of 16 or more, got {page_size}")
    if heads & (heads - 1) or heads < 8:
        raise ValueError(f"index_heads must be a power of two of 8 or more, got {heads}")
    max_pages = block_table.shape[1]
    logits = torch.empty(batch_size, seq_len_q, max_pages * page_size, device=index_q.device)
    if logits.numel() == 0:
        return logits
    is_fp8 = index_cache.dtype == torch.uint8
    keys = index_cache.view(torch.float8_e4m3fn) if is_fp8 else index_cache
    scales = index_cache.view(torch.float32)[:, page_size * dim // 4 :] if is_fp8 else index_weights
    num_sms = torch.cuda.get_device_properties(index_q.device).multi_processor_count
    config = choose_config(
        batch_size, seq_len_q, max_pages, heads, "fp8" if is_fp8 else "bf16", num_sms
    )
    grid = (
        batch_size,
        -(-max_pages // config.pages_a_program),
        -(-seq_len_q // config.block_q),
    )
    _paged_indexer_kernel[grid](
        index_q, keys, scales, index_weights, seq_lens, block_table, logits,
        seq_len_q, max_pages, config.pages_a_program,
        keys.stride(0), scales.stride(0), logits.stride(1),
        HEADS=heads, DIM=dim, BLOCK_Q=config.block_q, PAGE_SIZE=page_size, HAS_SCALE=is_fp8,
        NUM_STAGES=config.num_stages, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return logits


def run(inputs: PagedIndexerInputs) -> PagedIndexerOutputs:
    return PagedIndexerOutputs(
        paged_indexer(
            inputs.index_q,
            inputs.index_cache,
            inputs.index_weights,
            inputs.seq_lens,
            inputs.block_table,
            page_size=inputs.page_size,
        )
    )


def supports(shape: PagedIndexerShape, machine: Machine) -> str | None:
    needed = (8, 9) if shape.precision == "fp8" else (8, 0)
    if machine.capability is None or machine.capability < needed:
        return (
            f"triton paged_indexer in {shape.precision} needs sm_{needed[0]}{needed[1]} or newer,"
            f" this is {machine.name}"
        )
    if shape.index_heads & (shape.index_heads - 1) or shape.index_heads < 8:
        return (
            "triton paged_indexer needs a power of two of 8 or more heads,"
            f" this case has {shape.index_heads}"
        )
    if shape.page_size & (shape.page_size - 1) or shape.page_size < 16:
        return (
            "triton paged_indexer needs a page_size that is a power of two,"
            f" this case has {shape.page_size}"
        )
    return None


IMPLEMENTATIONS = (Implementation(name="triton", run=run, supports=supports, priority=20),)


def compile_cases() -> list[CompileCase]:
    cases = []
    for precision, dtype, instruction, seq_len_q in (
        ("fp8", "fp8e4nv", "QGMMA", 1),
        ("fp8", "fp8e4nv", "QGMMA", 4),
        ("bf16", "bf16", "HGMMA", 1),
    ):
        config = choose_config(32, seq_len_q, 512, 64, precision, 132)
        signature = {
            "q_ptr": f"*{dtype}:16", "keys_ptr": f"*{dtype}:16", "scales_ptr": "*fp32:16",
            "weights_ptr": "*fp32:16", "lens_ptr": "*i32:16", "table_ptr": "*i32:16",
            "logits_ptr": "*fp32:16", "seq_len_q": "i32", "max_pages": "i32:16",
            "pages_a_program": "i32", "stride_page": "i32:16",
            "stride_scale_page": "i32:16", "stride_logits_row": "i32:16",
        }  # fmt: skip
        cases.append(
            CompileCase(
                name=f"paged_indexer_triton[{precision}-q{seq_len_q}]",
                kernel=_paged_indexer_kernel,
                signature=signature,
                constexprs={
                    "HEADS": 64,
                    "DIM": 128,
                    "BLOCK_Q": config.block_q,
                    "PAGE_SIZE": 64,
                    "HAS_SCALE": precision == "fp8",
                    "NUM_STAGES": config.num_stages,
                },
                options={"num_warps": config.num_warps, "num_stages": config.num_stages},
                must_have={instruction: 1, "LDGSTS": 1},
            )
        )
    return cases
