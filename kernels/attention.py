"""What sparse prefill, sparse decode and dense attention share: softmax over listed keys, in fp32.

    P[h, p] = sm_scale · ⟨q[h], k[p]⟩ for valid p, else -inf
    max_logits[h] = max_p P        lse[h] = ln Σ_p exp P        out[h] = Σ_p exp(P - lse) · v[p]
    with a sink: out ← out / (1 + exp(attn_sink[h] - lse)); it changes neither lse nor max_logits

Natural logarithm, scale included. A query without a valid key: out 0, max_logits -inf, lse +inf.
Source: FlashMLA tests/ref.py (semantics and tolerances).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import Check, Tolerance, compare_logs_to_budget, compare_to_budget

LOG2_E = 1.4426950408889634
REFERENCE_CHUNK_ELEMENTS = 2**22
"""16 MB in fp32: on a CPU twice as fast as chunks that no cache holds."""

OUT_TOLERANCE = Tolerance(abs=8e-4, rel=3.01 / 128, cos=7e-6)
LSE_TOLERANCE = Tolerance(abs=1e-6, rel=2.01 / 65536, cos=1e-7)
DECODE_OUT_TOLERANCE = Tolerance(abs=1e-3, rel=2.01 / 128, cos=5e-6)
DECODE_LSE_TOLERANCE = Tolerance(abs=1e-6, rel=8.01 / 65536, cos=1e-7)


class AttentionRow(NamedTuple):
    """[rows, num_heads, head_dim_v] and two of [rows, num_heads] fp32."""

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


def attend_plain(
    q: Tensor, k: Tensor, valid: Tensor, sm_scale: float, head_dim_v: int, attn_sink: Tensor | None
) -> AttentionRow:
    """What plain torch makes of `attend` in bf16: logits, weights and output are each rounded.

    Its error is the budget of a kernel, so it shares no line with `attend`. lse is the fp32
    logarithm of the rounded logits; `out` is bf16.
    """
    q, k = q.bfloat16(), k.bfloat16().masked_fill(~valid[..., None], 0)
    hidden = ~valid[:, None, :]
    logits = torch.matmul(q, k.mT).mul(sm_scale).masked_fill(hidden, float("-inf"))
    weights = logits.softmax(-1).nan_to_num(nan=0.0)
    out = torch.matmul(weights, k[..., :head_dim_v])
    num_valid = valid.sum(-1)[:, None]
    lse = logits.float().logsumexp(-1)
    if attn_sink is not None:
        total = torch.logaddexp(lse, attn_sink.expand_as(lse))
        share = torch.where(lse == total, 1.0, (lse - total).exp())
        out = out * share.bfloat16()[..., None]
    largest = logits.float().max(-1).values if k.shape[1] else lse
    return AttentionRow(out, largest, lse.where(num_valid > 0, float("inf")))


def budget_checks(
    actual: Any, expected: Any, plain: Any, *, lse_floor: float = 0.0
) -> tuple[Check, ...]:
    """`<name>_budget` of each output, the same field of all three; where actual has None, none.

    `lse_floor` is an error of lse that is allowed whatever plain's is.
    """
    checks = [compare_to_budget("out_budget", actual.out, expected.out, plain.out)]
    for name in actual._fields:
        if name != "out" and getattr(actual, name) is not None:
            tensors = (getattr(outputs, name) for outputs in (actual, expected, plain))
            checks.append(
                compare_logs_to_budget(f"{name}_budget", *tensors, absolute_floor=lse_floor)
            )
    return tuple(checks)


def row_chunk(num_keys: int, num_heads: int, width: int) -> int:
    """Rows that `attend` may take at once within REFERENCE_CHUNK_ELEMENTS."""
    return max(1, REFERENCE_CHUNK_ELEMENTS // max(1, num_keys * max(num_heads, width)))
