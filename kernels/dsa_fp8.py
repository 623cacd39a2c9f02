"""DSA in prefill with its attention in fp8 too: the mathematics of `dsa` over e4m3 tensors.

    indexer → topk → sparse_prefill_fp8
    a chunk of seq_len_q queries that ends at position L

    topk_indices[i] = positions of the topk largest index logits of query i      (`indexer.py`)
    out[i, h] = softmax over p of (sm_scale · ⟨q̂[i, h], k̂[n_p]⟩) · kv[n_p] · kv_scale
    with n_p = topk_indices[i, p], and q̂ and k̂ as in `sparse_prefill_fp8.py`

Shapes:
    scores        tensors of `indexer`, index_q and index_k in e4m3
    attention     tensors of `sparse_prefill_fp8`: e4m3 latents, bf16 rope columns, fp32 scales
    out           [seq_len_q, num_heads, 512]  bf16
    max_logits    [seq_len_q, num_heads]       fp32   largest scaled logit of the selected keys
    lse           [seq_len_q, num_heads]       fp32   natural logarithm, over the selected keys
    topk_indices  [seq_len_q, topk]            int32  positions in the sequence, -1 = none

Conventions: the tensors are those that `dsa` makes of the same seed; the attention's are rounded
outside the timed call (a power-of-two scale for each query head, one for all keys), as for
`dense_attention_fp8`. The selection is that of `dsa` in fp8. The reference starts from the rounded
tensors. What rounding them costs is in no verdict; `rounding_error` and `dense_error`, both against
the bf16 tensors, say it.

Source: DeepSeek-V3.2 report, section 2.1, whose own attention is in bf16; `sparse_prefill_fp8.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from dsa_bench.accuracy import Check
from dsa_bench.kernels import dsa, dsa_figures, indexer, sparse_prefill, sparse_prefill_fp8
from dsa_bench.kernels.dsa import DsaShape
from dsa_bench.kernels.dsa_inputs import DsaPrefillInputs
from dsa_bench.kernels.indexer import IndexerInputs
from dsa_bench.kernels.indexer_topk import check_selection
from dsa_bench.kernels.sparse_prefill import SparsePrefillOutputs
from dsa_bench.kernels.sparse_prefill_fp8 import Fp8PrefillInputs
from dsa_bench.operator import Cost, Implementation, Memory, Operator, Run, Unsupported
from dsa_bench.preset import Preset
from dsa_bench.record import Case

STAGES = ("indexer", "topk", "sparse_prefill_fp8")
STAGE_OPERATORS = {**dsa.STAGE_OPERATORS, "sparse_prefill_fp8": sparse_prefill_fp8.OPERATOR}

INSTEAD = {
    "decode": "dsa_fp8 is for prefill: in decode the cache that dsa attends to is in fp8 already"
    " (pass --op dsa --precision fp8)"
}


@dataclass(frozen=True, slots=True)
class DsaFp8Inputs:
    scores: IndexerInputs
    attention: Fp8PrefillInputs
    """Its queries list nothing yet: topk_indices [seq_len_q, 0]."""
    topk: int
    workspace_bytes: int
    exact: Callable[[], DsaPrefillInputs] | None = None
    """Makes the inputs of `dsa` again that these were rounded from."""

    def attend_to(self, topk_indices: Tensor) -> Fp8PrefillInputs:
        """Inputs of the attention over this selection."""
        return replace(self.attention, topk_indices=topk_indices)

    def select(self, rows: Tensor) -> "DsaFp8Inputs":
        """The same keys, only the queries in `rows`."""
        scores, attention = self.scores.select(rows), self.attention.select(rows)
        return replace(self, scores=scores, attention=attention, exact=None)


class DsaFp8Outputs(NamedTuple):
    out: Tensor
    max_logits: Tensor
    lse: Tensor
    topk_indices: Tensor


def make_inputs(shape: DsaShape, *, seed: int, device: torch.device | str) -> DsaFp8Inputs:
    """The inputs that `dsa` makes of this seed, or takes from a file, those of the attention
    rounded."""
    exact = partial(_make_exact, shape, seed, device)
    inputs = exact()
    nothing = torch.empty(shape.seq_len_q, 0, dtype=torch.int32, device=inputs.q.device)
    return DsaFp8Inputs(
        inputs.indexer_inputs(slice(None)),
        sparse_prefill_fp8.quantize(inputs.attention_inputs(nothing)),
        inputs.topk,
        inputs.workspace_bytes,
        exact,
    )


def _make_exact(shape: DsaShape, seed: int, device: torch.device | str) -> DsaPrefillInputs:
    inputs = dsa.make_inputs(shape, seed=seed, device=device)
    assert isinstance(inputs, DsaPrefillInputs)
    return inputs


def compose(phase: str, stages: Mapping[str, Implementation]) -> Run:
    """The stages one after the other; each is marked `stage:<name>` for the profiler."""
    return lambda inputs: run(inputs, stages)


def run(inputs: DsaFp8Inputs, stages: Mapping[str, Implementation]) -> DsaFp8Outputs:
    indices = dsa.select_prefill(inputs.scores, inputs.topk, inputs.workspace_bytes, stages)
    with record_function("stage:sparse_prefill_fp8"):
        attended = stages["sparse_prefill_fp8"].run(inputs.attend_to(indices))
    return DsaFp8Outputs(attended.out, attended.max_logits, attended.lse, indices)


def reference_stages() -> dict[str, Implementation]:
    """Every stage by its reference."""
    return {
        name: Implementation(name="reference", run=STAGE_OPERATORS[name].reference)
        for name in STAGES
    }


def reference(inputs: DsaFp8Inputs, *, rows: Tensor | None = None) -> DsaFp8Outputs:
    """The composition of the stages' references."""
    return run(inputs if rows is None else inputs.select(rows), reference_stages())


def check(
    inputs: DsaFp8Inputs, outputs: DsaFp8Outputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """The selection as in `dsa`, and the attention over the selection that was made as in
    `sparse_prefill_fp8`."""
    if rows is not None:
        inputs, outputs = inputs.select(rows), DsaFp8Outputs(*(x[rows] for x in outputs))
    logits = indexer.reference(inputs.scores).index_logits
    attended = SparsePrefillOutputs(outputs.out, outputs.max_logits, outputs.lse)
    return (
        check_selection(logits, outputs.topk_indices),
        *sparse_prefill_fp8.check(inputs.attend_to(outputs.topk_indices), attended),
    )


def figures(
    inputs: DsaFp8Inputs, outputs: DsaFp8Outputs, *, rows: Tensor | None = None
) -> dict[str, Any]:
    """`dense_error` as in `dsa` and `rounding_error` as in `sparse_prefill_fp8` of a few rows, both
    against the bf16 tensors. What the selection keeps of the mass is worked out from those alone:
    rounding moves lse by as much as the keys that are left out."""
    if inputs.exact is None:
        return {}
    if rows is None:
        rows = torch.arange(outputs.out.shape[0], device=outputs.out.device)
    rows = rows[: dsa_figures.DENSE_ERROR_ROWS]
    exact = inputs.exact()
    wanted = sparse_prefill.reference(exact.attention_inputs(outputs.topk_indices), rows=rows)
    unrounded = outputs._replace(lse=outputs.lse.index_copy(0, rows, wanted.lse))
    return {
        **dsa_figures.figures(exact, unrounded, rows=rows),
        **sparse_prefill_fp8.rounding_error(outputs.out[rows], wanted.out),
    }


def stage_shapes(shape: DsaShape) -> dict[str, Any]:
    """Stage -> its shape; attention has that of `sparse_prefill`."""
    return dict(zip(STAGES, shape.stage_shapes().values(), strict=True))


def cost(shape: DsaShape) -> Cost:
    """Sum of the stages' costs."""
    return dsa.cost_of(stage_shapes(shape), STAGE_OPERATORS)


def memory(shape: DsaShape) -> Memory:
    """As of `dsa`; the bf16 tensors are gone once they are rounded."""
    return dsa.memory_of(shape, stage_shapes(shape), STAGE_OPERATORS)


def shape_of(case: Case, preset: Preset) -> DsaShape:
    if case.phase in INSTEAD:
        raise Unsupported(INSTEAD[case.phase])
    if case.precision != "fp8":
        raise Unsupported(
            f"dsa_fp8 computes in fp8, got precision {case.precision}"
            " (add --precision fp8, or take dsa)"
        )
    shape = dsa.shape_of(case, preset)
    sparse_prefill_fp8.expect_widths(shape.stage_shapes()["sparse_prefill"])
    return shape


OPERATOR = Operator(
    name="dsa_fp8",
    summary="DSA of a prefill chunk with its attention over fp8 queries, keys and values too",
    phases=("prefill",),
    axes=frozenset({"topk", "precision", "num_heads", "inputs"}),
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=check,
    cost=cost,
    memory=memory,
    num_rows=lambda shape: shape.seq_len_q,
    stages=lambda phase: STAGES,
    compose=compose,
    stage_shapes=lambda shape: {name: (part,) for name, part in stage_shapes(shape).items()},
    figures=figures,
    finite=("out",),
    precisions=("fp8",),
    instead=INSTEAD,
)
