"""The sparse layer in prefill with attention in the MHA form under a mask: for short prompts.

The same inputs, outputs and mathematics as `dsa_layer`; a key costs 320 columns a head in place of
1088, but all keys of the prompt are computed, and keys and values of every head are made of the
latents first. Where all keys fit into topk nothing is selected and topk_indices is None.

Source: DeepSeek-V3.2 report, section 3 (masked MHA mode for short-sequence prefill).
"""

from typing import Any

from dsa_bench.kernels import layer_gate
from dsa_bench.kernels.dsa_layer import (
    AXES,
    PREFILL_STAGES,
    compose,
    num_rows,
    reference,
    sum_of_calls,
)
from dsa_bench.kernels.dsa_layer import shape_of as sparse_shape_of
from dsa_bench.kernels.layer_calls import masked_calls, masked_memory
from dsa_bench.kernels.layer_inputs import LayerShape, make_inputs
from dsa_bench.operator import Cost, Operator, Unsupported
from dsa_bench.preset import Preset
from dsa_bench.record import Case

STAGES = (*PREFILL_STAGES, "masked_prefill")
MAX_KEYS = 16384
"""Beyond twice the length at which the sparse form needs fewer FLOPs there is nothing to learn."""


def shape_of(case: Case, preset: Preset) -> LayerShape:
    if case.seq_len_kv > MAX_KEYS:
        raise Unsupported(
            f"the masked form is for prompts of up to {MAX_KEYS} tokens, got {case.seq_len_kv}"
            " (dsa_layer is the form beyond)"
        )
    return sparse_shape_of(case, preset)


def cost(shape: LayerShape) -> Cost:
    """Sum of the stages' costs."""
    return sum_of_calls(masked_calls(shape))


def stage_shapes(shape: LayerShape) -> dict[str, tuple[Any, ...]]:
    calls = masked_calls(shape)
    return {stage: calls[stage] for stage in STAGES}


OPERATOR = Operator(
    name="masked_layer",
    summary="a sparse layer in prefill as masked MHA: the same result, faster for short prompts",
    phases=("prefill",),
    axes=AXES - {"batch_size"},
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=layer_gate.check,
    cost=cost,
    memory=masked_memory,
    num_rows=num_rows,
    stages=lambda phase: STAGES,
    compose=compose("mha"),
    stage_shapes=stage_shapes,
    figures=layer_gate.figures,
    finite=("out",),
)
