"""A top-k of your own: the k largest of each row by sorting it, as an implementation of `topk`."""

import torch

from dsa_bench.kernels.topk import TopkInputs, TopkOutputs, TopkShape, ascending
from dsa_bench.operator import Implementation, Machine


def by_sorting(inputs: TopkInputs, /) -> TopkOutputs:
    """Columns inside [kv_start, kv_end) first, by value; NaN counts as -inf; -1 fills the rest."""
    logits = inputs.index_logits.nan_to_num(nan=float("-inf"), posinf=float("inf"))
    columns = torch.arange(logits.shape[1], device=logits.device)
    inside = (columns >= inputs.kv_start[:, None]) & (columns < inputs.kv_end[:, None])
    by_value = logits.argsort(dim=1, descending=True, stable=True)
    # a second, stable sort brings the valid ones to the front and keeps their order
    valid = inside.gather(1, by_value)
    first = valid.int().argsort(dim=1, descending=True, stable=True)[:, : inputs.topk]
    chosen = by_value.gather(1, first).masked_fill(~valid.gather(1, first), -1)
    chosen = chosen.to(torch.int32)
    return TopkOutputs(ascending(chosen) if inputs.sorted_indices else chosen)


def supports(shape: TopkShape, machine: Machine) -> str | None:
    if shape.num_cols > 65536:
        return f"by_sorting takes rows up to 64K columns, this case has {shape.num_cols}"
    return None


IMPLEMENTS = "topk"
IMPLEMENTATIONS = (Implementation(name="by_sorting", run=by_sorting, supports=supports),)
