"""FlashAttention 3 (Hopper), forward: the wheel `fa3-fwd`, which imports as `fa3_fwd_interface`.

Prefill calls `flash_attn_func`: causal there means aligned to the end of the keys, as here.
Decode is its MLA form: the rotated 64 columns go in as q and k, the other 512 as qv and v, and the
scores are q · k + qv · v; k and v are views of the same rows (their strides, 1152 bytes, are
multiples of 16 as TMA wants them). Sequences of different lengths go in as pages with their table.
In fp8 it does prefill alone here: e4m3 with one descale a head, [batch_size, num_heads] in their
words, bf16 out; their MLA form takes no fp8. By default their fp8 kernel sums all keys of a query
in one accumulator and is wrong at long L; `num_splits`, theirs too, cuts the keys in pieces and
joins the results in fp32 (`dense_attention_fp8.PIECE_KEYS` tells why and how long).
Their lse is [batch_size, num_heads, seq_len_q], natural: transposed here as a view.
"""

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dsa_bench.baselines.dense_attention import (
    DenseAttentionShape,
    DenseDecodeInputs,
    DenseInputs,
    DenseOutputs,
    DensePrefillInputs,
)
from dsa_bench.baselines.dense_attention_fp8 import PIECE_KEYS, Fp8PrefillInputs, num_pieces
from dsa_bench.baselines.key_pages import KeyPages
from dsa_bench.library import Library
from dsa_bench.operator import Implementation, Machine

MODULE = "fa3_fwd_interface"
MAX_SPLITS = 256
"""Theirs."""


@cache
def load() -> Any:
    """The module of the wheel."""
    return importlib.import_module(MODULE)


LIBRARY = Library(
    title="FlashAttention-3",
    modules=(MODULE,),
    distributions=("fa3-fwd",),
    install="pip install fa3-fwd",
    load=load,
)


def prefill(q: Tensor, k: Tensor, v: Tensor, *, sm_scale: float) -> DenseOutputs:
    """MHA form, causal to the end of the keys."""
    out, lse = load().flash_attn_func(
        q.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        softmax_scale=sm_scale,
        causal=True,
        return_attn_probs=True,
    )
    return DenseOutputs(out[0], lse[0].transpose(0, 1))


def decode(
    q: Tensor, kv: Tensor, *, head_dim_v: int, sm_scale: float, pages: KeyPages | None = None
) -> DenseOutputs:
    """MQA form; the number of splits over keys is theirs to choose (num_splits=0)."""
    kv = kv.unsqueeze(2)
    out, lse, *_ = load().flash_attn_with_kvcache(
        q[..., head_dim_v:],
        kv[..., head_dim_v:],
        kv[..., :head_dim_v],
        qv=q[..., :head_dim_v],
        cache_seqlens=None if pages is None else pages.seq_lens,
        page_table=None if pages is None else pages.block_table,
        softmax_scale=sm_scale,
        causal=True,
        num_splits=0,
        return_softmax_lse=True,
    )
    return DenseOutputs(out, lse.transpose(1, 2))


@torch.no_grad()
def run(inputs: DenseInputs, /) -> DenseOutputs:
    if isinstance(inputs, DensePrefillInputs):
        return prefill(inputs.q, inputs.k, inputs.v, sm_scale=inputs.sm_scale)
    assert isinstance(inputs, DenseDecodeInputs)
    return decode(
        inputs.q,
        inputs.kv,
        head_dim_v=inputs.head_dim_v,
        sm_scale=inputs.sm_scale,
        pages=inputs.pages,
    )


@torch.no_grad()
def run_fp8(inputs: Fp8PrefillInputs, /) -> DenseOutputs:
    """MHA form over e4m3 tensors, in pieces of PIECE_KEYS keys; theirs end at a block of 160."""
    scales = {"q": inputs.q_scale, "k": inputs.k_scale, "v": inputs.v_scale}
    out, lse = load().flash_attn_func(
        inputs.q.unsqueeze(0),
        inputs.k.unsqueeze(0),
        inputs.v.unsqueeze(0),
        softmax_scale=inputs.sm_scale,
        causal=True,
        num_splits=num_pieces(inputs.k.shape[0]),
        return_attn_probs=True,
        **{f"{name}_descale": scale.unsqueeze(0) for name, scale in scales.items()},
    )
    return DenseOutputs(out[0], lse[0].transpose(0, 1))


def supports(shape: DenseAttentionShape, machine: Machine) -> str | None:
    if machine.device != "cuda" or not machine.is_hopper:
        return "flash_attn_3 needs a Hopper GPU (compute capability 9.0)"
    return LIBRARY.obstacle()


def supports_fp8(shape: DenseAttentionShape, machine: Machine) -> str | None:
    if machine.device == "cuda" and machine.is_hopper and not shape.is_prefill:
        return "flash_attn_3 has no fp8 decode in the MQA form (flash_mla has)"
    if num_pieces(shape.seq_len_kv) > MAX_SPLITS:
        return (
            f"flash_attn_3 takes up to {MAX_SPLITS} pieces of {PIECE_KEYS} keys in fp8,"
            f" this case has {shape.seq_len_kv} keys"
        )
    return supports(shape, machine)


IMPLEMENTATIONS = {
    "dense_attention": (
        Implementation(
            name="flash_attn_3", run=run, supports=supports, library=LIBRARY, priority=40
        ),
    ),
    "dense_attention_fp8": (
        Implementation(
            name="flash_attn_3", run=run_fp8, supports=supports_fp8, library=LIBRARY, priority=40
        ),
    ),
}
