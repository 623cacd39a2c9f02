"""How our own kernels of dense decode cut the keys in parts, and where the parts go."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dsa_bench.baselines.dense_attention import DenseOutputs
from dsa_bench.kernels.combine_splits import MAX_SPLITS, combine_splits


def choose_num_splits(*, tiles: int, steps: int, split_cost: int, num_sms: int) -> int:
    """The fewest parts that minimise waves of programs times (steps + cost) of a part.

    `tiles` is the number of programs of one part, `steps` what they all have to walk; `split_cost`
    is counted in steps. An SM runs one program at a time: it takes all the shared memory.
    """

    def time(num_splits: int) -> int:
        waves = triton.cdiv(tiles * num_splits, num_sms)
        return int(waves * (triton.cdiv(steps, num_splits) + (split_cost if num_splits > 1 else 0)))

    # more than two waves of parts need more workspace than they save time
    most = max(1, min(MAX_SPLITS, steps, 2 * num_sms // max(1, tiles)))
    return min(range(1, most + 1), key=time)


@dataclass(frozen=True, slots=True)
class SplitResults:
    """What a kernel writes: `outputs` themselves, or with more than one part fp32 results and lse
    in log2 units."""

    outputs: DenseOutputs
    part: Tensor  # [num_splits, *out.shape] fp32, or out
    part_lse: Tensor  # [num_splits, *lse.shape] fp32, or lse
    num_splits: int


def allocate(q: Tensor, head_dim_v: int, num_splits: int) -> SplitResults:
    """Of q [batch_size, seq_len_q, num_heads, …]: nothing is filled."""
    out = q.new_empty(*q.shape[:-1], head_dim_v)
    lse = torch.empty(q.shape[:-1], device=q.device)
    if num_splits == 1:
        return SplitResults(DenseOutputs(out, lse), out, lse, 1)
    part = torch.empty(num_splits, *out.shape, device=q.device)
    part_lse = torch.empty(num_splits, *lse.shape, device=q.device)
    return SplitResults(DenseOutputs(out, lse), part, part_lse, num_splits)


def combine(results: SplitResults) -> DenseOutputs:
    """The outputs, joined from the parts where there are any."""
    out, lse = results.outputs
    if results.num_splits > 1:
        assert lse is not None
        combine_splits(results.part, results.part_lse, results.num_splits, None, out, lse)
    return results.outputs
