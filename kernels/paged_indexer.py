"""Lightning indexer over a paged cache, for decode: index logits of a few queries a sequence.

    index_logits[b, j, s] =
        scale(b, s) · Σ_h index_weights[b, j, h] · max(0, ⟨index_q[b, j, h], key(b, s)⟩)

key(b, s) and scale(b, s) lie on page block_table[b, s // page_size] of `index_cache` (layout:
`paging.py`).

Shapes:
    index_q        [batch_size, seq_len_q, index_heads, index_dim]  e4m3 or bf16
    index_cache    [num_pages, page_size · 132] uint8, or [num_pages, page_size · 128] bf16
    index_weights  [batch_size, seq_len_q, index_heads]             fp32
    seq_lens       [batch_size, seq_len_q]                          int32  visible keys, from 0 on
    block_table    [batch_size, max_pages]                          int32
    index_logits   [batch_size, seq_len_q, max_pages · page_size]   fp32

Conventions: columns at and beyond seq_lens[b, j] are undefined (the reference holds -inf there).
Entries of block_table beyond the last page of a sequence are never read (inputs hold -1 there);
pages are not checked against num_pages.

Source: DeepGEMM `fp8_paged_mqa_logits` with 2-D context_lens and clean_logits=False.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import Check, compare_tensors, compare_to_budget
from dsa_bench.kernels.decode_lengths import (
    decode_lengths,
    expect_lengths,
    longest_sequence,
    pages_of,
)
from dsa_bench.kernels.indexer import (
    logits_tolerance,
    make_index_vectors,
    weighted_relu_scores,
    weighted_relu_scores_plain,
)
from dsa_bench.kernels.paging import (
    index_row_bytes,
    make_cache,
    make_ragged_block_table,
    pack_index_pages,
    unpack_index_pages,
)
from dsa_bench.operator import Cost, Memory, Operator, Unsupported
from dsa_bench.preset import Preset
from dsa_bench.record import EQUAL_LENGTHS, Case


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedIndexerShape:
    """batch_size sequences, the longest of seq_len_kv tokens, the seq_len_q new ones counted in."""

    batch_size: int
    seq_len_kv: int
    seq_len_q: int = 1
    index_heads: int = 64
    index_dim: int = 128
    page_size: int = 64
    precision: str = "fp8"
    lengths: str = EQUAL_LENGTHS
    """A kind of `decode_lengths.py`."""

    def __post_init__(self) -> None:
        expect_new_tokens(self.seq_len_q, self.seq_len_kv)
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

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs: of n keys query j sees n - seq_len_q + j + 1."""
        m = self.seq_len_q
        return sum(m * (n - m) + m * (m + 1) // 2 for n in self.seq_lens)


def expect_new_tokens(seq_len_q: int, seq_len_kv: int) -> None:
    """Raise Unsupported unless the new tokens lie within the context."""
    if not 0 < seq_len_q <= seq_len_kv:
        raise Unsupported(
            f"seq_len_q {seq_len_q} must be 1 … L {seq_len_kv} (the new tokens are counted in L)"
        )


@dataclass(frozen=True, slots=True)
class PagedIndexerInputs:
    index_q: Tensor
    index_cache: Tensor
    index_weights: Tensor
    seq_lens: Tensor
    block_table: Tensor
    page_size: int


class PagedIndexerOutputs(NamedTuple):
    index_logits: Tensor


def make_inputs(
    shape: PagedIndexerShape, *, seed: int, device: torch.device | str
) -> PagedIndexerInputs:
    """Gaussian queries and keys in a cache whose pages are randomly permuted."""
    g = torch.Generator(device=device).manual_seed(seed)

    def index_pages(pages: int) -> tuple[Tensor, ...]:
        k = torch.randn(pages, shape.page_size, shape.index_dim, generator=g, device=device)
        return (pack_index_pages(k, shape.precision),)

    (cache,) = make_cache(sum(shape.pages), shape.page_size, index_pages, device=device)
    dims = (shape.batch_size, shape.seq_len_q, shape.index_heads)
    q = torch.randn(*dims, shape.index_dim, generator=g, device=device)
    index_q, q_scale = make_index_vectors(q, shape.precision)
    weights = torch.randn(*dims, generator=g, device=device)
    scale = (shape.index_heads * shape.index_dim) ** -0.5
    block_table = make_ragged_block_table(shape.pages, g)
    return PagedIndexerInputs(
        index_q,
        cache,
        weights * q_scale * scale,
        visible_keys(shape.seq_lens, shape.seq_len_q, device),
        block_table,
        shape.page_size,
    )


def visible_keys(seq_lens: Sequence[int], seq_len_q: int, device: torch.device | str) -> Tensor:
    """[sequences, seq_len_q] int32: the last query sees all keys, each before it one less."""
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    return lens[:, None] + torch.arange(1 - seq_len_q, 1, dtype=torch.int32, device=device)


def reference(inputs: PagedIndexerInputs, *, rows: Tensor | None = None) -> PagedIndexerOutputs:
    """The formula in fp32, one sequence at a time; -inf at and beyond seq_lens."""
    return _score_sequences(inputs, rows, weighted_relu_scores)


def plain(inputs: PagedIndexerInputs, *, rows: Tensor | None = None) -> PagedIndexerOutputs:
    """The formula in bf16: the measure of a kernel's error."""
    return _score_sequences(inputs, rows, weighted_relu_scores_plain)


def _score_sequences(
    inputs: PagedIndexerInputs,
    rows: Tensor | None,
    score_keys: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> PagedIndexerOutputs:
    batch = range(inputs.index_q.shape[0]) if rows is None else rows.tolist()
    width = inputs.block_table.shape[1] * inputs.page_size
    out = torch.full(
        (len(batch), inputs.index_q.shape[1], width), float("-inf"), device=inputs.index_q.device
    )
    columns = torch.arange(width, device=out.device)
    for i, b in enumerate(batch):
        longest = int(inputs.seq_lens[b].max())
        pages = inputs.block_table[b, : -(-longest // inputs.page_size)].long()
        values, scale = unpack_index_pages(inputs.index_cache[pages], inputs.page_size)
        k = values.flatten(0, 1)[:longest]
        scores = score_keys(inputs.index_q[b], k, inputs.index_weights[b])
        out[i, :, :longest] = scores * scale.flatten()[:longest]
        out[i].masked_fill_(columns >= inputs.seq_lens[b, :, None], float("-inf"))
    return PagedIndexerOutputs(out)


def check(
    inputs: PagedIndexerInputs, outputs: PagedIndexerOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """The columns below seq_lens against the reference: a tolerance, twice the error of `plain`."""
    expected = reference(inputs, rows=rows).index_logits
    actual, lens = (x if rows is None else x[rows] for x in (outputs.index_logits, inputs.seq_lens))
    mask = torch.arange(expected.shape[-1], device=expected.device) < lens.unsqueeze(-1)
    tolerance = logits_tolerance(expected, mask)
    low = plain(inputs, rows=rows).index_logits
    return (
        compare_tensors("index_logits", actual, expected, tolerance, mask=mask),
        compare_to_budget("index_logits_budget", actual, expected, low, mask=mask),
    )


def cost(shape: PagedIndexerShape) -> Cost:
    """2 · index_heads · index_dim FLOP a visible pair; the keys of a sequence once."""
    element = 1 if shape.precision == "fp8" else 2
    queries = shape.batch_size * shape.seq_len_q * shape.index_heads
    keys = sum(shape.seq_lens)
    return Cost(
        flops=2.0 * shape.index_heads * shape.index_dim * shape.pairs,
        bytes_read=queries * (shape.index_dim * element + 4.0)
        + float(keys * index_row_bytes(shape.precision)),
        bytes_written=4.0 * shape.pairs,
    )


def memory(shape: PagedIndexerShape) -> Memory:
    """Keys in the pages of each sequence, logits in rows as wide as the longest."""
    element = 1 if shape.precision == "fp8" else 2
    queries = shape.batch_size * shape.seq_len_q * shape.index_heads
    columns = shape.max_pages * shape.page_size
    return Memory(
        input_bytes=sum(shape.pages) * shape.page_size * index_row_bytes(shape.precision)
        + queries * (shape.index_dim * element + 4)
        + 4 * shape.batch_size * (shape.max_pages + shape.seq_len_q),
        output_bytes=4 * shape.batch_size * shape.seq_len_q * columns,
    )


def shape_of(case: Case, preset: Preset) -> PagedIndexerShape:
    return PagedIndexerShape(
        batch_size=case.batch_size,
        seq_len_kv=case.seq_len_kv,
        seq_len_q=case.seq_len_q,
        index_heads=preset.index_heads,
        index_dim=preset.index_dim,
        page_size=preset.page_size,
        precision=case.precision,
        lengths=case.lengths,
    )


OPERATOR = Operator(
    name="paged_indexer",
    summary="index logits of new tokens over a paged key cache",
    phases=("decode",),
    axes=frozenset({"precision", "batch_size", "lengths"}),
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=check,
    cost=cost,
    memory=memory,
    num_rows=lambda shape: shape.batch_size,
    always_checked=longest_sequence,
)
