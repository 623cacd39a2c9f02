"""Our own dense attention for Hopper in Gluon, both forms: `gluon`."""

from dsa_bench.baselines.dense_attention import (
    DenseAttentionShape,
    DenseInputs,
    DenseOutputs,
    DensePrefillInputs,
)
from dsa_bench.baselines.dense_attention_arguments import obstacle_of_widths
from dsa_bench.baselines.dense_decode_gluon import decode
from dsa_bench.baselines.dense_prefill_gluon import prefill
from dsa_bench.operator import Implementation, Machine, Unsupported

ONE_LENGTH = (
    "gluon dense_attention decodes sequences of one length: its programs all walk equally many keys"
    " (use triton, or --lengths equal)"
)


def run(inputs: DenseInputs, /) -> DenseOutputs:
    if isinstance(inputs, DensePrefillInputs):
        return prefill(inputs.q, inputs.k, inputs.v, sm_scale=inputs.sm_scale)
    if inputs.pages is not None:
        raise Unsupported(ONE_LENGTH)
    return decode(inputs.q, inputs.kv, sm_scale=inputs.sm_scale)


def supports(shape: DenseAttentionShape, machine: Machine) -> str | None:
    if machine.device != "cuda" or not machine.is_hopper:
        return (
            f"gluon dense_attention needs a Hopper GPU (sm_90), this is {machine.name} (use triton)"
        )
    if shape.is_ragged:
        return ONE_LENGTH
    return obstacle_of_widths("gluon", shape)


IMPLEMENTS = "dense_attention"
# above cuDNN's 30, which it beats in prefill, below FlashMLA's 35, which beats it in decode
IMPLEMENTATIONS = (Implementation(name="gluon", run=run, supports=supports, priority=32),)
