"""DeepSeek Sparse Attention, whole: indexer, top-k selector, attention over the selection.

    prefill:  indexer → topk → sparse_prefill
              a chunk of seq_len_q queries that ends at position L
    decode:   paged_indexer → topk → page_slots → sparse_decode
              seq_len_q new tokens of batch_size sequences; a top-k that writes slots beside its
              indices leaves page_slots nothing to run, and its cost is counted all the same

Each stage is an operator of its own; an implementation of `dsa` names one implementation for each
stage.

Shapes (prefill; decode has [batch_size, seq_len_q, …] and paged caches):
    out           [seq_len_q, num_heads, 512]  bf16
    lse           [seq_len_q, num_heads]       fp32   natural logarithm, over the selected keys
    topk_indices  [seq_len_q, topk]            int32  positions in the sequence, -1 = none

Conventions: precision `fp8` means indexer and decode caches in fp8, as V3.2 is deployed, with
sparse prefill in bf16 (`dsa_fp8` has that in fp8 too); `bf16` means bf16 throughout. Nothing of
size L × L is held: in prefill the logits are made and consumed in chunks of queries of at most
`workspace_bytes`.

Source: DeepSeek-V3.2 report, section 2.1; chunking of the logits as in vLLM and SGLang.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from dsa_bench.accuracy import Check, compare_tensors
from dsa_bench.kernels import (
    indexer,
    page_slots,
    paged_indexer,
    sparse_decode,
    sparse_prefill,
    topk,
)
from dsa_bench.kernels.attention import (
    DECODE_LSE_TOLERANCE,
    DECODE_OUT_TOLERANCE,
    budget_checks,
)
from dsa_bench.kernels.decode_lengths import longest_sequence
from dsa_bench.kernels.dsa_captured import expect_captured, load_prefill_inputs
from dsa_bench.kernels.dsa_figures import figures
from dsa_bench.kernels.dsa_inputs import (
    DsaDecodeInputs,
    DsaPrefillInputs,
    make_decode_inputs,
    make_prefill_inputs,
)
from dsa_bench.kernels.indexer_topk import check_selection
from dsa_bench.kernels.paging import Pages
from dsa_bench.operator import Cost, Implementation, Memory, Operator, Run, Unsupported
from dsa_bench.preset import Preset
from dsa_bench.record import EQUAL_LENGTHS, INPUT_KINDS, RANDOM_INPUTS, Case

STAGES = {
    "prefill": ("indexer", "topk", "sparse_prefill"),
    "decode": ("paged_indexer", "topk", "page_slots", "sparse_decode"),
}
STAGE_OPERATORS = {
    module.OPERATOR.name: module.OPERATOR
    for module in (indexer, topk, sparse_prefill, paged_indexer, page_slots, sparse_decode)
}
WORKSPACE_BYTES = 512 * 2**20
LOGITS_ALIGNMENT = 64
"""Columns to which an implementation may pad a row of logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DsaShape:
    """The integers of both phases; `batch_size` is 1 in prefill."""

    phase: str
    seq_len_kv: int
    seq_len_q: int
    topk: int = 2048
    precision: str = "fp8"
    batch_size: int = 1
    num_heads: int = 128
    preset: Preset
    workspace_bytes: int = WORKSPACE_BYTES
    inputs: str = RANDOM_INPUTS
    """A kind of content, or the path of a file with captured inputs."""
    lengths: str = EQUAL_LENGTHS
    """A kind of `decode_lengths.py`."""

    def __post_init__(self) -> None:
        stages = self.stage_shapes()
        if not self.is_captured:
            return
        if not self.inputs.endswith(".safetensors"):
            known = ", ".join((*INPUT_KINDS, "FILE.safetensors"))
            raise Unsupported(f"unknown inputs {self.inputs!r}; known: {known}")
        if self.phase != "prefill":
            raise Unsupported("captured inputs are a chunk of prefill (pass --phase prefill)")
        expect_captured(self.inputs, stages["indexer"], stages["sparse_prefill"])

    @property
    def is_captured(self) -> bool:
        return self.inputs not in INPUT_KINDS

    def stage_shapes(self) -> dict[str, Any]:
        """Stage -> its shape; raises Unsupported where one of the stages would."""
        if self.phase == "prefill":
            return {
                "indexer": indexer.IndexerShape(
                    seq_len_q=self.seq_len_q,
                    seq_len_kv=self.seq_len_kv,
                    index_heads=self.preset.index_heads,
                    index_dim=self.preset.index_dim,
                    precision=self.precision,
                ),
                "topk": topk.shape_of(self.case, self.preset),
                "sparse_prefill": sparse_prefill.SparsePrefillShape(
                    seq_len_q=self.seq_len_q,
                    seq_len_kv=self.seq_len_kv,
                    topk=self.topk,
                    num_heads=self.num_heads,
                    head_dim_qk=self.preset.head_dim_qk,
                    head_dim_v=self.preset.head_dim_v,
                    sm_scale=self.preset.sm_scale,
                ),
            }
        return {
            name: STAGE_OPERATORS[name].shape(self.case, self.preset) for name in STAGES["decode"]
        }

    @property
    def case(self) -> Case:
        return Case(
            op="dsa",
            impl="reference",
            phase=self.phase,
            seq_len_kv=self.seq_len_kv,
            seq_len_q=self.seq_len_q,
            topk=self.topk,
            precision=self.precision,
            batch_size=self.batch_size,
            num_heads=self.num_heads,
            lengths=self.lengths,
        )


Attended = sparse_prefill.SparsePrefillOutputs | sparse_decode.SparseDecodeOutputs


class DsaOutputs(NamedTuple):
    out: Tensor
    lse: Tensor
    topk_indices: Tensor


def make_inputs(
    shape: DsaShape, *, seed: int, device: torch.device | str
) -> DsaPrefillInputs | DsaDecodeInputs:
    """Inputs in which indexer and attention look for the same keys (see `dsa_inputs.py`)."""
    stages = shape.stage_shapes()
    if shape.phase == "decode":
        parts = stages["paged_indexer"], stages["sparse_decode"]
        return make_decode_inputs(shape.inputs, *parts, seed=seed, device=device)
    make = load_prefill_inputs if shape.is_captured else make_prefill_inputs
    return make(
        shape.inputs,
        stages["indexer"],
        stages["sparse_prefill"],
        seed=seed,
        device=device,
        workspace_bytes=shape.workspace_bytes,
    )


def compose(phase: str, stages: Mapping[str, Implementation]) -> Run:
    """The stages one after the other; each is marked `stage:<name>` for the profiler."""
    if phase == "prefill":
        return lambda inputs: run_prefill(inputs, stages)
    return lambda inputs: run_decode(inputs, stages)


def query_chunks(num_queries: int, num_keys: int, workspace_bytes: int) -> list[slice]:
    """Cut the queries so that their fp32 logits over all keys fit into the workspace."""
    row_bytes = 4 * -(-num_keys // LOGITS_ALIGNMENT) * LOGITS_ALIGNMENT
    size = max(1, workspace_bytes // row_bytes)
    return [slice(i, min(i + size, num_queries)) for i in range(0, num_queries, size)]


def run_prefill(inputs: DsaPrefillInputs, stages: Mapping[str, Implementation]) -> DsaOutputs:
    indexer_inputs = inputs.indexer_inputs(slice(None))
    topk_indices = select_prefill(indexer_inputs, inputs.topk, inputs.workspace_bytes, stages)
    with record_function("stage:sparse_prefill"):
        out = stages["sparse_prefill"].run(inputs.attention_inputs(topk_indices))
    return DsaOutputs(out.out, out.lse, topk_indices)


def select_prefill(
    inputs: indexer.IndexerInputs,
    topk_size: int,
    workspace_bytes: int,
    stages: Mapping[str, Implementation],
) -> Tensor:
    """topk_indices of every query, by indexer and topk alone, in chunks of queries."""
    selected: list[Tensor] = []
    num_queries, num_keys = inputs.index_q.shape[0], inputs.index_k.shape[0]
    for part in query_chunks(num_queries, num_keys, workspace_bytes):
        chunk = inputs.select(part)
        with record_function("stage:indexer"):
            (logits,) = stages["indexer"].run(chunk)
        with record_function("stage:topk"):
            start, end = chunk.kv_start, chunk.kv_end
            outputs = stages["topk"].run(topk.TopkInputs(logits, start, end, topk_size))
        # before the next chunk's are made: one chunk of logits is the workspace
        del logits
        selected.append(outputs.topk_indices)
    if len(selected) == 1:
        return selected[0]
    with record_function("stage:topk"):
        return torch.cat(selected)


def run_decode(
    inputs: DsaDecodeInputs,
    stages: Mapping[str, Implementation],
    *,
    topk_indices: Tensor | None = None,
) -> DsaOutputs:
    """`topk_indices` [batch_size, seq_len_q, topk]: use this selection instead of making one.

    page_slots runs only where the selection comes without slots.
    """
    if topk_indices is None:
        indices, slots = select_decode(inputs, stages)
    else:
        indices, slots = topk_indices, None
    if slots is None:
        with record_function("stage:page_slots"):
            (slots,) = stages["page_slots"].run(
                page_slots.PageSlotsInputs(indices, inputs.block_table, inputs.page_size)
            )
    with record_function("stage:sparse_decode"):
        out = stages["sparse_decode"].run(inputs.attention_inputs(slots))
    return DsaOutputs(out.out, out.lse, indices)


def select_decode(
    inputs: DsaDecodeInputs, stages: Mapping[str, Implementation]
) -> topk.TopkOutputs:
    """topk_indices of every query, by paged_indexer and topk alone, and topk_slots if topk gives
    them: [batch_size, seq_len_q, topk]."""
    with record_function("stage:paged_indexer"):
        (logits,) = stages["paged_indexer"].run(inputs.indexer_inputs())
    with record_function("stage:topk"):
        rows, pages = logits.flatten(0, 1), Pages(inputs.block_table, inputs.page_size)
        ends = inputs.seq_lens.flatten()
        selected = stages["topk"].run(
            topk.TopkInputs(rows, inputs.no_start, ends, inputs.topk, pages=pages)
        )
        shape = (*logits.shape[:2], inputs.topk)
        slots = selected.topk_slots
        return topk.TopkOutputs(
            selected.topk_indices.view(shape), None if slots is None else slots.view(shape)
        )


def reference_stages(phase: str) -> dict[str, Implementation]:
    """Every stage by its reference."""
    return {
        name: Implementation(name="reference", run=STAGE_OPERATORS[name].reference)
        for name in STAGES[phase]
    }


def reference(
    inputs: DsaPrefillInputs | DsaDecodeInputs, *, rows: Tensor | None = None
) -> DsaOutputs:
    """The composition of the stages' references."""
    inputs = inputs if rows is None else inputs.select(rows)
    if isinstance(inputs, DsaPrefillInputs):
        return run_prefill(inputs, reference_stages("prefill"))
    return run_decode(inputs, reference_stages("decode"))


def check(
    inputs: DsaPrefillInputs | DsaDecodeInputs,
    outputs: DsaOutputs,
    *,
    rows: Tensor | None = None,
) -> tuple[Check, ...]:
    """The selection against the reference's logits, and attention over the selection that was made.

    Logits that differ by rounding may swap keys at the boundary, after which `out` differs by more
    than rounding; so `out` is compared with the reference on the *actual* selection, and a key may
    be taken or left only if its reference logit lies within rounding of the k-th largest.
    """
    if rows is not None:
        inputs, outputs = inputs.select(rows), DsaOutputs(*(x[rows] for x in outputs))
    if isinstance(inputs, DsaPrefillInputs):
        logits = indexer.reference(inputs.indexer_inputs(slice(None))).index_logits
        attention_inputs = inputs.attention_inputs(outputs.topk_indices)
        attended: Attended = sparse_prefill.reference(attention_inputs)
        plain: Attended = sparse_prefill.plain(attention_inputs)
    else:
        logits = paged_indexer.reference(inputs.indexer_inputs()).index_logits.flatten(0, 1)
        slots = page_slots.reference(
            page_slots.PageSlotsInputs(outputs.topk_indices, inputs.block_table, inputs.page_size)
        ).topk_slots
        # all that is listed counts, in whatever order: lengths must not hide what is selected
        decode_inputs = replace(inputs.attention_inputs(slots), topk_lens=None)
        attended, plain = (f(decode_inputs) for f in (sparse_decode.reference, sparse_decode.plain))
    actual = sparse_decode.SparseDecodeOutputs(outputs.out, outputs.lse)
    return (
        check_selection(logits, outputs.topk_indices.flatten(0, -2)),
        compare_tensors("out", outputs.out, attended.out, DECODE_OUT_TOLERANCE),
        compare_tensors("lse", outputs.lse, attended.lse, DECODE_LSE_TOLERANCE),
        *budget_checks(actual, attended, plain),
    )


def cost(shape: DsaShape) -> Cost:
    return cost_of(shape.stage_shapes(), STAGE_OPERATORS)


def cost_of(stages: Mapping[str, Any], operators: Mapping[str, Operator]) -> Cost:
    """Sum of the stages' costs."""
    total = Cost(flops=0.0, bytes_read=0.0, bytes_written=0.0)
    for name, stage_shape in stages.items():
        total = total + operators[name].cost(stage_shape)
    return total


def memory(shape: DsaShape) -> Memory:
    return memory_of(shape, shape.stage_shapes(), STAGE_OPERATORS)


def memory_of(
    shape: DsaShape, stages: Mapping[str, Any], operators: Mapping[str, Operator]
) -> Memory:
    """Inputs of indexer and attention, a chunk of logits, selection, partial results, output."""
    parts = {name: operators[name].memory(stage) for name, stage in stages.items()}
    first, *_, last = parts.values()
    selection = parts["topk"].output_bytes
    logits = first.output_bytes
    if shape.phase == "prefill":
        one_row = 4 * shape.seq_len_kv
        logits = min(logits, max(one_row, shape.workspace_bytes))
    return Memory(
        input_bytes=first.input_bytes + last.input_bytes - selection,
        output_bytes=last.output_bytes + selection,
        workspace_bytes=logits + selection + last.workspace_bytes,
    )


def shape_of(case: Case, preset: Preset) -> DsaShape:
    if case.topk is None:
        raise Unsupported("topk has no value (pass -k)")
    return DsaShape(
        phase=case.phase,
        seq_len_kv=case.seq_len_kv,
        seq_len_q=case.seq_len_q,
        topk=case.topk,
        precision=case.precision,
        batch_size=case.batch_size,
        num_heads=case.num_heads,
        preset=preset,
        inputs=case.inputs,
        lengths=case.lengths,
    )


OPERATOR = Operator(
    name="dsa",
    summary="complete DeepSeek Sparse Attention: indexer, top-k, attention over the selection",
    phases=("prefill", "decode"),
    axes=frozenset({"topk", "precision", "batch_size", "lengths", "num_heads", "inputs"}),
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=check,
    cost=cost,
    memory=memory,
    num_rows=lambda shape: shape.seq_len_q if shape.phase == "prefill" else shape.batch_size,
    always_checked=longest_sequence,
    stages=STAGES.__getitem__,
    compose=compose,
    stage_shapes=lambda shape: {name: (part,) for name, part in shape.stage_shapes().items()},
    figures=figures,
    finite=("out",),
)
