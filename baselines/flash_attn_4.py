"""FlashAttention 4, forward: the wheel `flash-attn-4`, which imports as `flash_attn.cute`.

Its kernels are written in CuTe's Python and compiled at the first call of a head width, with no
nvcc. Causal there means aligned to the end of the keys, as here; lse is natural and [batch_size,
num_heads, seq_len_q], transposed here as a view.

Prefill only: its form for latent keys (`qv`) is made for Blackwell, and on Hopper it takes head
widths up to 256. fp8 is for Blackwell too.
"""

import importlib
from functools import cache
from typing import Any

import torch

from dsa_bench.baselines.dense_attention import (
    DenseAttentionShape,
    DenseOutputs,
    DensePrefillInputs,
)
from dsa_bench.library import Library
from dsa_bench.operator import Implementation, Machine

MODULE = "flash_attn.cute"
MAX_HEAD_DIM = 256


@cache
def load() -> Any:
    """The module, with the function needed."""
    module = importlib.import_module(MODULE)
    if not hasattr(module, "flash_attn_func"):
        raise ImportError(f"this {MODULE} has no flash_attn_func")
    return module


LIBRARY = Library(
    title="FlashAttention-4",
    modules=(MODULE,),
    distributions=("flash-attn-4",),
    # only pre-releases work: without a bound pip takes the empty 0.0.1
    install="pip install 'flash-attn-4[cu13]>=4.0.0b36'",
    load=load,
)


@torch.no_grad()
def run(inputs: DensePrefillInputs, /) -> DenseOutputs:
    out, lse = load().flash_attn_func(
        inputs.q.unsqueeze(0),
        inputs.k.unsqueeze(0),
        inputs.v.unsqueeze(0),
        softmax_scale=inputs.sm_scale,
        causal=True,
        return_lse=True,
    )
    return DenseOutputs(out[0], lse[0].transpose(0, 1))


def supports(shape: DenseAttentionShape, machine: Machine) -> str | None:
    if machine.device != "cuda" or not machine.is_hopper:
        return "flash_attn_4, as it is called here, needs a Hopper GPU (compute capability 9.0)"
    if not shape.is_prefill:
        return (
            f"flash_attn_4 takes head widths up to {MAX_HEAD_DIM} on Hopper,"
            f" decode has {shape.head_dim_qk}"
        )
    return LIBRARY.obstacle()


IMPLEMENTS = "dense_attention"
IMPLEMENTATIONS = (
    Implementation(name="flash_attn_4", run=run, supports=supports, library=LIBRARY, priority=38),
)
