"""Exact top-k in Gluon: `row_topk.py`. Of equal values it takes the lowest columns.

Where there are pages it writes `topk_slots` beside the columns.
"""

import torch

from dsa_bench.kernels.row_topk import MAX_TOPK, topk
from dsa_bench.kernels.topk import TopkInputs, TopkOutputs, TopkShape
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "topk"


def run(inputs: TopkInputs) -> TopkOutputs:
    logits, slots = inputs.index_logits, None
    if inputs.pages is not None:
        shape = (logits.shape[0], inputs.topk)
        slots = torch.empty(shape, dtype=torch.int32, device=logits.device)
    indices = topk(
        logits, inputs.kv_start, inputs.kv_end, inputs.topk,
        sorted_indices=inputs.sorted_indices, pages=inputs.pages, slots=slots,
    )  # fmt: skip
    return TopkOutputs(indices, slots)


def supports(shape: TopkShape, machine: Machine) -> str | None:
    if machine.capability is None or machine.capability < (8, 0):
        return f"gluon topk needs an NVIDIA GPU of sm_80 or newer, this is {machine.name}"
    if shape.topk > MAX_TOPK:
        return f"gluon topk takes topk up to {MAX_TOPK}, this case has {shape.topk}"
    return None


IMPLEMENTATIONS = (Implementation(name="gluon", run=run, supports=supports, priority=20),)
