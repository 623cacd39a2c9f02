"""What attention in e4m3 may be off by: rounded weights, and sums that Hopper makes with 14 bits.

The reference of such an operator starts from the rounded inputs, so what was lost when they were
rounded is not held against a kernel, and no verdict speaks of it. A kernel rounds the weights of
the softmax to e4m3 as well, for their product with the values: that is the error it is allowed.
"""

from typing import Any

import torch
from torch import Tensor

from dsa_bench.accuracy import (
    Check,
    Tolerance,
    compare_logs_to_budget,
    compare_tensors,
    compare_to_budget,
)

E4M3_ROUNDING = 2.0**-4
"""Largest relative error of one rounding to e4m3, which has three bits behind the leading one."""
OUT_RELATIVE = 2 * E4M3_ROUNDING
OUT_COSINE = E4M3_ROUNDING**2 / 2
"""1 - 2xy / (x² + y²) of tensors that differ by 2^-4 of their length is half the square of that."""
LSE_FLOOR = 2.0**-11
"""The weights are summed before they are rounded, so lse has the error of the logits alone. Hopper
adds fp8 products with some 14 bits; where logits stay below 1 that is at most 4 units of 2^-13."""
LSE_TOLERANCE = Tolerance(abs=2.0**-9, rel=2.0**-8, cos=1e-5)
"""A logit that is off by one bf16 rounding, 2^-8 of it, is worse than any sum of fp8 products."""
LOGIT_STEPS = 2.0**-9
"""Of one logit nothing is averaged. 512 products are summed in 16 steps, each of which loses up to
2^-13 of the largest number in play, and none is larger than the lengths of both vectors."""
SAMPLED_KEYS = 1024


def round_weights(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, largest logit, lse) of a softmax over the last dimension, as a fp8 kernel has them.

    Logits are rounded to bf16, which stands for the few bits that sums of fp8 products have.
    Weights exp(logit - largest) in 0 … 1 are rounded to e4m3. They are not scaled up first, as some
    kernels do, so that those below 2^-10 are lost. The sum that divides, and that lse is of, is of
    weights that are not rounded. A row of -inf has weights 0 and lse -inf.
    """
    logits = logits.bfloat16().float()
    largest = logits.amax(-1)
    finite = torch.where(largest == float("-inf"), 0.0, largest)
    weights = (logits - finite.unsqueeze(-1)).exp_()
    total = weights.sum(-1)
    rounded = weights.to(torch.float8_e4m3fn).float() / total.clamp_min(1e-30).unsqueeze(-1)
    return rounded, largest, largest + total.log()


def sampled(keys: Tensor) -> Tensor:
    """About SAMPLED_KEYS of [keys, …]."""
    return keys[:: max(1, keys.shape[0] // SAMPLED_KEYS)]


def out_tolerance(values: Tensor) -> Tolerance:
    """Twice what rounded weights do at most: 2^-4 of Σ weight · |value|, which is no more than the
    rms of values, fp32, a sample, where many keys have weight; and the same share of an element."""
    rms = values.square().mean().sqrt().item() if values.numel() else 0.0
    return Tolerance(abs=OUT_RELATIVE * rms + 1e-30, rel=OUT_RELATIVE, cos=OUT_COSINE)


def logit_units(q_lengths: Tensor, k_length: Tensor, sm_scale: float) -> Tensor:
    """1 where a sum of products of such lengths loses less than LSE_TOLERANCE lets through, else
    by how much it may lose more."""
    lost = LOGIT_STEPS * sm_scale * q_lengths * k_length
    return (lost / LSE_TOLERANCE.abs).clamp_min(1.0)


def out_units(magnitudes: Tensor, values: Tensor) -> Tensor:
    """1 where Σ weight · |value| is below the rms of values, else by how much it is above: where
    two keys have all the weight, their values may be larger, and cancel."""
    rms = values.square().mean().sqrt() if values.numel() else values.new_ones(())
    return (magnitudes / (rms + 1e-30)).clamp_min(1.0)


def check_outputs(
    actual: Any,
    expected: Any,
    plain: Any,
    tolerance: Tolerance,
    *,
    out_unit: Tensor | None = None,
    logit_unit: Tensor | None = None,
) -> tuple[Check, ...]:
    """All outputs against the fp32 reference: tolerances, and twice the error of `plain`.

    Where the scores are weak all weights of a query lie within one step of e4m3 and are rounded the
    same way, by 2^-4 at most, or by luck not at all: hence that floor under the budget. `lse` sees
    a missing key or a wrong scale long before `out` does; what `actual` has as None is not checked.
    `out` is compared in `out_units` and `max_logits` in `logit_units`, where they are given.
    """
    unit = 1.0 if out_unit is None else out_unit
    checks = [
        compare_tensors("out", actual.out / unit, expected.out / unit, tolerance),
        compare_to_budget("out_budget", actual.out, expected.out, plain.out, floor=E4M3_ROUNDING),
    ]
    for name in actual._fields:
        found, wanted, low = (getattr(outputs, name) for outputs in (actual, expected, plain))
        if name != "out" and found is not None:
            unit = logit_unit if name == "max_logits" and logit_unit is not None else 1.0
            checks.append(compare_tensors(name, found / unit, wanted / unit, LSE_TOLERANCE))
            checks.append(
                compare_logs_to_budget(
                    f"{name}_budget", found, wanted, low, absolute_floor=LSE_FLOOR
                )
            )
    return tuple(checks)
