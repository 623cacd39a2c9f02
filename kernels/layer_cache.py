"""The paged caches of one layer: latents and index keys of several sequences.

Layouts as in `paging.py`. A token at position p of sequence b lies at
    slot = block_table[b, p // page_size] · page_size + p % page_size
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_bench.kernels.paging import (
    HEAD_DIM_QK,
    INDEX_DIM,
    index_row_bytes,
    mla_row_bytes,
)
from dsa_bench.preset import Preset

CACHE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.uint8}


@dataclass(frozen=True, slots=True)
class LayerCache:
    kv_cache: Tensor
    """[num_pages, page_size, 576] bf16 or fp32, or [num_pages, page_size, 656] uint8."""
    index_cache: Tensor | None
    """[num_pages, page_size · 128], or · 132 uint8; None in a dense layer."""
    block_table: Tensor
    """[batch_size, max_pages] int32."""
    page_size: int

    @classmethod
    def allocate(
        cls,
        preset: Preset,
        batch_size: int,
        max_tokens: int,
        precision: str,
        device: torch.device | str,
        *,
        with_index: bool = True,
    ) -> "LayerCache":
        """Zeroed caches for `batch_size` sequences of up to `max_tokens`, pages in order.

        `precision`: fp8 (656 and 132 bytes a token), bf16, or fp32 (for references).
        """
        page_size, dtype = preset.page_size, CACHE_DTYPES[precision]
        max_pages = -(-max_tokens // page_size)
        num_pages = batch_size * max_pages
        is_fp8 = precision == "fp8"
        row = mla_row_bytes("fp8") if is_fp8 else HEAD_DIM_QK
        index_row = index_row_bytes("fp8") if is_fp8 else INDEX_DIM
        table = torch.arange(num_pages, dtype=torch.int32, device=device)
        return cls(
            torch.zeros(num_pages, page_size, row, dtype=dtype, device=device),
            torch.zeros(num_pages, page_size * index_row, dtype=dtype, device=device)
            if with_index
            else None,
            table.view(batch_size, max_pages),
            page_size,
        )

    @property
    def precision(self) -> str:
        return next(name for name, dtype in CACHE_DTYPES.items() if dtype == self.kv_cache.dtype)

    @property
    def max_tokens(self) -> int:
        """Positions that each sequence has room for."""
        return self.block_table.shape[1] * self.page_size

    def slots(self, sequence: Tensor, positions: Tensor) -> Tensor:
        """Slots of tokens, int32: `sequence` and `positions` are of one shape, integers."""
        positions = positions.long()
        pages = self.block_table[sequence.long(), positions // self.page_size]
        return (pages * self.page_size + positions % self.page_size).to(torch.int32)
