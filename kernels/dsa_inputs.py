"""Inputs of the whole pipeline in which indexer and attention look for the same keys.

Every key has a hidden vector z, every query a hidden vector y, both of index_dim Gaussians. The
indexer's key is z, its queries are y with noise of each head; the latent key is z · A for a fixed A
with orthonormal rows, the queries of the attention are (y with noise) · A. So both score a key by
about ⟨y, z⟩, which is what training the indexer aims at, and what DSA leaves out is a measurable,
not an arbitrary, part of the attention. The gain makes the logits of the attention spread with a
standard deviation of about 4.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsa_bench.kernels.indexer import (
    IndexerInputs,
    IndexerShape,
    causal_range,
    make_index_vectors,
    weight_scale,
)
from dsa_bench.kernels.paged_indexer import PagedIndexerInputs, PagedIndexerShape, decode_lens
from dsa_bench.kernels.paging import (
    HEAD_DIM_ROPE,
    HEAD_DIM_V,
    make_block_table,
    make_cache,
    pack_index_pages,
    pack_mla_rows,
)
from dsa_bench.kernels.sparse_decode import SparseDecodeInputs, SparseDecodeShape
from dsa_bench.kernels.sparse_prefill import SparsePrefillInputs, SparsePrefillShape

HEAD_NOISE = 0.5
LATENT_SCALE = 0.2
LOGIT_SPREAD = 4.0


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
        return SparseDecodeInputs(self.q, self.kv_cache, topk_slots, self.sm_scale)

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


def make_index_queries(
    y: Tensor, heads: int, precision: str, scale: float, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Hidden vectors -> index_q [..., heads, index_dim], index_weights [..., heads], positive."""
    dims = (*y.shape[:-1], heads)
    noise = torch.randn(*dims, y.shape[-1], generator=g, device=g.device)
    index_q, q_scale = make_index_vectors(y.unsqueeze(-2) + HEAD_NOISE * noise, precision)
    weights = torch.rand(dims, generator=g, device=g.device) + 0.5
    return index_q, weights * q_scale * scale


def make_prefill_inputs(
    index_shape: IndexerShape,
    shape: SparsePrefillShape,
    *,
    seed: int,
    device: torch.device | str,
    workspace_bytes: int,
) -> DsaPrefillInputs:
    """A chunk of queries that ends at position seq_len_kv."""
    g = torch.Generator(device=device).manual_seed(seed)
    dim = index_shape.index_dim
    rope = shape.head_dim_qk - shape.head_dim_v
    projection = make_projection(dim, shape.head_dim_v, g)
    z = torch.randn(shape.seq_len_kv, dim, generator=g, device=device)
    y = torch.randn(shape.seq_len_q, dim, generator=g, device=device)
    index_k, index_k_scale = make_index_vectors(z, index_shape.precision)
    index_q, index_weights = make_index_queries(
        y, index_shape.index_heads, index_shape.precision, weight_scale(index_shape), g
    )
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
    )


def make_decode_inputs(
    index_shape: PagedIndexerShape,
    shape: SparseDecodeShape,
    *,
    seed: int,
    device: torch.device | str,
) -> DsaDecodeInputs:
    """New tokens of batch_size sequences, whose pages are randomly permuted."""
    g = torch.Generator(device=device).manual_seed(seed)
    dim, rope, latent = index_shape.index_dim, HEAD_DIM_ROPE, HEAD_DIM_V
    projection = make_projection(dim, latent, g)

    def pages(count: int) -> tuple[Tensor, ...]:
        z = torch.randn(count, shape.page_size, dim, generator=g, device=device)
        kv = make_latents(z, projection, rope, g)
        return pack_mla_rows(kv, shape.precision), pack_index_pages(z, index_shape.precision)

    num_pages = shape.batch_size * shape.max_pages
    kv_cache, index_cache = make_cache(num_pages, shape.page_size, pages, device=device)
    y = torch.randn(shape.batch_size, shape.seq_len_q, dim, generator=g, device=device)
    scale = float((index_shape.index_heads * dim) ** -0.5)
    index_q, index_weights = make_index_queries(
        y, index_shape.index_heads, index_shape.precision, scale, g
    )
    return DsaDecodeInputs(
        index_q,
        index_cache,
        index_weights,
        decode_lens(shape.batch_size, shape.seq_len_q, shape.seq_len_kv, device),
        make_block_table(shape.batch_size, shape.max_pages, g),
        make_queries(y, shape.num_heads, projection, shape.sm_scale, rope, g),
        kv_cache,
        torch.zeros(shape.queries, dtype=torch.int32, device=device),
        shape.sm_scale,
        shape.topk,
        shape.page_size,
    )
