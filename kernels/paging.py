"""Layouts of the two paged caches, and positions to slots.

Slot = page · page_size + offset. `block_table[b, i]` is the page of positions i · page_size … of
sequence b.

MLA latent cache, fp8: [num_pages, page_size, 656] uint8, a token is
    bytes   0..511   512 e4m3 latents
    bytes 512..527   4 fp32 scales, one for each 128 latents, powers of two
    bytes 528..655   64 bf16, the rotated key
MLA latent cache, bf16: [num_pages, page_size, 576] bf16, latents then rotated key.
fp32, for references: the same in fp32; nothing in it is rounded.

Indexer key cache, fp8: [num_pages, page_size · 132] uint8; a page holds first the e4m3 values of
all its tokens, then their fp32 scales: it is *not* interleaved by token.
Indexer key cache, bf16: [num_pages, page_size · 128] bf16; fp32 for references: the same in fp32.

Source: FlashMLA flash_mla_interface.py and tests/quant.py (656 bytes); DeepGEMM
tests/test_attention.py (132 bytes).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_bench.kernels.fp8 import LATENT_SCALE_FLOOR, quantize, quantize_index_vectors

HEAD_DIM_V = 512
HEAD_DIM_ROPE = 64
HEAD_DIM_QK = HEAD_DIM_V + HEAD_DIM_ROPE
INDEX_DIM = 128
LATENT_GROUP = 128
SCALE_BYTES = 4
MLA_ROW_BYTES = HEAD_DIM_V + HEAD_DIM_V // LATENT_GROUP * SCALE_BYTES + HEAD_DIM_ROPE * 2
INDEX_ROW_BYTES = INDEX_DIM + SCALE_BYTES


ELEMENT_BYTES = {"bf16": 2, "fp32": 4}
"""Of a cache that is not fp8."""
PRECISIONS = {torch.uint8: "fp8", torch.bfloat16: "bf16", torch.float32: "fp32"}
"""dtype of a cache -> its precision."""


@dataclass(frozen=True, slots=True)
class Pages:
    """Where the sequences of a batch lie in a paged cache."""

    block_table: Tensor
    """[batch_size, max_pages] int32"""
    page_size: int

    def seq_len_q(self, num_rows: int) -> int:
        """Rows of a sequence, if the batch has so many: row i is of sequence i // seq_len_q."""
        return num_rows // max(1, self.block_table.shape[0])


def mla_row_bytes(precision: str) -> int:
    """Bytes of one token in the latent cache: 656 (fp8), 1152 (bf16) or 2304 (fp32)."""
    return MLA_ROW_BYTES if precision == "fp8" else HEAD_DIM_QK * ELEMENT_BYTES[precision]


def index_row_bytes(precision: str) -> int:
    """Bytes of one token in the indexer's cache: 132 (fp8), 256 (bf16) or 512 (fp32)."""
    return INDEX_ROW_BYTES if precision == "fp8" else INDEX_DIM * ELEMENT_BYTES[precision]


def pack_mla_rows(kv: Tensor, precision: str) -> Tensor:
    """[..., 576] -> cache rows: [..., 656] uint8 (fp8), or [..., 576] bf16 or fp32."""
    if precision != "fp8":
        return kv.to(_dtype(precision))
    values, scale = quantize(kv[..., :HEAD_DIM_V], LATENT_GROUP, LATENT_SCALE_FLOOR)
    rope = kv[..., HEAD_DIM_V:].bfloat16().contiguous()
    return torch.cat(
        [values.view(torch.uint8), scale.contiguous().view(torch.uint8), rope.view(torch.uint8)],
        dim=-1,
    )


def unpack_mla_rows(rows: Tensor) -> Tensor:
    """Cache rows -> [..., 576] fp32; of fp8, rounded to bf16 as every kernel holds them."""
    if rows.dtype != torch.uint8:
        return rows.float()
    scale_end = MLA_ROW_BYTES - 2 * HEAD_DIM_ROPE
    values = rows[..., :HEAD_DIM_V].contiguous().view(torch.float8_e4m3fn).float()
    scale = rows[..., HEAD_DIM_V:scale_end].contiguous().view(torch.float32)
    latent = (values.unflatten(-1, (-1, LATENT_GROUP)) * scale.unsqueeze(-1)).flatten(-2)
    rope = rows[..., scale_end:].contiguous().view(torch.bfloat16).float()
    return torch.cat([latent.bfloat16().float(), rope], dim=-1)


def pack_index_pages(index_k: Tensor, precision: str) -> Tensor:
    """[pages, page_size, 128] -> [pages, page_size · 132] uint8, or [pages, … · 128] floats."""
    if precision != "fp8":
        return index_k.to(_dtype(precision)).flatten(1)
    values, scale = quantize_index_vectors(index_k)
    return torch.cat(
        [values.view(torch.uint8).flatten(1), scale.contiguous().view(torch.uint8)], dim=-1
    )


def unpack_index_pages(index_cache: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Pages -> fp32 values [pages, page_size, 128], unscaled, and scales [pages, page_size]."""
    values, scale = split_index_pages(index_cache, page_size)
    if scale is None:
        return values.float(), torch.ones(values.shape[:2], device=values.device)
    return values.float(), scale


def split_index_pages(index_cache: Tensor, page_size: int) -> tuple[Tensor, Tensor | None]:
    """Views of pages: values [pages, page_size, 128], e4m3 or as they are, and scales, None but in
    fp8: [pages, page_size] fp32. To write to them is to write to the cache."""
    if index_cache.dtype != torch.uint8:
        return index_cache.unflatten(1, (page_size, INDEX_DIM)), None
    split = page_size * INDEX_DIM
    values = index_cache[:, :split].view(torch.float8_e4m3fn).unflatten(1, (page_size, INDEX_DIM))
    return values, index_cache.view(torch.float32)[:, split // SCALE_BYTES :]


def _dtype(precision: str) -> torch.dtype:
    return next(dtype for dtype, name in PRECISIONS.items() if name == precision)


def make_block_table(batch_size: int, max_pages: int, generator: torch.Generator) -> Tensor:
    """A random permutation of pages: [batch_size, max_pages] int32, no page used twice."""
    return make_ragged_block_table((max_pages,) * batch_size, generator)


def make_ragged_block_table(num_pages: Sequence[int], generator: torch.Generator) -> Tensor:
    """The same for sequences of so many pages, as wide as the most; behind the last page -1."""
    pages = torch.randperm(sum(num_pages), generator=generator, device=generator.device)
    return fill_block_table(pages, num_pages)


def fill_block_table(pages: Tensor, num_pages: Sequence[int]) -> Tensor:
    """[sequences, max_pages] int32: the first num_pages[0] of `pages`, then those of the next, …;
    -1 behind the last page of a sequence."""
    counts = torch.tensor(num_pages, device=pages.device)
    is_used = torch.arange(max(num_pages), device=pages.device) < counts[:, None]
    table = torch.full(is_used.shape, -1, dtype=torch.int32, device=pages.device)
    table[is_used] = pages.to(torch.int32)
    return table


def make_cache(
    num_pages: int,
    page_size: int,
    rows_of: Callable[[int], tuple[Tensor, ...]],
    *,
    device: torch.device | str,
) -> list[Tensor]:
    """Fill caches page by page, so that no fp32 copy of a whole cache is ever held.

    `rows_of(pages)` returns the packed tensors of that many pages; that is their first dimension.
    """
    chunk = max(1, 65536 // page_size)
    caches: list[Tensor] = []
    for begin in range(0, num_pages, chunk):
        count = min(chunk, num_pages - begin)
        parts = rows_of(count)
        if not caches:
            caches = [
                torch.empty((num_pages, *part.shape[1:]), dtype=part.dtype, device=device)
                for part in parts
            ]
        for cache, part in zip(caches, parts, strict=True):
            cache[begin : begin + count] = part
    return caches
