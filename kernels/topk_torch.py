"""Top-k selector by `torch.topk`, with the range of each row cut out first.

torch.topk looks at whole rows and takes NaN for the largest: so a copy is made in which NaN and
-inf are the least finite number and what lies outside the range is -inf. Two passes over the logits
that a kernel with bounds does without; they belong to the timed call. A logit of exactly
-3.4028235e38 counts as -inf. bf16 logits become fp32 first. Indices are sorted by a sort behind it.
"""

import torch

from dsa_bench.kernels.topk import TopkInputs, TopkOutputs, TopkShape, ascending
from dsa_bench.operator import Implementation, Machine

LOWEST = torch.finfo(torch.float32).min


@torch.no_grad()
def run(inputs: TopkInputs, /) -> TopkOutputs:
    logits = inputs.index_logits.float()
    columns = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    bounded = logits.nan_to_num(nan=LOWEST, posinf=float("inf"), neginf=LOWEST)
    outside = (columns >= inputs.kv_end[:, None]) | (columns < inputs.kv_start[:, None])
    bounded.masked_fill_(outside, float("-inf"))
    best = bounded.topk(min(inputs.topk, logits.shape[1]), dim=1)
    chosen = best.indices.to(torch.int32).masked_fill_(best.values == float("-inf"), -1)
    chosen = torch.nn.functional.pad(chosen, (0, inputs.topk - chosen.shape[1]), value=-1)
    return TopkOutputs(ascending(chosen) if inputs.sorted_indices else chosen)


def supports(shape: TopkShape, machine: Machine) -> str | None:
    if machine.device != "cuda":
        return "torch's top-k is here as a competitor on a GPU; on a CPU it is the reference"
    return None


IMPLEMENTS = "topk"
IMPLEMENTATIONS = (Implementation(name="torch", run=run, supports=supports, priority=-20),)
