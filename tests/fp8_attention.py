"""Dense attention in fp8 for tests: shapes, inputs, and a kernel in torch."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from dsa_bench.baselines import dense_attention, dense_attention_fp8
from dsa_bench.baselines.dense_attention import DenseAttentionShape, DenseOutputs
from dsa_bench.baselines.dense_attention_fp8 import OPERATOR, Fp8Inputs


def prefill_shape(seq_len_q: int, seq_len_kv: int, num_heads: int = 3) -> DenseAttentionShape:
    return DenseAttentionShape(
        phase="prefill", seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, num_heads=num_heads,
        head_dim_qk=192, head_dim_v=128,
    )  # fmt: skip


def decode_shape(
    batch_size: int, seq_len_q: int, seq_len_kv: int, num_heads: int = 3, lengths: str = "equal"
) -> DenseAttentionShape:
    return DenseAttentionShape(
        phase="decode", batch_size=batch_size, seq_len_q=seq_len_q, seq_len_kv=seq_len_kv,
        num_heads=num_heads, head_dim_qk=576, head_dim_v=512, lengths=lengths,
    )  # fmt: skip


def make(shape: DenseAttentionShape, *, sharp: float = 1.0, device: str = "cpu") -> Any:
    """Inputs whose scores are `sharp` times as strong: the scales alone say so."""
    inputs = OPERATOR.make_inputs(shape, seed=3, device=device)
    return dataclasses.replace(inputs, q_scale=inputs.q_scale * sharp)


def online(inputs: Fp8Inputs, *, block: int = 16, up: float = 1.0) -> DenseOutputs:
    """A fp8 kernel in torch: blocks of keys, a running maximum, e4m3 weights times `up`."""
    unscaled, factor = dense_attention_fp8._unscaled(inputs)

    def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, sm_scale: float) -> Any:
        logits = (torch.einsum("qhd,khd->qhk", q, k) * sm_scale).masked_fill(hidden, -math.inf)
        best = torch.full(logits.shape[:2], -1e30)
        total, out = torch.zeros_like(best), torch.zeros(*best.shape, v.shape[-1])
        for part, values in zip(logits.split(block, -1), v.split(block), strict=True):
            new = torch.maximum(best, part.amax(-1))
            keep, weights = (best - new).exp(), (part - new[..., None]).exp()
            total = total * keep + weights.sum(-1)
            rounded = (weights * up).to(torch.float8_e4m3fn).float() / up
            out = out * keep[..., None] + torch.einsum("qhk,khd->qhd", rounded, values)
            best = new
        return dense_attention.Attended(out / total[..., None], best + total.log())

    out, lse = dense_attention.attend_rows(unscaled, None, torch.float32, attend)
    return DenseOutputs((out * factor).bfloat16(), lse)
