"""Lightning indexer over a paged cache for Hopper in Gluon: `paged_logits.py`.

Supports fp8 and bf16 caches, 1 to 8 new tokens a sequence, lengths that differ by query and by
sequence, 8, 16, 32 or 64 heads of 128 columns, pages of a multiple of 64 keys.
"""

from dsa_bench.kernels.logit_tiles import refusal
from dsa_bench.kernels.page_tiles import MAX_SEQ_LEN_Q, TILE_KEYS
from dsa_bench.kernels.paged_indexer import (
    PagedIndexerInputs,
    PagedIndexerOutputs,
    PagedIndexerShape,
)
from dsa_bench.kernels.paged_logits import paged_logits
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "paged_indexer"


def run(inputs: PagedIndexerInputs) -> PagedIndexerOutputs:
    return PagedIndexerOutputs(
        paged_logits(
            inputs.index_q,
            inputs.index_cache,
            inputs.index_weights,
            inputs.seq_lens,
            inputs.block_table,
            page_size=inputs.page_size,
        )
    )


def supports(shape: PagedIndexerShape, machine: Machine) -> str | None:
    reason = refusal("gluon paged_indexer", shape.index_heads, shape.index_dim, machine)
    if reason is not None:
        return reason
    if shape.page_size % TILE_KEYS:
        return (
            f"gluon paged_indexer takes pages of a multiple of {TILE_KEYS} tokens,"
            f" this case has {shape.page_size}"
        )
    if shape.seq_len_q > MAX_SEQ_LEN_Q:
        return (
            f"gluon paged_indexer takes {MAX_SEQ_LEN_Q} new tokens a sequence at most,"
            f" this case has {shape.seq_len_q}"
        )
    return None


IMPLEMENTATIONS = (Implementation(name="gluon", run=run, supports=supports, priority=30),)
