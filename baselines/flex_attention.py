"""torch's FlexAttention: attention that torch.compile generates in Triton from a mask function.

The causal mask is aligned to the end of the keys by its function, and a table says which blocks of
128 queries and 128 keys are seen wholly, in part or not at all. Table and compiled function depend
on lengths alone, alike for all layers and steps: both are made at the first call of a shape and
kept, so they are not in the time. The table is written down from the lengths: torch's
`create_block_mask` looks at every pair, 17 GB for a whole prompt of 128K tokens.

The guards that torch.compile checks at each call are in the time. lse is natural, [1, num_heads,
seq_len_q], transposed here as a view.

The code that torch 2.11 generates counts elements in 32 bits: keys of more than 2^31 elements end
in wrong rows or an illegal access, and are refused.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dsa_bench.baselines.dense_attention import (
    DenseAttentionShape,
    DenseOutputs,
    DensePrefillInputs,
)
from dsa_bench.operator import Implementation, Machine

BLOCK = 128
MIN_CAPABILITY = (8, 0)


def causal_block_mask(seq_len_q: int, seq_len_kv: int, device: torch.device | str) -> Any:
    """BlockMask of a causal mask aligned to the end: query i sees keys up to i + before."""
    from torch.nn.attention.flex_attention import BlockMask

    before = seq_len_kv - seq_len_q

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query + before >= key

    # first and last key that the first and the last query of each block see
    first = torch.arange(0, seq_len_q, BLOCK, device=device) + before
    last = (first + BLOCK - 1).clamp(max=seq_len_kv - 1)
    num_full = (first + 1) // BLOCK
    num_partial = last // BLOCK + 1 - num_full
    num_blocks = -(-seq_len_kv // BLOCK)
    columns = torch.arange(num_blocks, device=device).expand(len(first), num_blocks)
    partial_columns = (columns + num_full[:, None]) % num_blocks
    return BlockMask.from_kv_blocks(
        _table(num_partial),
        _table(partial_columns),
        _table(num_full),
        _table(columns),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(seq_len_q, seq_len_kv),
    )


def _table(x: Tensor) -> Tensor:
    """int32 with axes of 1 for batch and heads."""
    return x.to(torch.int32).contiguous()[None, None]


@lru_cache(maxsize=1)
def prepare(
    num_heads: int, seq_len_q: int, seq_len_kv: int, device: torch.device
) -> tuple[Callable[..., Any], Any]:
    """The compiled function and the mask of a shape."""
    from torch.nn.attention.flex_attention import flex_attention

    # after 8 shapes of one function torch goes on uncompiled: each shape starts afresh
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return compiled, causal_block_mask(seq_len_q, seq_len_kv, device)


@torch.no_grad()
def run(inputs: DensePrefillInputs, /) -> DenseOutputs:
    from torch.nn.attention.flex_attention import AuxRequest

    seq_len_q, num_heads, _ = inputs.q.shape
    attend, block_mask = prepare(num_heads, seq_len_q, inputs.k.shape[0], inputs.q.device)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (inputs.q, inputs.k, inputs.v))
    out, aux = attend(
        q,
        k,
        v,
        block_mask=block_mask,
        scale=inputs.sm_scale,
        return_aux=AuxRequest(lse=True),
    )
    return DenseOutputs(out[0].transpose(0, 1), aux.lse[0].transpose(0, 1))


def supports(shape: DenseAttentionShape, machine: Machine) -> str | None:
    if machine.device != "cuda" or (machine.capability or (0, 0)) < MIN_CAPABILITY:
        return "flex_attention needs a CUDA GPU of compute capability 8.0 or higher"
    if not shape.is_prefill:
        return (
            "flex_attention pads head widths to a power of 2, decode's"
            f" {shape.head_dim_qk} nearly to the double: only its prefill is here"
        )
    if shape.exceeds_int32:
        return (
            "flex_attention counts elements in 32 bits and k has more than 2^31 of them"
            " (take fewer heads or keys)"
        )
    return None


IMPLEMENTS = "dense_attention"
IMPLEMENTATIONS = (Implementation(name="flex_attention", run=run, supports=supports, priority=8),)
