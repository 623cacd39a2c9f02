"""Inputs of the whole pipeline in which indexer and attention look for the same keys.

Every key has a hidden vector z, every query a hidden vector y, both of index_dim Gaussians (see
`content`). The indexer's key is z, its queries are y with noise of each head; the latent key is
z · A for a fixed A with orthonormal rows, the queries of the attention are (y with noise) · A. So
both score a key by about ⟨y, z⟩, which is what training the indexer aims at, and what DSA leaves
out is a measurable, not an arbitrary, part of the attention. The gain makes the logits of the
attention spread with a standard deviation of about 4 where y and z are independent.

What the indexer is given before it is quantised isn't kept: inputs know how to make it again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_bench.kernels.content import make_content
from dsa_bench.kernels.indexer import (
    IndexerInputs,
    IndexerShape,
    causal_range,
    make_index_vectors,
    weight_scale,
)
from dsa_bench.kernels.paged_indexer import PagedIndexerInputs, PagedIndexerShape, visible_keys
from dsa_bench.kernels.paging import (
    HEAD_DIM_ROPE,
    HEAD_DIM_V,
    make_ragged_block_table,
    pack_index_pages,
    pack_mla_rows,
)
from dsa_bench.kernels.sparse_decode import SparseDecodeInputs, SparseDecodeShape
from dsa_bench.kernels.sparse_prefill import SparsePrefillInputs, SparsePrefillShape

HEAD_NOISE = 0.5
LATENT_SCALE = 0.2
LOGIT_SPREAD = 4.0
CHUNK_TOKENS = 65536
"""Tokens of a sequence that are packed into pages at once."""
SEED_STEP = 1_000_003
"""Between the sequences of one seed and those of the next; larger than any batch."""


class IndexVectors(NamedTuple):
    """What the indexer scores, in fp32 and not quantised: a query's logits are those of `indexer`
    with index_k_scale 1."""

    q: Tensor
    """[…, index_heads, index_dim]"""
    weights: Tensor
    """[…, index_heads]"""
    k: Tensor
    """[keys, index_dim], at least the visible keys, in order of position."""


Exact = Callable[[Tensor], Iterator[IndexVectors]]
"""Numbers of rows -> the vectors of one row after the other, made again."""


@dataclass(frozen=True, slots=True)
class DsaPrefillInputs:
    """Tensors of `indexer` and `sparse_prefill`, without the selection."""

    index_q: Tensor
    index_k: Tensor
    index_k_scale: Tensor
    index_weights: Tensor
    kv_start: Tensor
    kv_end: Tensor
    q: Tensor
    kv: Tensor
    sm_scale: float
    topk: int
    workspace_bytes: int
    exact: Exact | None = None
    """None: nobody knows what was quantised."""

    def indexer_inputs(self, part: slice) -> IndexerInputs:
        return IndexerInputs(
            self.index_q[part],
            self.index_k,
            self.index_k_scale,
            self.index_weights[part],
            self.kv_start[part],
            self.kv_end[part],
        )

    def attention_inputs(self, topk_indices: Tensor) -> SparsePrefillInputs:
        return SparsePrefillInputs(self.q, self.kv, topk_indices, self.sm_scale)

    def select(self, rows: Tensor) -> "DsaPrefillInputs":
        """The same keys, only the queries in `rows`."""
        return replace(
            self,
            index_q=self.index_q[rows],
            index_weights=self.index_weights[rows],
            kv_start=self.kv_start[rows],
            kv_end=self.kv_end[rows],
            q=self.q[rows],
            exact=None,
        )


@dataclass(frozen=True, slots=True)
class DsaDecodeInputs:
    """Tensors of `paged_indexer` and `sparse_decode`, without the selection."""

    index_q: Tensor
    index_cache: Tensor
    index_weights: Tensor
    seq_lens: Tensor
    block_table: Tensor
    q: Tensor
    kv_cache: Tensor
    no_start: Tensor
    """[batch_size · seq_len_q] int32 zeros: each row of logits begins at its first column."""
    sm_scale: float
    topk: int
    page_size: int
    exact: Exact | None = None
    """None: nobody knows what was quantised."""

    def indexer_inputs(self) -> PagedIndexerInputs:
        return PagedIndexerInputs(
            self.index_q,
            self.index_cache,
            self.index_weights,
            self.seq_lens,
            self.block_table,
            self.page_size,
        )

    def attention_inputs(self, topk_slots: Tensor) -> SparseDecodeInputs:
        """A sequence of fewer than topk tokens lists them all and then -1: lengths say how many.
        Among several it is to take less time than the others; a single one has none to spare."""
        lens = self.seq_lens if self.seq_lens.numel() > 1 else None
        return SparseDecodeInputs(
            self.q, self.kv_cache, topk_slots, self.sm_scale, topk_lens=lens, is_padded=True
        )

    def select(self, rows: Tensor) -> "DsaDecodeInputs":
        """The same caches, only the sequences in `rows`."""
        return replace(
            self,
            index_q=self.index_q[rows],
            index_weights=self.index_weights[rows],
            seq_lens=self.seq_lens[rows],
            block_table=self.block_table[rows],
            q=self.q[rows],
            no_start=self.no_start[: rows.numel() * self.q.shape[1]],
            exact=None,
        )


def make_projection(index_dim: int, width: int, g: torch.Generator) -> Tensor:
    """[index_dim, width] with orthonormal rows."""
    square = torch.randn(width, index_dim, generator=g, device=g.device)
    projection: Tensor = torch.linalg.qr(square).Q.T.contiguous()
    return projection


def make_latents(z: Tensor, projection: Tensor, head_dim_rope: int, g: torch.Generator) -> Tensor:
    """Hidden vectors [..., index_dim] -> latent keys [..., head_dim_v + head_dim_rope] bf16."""
    rope = torch.randn(*z.shape[:-1], head_dim_rope, generator=g, device=g.device) / 10
    return torch.cat([z @ projection * LATENT_SCALE, rope], dim=-1).bfloat16()


def make_queries(
    y: Tensor,
    heads: int,
    projection: Tensor,
    sm_scale: float,
    head_dim_rope: int,
    g: torch.Generator,
) -> Tensor:
    """Hidden vectors [..., index_dim] -> [..., heads, head_dim_v + head_dim_rope] bf16."""
    index_dim = y.shape[-1]
    gain = LOGIT_SPREAD / (sm_scale * LATENT_SCALE * (index_dim * (1 + HEAD_NOISE**2)) ** 0.5)
    dims = (*y.shape[:-1], heads)
    noise = torch.randn(*dims, index_dim, generator=g, device=g.device)
    nope = ((y.unsqueeze(-2) + HEAD_NOISE * noise) * gain).bfloat16() @ projection.bfloat16()
    rope = torch.randn(*dims, head_dim_rope, generator=g, device=g.device).bfloat16()
    return torch.cat([nope, rope], dim=-1)


def make_index_queries(y: Tensor, heads: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hidden vectors -> fp32 queries [..., heads, index_dim] and positive weights [..., heads]."""
    dims = (*y.shape[:-1], heads)
    noise = torch.randn(*dims, y.shape[-1], generator=g, device=g.device)
    weights = torch.rand(dims, generator=g, device=g.device) + 0.5
    return y.unsqueeze(-2) + HEAD_NOISE * noise, weights


def quantize_index_queries(q: Tensor, weights: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Queries in the precision of the indexer; their scale goes into the weights."""
    index_q, q_scale = make_index_vectors(q, precision)
    return index_q, weights * q_scale


class _Chunk(NamedTuple):
    """A chunk of prefill before anything is quantised."""

    y: Tensor
    projection: Tensor
    vectors: IndexVectors
    generator: torch.Generator
    """Behind all that was drawn for these."""


def _make_chunk(
    shape: IndexerShape, head_dim_v: int, kind: str, seed: int, device: torch.device | str
) -> _Chunk:
    g = torch.Generator(device=device).manual_seed(seed)
    projection = make_projection(shape.index_dim, head_dim_v, g)
    z, y = make_content(
        kind,
        num_keys=shape.seq_len_kv,
        num_queries=shape.seq_len_q,
        width=shape.index_dim,
        generator=g,
    )
    q, weights = make_index_queries(y, shape.index_heads, g)
    return _Chunk(y, projection, IndexVectors(q, weights * weight_scale(shape), z), g)


def _exact_prefill(make: Callable[[], _Chunk], rows: Tensor) -> Iterator[IndexVectors]:
    q, weights, k = make().vectors
    for row in rows.tolist():
        yield IndexVectors(q[row : row + 1], weights[row : row + 1], k)


def make_prefill_inputs(
    kind: str,
    index_shape: IndexerShape,
    shape: SparsePrefillShape,
    *,
    seed: int,
    device: torch.device | str,
    workspace_bytes: int,
) -> DsaPrefillInputs:
    """A chunk of queries that ends at position seq_len_kv; `kind` of content."""
    make = partial(_make_chunk, index_shape, shape.head_dim_v, kind, seed, device)
    y, projection, (exact_q, exact_weights, z), g = make()
    rope = shape.head_dim_qk - shape.head_dim_v
    index_k, index_k_scale = make_index_vectors(z, index_shape.precision)
    index_q, index_weights = quantize_index_queries(exact_q, exact_weights, index_shape.precision)
    del exact_q
    return DsaPrefillInputs(
        index_q,
        index_k,
        index_k_scale,
        index_weights,
        *causal_range(shape.seq_len_q, shape.seq_len_kv, device),
        make_queries(y, shape.num_heads, projection, shape.sm_scale, rope, g),
        make_latents(z, projection, rope, g),
        shape.sm_scale,
        shape.topk,
        workspace_bytes,
        partial(_exact_prefill, make),
    )


class _Sequence(NamedTuple):
    """The new tokens and the keys of one sequence in decode before anything is quantised."""

    y: Tensor
    vectors: IndexVectors
    """Keys to the end of the last page; what stands behind the sequence is noise."""
    generator: torch.Generator
    """Behind all that was drawn for these."""


def _make_sequence(
    shape: PagedIndexerShape, kind: str, seed: int, device: torch.device | str, sequence: int
) -> _Sequence:
    """Each sequence has a seed of its own, so that one is made again without the others."""
    # far from the seeds of what the sequences share
    own_seed = (2**40 + seed * SEED_STEP + sequence) % 2**63
    g = torch.Generator(device=device).manual_seed(own_seed)
    dim, length = shape.index_dim, shape.seq_lens[sequence]
    z, y = make_content(kind, num_keys=length, num_queries=shape.seq_len_q, width=dim, generator=g)
    q, weights = make_index_queries(y, shape.index_heads, g)
    rest = shape.pages[sequence] * shape.page_size - length
    z = torch.cat([z, torch.randn(rest, dim, generator=g, device=g.device)])
    scale = float((shape.index_heads * dim) ** -0.5)
    return _Sequence(y, IndexVectors(q, weights * scale, z), g)


def _exact_decode(make: Callable[[int], _Sequence], rows: Tensor) -> Iterator[IndexVectors]:
    return (make(row).vectors for row in rows.tolist())


def _write_pages(
    caches: list[Tensor],
    pages: Tensor,
    z: Tensor,
    projection: Tensor,
    shape: SparseDecodeShape,
    g: torch.Generator,
) -> None:
    """Pack one sequence into its pages of both caches, latent and indexer, which are made here if
    the list is empty; in chunks, so that no fp32 copy of a long sequence is held."""
    chunk = max(1, CHUNK_TOKENS // shape.page_size)
    tokens = z.view(-1, shape.page_size, z.shape[-1])
    for own, part in zip(pages.split(chunk), tokens.split(chunk), strict=True):
        kv = make_latents(part, projection, HEAD_DIM_ROPE, g)
        packed = pack_mla_rows(kv, shape.precision), pack_index_pages(part, shape.precision)
        if not caches:
            num_pages = sum(shape.pages)
            caches.extend(x.new_empty(num_pages, *x.shape[1:]) for x in packed)
        for cache, values in zip(caches, packed, strict=True):
            cache[own] = values


def make_decode_inputs(
    kind: str,
    index_shape: PagedIndexerShape,
    shape: SparseDecodeShape,
    *,
    seed: int,
    device: torch.device | str,
) -> DsaDecodeInputs:
    """New tokens of batch_size sequences, whose pages are randomly permuted; `kind` of content."""
    g = torch.Generator(device=device).manual_seed(seed)
    projection = make_projection(index_shape.index_dim, HEAD_DIM_V, g)
    block_table = make_ragged_block_table(shape.pages, g)
    make = partial(_make_sequence, index_shape, kind, seed, device)
    caches: list[Tensor] = []
    made = []
    for sequence, num_pages in enumerate(shape.pages):
        y, (q, weights, z), own = make(sequence)
        made.append((y, *quantize_index_queries(q, weights, index_shape.precision)))
        pages = block_table[sequence, :num_pages].long()
        _write_pages(caches, pages, z, projection, shape, own)
    y, index_q, index_weights = (torch.stack(column) for column in zip(*made, strict=True))
    kv_cache, index_cache = caches
    return DsaDecodeInputs(
        index_q,
        index_cache,
        index_weights,
        visible_keys(shape.seq_lens, shape.seq_len_q, device),
        block_table,
        make_queries(y, shape.num_heads, projection, shape.sm_scale, HEAD_DIM_ROPE, g),
        kv_cache,
        torch.zeros(shape.queries, dtype=torch.int32, device=device),
        shape.sm_scale,
        shape.topk,
        shape.page_size,
        partial(_exact_decode, make),
    )
