"""Positions to slots: where in the paged cache the selected positions of each sequence lie.

    topk_slots[b, j, p] = block_table[b, t // page_size] · page_size + t % page_size
    with t = topk_indices[b, j, p]

Shapes:
    topk_indices  [batch_size, seq_len_q, topk]  int32  positions in the sequence
    block_table   [batch_size, max_pages]        int32
    topk_slots    [batch_size, seq_len_q, topk]  int32  rows of the cache

Conventions: a position that is negative or not below max_pages · page_size gives -1. A sequence of
fewer than topk tokens lists them all, then -1; behind its last page its row of block_table is -1.
Source: the step between selector and attention in vLLM's and SGLang's decode path.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import Check, shape_differs
from dsa_bench.kernels.decode_lengths import (
    decode_lengths,
    expect_lengths,
    longest_sequence,
    pages_of,
)
from dsa_bench.kernels.index_patterns import random_indices
from dsa_bench.kernels.paging import make_ragged_block_table
from dsa_bench.operator import Cost, Memory, Operator, Unsupported
from dsa_bench.preset import Preset
from dsa_bench.record import EQUAL_LENGTHS, Case


@dataclass(frozen=True, kw_only=True, slots=True)
class PageSlotsShape:
    """batch_size sequences, the longest of seq_len_kv tokens."""

    batch_size: int
    seq_len_kv: int
    topk: int = 2048
    seq_len_q: int = 1
    page_size: int = 64
    lengths: str = EQUAL_LENGTHS
    """A kind of `decode_lengths.py`."""

    def __post_init__(self) -> None:
        if self.topk > self.seq_len_kv:
            raise Unsupported(f"topk {self.topk} is more than the {self.seq_len_kv} keys there are")
        expect_lengths(self)

    @property
    def seq_lens(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return decode_lengths(self)

    @property
    def max_pages(self) -> int:
        return -(-self.seq_len_kv // self.page_size)

    @property
    def pages(self) -> tuple[int, ...]:
        """Pages of each sequence."""
        return pages_of(self.seq_lens, self.page_size)


@dataclass(frozen=True, slots=True)
class PageSlotsInputs:
    topk_indices: Tensor
    block_table: Tensor
    page_size: int


class PageSlotsOutputs(NamedTuple):
    topk_slots: Tensor


def make_inputs(shape: PageSlotsShape, *, seed: int, device: torch.device | str) -> PageSlotsInputs:
    """Random distinct positions in sequences whose pages are randomly permuted."""
    g = torch.Generator(device=device).manual_seed(seed)
    visible = torch.tensor(shape.seq_lens, device=device).repeat_interleave(shape.seq_len_q)
    indices = random_indices(visible, shape.seq_len_kv, shape.topk, g)
    return PageSlotsInputs(
        indices.view(shape.batch_size, shape.seq_len_q, shape.topk),
        make_ragged_block_table(shape.pages, g),
        shape.page_size,
    )


def reference(inputs: PageSlotsInputs, *, rows: Tensor | None = None) -> PageSlotsOutputs:
    """The formula, in integers."""
    indices, table = (
        x if rows is None else x[rows] for x in (inputs.topk_indices, inputs.block_table)
    )
    valid = (indices >= 0) & (indices < table.shape[1] * inputs.page_size)
    safe = torch.where(valid, indices, 0).long()
    pages = table.gather(1, (safe // inputs.page_size).flatten(1)).view_as(indices)
    slots = pages * inputs.page_size + (safe % inputs.page_size).to(torch.int32)
    return PageSlotsOutputs(torch.where(valid, slots, -1).to(torch.int32))


def check(
    inputs: PageSlotsInputs, outputs: PageSlotsOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """Equality, element by element."""
    expected = reference(inputs, rows=rows).topk_slots
    actual = outputs.topk_slots if rows is None else outputs.topk_slots[rows]
    if actual.shape != expected.shape:
        return (shape_differs("topk_slots"),)
    wrong = float((actual != expected).sum().item())
    return (
        Check(
            name="topk_slots", passed=wrong == 0, figures={"wrong": wrong}, limits={"wrong": 0.0}
        ),
    )


def cost(shape: PageSlotsShape) -> Cost:
    """Indices read, slots written, the pages of the block table once."""
    entries = 4.0 * shape.batch_size * shape.seq_len_q * shape.topk
    return Cost(flops=0.0, bytes_read=entries + 4.0 * sum(shape.pages), bytes_written=entries)


def memory(shape: PageSlotsShape) -> Memory:
    """Indices and a whole block table; slots."""
    entries = 4 * shape.batch_size * shape.seq_len_q * shape.topk
    table = 4 * shape.batch_size * shape.max_pages
    return Memory(input_bytes=entries + table, output_bytes=entries)


def shape_of(case: Case, preset: Preset) -> PageSlotsShape:
    if case.topk is None:
        raise Unsupported("topk has no value (pass -k)")
    return PageSlotsShape(
        batch_size=case.batch_size,
        seq_len_kv=case.seq_len_kv,
        topk=case.topk,
        seq_len_q=case.seq_len_q,
        page_size=preset.page_size,
        lengths=case.lengths,
    )


OPERATOR = Operator(
    name="page_slots",
    summary="cache rows of the selected positions",
    phases=("decode",),
    axes=frozenset({"topk", "batch_size", "lengths"}),
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=check,
    cost=cost,
    memory=memory,
    num_rows=lambda shape: shape.batch_size,
    always_checked=longest_sequence,
)
