"""The dense layer as an operator: from hidden states to outputs with attention to every key.

    u = W_O [attention of every head over all earlier keys]   (`dense_latent_attention.py`)

Shapes:
    hidden   [tokens, 7168]                                                        bf16
    out      prefill [tokens, 7168], decode [batch_size, seq_len_q, 7168]          bf16

Conventions: in prefill the keys and values of each head up to the chunk are there already, as they
are when a prompt is taken whole or its earlier chunks came before; the call makes those of its own
tokens. In decode latents lie contiguous in bf16. `precision` fp8 is that of the projections: no
dense attention here takes fp8 keys. With `tensor_parallel` > 1 one rank's heads are computed.

Source: DeepSeek-V3.2 report, appendix A: the layer of DeepSeek-V3.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsa_bench.accuracy import Check, compare_to_budget
from dsa_bench.baselines.dense_attention import DenseAttentionShape
from dsa_bench.baselines.dense_latent_attention import (
    STAGE_OPERATORS,
    DenseLatentAttention,
    HeadKeys,
    dense_cache,
)
from dsa_bench.kernels import layer_inputs
from dsa_bench.kernels.latent_attention import LayerOutputs
from dsa_bench.kernels.layer_calls import (
    absorbed_calls,
    glue_calls,
    head_key_bytes,
    head_key_calls,
    held_bytes,
)
from dsa_bench.kernels.layer_gate import widen
from dsa_bench.kernels.layer_inputs import LayerInputs, LayerShape
from dsa_bench.operator import Cost, Implementation, Memory, Operator, Run
from dsa_bench.preset import Preset
from dsa_bench.record import Case

GLUE_STAGES = ("linear", "quantize", "rms_norm", "cache_write", "query_rope", "head_linear")
STAGES = (*GLUE_STAGES, "dense_attention")
KEYS_CHUNK = 8192


@dataclass(frozen=True, slots=True)
class DenseLayerInputs:
    layer: LayerInputs
    head_keys: HeadKeys | None
    """Prefill: those of the tokens before the chunk, with room for its own."""


def make_inputs(shape: LayerShape, *, seed: int, device: torch.device | str) -> DenseLayerInputs:
    """The inputs of the sparse layer, the latents contiguous, the indexer left away."""
    cache = dense_cache(shape.batch_size, shape.seq_len_kv, "bf16", device)
    made = layer_inputs.make_inputs(shape, seed=seed, device=device, cache=cache)
    made = replace(made, weights=made.weights.without_index())
    return DenseLayerInputs(made, make_head_keys(made, shape) if shape.is_prefill else None)


def make_head_keys(inputs: LayerInputs, shape: LayerShape) -> HeadKeys:
    device = inputs.rope_table.device
    layer = DenseLatentAttention(inputs.weights, rope=inputs.rope_table)
    made = HeadKeys.allocate(
        shape.preset, shape.rank_heads, shape.seq_len_kv, torch.bfloat16, device
    )
    for begin in range(0, shape.start, KEYS_CHUNK):
        part = slice(begin, min(begin + KEYS_CHUNK, shape.start))
        layer.head_keys(inputs.cache.kv_cache[0, part], made.k[part], made.v[part])
    return made


def run_layer(inputs: DenseLayerInputs, stages: Mapping[str, Implementation]) -> LayerOutputs:
    own = inputs.layer
    layer = DenseLatentAttention(own.weights, stages=stages, rope=own.rope_table)
    with torch.no_grad():
        if inputs.head_keys is None:
            return layer.decode_tokens(own.tokens, own.cache)
        first = own.tokens.num_keys - own.tokens.positions.shape[0]
        return layer.prefill_tokens(own.tokens, own.cache, inputs.head_keys, first)


def compose(phase: str, stages: Mapping[str, Implementation]) -> Run:
    return lambda inputs: run_layer(inputs, stages)


def widened(inputs: LayerInputs) -> LayerInputs:
    """The same values as fp32 tensors; e4m3 weights and the cache stay what they are."""
    tokens = replace(inputs.tokens, hidden=inputs.tokens.hidden.float())
    return replace(inputs, weights=inputs.weights.map(widen), tokens=tokens)


def run_plain(inputs: LayerInputs, rows: Tensor) -> Tensor:
    """Rows of the output in plain torch, MQA form: exact on fp32 tensors, else in bf16."""
    if inputs.phase == "prefill":
        layer = DenseLatentAttention(inputs.weights, rope=inputs.rope_table)
        up = layer.queries_up(inputs.tokens, inputs.cache)[rows]
        tokens = inputs.tokens.select(rows)
        kv = inputs.cache.kv_cache[0, : tokens.num_keys].to(up.dtype)
        return layer.output(layer.attend_everywhere(up, kv, tokens))
    part = inputs.select(rows)
    layer = DenseLatentAttention(part.weights, rope=part.rope_table)
    up = layer.queries_up(part.tokens, part.cache).unflatten(0, (rows.numel(), -1))
    outs = []
    for i, sequence in enumerate(part.tokens.block_table[:, 0].tolist()):
        every = torch.arange(rows.numel() * up.shape[1], device=rows.device)
        tokens = part.tokens.select(every.view(rows.numel(), -1)[i])
        kv = part.cache.kv_cache[sequence, : tokens.num_keys].to(up.dtype)
        outs.append(layer.output(layer.attend_everywhere(up[i], kv, tokens)))
    return torch.stack(outs)


def reference(inputs: DenseLayerInputs, *, rows: Tensor | None = None) -> LayerOutputs:
    """The layer on fp32 tensors, in plain torch."""
    own = inputs.layer
    if rows is None:
        count = own.tokens.positions.shape[0]
        count = count if own.phase == "prefill" else own.tokens.block_table.shape[0]
        rows = torch.arange(count, device=own.rope_table.device)
    return LayerOutputs(run_plain(widened(own), rows), None)


def check(
    inputs: DenseLayerInputs, outputs: LayerOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """The output against the reference, under the budget of plain bf16."""
    if rows is None:
        rows = torch.arange(outputs.out.shape[0], device=outputs.out.device)
    expected = reference(inputs, rows=rows).out
    plain = run_plain(inputs.layer, rows)
    return (compare_to_budget("out_budget", outputs.out[rows], expected, plain),)


def stage_shapes(shape: LayerShape) -> dict[str, tuple[Any, ...]]:
    preset, heads = shape.preset, shape.rank_heads
    calls = glue_calls(shape, with_index=False)
    if shape.is_prefill:
        calls |= head_key_calls(shape, shape.seq_len_q)
        widths = (preset.head_dim_qk_mha, preset.head_dim_v_mha)
    else:
        calls |= absorbed_calls(shape)
        widths = (preset.head_dim_qk, preset.head_dim_v)
    attention = DenseAttentionShape(
        phase=shape.phase,
        seq_len_q=shape.seq_len_q,
        seq_len_kv=shape.seq_len_kv,
        batch_size=shape.batch_size,
        num_heads=heads,
        head_dim_qk=widths[0],
        head_dim_v=widths[1],
        sm_scale=preset.sm_scale,
    )
    return {stage: (calls | {"dense_attention": (attention,)})[stage] for stage in STAGES}


def cost(shape: LayerShape) -> Cost:
    """Sum of the stages' costs."""
    total = Cost(flops=0.0, bytes_read=0.0, bytes_written=0.0)
    for stage, shapes in stage_shapes(shape).items():
        for one in shapes:
            total = total + STAGE_OPERATORS[stage].cost(one)
    return total


def memory(shape: LayerShape) -> Memory:
    held = held_bytes(shape, with_index=False)
    (attention,) = stage_shapes(shape)["dense_attention"]
    inner = STAGE_OPERATORS["dense_attention"].memory(attention)
    kept = head_key_bytes(shape) if shape.is_prefill else 0
    return Memory(
        input_bytes=held.input_bytes + kept,
        output_bytes=held.output_bytes,
        workspace_bytes=held.workspace_bytes + inner.workspace_bytes,
    )


def shape_of(case: Case, preset: Preset) -> LayerShape:
    return LayerShape(
        phase=case.phase,
        seq_len_kv=case.seq_len_kv,
        seq_len_q=case.seq_len_q,
        precision=case.precision,
        batch_size=case.batch_size,
        num_heads=case.num_heads,
        tensor_parallel=case.tensor_parallel,
        inputs=case.inputs,
        weights=case.weights,
        preset=preset,
    )


OPERATOR = Operator(
    name="dense_layer",
    summary="a dense layer, whole: hidden state to output with attention to every key",
    phases=("prefill", "decode"),
    axes=frozenset(
        {"precision", "batch_size", "num_heads", "tensor_parallel", "inputs", "weights"}
    ),
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=check,
    cost=cost,
    memory=memory,
    num_rows=lambda shape: shape.seq_len_q if shape.is_prefill else shape.batch_size,
    stages=lambda phase: STAGES,
    compose=compose,
    stage_shapes=stage_shapes,
    finite=("out",),
)
