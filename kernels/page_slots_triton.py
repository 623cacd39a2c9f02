"""Positions to slots in plain Triton: a program gathers a block of entries of one query.

Bound by its launch: 8 bytes an entry.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_bench.expect import expect_same_device, expect_tensor
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.page_slots import PageSlotsInputs, PageSlotsOutputs, PageSlotsShape
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "page_slots"
BLOCK = 1024


@triton.jit
def _page_slots_kernel(
    indices_ptr, table_ptr, slots_ptr, seq_len_q, topk, max_pages, stride_table_row,
    PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK entries of one query."""
    query = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = offs < topk
    position = tl.load(indices_ptr + query * topk + offs, mask=exists, other=-1)
    valid = (position >= 0) & (position < max_pages * PAGE_SIZE)
    table_row = table_ptr + query // seq_len_q * stride_table_row
    page = tl.load(table_row + position // PAGE_SIZE, mask=valid, other=0)
    slot = tl.where(valid, page * PAGE_SIZE + position % PAGE_SIZE, -1)
    tl.store(slots_ptr + query * topk + offs, slot, mask=exists)


def page_slots(topk_indices: Tensor, block_table: Tensor, *, page_size: int) -> Tensor:
    """Cache rows of selected positions; conventions as in `page_slots.py`.

    Args:
        topk_indices: [batch_size, seq_len_q, topk] int32, contiguous.
        block_table: [batch_size, max_pages] int32, any row stride.
    Returns:
        [batch_size, seq_len_q, topk] int32.
    """
    expect_tensor(
        "topk_indices", topk_indices, torch.int32, batch_size=None, seq_len_q=None, topk=None
    )
    batch_size, seq_len_q, topk = topk_indices.shape
    expect_tensor("block_table", block_table, torch.int32, batch_size=batch_size, max_pages=None)
    expect_same_device(topk_indices=topk_indices, block_table=block_table)
    if not topk_indices.is_contiguous():
        raise ValueError(
            f"topk_indices must be contiguous, got strides {tuple(topk_indices.stride())}"
        )
    slots = torch.empty_like(topk_indices)
    if slots.numel():
        _page_slots_kernel[(batch_size * seq_len_q, -(-topk // BLOCK))](
            topk_indices, block_table, slots,
            seq_len_q, topk, block_table.shape[1], block_table.stride(0),
            PAGE_SIZE=page_size, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return slots


def run(inputs: PageSlotsInputs) -> PageSlotsOutputs:
    return PageSlotsOutputs(
        page_slots(inputs.topk_indices, inputs.block_table, page_size=inputs.page_size)
    )


def supports(shape: PageSlotsShape, machine: Machine) -> str | None:
    if machine.device != "cuda":
        return f"triton page_slots needs a CUDA GPU, this is {machine.name}"
    return None


IMPLEMENTATIONS = (Implementation(name="triton", run=run, supports=supports, priority=20),)


def compile_cases() -> list[CompileCase]:
    signature = {
        "indices_ptr": "*i32:16", "table_ptr": "*i32:16", "slots_ptr": "*i32:16",
        "seq_len_q": "i32", "topk": "i32:16", "max_pages": "i32:16", "stride_table_row": "i32:16",
    }  # fmt: skip
    return [
        CompileCase(
            name="page_slots_triton",
            kernel=_page_slots_kernel,
            signature=signature,
            constexprs={"PAGE_SIZE": 64, "BLOCK": BLOCK},
            options={"num_warps": 4},
        )
    ]
