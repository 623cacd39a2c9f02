"""Sparse prefill as its definition reads."""

import math

import torch

from dsa_bench.kernels.sparse_prefill import SparsePrefillOutputs

INF = float("inf")


def loops(q, kv, inputs, head_dim_v=512):
    """The definition, one query, head and entry at a time, in Python floats.

    q and kv in fp64; the rest from inputs of sparse_prefill or sparse_prefill_fp8.
    """
    rows, heads = q.shape[:2]
    out = torch.zeros(rows, heads, head_dim_v, dtype=torch.float64)
    largest, lse = torch.full((rows, heads), -INF), torch.full((rows, heads), INF)
    for i in range(rows):
        listed = inputs.topk_indices[i].tolist()
        if inputs.topk_lens is not None:
            listed = listed[: max(0, int(inputs.topk_lens[i]))]
        used = [n for n in listed if 0 <= n < kv.shape[0]]
        for h in range(heads if used else 0):
            scores = [inputs.sm_scale * float(q[i, h] @ kv[n]) for n in used]
            total = sum(math.exp(s) for s in scores)
            largest[i, h], lse[i, h] = max(scores), math.log(total)
            if inputs.attn_sink is not None:
                sink = float(inputs.attn_sink[h])
                total += math.exp(sink) if sink < INF else INF
            for n, s in zip(used, scores, strict=True):
                out[i, h] += math.exp(s) / total * kv[n, :head_dim_v]
    return SparsePrefillOutputs(out.float(), largest, lse)
