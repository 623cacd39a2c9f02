"""Slots of the columns that are selected in a row, written beside them: device code in Gluon, and
its arguments.

    topk_slots[i, p] = block_table[i // seq_len_q, t // page_size] · page_size + t % page_size
    with t = topk_indices[i, p]

As in `page_slots.py`, -1 gives -1, and so does a position behind the pages of the table.
"""

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

from dsa_bench.expect import expect_same_device, expect_tensor
from dsa_bench.kernels.paging import Pages


@aggregate
class RowPages:
    """The pages of a row's sequence, and where the slots of the row go."""

    slots_ptr: gl.tensor  # [topk] int32
    table_ptr: gl.tensor  # [max_pages] int32
    max_pages: gl.tensor
    PAGE_SIZE: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, slots_ptr, table_ptr, max_pages, PAGE_SIZE):
        self.slots_ptr = slots_ptr
        self.table_ptr = table_ptr
        self.max_pages = max_pages
        self.PAGE_SIZE = gl.constexpr(PAGE_SIZE)


@gluon.jit
def locate_pages(
    slots_ptr, table_ptr, row, seq_len_q, max_pages, stride_table_row,
    TOPK: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """Those of the row."""
    sequence = row // seq_len_q
    return RowPages(
        slots_ptr + row.to(gl.int64) * TOPK,
        table_ptr + sequence.to(gl.int64) * stride_table_row,
        max_pages,
        PAGE_SIZE,
    )


@gluon.jit
def load_pages(pages, column, wanted):
    """The page of each wanted column, if the table has one; without `pages` nothing is loaded."""
    page = 0
    if pages is not None:
        # as an unsigned number -1 lies behind all pages
        entry = column.to(gl.uint32, bitcast=True) // pages.PAGE_SIZE
        exists = wanted & (entry < pages.max_pages)
        page = gl.load(pages.table_ptr + entry, mask=exists, other=0)
    return page


@gluon.jit
def store_slots(pages, place, column, page, wanted):
    """Store the slots of the wanted columns, whose pages are loaded; nothing without `pages`."""
    if pages is not None:
        position = column.to(gl.uint32, bitcast=True)
        exists = position // pages.PAGE_SIZE < pages.max_pages
        topk_slot = page * pages.PAGE_SIZE + (position % pages.PAGE_SIZE).to(gl.int32)
        gl.store(pages.slots_ptr + place, gl.where(exists, topk_slot, -1), mask=wanted)


def check_pages(pages: Pages | None, slots: Tensor | None, num_rows: int, topk: int) -> None:
    """ValueError or TypeError unless there are pages for all rows and room for their slots, or
    neither."""
    if pages is None and slots is None:
        return
    if pages is None or slots is None:
        raise ValueError("give both pages and slots, or neither")
    table = pages.block_table
    expect_tensor("block_table", table, torch.int32, batch_size=None, max_pages=None)
    expect_tensor("slots", slots, torch.int32, num_rows=num_rows, topk=topk)
    expect_same_device(slots=slots, block_table=table)
    if not slots.is_contiguous():
        raise ValueError(f"slots must be contiguous, got strides {tuple(slots.stride())}")
    if pages.page_size < 1:
        raise ValueError(f"page_size must be 1 or more, got {pages.page_size}")
    if pages.seq_len_q(num_rows) * table.shape[0] != num_rows:
        raise ValueError(
            f"num_rows must be a multiple of the {table.shape[0]} sequences of block_table,"
            f" got {num_rows}"
        )


def page_arguments(pages: Pages | None, slots: Tensor | None, num_rows: int) -> dict[str, Any]:
    """What a kernel that may write slots is launched with, by name."""
    if pages is None:
        pointers = dict.fromkeys(("slots_ptr", "table_ptr"))
        sizes = dict.fromkeys(("seq_len_q", "max_pages", "stride_table_row"))
        return {**pointers, **sizes, "HAS_PAGES": False, "PAGE_SIZE": 1}
    table = pages.block_table
    return {
        "slots_ptr": slots, "table_ptr": table, "seq_len_q": pages.seq_len_q(num_rows),
        "max_pages": table.shape[1], "stride_table_row": table.stride(0),
        "HAS_PAGES": True, "PAGE_SIZE": pages.page_size,
    }  # fmt: skip


def page_types(page_size: int | None) -> tuple[dict[str, str], dict[str, Any]]:
    """(signature, constexprs) of the same arguments, for compile cases; None: without pages."""
    if page_size is None:
        return {}, page_arguments(None, None, 0)
    signature = {
        "slots_ptr": "*i32:16", "table_ptr": "*i32:16",
        "seq_len_q": "i32", "max_pages": "i32", "stride_table_row": "i32",
    }  # fmt: skip
    return signature, {"HAS_PAGES": True, "PAGE_SIZE": page_size}
