"""Where the keys of a decode batch lie whose sequences differ in length: in pages, in order.

    keys of sequence b = kv.flatten(0, 1)[first : first + lengths[b]]
    with first = block_table[b, 0] · PAGE_SIZE

Each sequence begins with a page of its own, right behind the last one of the sequence before. So a
kernel may look up every page in the table, as in an engine, or the first one alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_bench.kernels.decode_lengths import pages_of
from dsa_bench.kernels.paging import fill_block_table

PAGE_SIZE = 64
"""Tokens of a page: the only size that FlashMLA takes."""


@dataclass(frozen=True, slots=True)
class KeyPages:
    lengths: tuple[int, ...]
    """Keys of each sequence, for a plan that is made on the host."""
    seq_lens: Tensor
    """[batch_size] int32: the same."""
    block_table: Tensor
    """[batch_size, max_pages] int32; -1 behind the last page of a sequence."""

    def select(self, sequences: slice) -> "KeyPages":
        """The same pages, only these sequences."""
        return KeyPages(
            self.lengths[sequences], self.seq_lens[sequences], self.block_table[sequences]
        )


def lay_out_pages(lengths: tuple[int, ...], device: torch.device | str) -> KeyPages:
    """The first sequence from page 0 on."""
    num_pages = pages_of(lengths, PAGE_SIZE)
    order = torch.arange(sum(num_pages), device=device)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return KeyPages(lengths, seq_lens, fill_block_table(order, num_pages))


def keys_of(kv: Tensor, pages: KeyPages | None, sequence: int) -> Tensor:
    """[keys, width] of one sequence; without pages of kv [batch_size, seq_len_kv, width]."""
    if pages is None:
        return kv[sequence]
    first = int(pages.block_table[sequence, 0]) * PAGE_SIZE
    return kv.flatten(0, 1)[first : first + pages.lengths[sequence]]
