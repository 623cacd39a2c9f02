"""How the output of a sparse layer is judged, and how far it is from dense attention.

Reference: the layer's own steps on fp32 tensors, unrounded but for what belongs to its definition
(e4m3 activations and weights, the format of the caches). `plain`: the same on bf16 tensors; its
error is the budget. Both use the selection that was made; that may take or leave a key only where
its exact score lies as near to the topk-th largest as plain bf16 errs.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsa_bench.accuracy import BUDGET_FACTOR, Check, compare_to_budget
from dsa_bench.kernels import indexer, indexer_topk, paged_indexer
from dsa_bench.kernels.latent_attention import LayerOutputs
from dsa_bench.kernels.layer import DeepSeekSparseAttention
from dsa_bench.kernels.layer_inputs import LayerInputs

FIGURE_ROWS = 8


def plain_layer(inputs: LayerInputs) -> DeepSeekSparseAttention:
    """The layer in plain torch, sparse form."""
    return DeepSeekSparseAttention(
        inputs.weights,
        topk=inputs.topk,
        form="mqa",
        rope=inputs.rope_table,
        workspace_bytes=inputs.workspace_bytes,
    )


def widened(inputs: LayerInputs) -> LayerInputs:
    """The same values as fp32 tensors; e4m3 and caches stay what they are."""
    tokens = replace(inputs.tokens, hidden=inputs.tokens.hidden.float())
    return replace(inputs, weights=inputs.weights.map(widen), tokens=tokens)


def widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def run(
    inputs: LayerInputs, rows: Tensor | None, topk_indices: Tensor | None = None
) -> LayerOutputs:
    """The plain layer on these inputs; a row is a token in prefill, a sequence in decode."""
    layer = plain_layer(inputs)
    if is_prefill(inputs):
        return layer.prefill_tokens(
            inputs.tokens, inputs.cache, rows=rows, topk_indices=topk_indices
        )
    inputs = inputs if rows is None else inputs.select(rows)
    return layer.decode_tokens(inputs.tokens, inputs.cache, topk_indices=topk_indices)


def run_dense(inputs: LayerInputs, rows: Tensor) -> Tensor:
    """The layer with every key selected, for some tokens of a prompt."""
    layer = plain_layer(inputs)
    up, tokens, keys = layer.prepare_prefill(inputs.tokens, inputs.cache, rows)
    return layer.output(layer.attend_everywhere(up, keys.kv, tokens))


def is_prefill(inputs: LayerInputs) -> bool:
    return inputs.phase == "prefill"


def index_logits(inputs: LayerInputs, rows: Tensor | None) -> Tensor:
    """[rows, keys]: scores by the plain layer, -inf where not visible."""
    layer = plain_layer(inputs)
    if is_prefill(inputs):
        up, tokens, keys = layer.prepare_prefill(inputs.tokens, inputs.cache, rows)
        return indexer.reference(layer.indexer_inputs(up, keys, tokens, inputs.cache)).index_logits
    inputs = inputs if rows is None else inputs.select(rows)
    prepared = layer.prepare_decode(inputs.tokens, inputs.cache)
    return paged_indexer.reference(prepared.indexer_inputs()).index_logits.flatten(0, 1)


def check(
    inputs: LayerInputs, outputs: LayerOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """The selection against exact scores, and the output on the selection that was made."""
    if rows is None:
        rows = torch.arange(outputs.out.shape[0], device=outputs.out.device)
    out, wide = outputs.out[rows], widened(inputs)
    if outputs.topk_indices is None:
        expected, plain = run_dense(wide, rows), run_dense(inputs, rows)
        return (compare_to_budget("out_budget", out, expected, plain),)
    chosen = outputs.topk_indices[rows]
    expected, plain = (run(x, rows, chosen).out for x in (wide, inputs))
    return (
        check_selection(wide, inputs, chosen, rows),
        compare_to_budget("out_budget", out, expected, plain),
    )


def check_selection(wide: LayerInputs, inputs: LayerInputs, chosen: Tensor, rows: Tensor) -> Check:
    """No key is missing or too many by more than twice what plain bf16 errs in its score."""
    exact, plain = index_logits(wide, rows), index_logits(inputs, rows)
    seen = exact > float("-inf")
    error = (plain - exact).where(seen, 0.0).abs().amax().item()
    tolerance = BUDGET_FACTOR * error
    return indexer_topk.check_selection(exact, chosen.flatten(0, -2), tolerance=tolerance)


def figures(
    inputs: LayerInputs, outputs: LayerOutputs, *, rows: Tensor | None = None
) -> dict[str, Any]:
    """`relative_l2` of some tokens' output against the dense layer's, ‖u - dense‖ / ‖dense‖.

    Of a prompt alone: what a decode leaves out is what a prompt of that length leaves out.
    """
    if not is_prefill(inputs) or outputs.topk_indices is None:
        return {}
    if rows is None:
        rows = torch.arange(outputs.out.shape[0], device=outputs.out.device)
    rows = rows[:FIGURE_ROWS]
    dense = run_dense(widened(inputs), rows)
    difference = (outputs.out[rows].float() - dense).norm() / dense.norm()
    return {"dense_error": {"relative_l2": difference.item()}}
