"""Lightning indexer for Hopper in Gluon: `ragged_logits.py`.

Supports fp8 and bf16, any lengths and visible ranges, 8, 16, 32 or 64 heads of 128 columns.
"""

from dsa_bench.kernels.indexer import IndexerInputs, IndexerOutputs, IndexerShape
from dsa_bench.kernels.logit_tiles import refusal
from dsa_bench.kernels.ragged_logits import ragged_logits
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "indexer"


def run(inputs: IndexerInputs) -> IndexerOutputs:
    return IndexerOutputs(
        ragged_logits(
            inputs.index_q,
            inputs.index_k,
            inputs.index_k_scale,
            inputs.index_weights,
            inputs.kv_start,
            inputs.kv_end,
        )
    )


def supports(shape: IndexerShape, machine: Machine) -> str | None:
    return refusal("gluon indexer", shape.index_heads, shape.index_dim, machine)


IMPLEMENTATIONS = (Implementation(name="gluon", run=run, supports=supports, priority=30),)
