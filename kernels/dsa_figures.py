"""How far a few rows are from dense attention, and from the selection without quantisation.

    relative_l2   ‖out - dense‖ / ‖dense‖
    mass_kept     mean share of the dense softmax on the selected keys
    recall        mean share of the top-k keys by exact scores that the selection holds

Dense attention is over all visible keys, on the same latents. Exact scores are the indexer's in
fp32, of queries and keys before they were rounded or quantised; they are made again for these rows
alone.
"""

from typing import Any

import torch
from torch import Tensor

from dsa_bench.kernels.attention import attend
from dsa_bench.kernels.dsa_inputs import DsaDecodeInputs, DsaPrefillInputs, IndexVectors
from dsa_bench.kernels.paging import HEAD_DIM_V, unpack_mla_rows

DENSE_ERROR_ROWS = 8

Inputs = DsaPrefillInputs | DsaDecodeInputs


def figures(inputs: Inputs, outputs: Any, *, rows: Tensor | None = None) -> dict[str, Any]:
    """`dense_error` of a few rows: figures, no criterion; `recall` where the inputs know it."""
    if rows is None:
        rows = torch.arange(outputs.out.shape[0], device=outputs.out.device)
    rows = rows[:DENSE_ERROR_ROWS]
    exact = inputs.exact
    inputs, outputs = inputs.select(rows), type(outputs)(*(x[rows] for x in outputs))
    dense = [attend_densely(inputs, i) for i in range(outputs.out.shape[0])]
    out = torch.stack([row.out for row in dense]).view_as(outputs.out)
    lse = torch.stack([row.lse for row in dense]).view_as(outputs.lse)
    difference = (outputs.out.float() - out).norm() / out.norm()
    kept = torch.exp(outputs.lse - lse).clamp(max=1.0).mean()
    found = {"relative_l2": difference.item(), "mass_kept": kept.item()}
    if exact is not None:
        lens = _visible(inputs)
        parts = [
            recall(vectors, outputs.topk_indices[i].view(lens.shape[1], -1), lens[i])
            for i, vectors in enumerate(exact(rows))
        ]
        found["recall"] = torch.cat(parts).mean().item()
    return {"dense_error": found}


def recall(vectors: IndexVectors, topk_indices: Tensor, lens: Tensor) -> Tensor:
    """Share of the exact top-k that is selected, of each query.

    Args:
        vectors: of these queries.
        topk_indices: [queries, topk] positions, -1 = none.
        lens: [queries] keys that each query sees.
    """
    shares = []
    for i, num_visible in enumerate(lens.tolist()):
        scores = exact_scores(IndexVectors(vectors.q[i], vectors.weights[i], vectors.k))
        best = scores[:num_visible].topk(min(topk_indices.shape[1], num_visible)).indices
        shares.append(torch.isin(best, topk_indices[i]).float().mean())
    return torch.stack(shares)


def exact_scores(vectors: IndexVectors) -> Tensor:
    """[keys] fp32 index logits of one query, [index_heads, …], over all keys."""
    products = (vectors.q.float() @ vectors.k.float().T).clamp_(min=0)
    scores: Tensor = vectors.weights.float() @ products
    return scores


def _visible(inputs: Inputs) -> Tensor:
    """[rows, queries of a row]: keys that each query sees, from the first on."""
    return inputs.kv_end[:, None] if isinstance(inputs, DsaPrefillInputs) else inputs.seq_lens


def attend_densely(inputs: Inputs, row: int) -> Any:
    """Attention of one row of the outputs over every key that it sees."""
    if isinstance(inputs, DsaPrefillInputs):
        q, keys = inputs.q[row : row + 1], inputs.kv
        lens = inputs.kv_end[row : row + 1]
    else:
        q, lens = inputs.q[row], inputs.seq_lens[row]
        # behind the last page the table names none
        pages = inputs.block_table[row, : -(-int(lens.max()) // inputs.page_size)].long()
        keys = unpack_mla_rows(inputs.kv_cache[pages]).flatten(0, 1)
    valid = torch.arange(keys.shape[0], device=q.device) < lens[:, None]
    parts = [
        attend(q[j : j + 1], keys[None], valid[j : j + 1], inputs.sm_scale, HEAD_DIM_V, None)
        for j in range(q.shape[0])
    ]
    return type(parts[0])(*(torch.cat(column) for column in zip(*parts, strict=True)))
