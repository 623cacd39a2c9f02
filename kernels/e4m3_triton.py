"""What Triton kernels that write index vectors and e4m3 share: rotations, power-of-two scales."""

import triton
import triton.language as tl

LEAST_SCALE = tl.constexpr(2.0**-22)
"""2^ceil(log2(1e-4 / 448)): INDEX_AMAX_FLOOR."""


@triton.jit
def power_of_two_scale(largest, LEAST: tl.constexpr):
    """(2^ceil(log2(largest / 448)), at least LEAST, a power of two; its inverse), both exact.

    448 = 1.75 · 2^8, so a mantissa above 1.75 carries into the exponent. The scale of inf is inf:
    times 448 and a small weight, 2^120 would be a number.
    """
    bits = tl.maximum(largest, LEAST * 448.0).to(tl.int32, bitcast=True)
    bits = ((bits + 0x1FFFFF) & 0x7F800000) - (8 << 23)
    inverse = (254 << 23) - bits
    scale = tl.where(largest == float("inf"), largest, bits.to(tl.float32, bitcast=True))
    return scale, inverse.to(tl.float32, bitcast=True)


@triton.jit
def quantize_by(y, inverse):
    """bf16 times `inverse`, a power of two in fp32, to e4m3; two elements at a time.

    By way of fp32 the compiler would round to bf16 one at a time, at a quarter of the rate.
    """
    return (y * inverse.to(tl.bfloat16)).to(tl.float8e4nv)


@triton.jit
def of_partners(x):
    """x [rows, n, 2, m] fp32 with the two of axis 2 in each other's place.

    What is XORed with itself and another is the other: the compiler keeps one shuffle of that.
    """
    bits = x.to(tl.int32, bitcast=True)
    both = tl.broadcast_to(tl.xor_sum(bits, 2, keep_dims=True), bits.shape)
    return (both ^ bits).to(tl.float32, bitcast=True)


@triton.jit
def _step_between_threads(x, STEP: tl.constexpr, ROWS: tl.constexpr):
    """The pairs (i, i + STEP) of each row of 64 become their sums and differences."""
    x = tl.reshape(x, [ROWS, 32 // STEP, 2, STEP])
    sign = (1 - 2 * tl.arange(0, 2)).to(tl.float32)[None, None, :, None]
    return tl.reshape(of_partners(x) + sign * x, [ROWS, 64])


@triton.jit
def _step_in_threads(x, STEP: tl.constexpr, ROWS: tl.constexpr):
    """The same where a thread holds both."""
    pairs = tl.permute(tl.reshape(x, [ROWS, 32 // STEP, 2, STEP]), [0, 1, 3, 2])
    first, second = tl.split(pairs)
    pairs = tl.join(first + second, first - second)
    return tl.reshape(tl.permute(pairs, [0, 1, 3, 2]), [ROWS, 64])


@triton.jit
def _hadamard_64(x, ROWS: tl.constexpr):
    """Rows of 64 times H_64; a thread is taken to hold 8 columns."""
    x = _step_in_threads(x, 1, ROWS)
    x = _step_in_threads(x, 2, ROWS)
    x = _step_in_threads(x, 4, ROWS)
    x = _step_between_threads(x, 8, ROWS)
    x = _step_between_threads(x, 16, ROWS)
    return _step_between_threads(x, 32, ROWS)


@triton.jit
def hadamard_128(low, high, ROWS: tl.constexpr):
    """Rows of 128 in fp32 times 128^-1/2 · H_128, as halves [ROWS, 64], in sums and differences."""
    low, high = low + high, low - high
    factor = 0.08838834764831845
    return _hadamard_64(low, ROWS) * factor, _hadamard_64(high, ROWS) * factor


@triton.jit
def rotate_half_split_64(x, cos, sin, ROWS: tl.constexpr):
    """[ROWS, 64] fp32 with its pairs (i, i + 32) turned; cos and sin have 64 columns too."""
    partner = tl.reshape(of_partners(tl.reshape(x, [ROWS, 1, 2, 32])), [ROWS, 64])
    return x * cos + partner * tl.where(tl.arange(0, 64)[None, :] < 32, -sin, sin)


@triton.jit
def pair_of_columns():
    """i mod 32 of columns 0 … 63, as the compiler can see it: eight beside one another."""
    return tl.max_contiguous(tl.multiple_of(tl.arange(0, 64) & 31, 32), 32)
