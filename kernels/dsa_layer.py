"""The sparse layer as an operator: from hidden states to outputs, attention in the MQA form.

    u = W_O [W_UV,i · attention over the topk selected latents]      (`layer.py` has every step)

Shapes:
    hidden        [tokens, 7168]                           bf16
    out           prefill [tokens, 7168], decode [batch_size, seq_len_q, 7168]   bf16
    topk_indices  [tokens, topk] or [batch_size, seq_len_q, topk]  int32  positions, -1 = none

Conventions: the keys of new tokens are written into the caches by every call, the same each time.
`precision` fp8: products in e4m3 with block scales, fp8 caches, fp8 indexer, and in prefill
attention in bf16 over latents read back from the cache. With `tensor_parallel` > 1 one rank's heads
are computed, and `out` is its share of the sum over ranks.

Source: DeepSeek-V3.2 report, section 2.1; its published inference code.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dsa_bench.kernels import layer_gate
from dsa_bench.kernels.latent_attention import LayerOutputs
from dsa_bench.kernels.layer import STAGE_OPERATORS, DeepSeekSparseAttention
from dsa_bench.kernels.layer_calls import Calls, sparse_calls, sparse_memory
from dsa_bench.kernels.layer_inputs import LayerInputs, LayerShape, make_inputs
from dsa_bench.operator import Cost, Implementation, Operator, Run, Unsupported
from dsa_bench.preset import Preset
from dsa_bench.record import Case

PREFILL_STAGES = (
    "linear",
    "quantize",
    "rms_norm",
    "cache_write",
    "cache_read",
    "query_rope",
    "index_query",
    "head_linear",
    "indexer",
    "topk",
)
STAGES = {
    "prefill": (*PREFILL_STAGES, "sparse_prefill"),
    "decode": (
        *(stage for stage in PREFILL_STAGES if stage not in ("cache_read", "indexer", "topk")),
        "paged_indexer",
        "topk",
        "page_slots",
        "sparse_decode",
    ),
}
AXES = frozenset(
    {"topk", "precision", "batch_size", "num_heads", "tensor_parallel", "inputs", "weights"}
)


def shape_of(case: Case, preset: Preset) -> LayerShape:
    if case.topk is None:
        raise Unsupported("topk has no value (pass -k)")
    return LayerShape(
        phase=case.phase,
        seq_len_kv=case.seq_len_kv,
        seq_len_q=case.seq_len_q,
        topk=case.topk,
        precision=case.precision,
        batch_size=case.batch_size,
        num_heads=case.num_heads,
        tensor_parallel=case.tensor_parallel,
        inputs=case.inputs,
        weights=case.weights,
        preset=preset,
    )


def run_layer(inputs: LayerInputs, stages: Mapping[str, Implementation], form: str) -> LayerOutputs:
    layer = DeepSeekSparseAttention(
        inputs.weights,
        topk=inputs.topk,
        form=form,
        stages=stages,
        rope=inputs.rope_table,
        workspace_bytes=inputs.workspace_bytes,
    )
    step = layer.prefill_tokens if inputs.phase == "prefill" else layer.decode_tokens
    with torch.no_grad():
        outputs: LayerOutputs = step(inputs.tokens, inputs.cache)
    return outputs


def compose(form: str) -> Callable[[str, Mapping[str, Implementation]], Run]:
    def composed(phase: str, stages: Mapping[str, Implementation]) -> Run:
        return lambda inputs: run_layer(inputs, stages, form)

    return composed


def reference(inputs: LayerInputs, *, rows: Tensor | None = None) -> LayerOutputs:
    """The layer on fp32 tensors, in plain torch."""
    return layer_gate.run(layer_gate.widened(inputs), rows)


def sum_of_calls(calls: Calls) -> Cost:
    """Costs of all calls; weights and tokens count once for each that reads them."""
    total = Cost(flops=0.0, bytes_read=0.0, bytes_written=0.0)
    for stage, shapes in calls.items():
        for shape in shapes:
            total = total + STAGE_OPERATORS[stage].cost(shape)
    return total


def num_rows(shape: LayerShape) -> int:
    return shape.seq_len_q if shape.is_prefill else shape.batch_size


def cost(shape: LayerShape) -> Cost:
    """Sum of the stages' costs."""
    return sum_of_calls(sparse_calls(shape))


def stage_shapes(shape: LayerShape) -> dict[str, tuple[Any, ...]]:
    calls = sparse_calls(shape)
    return {stage: calls[stage] for stage in STAGES[shape.phase]}


OPERATOR = Operator(
    name="dsa_layer",
    summary="a sparse layer, whole: hidden state to output, projections and caches included",
    phases=("prefill", "decode"),
    axes=AXES,
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=layer_gate.check,
    cost=cost,
    memory=sparse_memory,
    num_rows=num_rows,
    stages=STAGES.__getitem__,
    compose=compose("mqa"),
    stage_shapes=stage_shapes,
    figures=layer_gate.figures,
    finite=("out",),
)
