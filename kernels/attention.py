"""What sparse prefill, sparse decode and dense attention share: softmax over listed keys, in fp32.

    P[h, p] = sm_scale · ⟨q[h], k[p]⟩ for valid p, else -inf
    max_logits[h] = max_p P        lse[h] = ln Σ_p exp P        out[h] = Σ_p exp(P - lse) · v[p]
    with a sink: out ← out / (1 + exp(attn_sink[h] - lse)); it changes neither lse nor max_logits

Natural logarithm, scale included. A query without a valid key: out 0, max_logits -inf, lse +inf.
Source: FlashMLA tests/ref.py (semantics and tolerances).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import Tolerance

LOG2_E = 1.4426950408889634
REFERENCE_CHUNK_ELEMENTS = 2**22
"""16 MB in fp32: on a CPU twice as fast as chunks that no cache holds."""

OUT_TOLERANCE = Tolerance(abs=8e-4, rel=3.01 / 128, cos=7e-6)
LSE_TOLERANCE = Tolerance(abs=1e-6, rel=2.01 / 65536, cos=1e-7)
DECODE_OUT_TOLERANCE = Tolerance(abs=1e-3, rel=2.01 / 128, cos=5e-6)
DECODE_LSE_TOLERANCE = Tolerance(abs=1e-6, rel=8.01 / 65536, cos=1e-7)


class AttentionRow(NamedTuple):
    """[rows, num_heads, head_dim_v] fp32 and two of [rows, num_heads] fp32."""

    out: Tensor
    max_logits: Tensor
    lse: Tensor


def attend(
    q: Tensor, k: Tensor, valid: Tensor, sm_scale: float, head_dim_v: int, attn_sink: Tensor | None
) -> AttentionRow:
    """Attention of each row over its own keys.

    Args:
        q: [rows, num_heads, head_dim_qk].
        k: [rows, keys, head_dim_qk]; values are its first `head_dim_v` columns. May hold NaN where
            not valid.
        valid: [rows, keys] bool.
    """
    k = torch.where(valid.unsqueeze(-1), k.float(), 0.0)
    logits = torch.einsum("qhd,qkd->qhk", q.float(), k) * sm_scale
    logits.masked_fill_(~valid.unsqueeze(1), float("-inf"))
    max_logits = (
        logits.amax(-1) if logits.shape[-1] else logits.new_full(q.shape[:2], float("-inf"))
    )
    lse = torch.logsumexp(logits, -1)
    empty = ~valid.any(-1)[:, None]
    weights = torch.exp(logits - torch.where(empty, 0.0, lse).unsqueeze(-1))
    out = torch.einsum("qhk,qkd->qhd", weights, k[..., :head_dim_v])
    if attn_sink is not None:
        out = out * torch.sigmoid(lse - attn_sink).masked_fill(empty, 0.0).unsqueeze(-1)
    return AttentionRow(out, max_logits, lse.masked_fill(empty, float("inf")))


def row_chunk(num_keys: int, num_heads: int, width: int) -> int:
    """Rows that `attend` may take at once within REFERENCE_CHUNK_ELEMENTS."""
    return max(1, REFERENCE_CHUNK_ELEMENTS // max(1, num_keys * max(num_heads, width)))
