"""Indexer and top-k in one: the keys with the largest index logits, in bounded memory.

    topk_indices[i, :] = columns of the min(topk, kv_end[i] - kv_start[i]) largest
                         index_logits[i, kv_start[i]:kv_end[i]]      as `indexer.py` defines them

Shapes:
    inputs of `indexer.py`
    topk_indices  [seq_len_q, topk]  int32  positions in the sequence, unsorted; -1 = none

Conventions: those of `indexer.py` and `topk.py`; of equal logits the lowest positions are taken. No
more than `workspace_bytes` are held beside inputs and outputs, at any number of keys: the logits of
4096 queries over 128K keys alone would be 2 GiB.

Source: DeepSeek-V3.2 report, section 1 (lightning indexer, token selection).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import Check, shape_differs
from dsa_bench.kernels import indexer, topk
from dsa_bench.kernels.indexer import IndexerInputs, IndexerShape
from dsa_bench.operator import Cost, Memory, Operator, Unsupported
from dsa_bench.preset import Preset
from dsa_bench.record import Case

WORKSPACE_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexerTopkShape:
    scores: IndexerShape
    topk: int = 2048
    workspace_bytes: int = WORKSPACE_BYTES

    def __post_init__(self) -> None:
        if self.topk > self.scores.seq_len_kv:
            raise Unsupported(
                f"topk {self.topk} is more than the {self.scores.seq_len_kv} keys there are"
            )


@dataclass(frozen=True, slots=True)
class IndexerTopkInputs:
    scores: IndexerInputs
    topk: int
    workspace_bytes: int = WORKSPACE_BYTES


class IndexerTopkOutputs(NamedTuple):
    topk_indices: Tensor


def make_inputs(
    shape: IndexerTopkShape, *, seed: int, device: torch.device | str
) -> IndexerTopkInputs:
    scores = indexer.make_inputs(shape.scores, seed=seed, device=device)
    return IndexerTopkInputs(scores, shape.topk, shape.workspace_bytes)


def reference(inputs: IndexerTopkInputs, *, rows: Tensor | None = None) -> IndexerTopkOutputs:
    """The reference of one, then that of the other."""
    start, end = (
        x if rows is None else x[rows] for x in (inputs.scores.kv_start, inputs.scores.kv_end)
    )
    logits = indexer.reference(inputs.scores, rows=rows).index_logits
    return IndexerTopkOutputs(
        topk.reference(topk.TopkInputs(logits, start, end, inputs.topk)).topk_indices
    )


def check(
    inputs: IndexerTopkInputs, outputs: IndexerTopkOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """As `check_selection`, which takes a logit that is -inf or NaN for a key that is not seen."""
    actual = outputs.topk_indices if rows is None else outputs.topk_indices[rows]
    num_rows = inputs.scores.kv_start.shape[0] if rows is None else len(rows)
    if actual.shape != (num_rows, inputs.topk):
        return (shape_differs("topk_indices"),)
    logits = indexer.reference(inputs.scores, rows=rows).index_logits
    return (check_selection(logits, actual),)


def check_selection(
    logits: Tensor, topk_indices: Tensor, *, tolerance: float | None = None
) -> Check:
    """Keys clearly above the k-th largest logit are selected, those clearly below not; none twice.

    Args:
        logits: [rows, keys] reference logits, -inf where not visible.
        topk_indices: [rows, topk] positions; -1 allowed where fewer than topk keys are visible.
        tolerance: what counts as clearly; None: twice that of the indexer's logits.
    """
    topk_size = topk_indices.shape[1]
    seen = logits > float("-inf")
    if tolerance is None:
        tolerance = 2 * indexer.logits_tolerance(logits, seen).abs
    safe = topk_indices.long().clamp(0, logits.shape[1] - 1)
    valid = (topk_indices == safe) & seen.gather(1, safe)
    taken = torch.zeros_like(logits, dtype=torch.int32)
    taken.scatter_add_(1, safe, valid.to(torch.int32))
    num_wanted = seen.sum(1).clamp(max=topk_size)
    best = logits.topk(min(topk_size, logits.shape[1]), dim=1).values
    last = (num_wanted - 1).clamp(min=0)[:, None]
    threshold = best.gather(1, last)
    figures = {
        "repeated": float((taken > 1).sum().item()),
        "wrong_count": float((valid.sum(1) != num_wanted).sum().item()),
        "stray": float((~valid & (topk_indices != -1)).sum().item()),
        "missed": float(((taken == 0) & seen & (logits > threshold + tolerance)).sum().item()),
        "too_low": float(((taken > 0) & (logits < threshold - tolerance)).sum().item()),
    }
    return Check(
        name="topk_indices",
        passed=not any(figures.values()),
        figures=figures,
        limits=dict.fromkeys(figures, 0.0),
    )


def cost(shape: IndexerTopkShape) -> Cost:
    """That of the indexer, of which no logits are written, and the indices."""
    scores = indexer.cost(shape.scores)
    return Cost(
        flops=scores.flops,
        bytes_read=scores.bytes_read,
        bytes_written=4.0 * shape.scores.seq_len_q * shape.topk,
    )


def memory(shape: IndexerTopkShape) -> Memory:
    return Memory(
        input_bytes=indexer.memory(shape.scores).input_bytes,
        output_bytes=4 * shape.scores.seq_len_q * shape.topk,
        workspace_bytes=shape.workspace_bytes,
    )


def shape_of(case: Case, preset: Preset) -> IndexerTopkShape:
    if case.topk is None:
        raise Unsupported("topk has no value (pass -k)")
    return IndexerTopkShape(scores=indexer.shape_of(case, preset), topk=case.topk)


OPERATOR = Operator(
    name="indexer_topk",
    summary="positions of the k largest index logits of a prefill chunk, in bounded memory",
    phases=("prefill",),
    axes=frozenset({"precision", "topk"}),
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=check,
    cost=cost,
    memory=memory,
    num_rows=lambda shape: shape.scores.seq_len_q,
)
