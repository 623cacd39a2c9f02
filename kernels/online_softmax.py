"""The step of a softmax whose scores come block by block: shared by the plain Triton kernels.

    m' = max(m, max S)      P = 2^(scale · (S - m'))      f = 2^(scale · (m - m'))
    l' = l · f + Σ P        what was summed before is due the factor f

with scale = sm_scale · log2 e > 0; S is -inf where there is no key. The difference is taken before
it is scaled, one instruction an element more than scale · S - scale · m': there the compiler rounds
the second product and fuses the first one, and for logits of 2^40 the key of the maximum would have
a weight of 2^(2^16), or of 0.
"""

import triton
import triton.language as tl

NO_MAXIMUM = tl.constexpr(-3.4028234663852886e38)
"""Maximum before the first key: the least finite one, so that no difference of two is NaN."""


@triton.jit
def softmax_step(scores, row_max, row_sum, qk_scale_log2):
    """(weights, factor due to what was summed before, maximum and sum with this block); scores and
    maximum are not scaled."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    rescale = tl.exp2((row_max - new_max) * qk_scale_log2)
    weights = tl.exp2((scores - new_max[:, None]) * qk_scale_log2)
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, 1)
